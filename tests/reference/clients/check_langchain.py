# /// script
# requires-python = ">=3.10"
# dependencies = ["langchain-openai==1.7.4", "langchain-core==1.8.3", "openai==3.57.0"]
# ///
"""LangChain: ChatOpenAI and OpenAI, structured output, log-probabilities, tools, the Responses API."""

import asyncio

import openai
from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, raises, same, true
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

MESSAGES = [SystemMessage("Answer briefly."), HumanMessage(QUESTION)]


def llm(**more):
    return ChatOpenAI(**dict(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=24, max_retries=0) | more)


@tool
def people(name: str) -> int:
    """The number of people of a city."""
    return len(name)


@check
def invoke_and_stream_and_batch():
    whole = llm().invoke(MESSAGES)
    true("content", bool(whole.content), whole, "some text")
    true("finish_reason", whole.response_metadata["finish_reason"] in ("stop", "length"), whole.response_metadata, "stop or length")
    usage = whole.usage_metadata
    same("total_tokens", usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])
    total = None
    for chunk in llm(stream_usage=True).stream(MESSAGES):
        total = chunk if total is None else total + chunk
    same("stream", total.content, whole.content)
    same("stream's usage", total.usage_metadata["total_tokens"], usage["total_tokens"])
    same("batch", [answer.content for answer in llm().batch([MESSAGES, MESSAGES])], [whole.content] * 2)
    same("ainvoke", asyncio.run(llm().ainvoke(MESSAGES)).content, whole.content)


def structured(method):
    bound = llm(max_tokens=100).with_structured_output(City if method == "json_schema" else None, method=method, include_raw=True)
    found = bound.invoke(CITY_QUESTION)
    same("parsing_error", found["parsing_error"], None)
    same("finish_reason", found["raw"].response_metadata["finish_reason"], "stop")
    return found["parsed"]


@check
def structured_output_json_schema():
    is_city("parsed", structured("json_schema"))
    plain = llm(max_tokens=100).with_structured_output(City, method="json_schema")
    is_city("without include_raw", plain.invoke(CITY_QUESTION))
    is_city("streamed", list(plain.stream(CITY_QUESTION))[-1])


@check
def structured_output_json_mode():
    found = structured("json_mode")
    true("parsed", isinstance(found, dict), found, "an object")


@check
def logprobs():
    answer = llm(logprobs=True, top_logprobs=2, max_tokens=8).invoke(MESSAGES)
    entries = answer.response_metadata["logprobs"]["content"]
    same("entries", len(entries), answer.usage_metadata["output_tokens"])
    true("values", all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries), entries, "two each")
    same("tokens", "".join(entry["token"] for entry in entries), answer.content)


@check
def tools_without_a_template_for_them():
    raises("tools", openai.BadRequestError, lambda: llm().bind_tools([people]).invoke(CITY_QUESTION), "tools")


@check
def tools_called():
    if not TOOLS_MODEL:
        return "no --tools-model"
    caller = llm(model=TOOLS_MODEL, max_tokens=60)
    answer = caller.bind_tools([people], tool_choice="people").invoke([HumanMessage(CITY_QUESTION)])
    same("calls", [call["name"] for call in answer.tool_calls], ["people"])
    true("arguments", isinstance(answer.tool_calls[0]["args"]["name"], str), answer.tool_calls, "a name")
    follow = [HumanMessage(CITY_QUESTION), answer, ToolMessage("2100000", tool_call_id=answer.tool_calls[0]["id"])]
    again = caller.bind_tools([people], tool_choice="none").invoke(follow)
    true("the answer to a result", bool(again.content), again, "a text")


@check
def completions():
    asked = OpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=8, max_retries=0)
    text = asked.invoke("The capital of France is")
    true("invoke", bool(text), text, "some text")
    same("stream", "".join(asked.stream("The capital of France is")), text)
    # LangChain sends a batch as one request with a list of prompts.
    same("batch", asked.batch(["The capital of France is"] * 2), [text] * 2)


@check
def responses():
    answer = llm(use_responses_api=True).invoke(MESSAGES)
    same("text", answer.text, llm().invoke(MESSAGES).content)
    bound = llm(use_responses_api=True, max_tokens=100).with_structured_output(City, method="json_schema", include_raw=True)
    found = bound.invoke(CITY_QUESTION)
    is_city("structured", found["parsed"])
    same("status", found["raw"].response_metadata["status"], "completed")


main("langchain-openai", "openai")
