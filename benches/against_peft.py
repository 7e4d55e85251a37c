#!/usr/bin/env python3
"""This project's training against PEFT's, alternately in one run, with the ratios.

    cargo build --release
    python3 -m venv peft && peft/bin/pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0
    benches/against_peft.py step MODEL_DIR --python peft/bin/python [--rounds 2] [--default-buffer] [--bf16]
    benches/against_peft.py sst2 MODEL_DIR TRAIN.jsonl VALID.jsonl --python peft/bin/python

Each measurement is a process of its own; with --rounds N every contender runs N times, in turns, and the best run of each
counts, since a disturbance can only slow one down. `step`: random tokens, batch 4 x 128, rank 16 on the seven projections.
`sst2`: completion-only rows {"prompt", "completion", "choices"}, equal rows, batch, steps, schedule and clipping; accuracy
and NLL of VALID's choices beside the speed. Give it the machine to itself. The result is a table and, with --json, an object.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent


def run(command):
    """The JSON object that a command prints last."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def step_contenders(args):
    size = ["--batch", args.batch, "--seq", args.seq, "--steps", args.steps]
    ours = lambda method, *more: [args.monteclora, "bench", "train", "-m", args.model, "--method", method, *size, *more, "--json"]
    peft = lambda method, *more: [args.python, HERE / "peft_side.py", "step", args.model, "--method", method, *size, *more]
    contenders = {
        "monteclora": ours("monteclora"),
        "our LoRA": ours("lora"),
        "PEFT LoRA": peft("lora"),
        "PEFT MonteCLoRA, buffer 10": peft("monteclora", "--buffer-size", 10),
    }
    if args.default_buffer:
        contenders["PEFT MonteCLoRA, buffer 150"] = peft("monteclora", "--buffer-size", 150)
    if args.bf16:
        contenders["monteclora, bf16"] = ours("monteclora", "--bf16")
        contenders["PEFT LoRA, bf16"] = peft("lora", "--dtype", "bf16")
        contenders["PEFT MonteCLoRA, bf16, buffer 10"] = peft("monteclora", "--dtype", "bf16", "--buffer-size", 10)
    return contenders


def sst2_ours(args, method, bf16=False):
    """Trains and scores with this project's command line."""
    with tempfile.TemporaryDirectory() as scratch:
        config = pathlib.Path(scratch, "run.toml")
        text = lambda value: json.dumps(str(value))
        config.write_text(
            f"seed = 0\n[model]\nmodel_id = {text(args.model)}\n"
            f"[data]\ntrain = {text(args.train)}\napply_chat_template = false\ntrain_on = \"completion\"\npacking = false\n"
            f"[lora]\nmethod = \"{method}\"\nr = 16\nlora_alpha = 32\n"
            f"[train]\noutput_dir = {text(pathlib.Path(scratch, 'out'))}\nmax_steps = {args.steps}\n"
            f"per_device_train_batch_size = {args.batch}\nlearning_rate = 5e-4\nwarmup_ratio = {min(1.0, 10 / args.steps)}\n"
            f"logging_steps = {args.steps}\nsave_steps = {args.steps + 1}\nbf16 = {json.dumps(bf16)}\n"
        )
        trained = run([args.monteclora, "train", "-c", config, "--json"])
        metrics = [json.loads(line) for line in pathlib.Path(scratch, "out/metrics.jsonl").read_text().splitlines()]
        peak = max(line["peak_memory_bytes"] for line in metrics if line["type"] == "train") / 1024 / 1e6
        scores = run([args.monteclora, "eval", "-m", args.model, "-a", pathlib.Path(scratch, "out"), "--data", args.valid,
                      "--no-chat-template", "--json"])["mean"]
    seconds = trained["seconds"]
    return {"train_s": seconds, "examples_per_second": args.steps * args.batch / seconds, "peak_gb": peak,
            "accuracy": scores["accuracy"], "nll": scores["nll"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "sst2"])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("train", nargs="?", type=pathlib.Path)
    parser.add_argument("valid", nargs="?", type=pathlib.Path)
    parser.add_argument("--python", default=sys.executable, help="a Python that has PEFT")
    parser.add_argument("--monteclora", default="target/release/monteclora", type=pathlib.Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender by its name in the table; several times for several")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--default-buffer", action="store_true", help="PEFT's default noise buffer of 150 too: 15 GB, a minute of set-up")
    parser.add_argument("--bf16", action="store_true", help="both in bfloat16 too (sst2: ours only)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    is_step = args.what == "step"
    if not is_step and not (args.train and args.valid):
        parser.error("sst2 needs TRAIN.jsonl and VALID.jsonl")
    args.batch = args.batch or (4 if is_step else 16)
    args.steps = args.steps or (6 if is_step else 120)
    args.rounds = args.rounds or (2 if is_step else 1)
    if is_step:
        contenders = {name: (lambda command=command: run(command)) for name, command in step_contenders(args).items()}
        speed, reference = "tokens_per_second", "monteclora"
    else:
        peft = lambda method: run([args.python, HERE / "peft_side.py", "sst2", args.model, args.train, args.valid,
                                   "--method", method, "--batch", args.batch, "--steps", args.steps])
        contenders = {
            "monteclora": lambda: sst2_ours(args, "monteclora"),
            "our LoRA": lambda: sst2_ours(args, "lora"),
            "PEFT LoRA": lambda: peft("lora"),
            "PEFT MonteCLoRA, buffer 10": lambda: peft("monteclora"),
        }
        if args.bf16:
            contenders["monteclora, bf16"] = lambda: sst2_ours(args, "monteclora", bf16=True)
        speed, reference = "examples_per_second", "monteclora"
    if args.only:
        unknown = [name for name in args.only if name not in contenders]
        if unknown or reference not in args.only:
            parser.error(f"--only takes {reference} and others of: {', '.join(contenders)}")
        contenders = {name: contenders[name] for name in contenders if name in args.only}
    best = {}
    for turn in range(args.rounds):
        for name, measure in contenders.items():
            found = measure()
            print(f"round {turn + 1}: {name}: {found[speed]:.2f} {speed.replace('_', ' ')}", file=sys.stderr, flush=True)
            if name not in best or found[speed] > best[name][speed]:
                best[name] = found
    ours = best[reference][speed]
    if args.json:
        print(json.dumps({"best": best, "ratios": {name: ours / found[speed] for name, found in best.items()}}))
        return
    extra = [] if is_step else ["accuracy", "nll"]
    head = f"{'':<34} {speed.replace('_', ' '):>20} {'peak GB':>8} {'monteclora / this':>18}"
    print(head + "".join(f"{name:>10}" for name in extra))
    for name, found in best.items():
        row = f"{name:<34} {found[speed]:>20.2f} {found['peak_gb']:>8.2f} {ours / found[speed]:>18.2f}"
        print(row + "".join(f"{found[key]:>10.3f}" for key in extra))


main()
