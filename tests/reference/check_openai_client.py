#!/usr/bin/env python3
"""Holds `monteclora serve` against the unmodified `openai` package: chat, completions, streaming, models, errors.

    python3 -m venv venv && venv/bin/pip install openai
    monteclora serve -m BASE --adapter triage=ADAPTER --port 1234
    venv/bin/python tests/reference/check_openai_client.py http://127.0.0.1:1234/v1 BASE_NAME triage [KEY]

Prints one line a check and ends with status 1 if any of them fails. Not needed by the project's own tests.
"""

import sys

import openai


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
    raises("embeddings", openai.NotFoundError, lambda: client.embeddings.create(model=base, input="x"))
    if len(sys.argv) > 4:
        stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
        raises("wrong key", openai.AuthenticationError, lambda: stranger.models.list())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
