# /// script
# requires-python = ">=3.10"
# dependencies = ["lm_eval[api]==0.4.13", "transformers==5.17.0", "torch==2.9.1"]
# ///
"""lm-evaluation-harness: log-likelihood tasks by `local-completions`, against transformers on the same model in float32."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
import transformers
from common import ARGS, KEY, MODEL, URL, check, main, same, true

ROWS = 20
# More only spin where a server computes beside it.
torch.set_num_threads(1)
TOLERANCE = 1e-3


def evaluate(batch_size, *more, data=ARGS.data):
    """Runs the program as a user does, and returns its samples."""
    work = pathlib.Path(tempfile.mkdtemp())
    task = work / "task"
    shutil.copytree(pathlib.Path(__file__).parent / "lm_eval", task)
    text = (task / "choices.yaml").read_text()
    (task / "choices.yaml").write_text(text.replace("DATA", json.dumps(os.path.abspath(data))))
    settings = [f"base_url={URL}/completions", f"model={MODEL}", f"tokenizer={ARGS.model_dir}", "max_retries=1", *more]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", ",".join(settings)]
    command += ["--tasks", "choices", "--include_path", str(task), "--limit", str(ROWS), "--batch_size", str(batch_size)]
    command += ["--output_path", str(work / "out"), "--log_samples"]
    environment = os.environ | {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    true("lm_eval's exit status", done.returncode == 0, done.stderr[-600:], "0")
    (file,) = (work / "out").rglob("samples_choices_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    shutil.rmtree(work)
    same("rows", len(samples), ROWS)
    return samples


@functools.cache
def transformers_model():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ARGS.model_dir)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(ARGS.model_dir, dtype=torch.float32)


@functools.cache
def reference(context, continuation):
    """Log-likelihood and whether the continuation is the greedy one, by transformers."""
    tokenizer, model = transformers_model()
    # As the harness splits them: white space at the context's end belongs to the continuation.
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    begin = len(tokenizer.encode(kept, add_special_tokens=False))
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    positions = range(begin, len(whole))
    total = sum(logprobs[at - 1, whole[at]].item() for at in positions)
    return total, all(logprobs[at - 1].argmax().item() == whole[at] for at in positions)


def compare(samples):
    checked, worst, greedy = 0, 0.0, 0
    for sample in samples:
        for argument, (found, *_) in zip(sample["arguments"].values(), sample["resps"]):
            context, continuation = argument["arg_0"], argument["arg_1"]
            total, is_greedy = reference(context, continuation)
            score, said = float(found[0]), str(found[1]) == "True"
            true(f"log-likelihood of {continuation!r}", abs(score - total) < TOLERANCE, score, f"{total} of transformers")
            same(f"is_greedy of {continuation!r}", said, is_greedy)
            checked, worst, greedy = checked + 1, max(worst, abs(score - total)), greedy + is_greedy
    same("log-likelihoods", checked > ROWS, True)
    print(f"     {checked} log-likelihoods, the largest difference {worst:.2e}, {greedy} greedy")
    return greedy


def skipped():
    return None if ARGS.data and ARGS.model_dir else "no --data and --model-dir"


@check
def one_prompt_of_token_ids_a_request():
    if skipped():
        return skipped()
    compare(evaluate(1, "num_concurrent=1"))


@check
def lists_of_token_ids():
    if skipped():
        return skipped()
    compare(evaluate(4, "num_concurrent=1"))


@check
def texts_by_several_connections():
    if skipped():
        return skipped()
    compare(evaluate(1, "num_concurrent=4", "tokenized_requests=False"))


@check
def greedy_continuations():
    """Each row has a choice that is what transformers goes on with."""
    if skipped():
        return skipped()
    tokenizer, model = transformers_model()
    with open(ARGS.data) as rows, tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        left = ROWS
        for row in map(json.loads, rows):
            question = row["messages"][0]["content"].split("\n")[0]
            prompt = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt", add_special_tokens=False)
            taken = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            text = tokenizer.decode(taken, skip_special_tokens=True)
            # The harness puts a space before a choice.
            if text.startswith(" ") and text.strip():
                json.dump({"question": question, "choices": [text.removeprefix(" "), "42"], "label": 0}, file)
                file.write("\n")
                left -= 1
            if not left:
                break
        file.flush()
        greedy = compare(evaluate(1, "num_concurrent=1", data=file.name))
    true("greedy continuations", greedy > ROWS / 2, greedy, "most of the rows")


main("lm_eval", "transformers", "torch")
