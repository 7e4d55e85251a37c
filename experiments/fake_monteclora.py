"""Stands in for the program in test_run.py: the same commands and files, numbers out of a seeded generator."""

import argparse
import json
import math
import os
import random
import struct
import sys
import time
import tomllib
from pathlib import Path


def note(arguments):
    """Writes down what was called, and takes its time where the test asks for it."""
    with open(os.environ["FAKE_CALLS"], "a", encoding="utf-8") as calls:
        calls.write(" ".join(arguments) + "\n")


def linger(command):
    """Waits to be stopped if the test asks for it."""
    if os.environ.get("FAKE_SLOW") == command:
        time.sleep(60)


def write_tensors(path, posterior):
    """A safetensors file of two modules."""
    tensors = {}
    for layer in range(2):
        module = f"base_model.model.layers.{layer}.q_proj"
        tensors[f"{module}.lora_A.weight"] = ([2, 3], [0.1] * 6)
        if posterior:
            tensors[f"{module}.lora_monteclora_sampler.std_prior"] = ([2], [-0.01, -0.02])
    header, body = {}, b""
    for name, (shape, values) in tensors.items():
        part = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def train(chosen):
    """Writes an adapter; a rate of 1e-2 diverges."""
    config = tomllib.loads(chosen.config.read_text())
    output = Path(config["train"]["output_dir"])
    resumed = (output / "checkpoint-60").exists()
    if output.exists() and any(output.iterdir()) and not (chosen.resume and resumed):
        return 2
    (output / "checkpoint-60").mkdir(parents=True, exist_ok=True)
    linger("train")
    if config["train"]["learning_rate"] == 1e-2:
        return 5
    rows = len(Path(config["data"]["train"]).read_text().splitlines())
    posterior = config["lora"]["method"] == "monteclora"
    config["lora"]["monteclora"] = {"temperature": 1.0, **config["lora"].get("monteclora", {})} if posterior else None
    record = {
        "config": config,
        "base": {"fingerprint": "0123", "model_id": config["model"]["model_id"]},
        "train": {"examples": rows, "trained_tokens": 2 * rows},
        "total_steps": 240,
    }
    (output / "run.json").write_text(json.dumps(record))
    (output / "metrics.jsonl").write_text(json.dumps({"type": "train", "step": 240, "task_loss": 0.1}) + "\n")
    write_tensors(output / "adapter_model.safetensors", posterior)
    (output / "adapter_config.json").write_text("{}")
    print(json.dumps({"output_dir": str(output), "steps": 240}))
    return 0


def fit(chosen):
    """Writes an adapter with a posterior."""
    linger("fit")
    chosen.output.mkdir()
    (chosen.output / "adapter_config.json").write_text("{}")
    nll = 0.5 if chosen.geometry == "svd" else 0.51
    print(json.dumps({"geometry": chosen.geometry, "criterion": "nll", "sigma": 0.07, "evaluations": [], "before": {"nll": 0.55}, "after": {"nll": nll}}))
    return 0


def calibrate(chosen):
    """Writes calibration.json beside the adapter."""
    (chosen.adapter[0] / "calibration.json").write_text("{}")
    print(json.dumps({"temperature": 2.5, "rows": 20, "before": {"nll": 0.9}, "after": {"nll": 0.5}}))
    return 0


def prediction(odds, answer):
    """One predictor's values of a row."""
    p = 1 / (1 + math.exp(-odds))
    probabilities = [1 - p, p]
    return {
        "probabilities": probabilities,
        "nll": -math.log(probabilities[answer]),
        "confidence": max(probabilities),
        "correct": (p > 0.5) == (answer == 1),
    }


def average(draws, answer):
    """The average of draws, with its entropies."""
    members = [prediction(odds, answer)["probabilities"] for odds in draws]
    p = sum(member[1] for member in members) / len(members)
    whole = prediction(math.log(p / (1 - p)), answer)
    entropy = sum(-q * math.log(q) for q in whole["probabilities"])
    expected = sum(-q * math.log(q) for member in members for q in member) / len(members)
    return {
        **whole,
        "draws": [[math.log(q) for q in member] for member in members],
        "predictive_entropy": entropy,
        "expected_entropy": expected,
        "mutual_information": max(0.0, entropy - expected),
    }


def evaluate(chosen):
    """Scores every row."""
    generator = random.Random(f"{[path.parts[-2:] for path in chosen.adapter]} {chosen.data.name} {chosen.seed}")
    rows, lines = [json.loads(line) for line in chosen.data.read_text().splitlines()], []
    for number, row in enumerate(rows, 1):
        answer = row["choices"].index(row["completion"])
        odds = generator.gauss(2.5 * answer - 1.25, 2.5)
        line = {"line": number, "answer": answer}
        if not chosen.no_base:
            line["base"] = prediction(0.1, answer)
        if len(chosen.adapter) == 1:
            line["mean"] = prediction(odds, answer)
        if chosen.posterior_samples:
            line["posterior"] = average([odds + generator.gauss(0, 1) for _ in range(chosen.posterior_samples)], answer)
        if len(chosen.adapter) > 1:
            line["ensemble"] = average([odds + generator.gauss(0, 1) for _ in chosen.adapter], answer)
        lines.append(line)
    chosen.per_row.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"rows": len(rows)}
    for kind in ("base", "mean", "posterior", "ensemble"):
        if kind in lines[0]:
            parts = [line[kind] for line in lines]
            nll = sum(p["nll"] for p in parts) / len(parts)
            scores[kind] = {"accuracy": sum(p["correct"] for p in parts) / len(parts), "nll": nll, "loss": nll, "draw_loss": 1.1 * nll}
    print(json.dumps(scores))
    return 0


def main():
    """The command line."""
    if sys.argv[1:] == ["--version"]:
        print("monteclora 0.0.0")
        return 0
    note(sys.argv[1:])
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("-c", dest="config", type=Path, required=True)
    training.add_argument("--resume")
    training.add_argument("--json", action="store_true")
    for name in ("fit", "calibrate", "eval"):
        command = commands.add_parser(name)
        command.add_argument("-m", dest="base", type=Path, required=True)
        command.add_argument("-a", dest="adapter", type=Path, action="append", required=True)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--seed", type=int, required=True)
        command.add_argument("--no-chat-template", action="store_true")
        command.add_argument("--json", action="store_true")
        if name == "fit":
            command.add_argument("-o", dest="output", type=Path, required=True)
            command.add_argument("--geometry", choices=("rows", "svd"), required=True)
            command.add_argument("--criterion", choices=("nll",), required=True)
            command.add_argument("--draws", type=int, required=True)
            command.add_argument("--rows", type=int, required=True)
        else:
            command.add_argument("--posterior-samples", type=int)
        if name == "eval":
            command.add_argument("--per-row", type=Path, required=True)
            command.add_argument("--no-base", action="store_true")
    chosen = parser.parse_args()
    return {"train": train, "fit": fit, "calibrate": calibrate, "eval": evaluate}[chosen.command](chosen)


if __name__ == "__main__":
    sys.exit(main())
