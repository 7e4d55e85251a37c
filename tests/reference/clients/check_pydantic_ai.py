# /// script
# requires-python = ">=3.10"
# dependencies = ["pydantic-ai-slim[openai]==2.68.0", "openai==3.57.0"]
# ///
"""Pydantic AI: agents over chat completions and responses, streaming, native and tool output, log-probabilities."""

import asyncio

from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, same, true
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS = {"temperature": 0, "max_tokens": 100}


def agent(kind=OpenAIChatModel, name=MODEL, settings=SETTINGS, **more):
    return Agent(kind(name, provider=OpenAIProvider(base_url=URL, api_key=KEY)), model_settings=settings, retries=0, **more)


async def streamed(made, question):
    async with made.run_stream(question) as result:
        return "".join([part async for part in result.stream_text(delta=True)])


def text(kind):
    whole = agent(kind).run_sync(QUESTION)
    true("output", bool(whole.output), whole, "some text")
    same("streamed", asyncio.run(streamed(agent(kind), QUESTION)), whole.output)


def structured(kind):
    answer = agent(kind, output_type=NativeOutput(City)).run_sync(CITY_QUESTION)
    is_city("output", answer.output)
    same("finish_reason", answer.response.finish_reason, "stop")


@check
def chat_text():
    text(OpenAIChatModel)


@check
def chat_structured():
    structured(OpenAIChatModel)


@check
def chat_logprobs():
    settings = SETTINGS | {"max_tokens": 6, "openai_logprobs": True, "openai_top_logprobs": 2}
    response = agent(settings=settings).run_sync(QUESTION).response
    entries = (response.provider_details or {}).get("logprobs")
    true("logprobs", entries and len(entries) == 6, response, "an entry for each token")


@check
def chat_tools():
    if not TOOLS_MODEL:
        return "no --tools-model"
    is_city("output", agent(name=TOOLS_MODEL, output_type=ToolOutput(City)).run_sync(CITY_QUESTION).output)


@check
def responses_text():
    text(OpenAIResponsesModel)


@check
def responses_structured():
    structured(OpenAIResponsesModel)


@check
def responses_tools():
    if not TOOLS_MODEL:
        return "no --tools-model"
    is_city("output", agent(OpenAIResponsesModel, TOOLS_MODEL, output_type=ToolOutput(City)).run_sync(CITY_QUESTION).output)


main("pydantic-ai-slim", "openai")
