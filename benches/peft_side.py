#!/usr/bin/env python3
"""PEFT's side of `against_peft.py`: one measurement in a process of its own, one JSON object on stdout.

    python peft_side.py step MODEL_DIR [--method lora|monteclora] [--batch 4] [--seq 128] [--steps 6] [--dtype f32|bf16] [--buffer-size 10]
                                       [--device cpu|cuda] [--random-weights]
    python peft_side.py sst2 MODEL_DIR TRAIN.jsonl VALID.jsonl [--method lora|monteclora] [--steps 120] [--batch 16]

`step` trains on random tokens with every position labelled, with `--random-weights` on a model of which config.json is enough.
On a GPU (never run there) a step ends when the GPU has done its work. `sst2` trains on the completions of prompt/completion rows with
padded batches, and scores the rows of VALID by the probabilities of their `choices`.
"""
import argparse
import json
import random
import resource
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(args, monteclora):
    """The base with rank 16, alpha 32 on the seven projections, and its trainable parameters."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if args.random_weights:
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    extra = {}
    if args.method == "monteclora":
        # Not every release of PEFT has it.
        from peft import MontecloraConfig

        extra = {"monteclora_config": MontecloraConfig(buffer_size=args.buffer_size, **monteclora)}
    model = get_peft_model(base.to(args.device), LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, **extra)).to(args.device)
    return model.train(), [p for p in model.parameters() if p.requires_grad]


def objective(args, model, **inputs):
    loss = model(**inputs).loss
    if args.method == "monteclora":
        loss = loss + model.base_model._get_monteclora_loss()
    return loss


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def device_memory_bytes(args):
    """In use on the GPU, by any program."""
    if args.device != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def step(args):
    began = time.time()
    model, parameters = adapted(args, {"num_samples": 8, "use_entropy": True})
    setup = time.time() - began
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.seq)).to(args.device)
    seconds = []
    for _ in range(args.steps):
        began = time.time()
        objective(args, model, input_ids=tokens, labels=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(args)
        seconds.append(time.time() - began)
    rate = args.batch * args.seq / statistics.median(seconds[1:])
    return {"setup_s": setup, "step_s": seconds, "tokens_per_second": rate, "peak_gb": peak_gb(), "device": args.device,
            "device_memory_bytes": device_memory_bytes(args)}


def sst2(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line) for line in open(args.train)]
    # The paper's settings, which are this project's defaults.
    model, parameters = adapted(args, {"num_samples": 4, "use_entropy": True, "sample_scaler": 5e-3, "dirichlet_prior": 1.0})
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    warmup = 10

    def batch(chosen):
        pairs = [(tokenizer(r["prompt"])["input_ids"], tokenizer(r["completion"])["input_ids"] + [tokenizer.eos_token_id]) for r in chosen]
        length = max(len(p) + len(c) for p, c in pairs)
        ids = torch.full((len(pairs), length), tokenizer.eos_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(pairs):
            end = len(prompt) + len(completion)
            ids[i, :end] = torch.tensor(prompt + completion)
            labels[i, len(prompt):end] = torch.tensor(completion)
            mask[i, :end] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    began = time.time()
    for s in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (s + 1) / warmup) * (1 - s / args.steps)
        inputs = batch([rows[order[(s * args.batch + i) % len(rows)]] for i in range(args.batch)])
        objective(args, model, **inputs).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.time() - began
    peak = peak_gb()

    model.eval()
    hits, nll, valid = 0, 0.0, [json.loads(line) for line in open(args.valid)]
    with torch.no_grad():
        for row in valid:
            prompt = tokenizer(row["prompt"])["input_ids"]
            # Both choices of SST-2 are one token, so one forward pass scores them.
            firsts = [tokenizer(choice)["input_ids"][0] for choice in row["choices"]]
            scores = model(input_ids=torch.tensor([prompt])).logits[0, -1, firsts].float().log_softmax(0)
            answer = row["choices"].index(row["completion"])
            hits += int(scores.argmax().item() == answer)
            nll -= scores[answer].item()
    return {"train_s": seconds, "examples_per_second": args.steps * args.batch / seconds, "peak_gb": peak,
            "accuracy": hits / len(valid), "nll": nll / len(valid)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "sst2"])
    parser.add_argument("model")
    parser.add_argument("train", nargs="?")
    parser.add_argument("valid", nargs="?")
    parser.add_argument("--method", choices=["lora", "monteclora"], default="lora")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--buffer-size", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of `step`")
    parser.add_argument("--random-weights", action="store_true", help="of `step`")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    is_step = args.what == "step"
    if not is_step and (args.random_weights or args.device != "cpu"):
        parser.error("--device and --random-weights are for step")
    args.batch = args.batch or (4 if is_step else 16)
    args.steps = args.steps or (6 if is_step else 120)
    print(json.dumps({"method": args.method, **(step(args) if is_step else sst2(args))}))


main()
