# /// script
# requires-python = ">=3.10"
# dependencies = ["dspy==3.4.1", "litellm==1.110.2", "openai==3.57.0"]
# ///
"""DSPy: LM over chat and completions, streaming, JSONAdapter's structured output, log-probabilities."""

import asyncio

import dspy
import litellm
from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, City, check, is_city, main, same, true


# DSPy sends a signature as a JSON schema to models of which LiteLLM says that they take one.
litellm.register_model({f"openai/{MODEL}": {"litellm_provider": "openai", "mode": "chat", "supports_response_schema": True}})


def lm(**more):
    return dspy.LM(f"openai/{MODEL}", **dict(api_base=URL, api_key=KEY, temperature=0, max_tokens=24, cache=False, num_retries=0) | more)


class Ask(dspy.Signature):
    """Name a city and its number of people."""

    question: str = dspy.InputField()
    city: City = dspy.OutputField()


@check
def chat():
    text = lm()(QUESTION)[0]
    true("text", bool(text), text, "some text")


@check
def completions():
    text = lm(model_type="text", max_tokens=8)("The capital of France is")[0]
    true("text", bool(text), text, "some text")


@check
def structured():
    asked = lm(max_tokens=200)
    with dspy.context(lm=asked, adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(Ask)(question=CITY_QUESTION)
    is_city("answer", answer.city)
    sent = asked.history[-1]
    true("completion_tokens", sent["usage"]["completion_tokens"] < 200, sent["usage"], "fewer than the limit")


@check
def stream():
    async def run():
        program = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[dspy.streaming.StreamListener("answer")])
        parts = []
        with dspy.context(lm=lm(max_tokens=100), adapter=dspy.JSONAdapter()):
            async for part in program(question=QUESTION):
                parts.append(part)
        return parts

    parts = asyncio.run(run())
    true("the last part", isinstance(parts[-1], dspy.Prediction) and parts[-1].answer, parts[-1:], "a Prediction")


@check
def logprobs():
    answer = lm(logprobs=True, max_tokens=6)(QUESTION)[0]
    entries = answer["logprobs"].content
    same("entries", len(entries), 6)


main("dspy", "litellm", "openai")
