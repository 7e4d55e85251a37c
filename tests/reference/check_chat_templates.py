"""Compares chat templates as they are rendered here with transformers' own text.

    cargo build --release -p monteclora-converters --example render_chat
    python3 tests/reference/check_chat_templates.py TEMPLATES... [--binary target/release/examples/render_chat]

TEMPLATES are files, or directories of `*.jinja`. Every conversation below is rendered with and without a generation prompt; text,
marked ranges and refusals must be transformers'. Prints the number that are equal and the first difference of each that is not.
Needs transformers 5 and jinja2; reads no model.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import warnings

from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

warnings.simplefilter("ignore")
logging.set_verbosity_error()

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place: <b>now</b> & \"soon\", the user's",
        "parameters": {
            "type": "object",
            "properties": {
                "zone": {"type": "string", "description": "Where, e.g. Zürich", "enum": ["north", "south"]},
                "area": {"type": ["integer", "null"], "default": None},
                "items": {"type": "array", "items": {"type": "number"}, "minItems": 1},
                "deep": {"type": "object", "properties": {"on": {"type": "boolean", "default": True}}, "required": ["on"]},
            },
            "required": ["zone"],
        },
        "return": {"type": "string"},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, identity="abc123def"):
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content, identity="abc123def", name="get_weather"):
    return {"role": "tool", "content": content, "tool_call_id": identity, "name": name}


ARGUMENTS = {"zone": "north <&> 'süd'", "area": 3, "items": [1.5, 2e-7, 1e20], "deep": {"on": True, "off": None}}

CONVERSATIONS = {
    "plain": ([user("Hello there")], {}),
    "answered": ([user("Hello"), assistant("Hi, how are you?")], {}),
    "system": ([system("Be brief."), user("Hello"), assistant("Hi")], {}),
    "turns": ([user("a"), assistant("b"), user("c"), assistant("d"), user("e")], {}),
    "system turns": ([system("S"), user("a"), assistant("b"), user("c"), assistant("d")], {}),
    "tools": ([user("The weather?")], {"tools": [WEATHER, CLOCK]}),
    "system tools": ([system("Be brief."), user("The weather?"), assistant("No.")], {"tools": [WEATHER]}),
    "call": (
        [user("The weather?"), assistant("", tool_calls=[call("get_weather", ARGUMENTS)]), tool("sun"), assistant("It is sunny.")],
        {"tools": [WEATHER, CLOCK]},
    ),
    "null call": (
        [user("The weather?"), assistant(None, tool_calls=[call("get_weather", {"zone": "north"})]), tool('{"sky": "sun"}'), assistant("Sunny.")],
        {"tools": [WEATHER]},
    ),
    "calls": (
        [
            system("S"),
            user("Both?"),
            assistant("Let me see.", tool_calls=[call("get_weather", {"zone": "n"}), call("clock", {}, "abc123deg")]),
            tool("sun"),
            tool("noon", "abc123deg", "clock"),
            assistant("Sunny at noon."),
            user("Thanks"),
        ],
        {"tools": [WEATHER, CLOCK]},
    ),
    "text arguments": (
        [user("q"), assistant("", tool_calls=[call("get_weather", '{"zone": "north"}')]), tool("r"), assistant("done")],
        {"tools": [WEATHER]},
    ),
    "bare call": (
        [user("q"), {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}, {"role": "tool", "content": "r"}],
        {"tools": [CLOCK]},
    ),
    "parts": ([user([{"type": "text", "text": "look "}, {"type": "text", "text": "here"}]), assistant([{"type": "text", "text": "fine"}])], {}),
    "image": ([user([{"type": "image"}, {"type": "text", "text": "What is it?"}]), assistant("A cat.")], {}),
    "null content": ([user("q"), assistant(None), user("r")], {}),
    "reasoning": (
        [user("q"), assistant("a", reasoning_content="because\nof"), user("r"), assistant("b", reasoning_content="so")],
        {},
    ),
    "thoughts in text": ([user("q"), assistant("<think>\nwhy\n</think>\n\na"), user("r"), assistant("<think>\nx\n</think>\n\nb")], {}),
    "thinking off": ([user("q"), assistant("a"), user("r")], {"enable_thinking": False, "thinking": False}),
    "thinking on": ([user("q"), assistant("a"), user("r")], {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    "unicode": ([system("日本語 <&>"), user("naïve 🦀 \"quoted\" 'single' \\n {{ x }}"), assistant("漢字\u2028\ttab")], {}),
    "white space": ([user("  spaced \n\n"), assistant("\n out \n"), user("")], {}),
    "roles": ([assistant("first"), user("a"), user("b"), system("late"), assistant("c")], {}),
    "names": ([user("q", name="Ann", weight=1), assistant("a", name="Bob", prefix=True, refusal=None)], {}),
    "date": ([user("q")], {"date_string": "01 Jan 2020"}),
    "documents": ([user("q")], {"documents": [{"title": "T", "text": "Body"}]}),
}


def reference(source, messages, more, opens):
    variables = {**TOKENS, **more}
    tools = variables.pop("tools", None)
    documents = variables.pop("documents", None)
    try:
        texts, marked = render_jinja_template(
            [json.loads(json.dumps(messages))],
            tools=tools,
            documents=documents,
            chat_template=source,
            add_generation_prompt=opens,
            return_assistant_tokens_mask="generation" in source,
            **variables,
        )
    except Exception as error:  # what a template does is open
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": texts[0], "generation": [list(pair) for pair in (marked[0] if marked else [])]}


def files(names):
    for name in map(pathlib.Path, names):
        yield from sorted(name.glob("*.jinja")) if name.is_dir() else [name]


def first_difference(a, b):
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    begin = max(0, at - 30)
    return f"at {at}: transformers {a[begin : at + 40]!r}, here {b[begin : at + 40]!r}"


def expressions(binary, record):
    """Python's values in expressions, one by one; those that are equal are recorded for `cargo test`."""
    failed = 0
    equal = []
    lines = (pathlib.Path(__file__).parent / "chat_template_expressions.txt").read_text().splitlines()
    asked = [line[2:].replace("\\n", "\n") if line.startswith("T ") else "{{ " + line + " }}" for line in lines if line and not line.startswith("#")]
    messages, more = CONVERSATIONS["call"]
    more = {**TOKENS, **more, "x": ARGUMENTS, "n": None, "i": 7, "f": 2.5, "t": " Some text, here ", "l": [3, 1, 2], "d": {"b": 1, "a": {"items": [1]}}, "y": True}
    variables = {**more, "messages": messages, "add_generation_prompt": True}
    answers = run(binary, [{"template": one, "variables": {"documents": None, **variables}} for one in asked])
    for one, here in zip(asked, answers):
        there = reference(one, messages, {k: v for k, v in more.items() if k not in TOKENS}, True)
        if there.get("text") == here.get("text"):
            equal.append([one, there.get("text")])
        else:
            failed += 1
            print(f"{one!r}\n    transformers {there}\n    here {here}")
    if record:
        lines = ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in equal)
        shown = json.dumps(variables, ensure_ascii=False)
        pathlib.Path(record).write_text(f'{{"variables": {shown},\n"answers": [\n{lines}\n]}}\n')
    print(f"{len(asked) - failed} of {len(asked)} expressions equal")
    return failed


def run(binary, requests):
    done = subprocess.run([binary], input="".join(json.dumps(r) + "\n" for r in requests), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*")
    parser.add_argument("--binary", default="target/release/examples/render_chat")
    parser.add_argument("--expressions", action="store_true", help="compare the expressions, too")
    parser.add_argument("--record", help="write transformers' answers to the expressions that are equal into this file")
    parser.add_argument("--quiet", action="store_true", help="no more than the totals of each template")
    args = parser.parse_args()
    failed = expressions(args.binary, args.record) if args.expressions else 0
    counts = {"equal": 0, "total": 0, "rendered equal": 0, "rendered": 0, "masks": 0}
    n_templates = 0
    for path in files(args.templates):
        n_templates += 1
        source = path.read_bytes().decode()
        cases, requests = [], []
        for name, (messages, more) in CONVERSATIONS.items():
            for opens in (False, True):
                cases.append((name, opens, reference(source, messages, more, opens)))
                variables = {**TOKENS, "documents": None, "tools": None, **more, "messages": messages, "add_generation_prompt": opens}
                requests.append({"template": source, "variables": variables})
        wrong = 0
        for (name, opens, there), here in zip(cases, run(args.binary, requests)):
            counts["total"] += 1
            counts["rendered"] += "text" in there
            counts["masks"] += bool(there.get("generation"))
            if ("error" in there and "error" in here) or there == here:
                counts["equal"] += 1
                counts["rendered equal"] += "text" in there
                continue
            wrong += 1
            if args.quiet:
                continue
            what = f"{path.name}: {name}{' + prompt' if opens else ''}"
            if "error" in there or "error" in here:
                print(f"{what}: transformers {there.get('error', 'renders')!r}, here {here.get('error', 'renders')!r}")
            elif there["text"] != here["text"]:
                print(f"{what}: {first_difference(there['text'], here['text'])}")
            else:
                print(f"{what}: marked {there['generation']}, here {here['generation']}")
        if wrong and args.quiet:
            print(f"{path.name}: {wrong} of {len(cases)} differ")
        failed += wrong
    if n_templates:
        print(
            f"{n_templates} templates: {counts['equal']} of {counts['total']} conversations equal; of {counts['rendered']} that transformers"
            f" renders {counts['rendered equal']}; {counts['masks']} with generation markers"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
