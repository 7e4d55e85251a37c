# /// script
# requires-python = ">=3.10"
# dependencies = ["openai-agents==0.24.0", "openai==3.57.0"]
# ///
"""openai-agents: an agent over the Responses API, its default, and over chat completions."""

import asyncio

import agents
import openai
from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, same, true

agents.set_tracing_disabled(True)
KINDS = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}


def agent(kind, name=MODEL, **more):
    settings = more.pop("settings", {})
    # One a run: a client's connections belong to an event loop.
    client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    return agents.Agent(
        name="assistant",
        instructions="Answer briefly.",
        model=KINDS[kind](model=name, openai_client=client),
        model_settings=agents.ModelSettings(temperature=0, max_tokens=100, **settings),
        **more,
    )


async def run(made, question):
    result = await agents.Runner.run(made, question, max_turns=3)
    if made.output_type:
        tokens = result.raw_responses[-1].usage.output_tokens
        true("output_tokens", tokens < 100, tokens, "fewer than the limit, as the answer is short")
    return result.final_output


async def streamed(made, question):
    result = agents.Runner.run_streamed(made, question, max_turns=3)
    text = ""
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            text += event.data.delta
    return text, result.final_output


async def text(kind):
    whole = await run(agent(kind), QUESTION)
    true("answer", bool(whole), whole, "some text")
    same("streamed", await streamed(agent(kind), QUESTION), (whole, whole))


async def structured(kind):
    is_city("answer", await run(agent(kind, output_type=City), CITY_QUESTION))
    is_city("streamed", (await streamed(agent(kind, output_type=City), CITY_QUESTION))[1])


async def tools(kind):
    asked = []

    @agents.function_tool
    def people(name: str) -> str:
        """The number of people of a city."""
        asked.append(name)
        return "2100000"

    made = agent(kind, TOOLS_MODEL, tools=[people], settings={"tool_choice": "people"})
    answer = await run(made, CITY_QUESTION)
    true("calls", len(asked) >= 1, asked, "a call")
    true("answer", bool(answer), answer, "some text")


@check
def responses_text():
    asyncio.run(text("responses"))


@check
def responses_structured():
    asyncio.run(structured("responses"))


@check
def responses_tools():
    return asyncio.run(tools("responses")) if TOOLS_MODEL else "no --tools-model"


@check
def chat_text():
    asyncio.run(text("chat"))


@check
def chat_structured():
    asyncio.run(structured("chat"))


@check
def chat_tools():
    return asyncio.run(tools("chat")) if TOOLS_MODEL else "no --tools-model"


main("openai-agents", "openai")
