#!/usr/bin/env python3
"""PEFT loads what this project writes, without a warning, and computes the same logits.

    pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0
    cargo build --release
    python tests/reference/check_peft.py target/release/monteclora [FIXTURES]

For every recorded adapter that is not to be refused, PEFT reads what `collapse` and `convert --to peft` write, also after
a trip through the mlx-lm and GGUF forms, and its logits are compared with the recorded ones; so are the logits of what
`merge` writes, read by transformers alone. What is written as MonteCLoRA must carry the source's posterior. Then a tiny training run is made, and PEFT's logits on its output are compared with this project's decoder
by `parity --reference`. Exits with 1 on any warning or difference.
"""
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

binary = sys.argv[1]
fixtures = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "data" / "fixtures")


def load(model_dir, adapter_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(model, adapter_dir).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def run(*arguments):
    result = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: {result.stderr}")
    return result.stdout


failed = False
with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    for case in sorted((fixtures / "adapters").iterdir()):
        if case.name.startswith("must-refuse"):
            continue
        model = fixtures / "models" / json.loads((case / "case.json").read_text())["model"]
        expected = load_file(case / "expected.safetensors")
        limit = 0.05 if "bf16" in case.name else 1e-4
        at = {name: scratch / f"{case.name}-{name}" for name in ("lora", "peft", "mlx", "from-mlx", "gguf", "from-gguf", "merged")}
        run("collapse", case, "-o", at["lora"])
        run("convert", case, "--to", "peft", "-o", at["peft"])
        run("convert", case, "--to", "mlx", "-o", at["mlx"])
        run("convert", at["mlx"], "--to", "lora", "-o", at["from-mlx"])
        run("convert", case, "--to", "gguf", "-m", model, "-o", at["gguf"])
        run("convert", at["gguf"], "--to", "lora", "-m", model, "-o", at["from-gguf"])
        run("merge", "-m", model, "-a", case, "--dtype", "f32", "-o", at["merged"])
        for name in ("lora", "peft", "from-mlx", "from-gguf", "merged"):
            if name == "merged":
                loaded = AutoModelForCausalLM.from_pretrained(at[name], dtype=torch.float32).eval()
            else:
                loaded = load(model, at[name])
            difference = (logits(loaded, expected["input_ids"]) - expected["logits"].float()).abs().max().item()
            failed |= not difference <= limit
            print(f"{case.name}: {name}, largest logit difference {difference:.2e} (limit {limit})")
        source, written = (load_file(path / "adapter_model.safetensors") for path in (case, at["peft"]))
        # The other two tensors of the sampler are its last random draw.
        kept = [name for name in source if not name.endswith((".gaussian_var_prior", ".expert_weights"))]
        same = source.keys() == written.keys() and all(torch.equal(source[name], written[name]) for name in kept)
        failed |= not same
        print(f"{case.name}: peft, tensors {'kept' if same else 'DIFFER'}")

    model = fixtures / "models" / "tiny-llama"
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"count {i}", "completion": f"{i} {i + 1}"}) + "\n" for i in range(12)))
    config = scratch / "run.toml"
    config.write_text(
        f'[model]\nmodel_id = "{model}"\n[data]\ntrain = "{rows}"\npacking = false\n'
        f'[train]\noutput_dir = "{scratch / "out"}"\nmax_steps = 8\nlearning_rate = 1e-2\n'
    )
    run("train", "-c", config)
    peft = load(model, scratch / "out")
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), peft.disable_adapter():
        base = peft(input_ids=ids).logits
    reference = scratch / "reference.safetensors"
    save_file({"input_ids": ids, "logits": logits(peft, ids), "base_logits": base.contiguous()}, reference)
    report = json.loads(run("parity", "-m", model, "-a", scratch / "out", "--reference", reference, "--engine", "ours", "--json"))
    difference = report["ours"]["max_abs_diff"]
    failed |= not difference <= 1e-4
    print(f"trained here, read by PEFT: largest logit difference {difference:.2e} (limit 0.0001)")
sys.exit(int(failed))
