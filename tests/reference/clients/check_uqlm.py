# /// script
# requires-python = ">=3.10"
# dependencies = ["uqlm==0.6.7", "langchain-openai==1.7.4", "openai==3.57.0", "torch==2.9.1", "pyarrow==19.0.1"]
# ///
"""UQLM's white-box scorers over LangChain's ChatOpenAI: they read the log-probabilities of the tokens."""

import asyncio
import math

from common import CITY_QUESTION, KEY, MODEL, QUESTION, URL, check, main, same, true
from langchain_openai import ChatOpenAI
from uqlm import WhiteBoxUQ

QUESTIONS = [QUESTION, CITY_QUESTION]


def llm():
    return ChatOpenAI(base_url=URL, api_key=KEY, model=MODEL, temperature=0.7, max_tokens=16, max_retries=0)


# One event loop for all: LangChain keeps its connections beyond a call.
LOOP = asyncio.new_event_loop()


def scores(names, **more):
    scorer = WhiteBoxUQ(llm=llm(), scorers=names, **more)
    frame = LOOP.run_until_complete(scorer.generate_and_score(prompts=QUESTIONS, show_progress_bars=False)).to_df()
    same("rows", len(frame), len(QUESTIONS))
    for name in names:
        for value in frame[name]:
            true(name, value is not None and math.isfinite(value) and 0 <= value <= 1, value, "a score between 0 and 1")
    return frame


@check
def scorers_of_one_answer():
    scores(["sequence_probability", "min_probability"])


@check
def scorers_of_top_logprobs():
    scores(["min_token_negentropy", "mean_token_negentropy", "probability_margin"], top_k_logprobs=5)


@check
def scorer_of_several_answers():
    scores(["monte_carlo_probability"], sampling_temperature=1.0)


@check
def scorer_that_asks_the_model_again():
    scores(["p_true"])


main("uqlm", "langchain-openai", "openai")
