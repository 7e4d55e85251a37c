# /// script
# requires-python = ">=3.10"
# dependencies = ["smolagents[openai]==1.26.0", "openai==3.57.0"]
# ///
"""smolagents: OpenAIModel whole, streamed, with a JSON schema, and its tool calls."""

from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, same, true
from smolagents import ChatMessage, FinalAnswerTool, MessageRole, OpenAIModel

MESSAGES = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": QUESTION}])]
ASKED = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": CITY_QUESTION}])]


def model(name=MODEL, **more):
    return OpenAIModel(model_id=name, api_base=URL, api_key=KEY, client_kwargs={"max_retries": 0}, temperature=0, **more)


@check
def chat_whole_and_streamed():
    whole = model(max_tokens=24).generate(MESSAGES)
    true("content", bool(whole.content), whole, "some text")
    parts = model(max_tokens=24).generate_stream(MESSAGES)
    same("streamed", "".join(part.content or "" for part in parts), whole.content)


@check
def structured():
    schema = {"name": "City", "strict": True, "schema": City.model_json_schema() | {"additionalProperties": False}}
    answer = model(max_tokens=100).generate(ASKED, response_format={"type": "json_schema", "json_schema": schema})
    is_city("answer", City.model_validate_json(answer.content))
    same("finish_reason", answer.raw.choices[0].finish_reason, "stop")


@check
def logprobs():
    answer = model(max_tokens=6, logprobs=True, top_logprobs=2).generate(MESSAGES)
    same("entries", len(answer.raw.choices[0].logprobs.content), 6)


@check
def tools():
    if not TOOLS_MODEL:
        return "no --tools-model"
    answer = model(TOOLS_MODEL, max_tokens=100).generate(MESSAGES, tools_to_call_from=[FinalAnswerTool()])
    same("calls", [call.function.name for call in answer.tool_calls], ["final_answer"])


main("smolagents", "openai")
