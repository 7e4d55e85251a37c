#!/usr/bin/env python3
"""Holds `monteclora serve` against the unmodified `openai` package: chat, completions, streaming, structured output, tools,
several clients at once, time-outs, models, errors.

    python3 -m venv venv && venv/bin/pip install openai
    monteclora serve -m BASE --adapter triage=ADAPTER --port 1234
    venv/bin/python tests/reference/check_openai_client.py http://127.0.0.1:1234/v1 BASE_NAME triage [KEY]

Prints one line a check and ends with status 1 if any of them fails. Not needed by the project's own tests.
"""

import asyncio
import json
import sys

import openai
import pydantic


class Place(pydantic.BaseModel):
    city: str


class Weather(pydantic.BaseModel):
    """A schema that refers to another."""

    place: Place


def main() -> int:
    url, base, adapter = sys.argv[1:4]
    client = openai.OpenAI(base_url=url, api_key=sys.argv[4] if len(sys.argv) > 4 else "none", max_retries=0)
    failures = 0

    def check(name, holds, found=""):
        nonlocal failures
        failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {name} {found}")

    models = {model.id: model for model in client.models.list()}
    check("models.list", {base, adapter} <= models.keys(), sorted(models))
    check("parent of the adapter", models[adapter].parent == base, models[adapter].parent)
    check("models.retrieve", client.models.retrieve(adapter).id == adapter)

    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Where is Paris?"}]
    texts = {}
    for model in (base, adapter):
        whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
        choice = whole.choices[0]
        texts[model] = choice.message.content
        check(f"chat {model}", bool(choice.message.content) and whole.model == model, repr(choice.message.content))
        check(f"finish reason {model}", choice.finish_reason in ("stop", "length"), choice.finish_reason)
        usage = whole.usage
        check(f"usage {model}", usage.total_tokens == usage.prompt_tokens + usage.completion_tokens <= 24 + usage.prompt_tokens, usage.total_tokens)

        stream = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
        text, reasons, totals = "", [], []
        for chunk in stream:
            if chunk.usage:
                totals.append(chunk.usage.total_tokens)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
        check(f"stream {model} says the same", text == texts[model], repr(text))
        check(f"stream {model} ends once", len(reasons) == 1 and totals == [usage.total_tokens], (reasons, totals))
    check("the adapter changes the answer", texts[base] != texts[adapter])

    stopped = client.chat.completions.create(model=base, messages=messages, temperature=0, max_tokens=24, stop=[" "])
    check("stop", " " not in stopped.choices[0].message.content and stopped.choices[0].finish_reason == "stop")
    several = client.chat.completions.create(model=base, messages=messages, n=2, temperature=1, max_tokens=4)
    check("n=2", len(several.choices) == 2)
    stream = client.chat.completions.create(model=base, messages=messages, n=2, temperature=1, seed=1, max_tokens=8, stream=True)
    texts_of, ends = ["", ""], [0, 0]
    for chunk in stream:
        for choice in chunk.choices:
            texts_of[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason is not None
    check("stream n=2", ends == [1, 1] and texts_of[0] != texts_of[1], texts_of)
    again = client.chat.completions.create(model=base, messages=messages, n=2, temperature=1, seed=1, max_tokens=8)
    check("a seed repeats", [choice.message.content for choice in again.choices] == texts_of)
    extra = client.chat.completions.create(
        model=base, messages=messages, temperature=0, max_tokens=24, store=True, metadata={"k": "v"}, user="u", parallel_tool_calls=True
    )
    check("fields without effect", extra.choices[0].message.content == texts[base] and extra.system_fingerprint is not None)

    asked = [{"role": "user", "content": "Name a city in France and its number of people, as JSON."}]
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 9999999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    for name, form in [
        ("json_object", {"type": "json_object"}),
        ("json_schema", {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}),
    ]:
        answer = client.chat.completions.create(model=base, messages=asked, temperature=0, max_tokens=200, response_format=form).choices[0]
        try:
            value = json.loads(answer.message.content)
        except ValueError:
            value = None
        # A small model may ramble within JSON until the limit, which then cuts it.
        check(name, isinstance(value, dict) or answer.finish_reason == "length", repr(answer.message.content)[:120])
        if name == "json_schema" and value is not None:
            check("json_schema keys", set(value) == {"city", "people"}, sorted(value))

    tool = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": schema}}
    try:
        choice = client.chat.completions.create(model=base, messages=asked, tools=[tool], temperature=0, max_tokens=64).choices[0]
        calls = choice.message.tool_calls or []
        check("tools", bool(choice.message.content) or all(json.loads(call.function.arguments) for call in calls), choice.finish_reason)
        forced = {"type": "function", "function": {"name": "weather"}}
        choice = client.chat.completions.create(
            model=base, messages=asked, tools=[tool], tool_choice=forced, temperature=0, max_tokens=128
        ).choices[0]
        calls = choice.message.tool_calls or []
        check("a forced tool", bool(calls) and set(json.loads(calls[0].function.arguments)) == {"city", "people"}, choice.finish_reason)
        # The client adds up the chunks of a stream by itself.
        parts = dict(model=base, messages=asked, temperature=0, max_tokens=256)
        with client.chat.completions.stream(
            **parts, tools=[openai.pydantic_function_tool(Weather)], tool_choice="required"
        ) as stream:
            choice = stream.get_final_completion().choices[0]
        message = choice.message
        parsed = message.tool_calls[0].function.parsed_arguments if message.tool_calls else None
        check("a required tool, streamed", message.role == "assistant" and isinstance(parsed, Weather), parsed)
    except openai.BadRequestError as error:
        check("tools, which the template does not take", True, str(error)[:120])

    async def at_once(n):
        async with openai.AsyncOpenAI(base_url=url, api_key=client.api_key, max_retries=0) as together:
            calls = [
                together.chat.completions.create(model=[base, adapter][idx % 2], messages=messages, temperature=0, max_tokens=24)
                for idx in range(n)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    found = asyncio.run(at_once(8))
    check("8 at once say what each says alone", found == [texts[base], texts[adapter]] * 4)
    hasty = client.with_options(timeout=0.05)
    try:
        hasty.chat.completions.create(model=base, messages=messages, max_tokens=200)
        check("a time-out of the client's", False, "no time-out")
    except openai.APITimeoutError:
        check("a time-out of the client's", True)

    whole = client.completions.create(model=adapter, prompt="The capital of France is", temperature=0, max_tokens=8)
    check("completions", bool(whole.choices[0].text) and whole.usage.completion_tokens <= 8, repr(whole.choices[0].text))
    parts = client.completions.create(model=adapter, prompt="The capital of France is", temperature=0, max_tokens=8, stream=True)
    text = "".join(choice.text for chunk in parts for choice in chunk.choices)
    check("completions stream says the same", text == whole.choices[0].text, repr(text))
    # Leaving a stream early must not disturb the next request.
    left = client.chat.completions.create(model=base, messages=messages, max_tokens=200, stream=True)
    next(iter(left))
    left.close()
    check("after leaving early", bool(client.chat.completions.create(model=base, messages=messages, max_tokens=2).choices))

    def raises(name, kind, call):
        try:
            call()
        except kind as error:
            check(name, True, f"{error.status_code} {error.code}")
        except openai.OpenAIError as error:
            check(name, False, repr(error))
        else:
            check(name, False, "no error")

    chat = client.chat.completions.create
    raises("unknown model", openai.NotFoundError, lambda: chat(model="nobody", messages=messages))
    raises("no messages", openai.BadRequestError, lambda: chat(model=base, messages=[]))
    raises("temperature below 0", openai.BadRequestError, lambda: chat(model=base, messages=messages, temperature=-1))
    raises("max_tokens of 0", openai.BadRequestError, lambda: chat(model=base, messages=messages, max_tokens=0))
    raises("too long", openai.BadRequestError, lambda: chat(model=base, messages=[{"role": "user", "content": "word " * 20000}]))
    raises("unknown field", openai.BadRequestError, lambda: chat(model=base, messages=messages, extra_body={"max_token": 3}))
    raises("log-probabilities", openai.BadRequestError, lambda: chat(model=base, messages=messages, logprobs=True))
    picture = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    raises("a picture", openai.BadRequestError, lambda: chat(model=base, messages=[{"role": "user", "content": picture}]))
    raises("a retired model", openai.NotFoundError, lambda: client.models.retrieve("nobody"))
    raises("embeddings", openai.NotFoundError, lambda: client.embeddings.create(model=base, input="x"))
    if len(sys.argv) > 4:
        stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
        raises("wrong key", openai.AuthenticationError, lambda: stranger.models.list())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
