# /// script
# requires-python = ">=3.10"
# dependencies = ["instructor==1.17.0", "openai==3.3.0"]
# ///
"""instructor: modes JSON, JSON_SCHEMA and TOOLS."""

import instructor
import openai
import pydantic
from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, same, true

MESSAGES = [{"role": "user", "content": CITY_QUESTION}]
ASKED = dict(messages=MESSAGES, response_model=City, temperature=0, max_tokens=100, max_retries=1)


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)


class Anything(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")


@check
def mode_json():
    # The library asks for any object and shows the schema to the model, which is too small to keep to it.
    asked = ASKED | {"messages": [{"role": "user", "content": QUESTION}], "response_model": Anything}
    _, raw = client(instructor.Mode.JSON).chat.completions.create_with_completion(model=MODEL, **asked)
    same("finish_reason", raw.choices[0].finish_reason, "stop")


@check
def mode_json_schema():
    city, raw = client(instructor.Mode.JSON_SCHEMA).chat.completions.create_with_completion(model=MODEL, **ASKED)
    is_city("answer", city)
    same("finish_reason", raw.choices[0].finish_reason, "stop")


@check
def partial_stream():
    last = None
    for last in client(instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(model=MODEL, **ASKED):
        pass
    true("the last part", last and last.name and last.people is not None, last, "a whole City")


@check
def mode_tools():
    if not TOOLS_MODEL:
        return "no --tools-model"
    is_city("answer", client(instructor.Mode.TOOLS).chat.completions.create(model=TOOLS_MODEL, **ASKED))


main("instructor", "openai")
