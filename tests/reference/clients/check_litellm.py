# /// script
# requires-python = ">=3.10"
# dependencies = ["litellm==1.110.2", "openai==3.57.0"]
# ///
"""LiteLLM: chat, streaming, structured output, log-probabilities, completions, the Responses API."""

import json

import litellm
from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, raises, same, true

# It prints advice on every error otherwise.
litellm.suppress_debug_info = True
MESSAGES = [{"role": "user", "content": QUESTION}]
ASKED = [{"role": "user", "content": CITY_QUESTION}]
SCHEMA = City.model_json_schema() | {"additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "city", "description": "Looks up a city", "parameters": SCHEMA}}


def to(**more):
    # "openai/" is LiteLLM's name for a server of OpenAI's protocol.
    return dict(model=f"openai/{MODEL}", api_base=URL, api_key=KEY, temperature=0, max_tokens=24, num_retries=0) | more


@check
def chat_whole_and_streamed():
    whole = litellm.completion(**to(messages=MESSAGES))
    text = whole.choices[0].message.content
    true("content", bool(text), text, "some text")
    parts = list(litellm.completion(**to(messages=MESSAGES, stream=True, stream_options={"include_usage": True})))
    same("streamed", "".join(part.choices[0].delta.content or "" for part in parts if part.choices), text)
    same("usage", [part.usage.total_tokens for part in parts if getattr(part, "usage", None)], [whole.usage.total_tokens])


@check
def structured():
    answer = litellm.completion(**to(messages=ASKED, max_tokens=100, response_format=City)).choices[0]
    is_city("answer", City.model_validate_json(answer.message.content))
    same("finish_reason", answer.finish_reason, "stop")


@check
def logprobs():
    entries = litellm.completion(**to(messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=2)).choices[0].logprobs.content
    same("entries", len(entries), 6)
    true("values", all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries), entries, "two each")


@check
def tools():
    raises("tools", litellm.BadRequestError, lambda: litellm.completion(**to(messages=ASKED, tools=[TOOL])), "tools")
    if TOOLS_MODEL:
        asked = to(model=f"openai/{TOOLS_MODEL}", messages=ASKED, tools=[TOOL], tool_choice="required", max_tokens=100)
        calls = litellm.completion(**asked).choices[0].message.tool_calls
        is_city("arguments", City(**json.loads(calls[0].function.arguments)))


@check
def completions():
    asked = to(model=f"text-completion-openai/{MODEL}", prompt="The capital of France is", max_tokens=8)
    text = litellm.text_completion(**asked).choices[0].text
    true("text", bool(text), text, "some text")
    same("streamed", "".join(part.choices[0].text or "" for part in litellm.text_completion(**asked, stream=True)), text)


@check
def responses():
    asked = dict(model=f"openai/{MODEL}", api_base=URL, api_key=KEY, input=QUESTION, temperature=0, max_output_tokens=24)
    text = litellm.responses(**asked).output_text
    true("text", bool(text), text, "some text")
    parts = [event.delta for event in litellm.responses(**asked, stream=True) if event.type == "response.output_text.delta"]
    same("streamed", "".join(parts), text)


@check
def errors():
    raises("an unknown model", litellm.NotFoundError, lambda: litellm.completion(**to(model="openai/nobody", messages=MESSAGES)))


main("litellm", "openai")
