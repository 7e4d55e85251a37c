# /// script
# requires-python = ">=3.10"
# dependencies = ["haystack-ai==3.4.1", "openai==3.57.0"]
# ///
"""Haystack: OpenAIChatGenerator and OpenAIResponsesChatGenerator, streaming, structured output, log-probabilities."""

import os

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, City, check, is_city, main, same, true  # noqa: E402
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator  # noqa: E402
from haystack.dataclasses import ChatMessage  # noqa: E402
from haystack.utils import Secret  # noqa: E402


def ask(question, kind=OpenAIChatGenerator, parts=None, **settings):
    generator = kind(
        model=MODEL,
        api_base_url=URL,
        api_key=Secret.from_token(KEY),
        max_retries=0,
        streaming_callback=parts.append if parts is not None else None,
        generation_kwargs={"temperature": 0} | settings,
    )
    return generator.run([ChatMessage.from_user(question)])["replies"][0]


@check
def chat_whole_and_streamed():
    whole = ask(QUESTION, max_tokens=24)
    true("text", bool(whole.text), whole, "some text")
    parts = []
    streamed = ask(QUESTION, parts=parts, max_tokens=24)
    same("streamed", ("".join(part.content for part in parts), streamed.text), (whole.text, whole.text))


@check
def structured():
    answer = ask(CITY_QUESTION, max_tokens=100, response_format=City)
    is_city("answer", City.model_validate_json(answer.text))
    same("finish_reason", answer.meta["finish_reason"], "stop")


@check
def logprobs():
    answer = ask(QUESTION, max_tokens=6, logprobs=True, top_logprobs=2)
    same("entries", len(answer.meta["logprobs"]["content"]), 6)


@check
def responses():
    whole = ask(QUESTION, OpenAIResponsesChatGenerator, max_output_tokens=24)
    same("text", whole.text, ask(QUESTION, max_tokens=24).text)
    streamed = ask(QUESTION, OpenAIResponsesChatGenerator, [], max_output_tokens=24)
    same("streamed", streamed.text, whole.text)
    is_city("structured", City.model_validate_json(ask(CITY_QUESTION, OpenAIResponsesChatGenerator, max_output_tokens=100, text_format=City).text))


main("haystack-ai", "openai")
