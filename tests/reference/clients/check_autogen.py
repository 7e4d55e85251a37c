# /// script
# requires-python = ">=3.10"
# dependencies = ["autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5", "openai==3.57.0"]
# ///
"""AutoGen: OpenAIChatCompletionClient whole, streamed, structured, with log-probabilities, and an agent of AgentChat."""

import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelFamily, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, City, check, is_city, main, same, true

INFO = dict(vision=False, function_calling=True, json_output=True, structured_output=True, family=ModelFamily.UNKNOWN)


def client(**more):
    return OpenAIChatCompletionClient(model=MODEL, base_url=URL, api_key=KEY, model_info=INFO, max_retries=0, temperature=0, **more)


def messages(text):
    return [UserMessage(content=text, source="user")]


@check
def chat_whole_and_streamed():
    async def run():
        whole = await client(max_tokens=24).create(messages(QUESTION))
        parts = [part async for part in client(max_tokens=24).create_stream(messages(QUESTION))]
        return whole, parts

    whole, parts = asyncio.run(run())
    true("content", bool(whole.content), whole, "some text")
    same("streamed", ("".join(parts[:-1]), parts[-1].content), (whole.content, whole.content))


@check
def structured():
    answer = asyncio.run(client(max_tokens=100).create(messages(CITY_QUESTION), json_output=City))
    is_city("answer", City.model_validate_json(answer.content))
    same("finish_reason", answer.finish_reason, "stop")


@check
def logprobs():
    answer = asyncio.run(client(max_tokens=6, logprobs=True, top_logprobs=2).create(messages(QUESTION)))
    true("logprobs", answer.logprobs and len(answer.logprobs) == 6, answer.logprobs, "an entry for each token")


@check
def agent():
    made = AssistantAgent("assistant", client(max_tokens=100), output_content_type=City)
    result = asyncio.run(made.run(task=CITY_QUESTION))
    is_city("answer", result.messages[-1].content)


main("autogen-agentchat", "autogen-ext", "openai")
