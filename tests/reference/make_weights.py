#!/usr/bin/env python3
"""What each kind of frozen weight holds of a small matrix, as PyTorch rounds it.

    pip install torch safetensors
    python tests/reference/make_weights.py tests/data/weights

`KIND.safetensors` has `stored` [rows, columns], a tensor of a model's file, and `values` in float32, what the weight computes with.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
stored = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
stored[0, :3] = torch.tensor([0.0, 1.0, -1e-30])
for kind, dtype in {"f32": torch.float32, "bf16": torch.bfloat16}.items():
    save_file({"stored": stored, "values": stored.to(dtype).float().clone()}, out / f"{kind}.safetensors")
