# /// script
# requires-python = ">=3.10"
# dependencies = ["openai==3.57.0"]
# ///
"""The `openai` package: chat, completions, responses, structured output, log-probabilities, tools, errors."""

import gzip
import json
import math
import urllib.request

import openai
from common import CITY_QUESTION, KEY, MODEL, QUESTION, TOOLS_MODEL, URL, City, check, is_city, main, raises, same, true

CLIENT = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
MESSAGES = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTION}]
ASKED = [{"role": "user", "content": CITY_QUESTION}]
PROMPT = "The capital of France is"
SCHEMA = City.model_json_schema() | {"additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "city", "description": "Looks up a city", "parameters": SCHEMA}}
chat, completions, responses = CLIENT.chat.completions, CLIENT.completions, CLIENT.responses


def greedy(**more):
    return dict(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=24) | more


@check
def models():
    names = [model.id for model in CLIENT.models.list()]
    true("models.list", MODEL in names, names, f"{MODEL!r} among them")
    same("models.retrieve", CLIENT.models.retrieve(MODEL).id, MODEL)


@check
def chat_whole_and_streamed():
    whole = chat.create(**greedy())
    text, usage = whole.choices[0].message.content, whole.usage
    true("content", bool(text), text, "some text")
    true("finish_reason", whole.choices[0].finish_reason in ("stop", "length"), whole.choices[0].finish_reason, "stop or length")
    same("total_tokens", usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    streamed, reasons, totals = "", [], []
    for chunk in chat.create(**greedy(stream=True, stream_options={"include_usage": True})):
        totals += [chunk.usage.total_tokens] if chunk.usage else []
        for choice in chunk.choices:
            streamed += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    same("the stream's text", streamed, text)
    same("the stream's finish reasons", reasons, [whole.choices[0].finish_reason])
    same("the stream's usage", totals, [usage.total_tokens])


@check
def chat_parse():
    answer = chat.parse(**greedy(messages=ASKED, max_tokens=100, response_format=City)).choices[0]
    is_city("parsed", answer.message.parsed)
    same("finish_reason", answer.finish_reason, "stop")


@check
def chat_parse_streamed():
    with chat.stream(**greedy(messages=ASKED, max_tokens=100, response_format=City)) as stream:
        answer = stream.get_final_completion().choices[0]
    is_city("parsed", answer.message.parsed)
    same("finish_reason", answer.finish_reason, "stop")


@check
def json_mode_ends():
    answer = chat.create(**greedy(messages=ASKED, max_tokens=200, response_format={"type": "json_object"})).choices[0]
    same("finish_reason", answer.finish_reason, "stop")
    true("content", isinstance(json.loads(answer.message.content), dict), answer.message.content, "an object")


@check
def n_and_stop_and_seed():
    drawn = greedy(temperature=1, n=3, seed=7, max_tokens=8)
    texts = [choice.message.content for choice in chat.create(**drawn).choices]
    same("choices", len(texts), 3)
    true("choices", len(set(texts)) > 1, texts, "texts that differ")
    same("the same seed again", [choice.message.content for choice in chat.create(**drawn).choices], texts)
    stopped = chat.create(**greedy(stop=[" "])).choices[0]
    same("finish_reason at a stop", stopped.finish_reason, "stop")
    true("the text before a stop", " " not in stopped.message.content, stopped.message.content, "no space")


def holds_logprobs(what, entries, tops):
    true(what, bool(entries), entries, "an entry for each token")
    for entry in entries:
        true(what, entry.logprob <= 0 and math.isfinite(entry.logprob), entry, "a finite log-probability")
        same(f"{what}: number of top_logprobs", len(entry.top_logprobs), tops)
        best = [top.logprob for top in entry.top_logprobs]
        same(f"{what}: order of top_logprobs", best, sorted(best, reverse=True))
        if tops:
            # The requests are greedy: the most likely token is the one that was taken.
            same(f"{what}: the most likely token", entry.top_logprobs[0].token, entry.token)
            true(f"{what}: its logprob", abs(best[0] - entry.logprob) < 1e-6, entry, "equal to the first of top_logprobs")
            true(f"{what}: sum of probabilities", sum(map(math.exp, best)) <= 1 + 1e-5, best, "at most 1")


@check
def chat_logprobs():
    whole = chat.create(**greedy(logprobs=True, top_logprobs=5, max_tokens=8))
    entries = whole.choices[0].logprobs.content
    # The token that ends a message is counted and not listed, as by OpenAI.
    ended = whole.choices[0].finish_reason == "stop"
    same("number of entries", len(entries), whole.usage.completion_tokens - ended)
    holds_logprobs("whole", entries, 5)
    same("bytes and text", b"".join(bytes(entry.bytes) for entry in entries).decode(), whole.choices[0].message.content)
    streamed = []
    for chunk in chat.create(**greedy(logprobs=True, top_logprobs=5, max_tokens=8, stream=True)):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    same("streamed", [(e.token, e.logprob) for e in streamed], [(e.token, e.logprob) for e in entries])
    holds_logprobs("without top_logprobs", chat.create(**greedy(logprobs=True, max_tokens=4)).choices[0].logprobs.content, 0)


@check
def logprobs_are_those_before_temperature():
    def first(**more):
        return chat.create(**greedy(logprobs=True, top_logprobs=3, max_tokens=1, **more)).choices[0].logprobs.content[0].top_logprobs

    plain, hot = first(), first(temperature=2.0, top_p=0.1, extra_body={"top_k": 1})
    same("tokens", [top.token for top in hot], [top.token for top in plain])
    for one, other in zip(plain, hot):
        true("log-probabilities", abs(one.logprob - other.logprob) < 1e-4, (plain, hot), "the same with and without a temperature")


@check
def completions_whole_and_streamed():
    asked = dict(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8)
    text = completions.create(**asked).choices[0].text
    true("text", bool(text), text, "some text")
    same("streamed", "".join(choice.text for chunk in completions.create(**asked, stream=True) for choice in chunk.choices), text)


@check
def completions_logprobs():
    whole = completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=3)
    found, text = whole.choices[0].logprobs, whole.choices[0].text
    same("tokens", "".join(found.tokens), text)
    same("lengths", {len(found.tokens), len(found.token_logprobs), len(found.top_logprobs), len(found.text_offset)}, {whole.usage.completion_tokens})
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs):
        same("the most likely token", max(top, key=top.get), token)
        true("its log-probability", abs(max(top.values()) - logprob) < 1e-6, (logprob, top), "that of top_logprobs")
    same("text_offset", found.text_offset, [len("".join(found.tokens[:at])) for at in range(len(found.tokens))])


@check
def completions_echo():
    echoed = completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=1, echo=True)
    alone = completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=1)
    found, answer = echoed.choices[0].logprobs, alone.choices[0].logprobs
    same("text", echoed.choices[0].text, PROMPT + alone.choices[0].text)
    same("tokens", "".join(found.tokens), echoed.choices[0].text)
    same("the first token's logprob", found.token_logprobs[0], None)
    true("the prompt's logprobs", all(value <= 0 for value in found.token_logprobs[1:]), found.token_logprobs, "numbers")
    same("the answer's tokens", found.tokens[-len(answer.tokens) :], answer.tokens)
    for one, other in zip(found.token_logprobs[-len(answer.tokens) :], answer.token_logprobs):
        true("the answer's logprobs", abs(one - other) < 1e-3, (one, other), "the same with and without echo")


@check
def completions_echo_of_the_prompt_alone():
    scored = completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=0, logprobs=2, echo=True)
    found = scored.choices[0].logprobs
    same("text", scored.choices[0].text, PROMPT)
    same("completion_tokens", scored.usage.completion_tokens, 0)
    same("tokens", len(found.tokens), scored.usage.prompt_tokens)
    same("top_logprobs of the first", found.top_logprobs[0], None)


@check
def completions_of_several_prompts():
    other = "Two and two make"
    asked = dict(model=MODEL, temperature=0, max_tokens=4)
    each = [completions.create(**asked, prompt=prompt).choices[0].text for prompt in (PROMPT, other)]
    both = completions.create(**asked, prompt=[PROMPT, other])
    same("index", [choice.index for choice in both.choices], [0, 1])
    same("a list of texts", [choice.text for choice in both.choices], each)
    same("completion_tokens of both", both.usage.completion_tokens, 8)
    scored = completions.create(**asked | {"max_tokens": 1}, prompt=[PROMPT, other], logprobs=1)
    same("entries of each", [len(choice.logprobs.tokens) for choice in scored.choices], [1, 1])
    # Token ids that any vocabulary of this size has.
    ids = [[504, 3575, 282], [504, 3575]]
    lone = [completions.create(**asked, prompt=prompt).choices[0].text for prompt in ids]
    same("lists of token ids", [choice.text for choice in completions.create(**asked, prompt=ids).choices], lone)
    counted = completions.create(**asked, prompt=ids[0]).usage.prompt_tokens
    same("prompt_tokens of token ids", counted, 3)


@check
def tools_without_a_template_for_them():
    raises("tools", openai.BadRequestError, lambda: chat.create(**greedy(messages=ASKED, tools=[TOOL])), "tools", "template")


@check
def tools_called():
    if not TOOLS_MODEL:
        return "no --tools-model"
    forced = {"type": "function", "function": {"name": "city"}}
    asked = greedy(model=TOOLS_MODEL, messages=ASKED, tools=[TOOL], max_tokens=100)
    answer = chat.create(**asked, tool_choice=forced).choices[0]
    true("tool_calls", bool(answer.message.tool_calls), answer, "a call")
    call = answer.message.tool_calls[0]
    City.model_validate_json(call.function.arguments)
    follow = ASKED + [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "2100000"}]
    again = chat.create(**greedy(model=TOOLS_MODEL, messages=follow, tools=[TOOL], max_tokens=8, tool_choice="none")).choices[0]
    true("the answer to a result", bool(again.message.content), again, "a text")
    with chat.stream(**asked | {"tools": [openai.pydantic_function_tool(City)]}, tool_choice="required") as stream:
        message = stream.get_final_completion().choices[0].message
    true("a streamed call", bool(message.tool_calls), message, "a call")
    is_city("a streamed call's arguments", message.tool_calls[0].function.parsed_arguments)


@check
def responses_whole():
    answer = responses.create(model=MODEL, instructions="Answer briefly.", input=QUESTION, temperature=0, max_output_tokens=24)
    same("output_text", answer.output_text, chat.create(**greedy()).choices[0].message.content)
    true("status", answer.status in ("completed", "incomplete"), answer.status, "completed or incomplete")
    same("total_tokens", answer.usage.total_tokens, answer.usage.input_tokens + answer.usage.output_tokens)
    short = responses.create(model=MODEL, input=MESSAGES, temperature=0, max_output_tokens=1)
    same("status of a short answer", (short.status, short.incomplete_details.reason), ("incomplete", "max_output_tokens"))


@check
def responses_streamed():
    # The library's helper takes a whole answer only, not an incomplete one.
    asked = dict(model=MODEL, instructions="Answer briefly.", input=QUESTION, temperature=0, max_output_tokens=100)
    kinds, text, numbers = [], "", []
    for event in responses.create(**asked, stream=True):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        text += event.delta if event.type == "response.output_text.delta" else ""
    same("the first event", kinds[0], "response.created")
    same("the last event", kinds[-1], "response.completed")
    same("sequence_number", numbers, list(range(len(numbers))))
    for kind in ("response.output_item.added", "response.content_part.added", "response.output_text.done", "response.output_item.done"):
        same(f"events {kind}", kinds.count(kind), 1)
    with responses.stream(**asked) as stream:
        final = stream.get_final_response()
    same("text", (text, final.output_text), (responses.create(**asked).output_text,) * 2)


@check
def responses_structured():
    asked = dict(model=MODEL, input=CITY_QUESTION, temperature=0, max_output_tokens=100)
    answer = responses.parse(**asked, text_format=City)
    is_city("output_parsed", answer.output_parsed)
    same("status", answer.status, "completed")
    with responses.stream(**asked, text_format=City) as stream:
        is_city("streamed", stream.get_final_response().output_parsed)


@check
def responses_tools():
    flat = {"type": "function", "name": "city", "description": "Looks up a city", "parameters": SCHEMA, "strict": True}
    asked = dict(input=CITY_QUESTION, temperature=0, max_output_tokens=100, tools=[flat])
    raises("tools", openai.BadRequestError, lambda: responses.create(model=MODEL, **asked), "tools", "template")
    if not TOOLS_MODEL:
        return None
    answer = responses.create(model=TOOLS_MODEL, **asked, tool_choice={"type": "function", "name": "city"})
    calls = [item for item in answer.output if item.type == "function_call"]
    same("number of calls", len(calls), 1)
    City.model_validate_json(calls[0].arguments)
    follow = [{"role": "user", "content": CITY_QUESTION}, *answer.output]
    follow.append({"type": "function_call_output", "call_id": calls[0].call_id, "output": "2100000"})
    again = responses.create(model=TOOLS_MODEL, input=follow, temperature=0, max_output_tokens=8, tools=[flat], tool_choice="none")
    true("the answer to a result", bool(again.output_text), again.output, "a text")


@check
def responses_that_need_what_is_stored():
    for key, more in [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("background", {"background": True}),
        ("tools", {"tools": [{"type": "web_search"}]}),
    ]:
        error = raises(key, openai.BadRequestError, lambda: responses.create(model=MODEL, input="x", **more), key)
        true(f"{key}: param", (error.param or "").startswith(key), error.param, key)


@check
def gzip_body():
    body = gzip.compress(json.dumps(greedy(max_tokens=4)).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip", "authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(f"{URL}/chat/completions", body, headers), timeout=120) as answer:
        text = json.load(answer)["choices"][0]["message"]["content"]
    same("text", text, chat.create(**greedy(max_tokens=4)).choices[0].message.content)


@check
def errors():
    raises("an unknown model", openai.NotFoundError, lambda: chat.create(**greedy(model="nobody")), "nobody")
    raises("no messages", openai.BadRequestError, lambda: chat.create(**greedy(messages=[])), "messages")
    raises("a temperature below 0", openai.BadRequestError, lambda: chat.create(**greedy(temperature=-1)), "temperature")
    raises("an unknown key", openai.BadRequestError, lambda: chat.create(**greedy(extra_body={"max_token": 3})), "max_token")
    nested = [{"role": "user", "content": "x", "colour": "red"}]
    raises("an unknown nested key", openai.BadRequestError, lambda: chat.create(**greedy(messages=nested)), "colour")
    unfit = TOOL | {"function": TOOL["function"] | {"parameters": "none"}}
    raises("a wrong type", openai.BadRequestError, lambda: chat.create(**greedy(tools=[unfit])), "tools[0].function.parameters")
    raises("embeddings", openai.NotFoundError, lambda: CLIENT.embeddings.create(model=MODEL, input="x"), "/v1/chat/completions")
    lost = openai.OpenAI(base_url=URL.removesuffix("/v1"), api_key=KEY, max_retries=0)
    raises("a missing /v1", openai.NotFoundError, lambda: lost.chat.completions.create(**greedy()), "/v1/chat/completions")


@check
def wrong_key():
    if KEY == "none":
        return "no --key"
    stranger = openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0)
    raises("a wrong key", openai.AuthenticationError, lambda: stranger.models.list())


@check
def vllm_keys():
    def asked(**more):
        return chat.create(**greedy(messages=ASKED, max_tokens=40), extra_body=more).choices[0]

    for more in ({"structured_outputs": {"choice": ["Paris", "Lyon"]}}, {"guided_choice": ["Paris", "Lyon"]}):
        answer = asked(**more)
        true(str(more), answer.message.content in ("Paris", "Lyon"), answer.message.content, "one of the choices")
        same(f"{more}: finish_reason", answer.finish_reason, "stop")
    for more in ({"structured_outputs": {"regex": "[0-9]{3}"}}, {"guided_regex": "[0-9]{3}"}):
        answer = asked(**more)
        true(str(more), len(answer.message.content) == 3 and answer.message.content.isdigit(), answer.message.content, "three digits")
    for more in ({"structured_outputs": {"json": SCHEMA}}, {"guided_json": SCHEMA}):
        is_city(str(more), City.model_validate_json(asked(**more).message.content))
    long = chat.create(**greedy(max_tokens=40), extra_body={"min_tokens": 40})
    same("min_tokens", long.usage.completion_tokens, 40)
    long = chat.create(**greedy(max_tokens=40), extra_body={"ignore_eos": True})
    same("ignore_eos", (long.usage.completion_tokens, long.choices[0].finish_reason), (40, "length"))


@check
def continued_message():
    begun = MESSAGES + [{"role": "assistant", "content": "Paris is in the"}]
    answer = chat.create(**greedy(messages=begun, max_tokens=8), extra_body={"continue_final_message": True, "add_generation_prompt": False})
    prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in begun).removesuffix("<|im_end|>\n")
    plain = completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8).choices[0].text
    same("continue_final_message", answer.choices[0].message.content, plain)


main("openai")
