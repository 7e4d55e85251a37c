#!/usr/bin/env python3
"""mlx-lm loads what `convert --to mlx` writes, and computes PEFT's logits.

    pip install "mlx[cpu]" mlx-lm==0.32.2
    python tests/reference/check_mlx.py target/release/monteclora [FIXTURES]

For every recorded adapter that is not to be refused, mlx-lm's own `load_adapters` reads the converted directory. Exits with
1 on any difference. On Linux mlx runs on the CPU.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

binary = sys.argv[1]
fixtures = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "data" / "fixtures")


def difference(model, expected, name):
    model.set_dtype(mx.float32)
    return mx.abs(model(expected["input_ids"]) - expected[name].astype(mx.float32)).max().item()


failed = False
with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    for case in sorted((fixtures / "adapters").iterdir()):
        if case.name.startswith("must-refuse"):
            continue
        source = fixtures / "models" / json.loads((case / "case.json").read_text())["model"]
        model_dir = scratch / f"{case.name}-model"
        shutil.copytree(source, model_dir)
        # mlx-lm reads the configuration as transformers 4 wrote it.
        config = json.loads((source / "config.json").read_text())
        config.setdefault("rope_theta", config.pop("rope_parameters", {}).get("rope_theta", 10000.0))
        (model_dir / "config.json").write_text(json.dumps(config))
        converted = scratch / case.name
        subprocess.run([binary, "convert", case, "-o", converted, "--to", "mlx"], check=True, stdout=subprocess.DEVNULL)
        model, _ = load_model(model_dir)
        expected = mx.load(str(case / "expected.safetensors"))
        base = difference(model, expected, "base_logits")
        load_adapters(model, str(converted))
        adapted = difference(model, expected, "logits")
        limit = 0.05 if "bf16" in case.name else 1e-4
        failed |= not (base <= limit and adapted <= limit)
        print(f"{case.name}: largest logit difference {adapted:.2e}, of the base alone {base:.2e} (limit {limit})")
sys.exit(int(failed))
