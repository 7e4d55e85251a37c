# /// script
# requires-python = ">=3.10"
# dependencies = ["outlines[openai]==1.3.3", "openai==3.57.0"]
# ///
"""Outlines: from_openai and from_vllm (a server with vLLM's keys), with schemas, choices and regular expressions."""

from typing import Literal

import openai
import outlines
from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, City, check, is_city, main, same, true

CLIENT = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
ASKED = dict(temperature=0, max_tokens=100)


@check
def text_whole_and_streamed():
    model = outlines.from_openai(CLIENT, MODEL)
    text = model(QUESTION, temperature=0, max_tokens=24)
    true("text", bool(text), text, "some text")
    same("streamed", "".join(model.stream(QUESTION, temperature=0, max_tokens=24)), text)


@check
def json_schema():
    is_city("answer", City.model_validate_json(outlines.from_openai(CLIENT, MODEL)(CITY_QUESTION, City, **ASKED)))


@check
def json_schema_as_vllm():
    is_city("answer", City.model_validate_json(outlines.from_vllm(CLIENT, MODEL)(CITY_QUESTION, City, **ASKED)))


@check
def choice_as_vllm():
    answer = outlines.from_vllm(CLIENT, MODEL)(QUESTION, Literal["France", "Spain"], **ASKED)
    true("answer", answer in ("France", "Spain"), answer, "one of the choices")


@check
def regex_as_vllm():
    answer = outlines.from_vllm(CLIENT, MODEL)(CITY_QUESTION, outlines.regex("[0-9]{4}"), **ASKED)
    true("answer", len(answer) == 4 and answer.isdigit(), answer, "four digits")


main("outlines", "openai")
