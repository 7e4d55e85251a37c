#!/usr/bin/env python3
"""Tokens and loss masks of `data preview --json` are those of transformers' chat templates, prefix by prefix.

    pip install transformers==5.17.0
    cargo build --release
    python tests/reference/check_chat_template.py target/release/monteclora MODEL_DIR ROWS.jsonl [TEMPLATE.jinja]

ROWS holds {"messages": [...]} lines. Without TEMPLATE the model's own is used; two beside this script imitate Llama-3's and one
that drops the thoughts of earlier turns. Where an earlier rendering is no prefix of the whole, each assistant turn is an
example of its own. Exits with 1 on any difference.
"""
import json
import subprocess
import sys

from transformers import AutoTokenizer

binary, model, rows = sys.argv[1:4]
template = sys.argv[4] if len(sys.argv) > 4 else None
tokenizer = AutoTokenizer.from_pretrained(model)
command = [binary, "data", "preview", "-m", model, rows, "-n", "40", "--json"]
if template:
    tokenizer.chat_template = open(template).read()
    command += ["--chat-template", template]
report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["rows"]
conversations = [json.loads(line)["messages"] for line in open(rows)]


def expected(messages, part):
    """Token ids and mask: the last assistant turn ends the text, and what an assistant says up to its end token is trained."""
    render = lambda n, prompt: tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = render(turns[-1] + 1, False)
    if not all(whole.startswith(render(i + 1, False)) for i in turns):
        turns = [turns[part]]
        whole = render(turns[0] + 1, False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = encoded["input_ids"], [False] * len(encoded["input_ids"])
    for turn in turns:
        begin, end = len(render(turn, True)), len(render(turn + 1, False))
        inside = [k for k, (s, e) in enumerate(encoded["offset_mapping"]) if begin <= s < e <= end]
        last = max(k for k in inside if ids[k] in tokenizer.all_special_ids)
        for k in inside:
            mask[k] = k <= last
    return ids, mask


different = 0
for row in report:
    if "problem" in row:
        print(f"line {row['line']}: {row['problem']}")
        different += 1
    elif (row["input_ids"], row["loss_mask"]) != expected(conversations[row["line"] - 1], row["part"]):
        print(f"line {row['line']}, part {row['part']}: different")
        different += 1
print(f"{len(report)} examples compared, {different} different")
sys.exit(different > 0)
