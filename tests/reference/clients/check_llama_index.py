# /// script
# requires-python = ">=3.10"
# dependencies = ["llama-index-llms-openai-like==0.8.1", "openai==2.54.0"]
# ///
"""LlamaIndex: OpenAILike's chat, completion, streaming, structured output, log-probabilities."""

from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, same, true
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike


def llm(**more):
    asked = dict(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, temperature=0, max_tokens=24, max_retries=0)
    return OpenAILike(**asked | more)


MESSAGES = [ChatMessage(role="system", content="Answer briefly."), ChatMessage(role="user", content=QUESTION)]


@check
def chat_whole_and_streamed():
    text = llm().chat(MESSAGES).message.content
    true("content", bool(text), text, "some text")
    same("streamed", list(llm().stream_chat(MESSAGES))[-1].message.content, text)
    true("complete", bool(llm().complete(QUESTION).text), "", "some text")


@check
def completion():
    asked = llm(is_chat_model=False, max_tokens=8)
    text = asked.complete("The capital of France is").text
    true("text", bool(text), text, "some text")
    same("streamed", list(asked.stream_complete("The capital of France is"))[-1].text, text)


@check
def structured():
    asked = llm(max_tokens=100, should_use_structured_outputs=True)
    is_city("answer", asked.structured_predict(City, PromptTemplate(CITY_QUESTION)))


@check
def structured_by_response_format():
    schema = {"name": "City", "strict": True, "schema": City.model_json_schema() | {"additionalProperties": False}}
    answer = llm(max_tokens=100).chat([ChatMessage(role="user", content=CITY_QUESTION)], response_format={"type": "json_schema", "json_schema": schema})
    is_city("answer", City.model_validate_json(answer.message.content))
    same("finish_reason", answer.raw.choices[0].finish_reason, "stop")


@check
def logprobs():
    answer = llm(max_tokens=6, logprobs=True, top_logprobs=2).chat(MESSAGES)
    true("logprobs", answer.logprobs and len(answer.logprobs) == 6, answer.logprobs, "an entry for each token")
    true("values", all(entry.logprob <= 0 for entry in answer.logprobs[0]), answer.logprobs, "numbers")


@check
def tools():
    if not TOOLS_MODEL:
        return "no --tools-model"
    asked = llm(model=TOOLS_MODEL, max_tokens=100, is_function_calling_model=True)
    is_city("a forced call", asked.structured_predict(City, PromptTemplate(CITY_QUESTION)))


main("llama-index-llms-openai-like", "llama-index-core", "openai")
