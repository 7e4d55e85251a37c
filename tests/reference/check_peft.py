#!/usr/bin/env python3
"""PEFT loads what this project writes, without a warning, and computes the same logits.

    pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0
    cargo build --release
    python tests/reference/check_peft.py target/release/monteclora [FIXTURES]

For every recorded adapter that is not to be refused, PEFT reads the collapsed form and its logits are compared with the
recorded ones. Then a tiny training run is made, and PEFT's logits on its output are compared with this project's decoder
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
        plain = scratch / case.name
        run("collapse", case, "-o", plain)
        difference = (logits(load(model, plain), expected["input_ids"]) - expected["logits"].float()).abs().max().item()
        limit = 0.05 if "bf16" in case.name else 1e-4
        failed |= not difference <= limit
        print(f"{case.name}: collapsed, largest logit difference {difference:.2e} (limit {limit})")

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
