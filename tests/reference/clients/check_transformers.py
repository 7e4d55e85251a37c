# /// script
# requires-python = ">=3.10"
# dependencies = ["openai==3.57.0", "transformers==5.17.0", "torch==2.9.1"]
# ///
"""Log-probabilities of the server against transformers on the same model in float32: chat, completions, prompts."""

import functools

import openai
import torch
import transformers
from common import ARGS, KEY, MODEL, QUESTION, URL, check, main, same, true

CLIENT = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = "The capital of France is Paris. The capital of Spain is Madrid. L'élève mange"
TOLERANCE = 1e-3
# More only spin where a server computes beside it.
torch.set_num_threads(1)
# Settings that change what is drawn and must not change what is told of the model.
SETTINGS = {
    "greedy": {"temperature": 0},
    "hot and filtered": {"temperature": 1.7, "top_p": 0.5, "seed": 3, "extra_body": {"top_k": 5, "min_p": 0.1}},
    "biased": {"temperature": 0, "logit_bias": {"504": 100}},
    "penalised": {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5, "extra_body": {"repetition_penalty": 1.3}},
    "held to a form": {"temperature": 0, "extra_body": {"structured_outputs": {"regex": "[0-9]{8}"}}},
}


@functools.cache
def model():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ARGS.model_dir)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(ARGS.model_dir, dtype=torch.float32)


def logprobs(tokens):
    """A row of log-probabilities for the token after each one."""
    with torch.no_grad():
        return model()[1](torch.tensor([tokens])).logits[0].log_softmax(-1)


def near(what, got, expected):
    true(what, abs(got - expected) < TOLERANCE, got, f"{expected} of transformers")


def holds_chat(name, settings):
    tokenizer, _ = model()
    asked = dict(model=MODEL, messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=4)
    entries = CLIENT.chat.completions.create(**asked | settings).choices[0].logprobs.content
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    taken = [tokenizer.convert_tokens_to_ids(as_stored(tokenizer, entry.token)) for entry in entries]
    rows = logprobs(prompt + taken)
    for at, entry in enumerate(entries):
        row = rows[len(prompt) - 1 + at]
        near(f"{name}: token {at}, {entry.token!r}", entry.logprob, row[taken[at]].item())
        best = row.topk(len(entry.top_logprobs)).values.tolist()
        for place, (top, value) in enumerate(zip(entry.top_logprobs, best, strict=True)):
            near(f"{name}: token {at}, place {place}", top.logprob, value)


def as_stored(tokenizer, text):
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.convert_ids_to_tokens(token)


def skipped():
    return None if ARGS.model_dir else "no --model-dir"


def add(name, settings):
    def run():
        return skipped() or holds_chat(name, settings)

    run.__name__ = f"chat_{name}"
    check(run)


for each in SETTINGS.items():
    add(*each)


@check
def prompts():
    if skipped():
        return skipped()
    tokenizer, _ = model()
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    rows = logprobs(ids)
    for prompt in (PROMPT, ids):
        for n in (0, 2):
            answer = CLIENT.completions.create(model=MODEL, prompt=prompt, max_tokens=n, temperature=0, logprobs=3, echo=True).choices[0]
            found = answer.logprobs
            same("tokens", len(found.tokens), len(ids) + n)
            same("the first", (found.token_logprobs[0], found.top_logprobs[0]), (None, None))
            for at in range(1, len(ids)):
                near(f"prompt token {at}", found.token_logprobs[at], rows[at - 1, ids[at]].item())
                near(f"the best at {at}", max(found.top_logprobs[at].values()), rows[at - 1].max().item())
            same("text_offset", found.text_offset[: len(ids)], [len(tokenizer.decode(ids[:at])) for at in range(len(ids))])


main("openai", "transformers", "torch")
