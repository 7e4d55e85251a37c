# /// script
# requires-python = ">=3.10"
# dependencies = ["semantic-kernel==1.45.0", "openai==3.57.0"]
# ///
"""Semantic Kernel: OpenAIChatCompletion whole, streamed and structured, OpenAITextCompletion."""

import asyncio

import openai
from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, City, check, is_city, main, same, true
from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
    OpenAITextCompletion,
    OpenAITextPromptExecutionSettings,
)
from semantic_kernel.contents import ChatHistory


def service(kind=OpenAIChatCompletion):
    return kind(ai_model_id=MODEL, async_client=openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0))


def history(text):
    made = ChatHistory(system_message="Answer briefly.")
    made.add_user_message(text)
    return made


@check
def chat_whole_and_streamed():
    settings = OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=24)

    async def run():
        asked = service()
        whole = await asked.get_chat_message_content(history(QUESTION), settings)
        parts = [part async for part in asked.get_streaming_chat_message_content(history(QUESTION), settings)]
        return whole.content, "".join(part.content for part in parts if part)

    whole, streamed = asyncio.run(run())
    true("content", bool(whole), whole, "some text")
    same("streamed", streamed, whole)


@check
def structured():
    settings = OpenAIChatPromptExecutionSettings(temperature=0, max_tokens=100, response_format=City)
    answer = asyncio.run(service().get_chat_message_content(history(CITY_QUESTION), settings))
    is_city("answer", City.model_validate_json(answer.content))
    same("finish_reason", answer.finish_reason.value, "stop")


@check
def completion():
    settings = OpenAITextPromptExecutionSettings(temperature=0, max_tokens=8)
    answer = asyncio.run(service(OpenAITextCompletion).get_text_content("The capital of France is", settings))
    true("text", bool(answer.text), answer, "some text")


@check
def completion_logprobs():
    settings = OpenAITextPromptExecutionSettings(temperature=0, max_tokens=6, logprobs=2)
    answer = asyncio.run(service(OpenAITextCompletion).get_text_content("The capital of France is", settings))
    same("entries", len(answer.metadata["logprobs"].token_logprobs), 6)


main("semantic-kernel", "openai")
