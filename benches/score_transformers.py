"""Scores the choices of a JSONL file with transformers on CPU, for comparison of speed and values.

Usage: score_transformers.py MODEL DATA [--rows N] [--batch 16]; needs torch and transformers; MODEL is a Hugging Face
directory. Rows are {prompt, completion, choices}; prompt and choice are bare text, tokenised apart and joined, without special
tokens. Where all choices have one token, one pass over the prompt scores them, with the head at its last position only; else
prompt and choice are run for every choice. Prints one line of JSON; loading and tokenising are not in the time.
"""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def items_of(row, encode):
    """What is run for a row: (tokens, positions of the head, choices scored at each, or the token of each)."""
    prompt, choices = encode(row["prompt"]), [encode(choice) for choice in row["choices"]]
    assert prompt and all(choices), "an empty prompt or choice"
    if all(len(choice) == 1 for choice in choices):
        last = [len(prompt) - 1] * len(choices)
        return [(prompt, last, [c[0] for c in choices], list(range(len(choices))))]
    start = len(prompt) - 1
    return [
        (prompt + choice[:-1], list(range(start, start + len(choice))), choice, [idx] * len(choice))
        for idx, choice in enumerate(choices)
    ]


@torch.inference_mode()
def run(model, items):
    """The log-likelihood of every target of every item; right-padded."""
    width = max(len(item[0]) for item in items)
    ids = torch.zeros((len(items), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for idx, (tokens, *_) in enumerate(items):
        ids[idx, : len(tokens)] = torch.tensor(tokens)
        mask[idx, : len(tokens)] = 1
    # The head runs once at each position, of which one may have several targets.
    places = {}
    of_target, targets = [], []
    for idx, (_, positions, wanted, _) in enumerate(items):
        for position, token in zip(positions, wanted):
            of_target.append(places.setdefault((idx, position), len(places)))
            targets.append(token)
    rows, columns = torch.tensor(list(places)).T
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    log_p = torch.log_softmax(model.lm_head(hidden[rows, columns]).float(), dim=-1)
    return log_p[torch.tensor(of_target), torch.tensor(targets)].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scores", help="a file for the log-likelihoods of every row, as JSON lines")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for key in ("final_logit_softcapping", "logits_scaling"):
        assert getattr(model.config, key, None) is None, f"{key}: the head is more than a product"
    with open(args.data) as file:
        rows = [json.loads(line) for line in file if line.strip()][: args.rows]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    items = [(row_idx, item) for row_idx, row in enumerate(rows) for item in items_of(row, encode)]
    items.sort(key=lambda item: -len(item[1][0]))
    batches = [items[start : start + args.batch] for start in range(0, len(items), args.batch)]
    run(model, [item for _, item in batches[0]])
    scores = [[0.0] * len(row["choices"]) for row in rows]
    begin = time.perf_counter()
    for batch in batches:
        found = iter(run(model, [item for _, item in batch]))
        for row_idx, (_, _, _, choices) in batch:
            for choice in choices:
                scores[row_idx][choice] += next(found)
    seconds = time.perf_counter() - begin
    right, nll = 0, 0.0
    for row, of_choices in zip(rows, scores):
        answer = row["choices"].index(row["completion"])
        log_p = torch.log_softmax(torch.tensor(of_choices, dtype=torch.float64), dim=0)
        right += int(log_p.argmax().item() == answer)
        nll -= log_p[answer].item()
    if args.scores:
        with open(args.scores, "w") as file:
            file.writelines(json.dumps(of_choices) + "\n" for of_choices in scores)
    n = len(rows)
    print(json.dumps({"rows": n, "seconds": seconds, "rows_per_second": n / seconds, "accuracy": right / n, "nll": nll / n}))


main()
