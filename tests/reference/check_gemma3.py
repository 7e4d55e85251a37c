#!/usr/bin/env python3
"""Our logits of Gemma 3 270M, as imported from GGUF, are as near to a float64 run as those of transformers in float32.

    pip install torch==2.9.1 transformers==5.17.0 peft==0.21.2
    cargo build --release
    python tests/reference/check_gemma3.py target/release/monteclora MODEL_DIR [ADAPTER]

MODEL_DIR is the directory that `monteclora quickstart --model gemma3-270m` leaves in its cache, ADAPTER the `lora` that it writes. transformers computes 200 positions in float64, where norms, softmax and the angles of
the rotary embedding, for which it otherwise goes back to float32, are in float64, too. Ours, by `parity --reference`, may be twice as far
from that as transformers' own float32, in the largest and in the mean difference. The tokens are compared with `data preview`.
Exits with 1 on a difference.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

N_POSITIONS = 200
LIMIT = 2.0

binary, model_dir, *adapter = sys.argv[1:]
text = (Path(__file__).parent.parent.parent / "src/commands/parity.txt").read_text(encoding="utf-8")


def run(*arguments):
    result = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: {result.stderr}")
    return json.loads(result.stdout)


def exact_angles(model):
    """The frequencies of the rotary embeddings in float64; transformers computes them in float32."""
    config = model.config
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    rotary = model.get_submodule("model.rotary_emb")
    for kind, parameters in config.rope_parameters.items():
        assert parameters["rope_type"] == "default", f"{kind}: {parameters}"
        exact = parameters["rope_theta"] ** -half
        name = f"{kind}_inv_freq"
        assert torch.allclose(exact, getattr(rotary, name).double(), rtol=1e-6), name
        setattr(rotary, name, exact)


def logits(ids, dtype):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").eval()
    is_exact = dtype == torch.float64
    if is_exact:
        exact_angles(model)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter[0]).to(dtype).eval()
    with torch.no_grad():
        if not is_exact:
            return model(input_ids=ids).logits.double()
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch.object(torch, "float", torch.double):
            found = model(input_ids=ids).logits
    assert found.dtype == torch.float64
    return found


ids = AutoTokenizer.from_pretrained(model_dir)(text, return_tensors="pt").input_ids
failed = False
with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    rows = scratch / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}) + "\n")
    [row] = run("data", "preview", "-m", model_dir, rows, "--json")["rows"]
    # A text row is trained with an end token behind it.
    same = row["input_ids"][:-1] == ids[0].tolist()
    failed |= not same
    print(f"{ids.shape[1]} tokens of prose, figures, code and other scripts: {'equal' if same else 'DIFFERENT'}")

    ids = ids[:, :N_POSITIONS]
    assert ids.shape[1] == N_POSITIONS
    exact = logits(ids, torch.float64)
    theirs = logits(ids, torch.float32)
    # parity reads float32; both are compared with the same rounded values.
    exact = exact.float()
    save_file({"input_ids": ids, "logits": exact}, scratch / "reference.safetensors")
    with_adapter = ["-a", adapter[0]] if adapter else []
    report = run(
        "parity", "-m", model_dir, *with_adapter, "--reference", scratch / "reference.safetensors", "--engine", "ours", "--json"
    )
    ours = report["ours"]
    difference = (theirs - exact.double()).abs()
    print(f"{report['positions']} positions, largest logit {exact.abs().max().item():.1f}; distance from float64:")
    for name, own, of_theirs in [
        ("largest", ours["max_abs_diff"], difference.max().item()),
        ("mean", ours["mean_abs_diff"], difference.mean().item()),
    ]:
        within = own <= LIMIT * of_theirs
        failed |= not within
        print(f"  {name}: ours {own:.2e}, transformers' float32 {of_theirs:.2e}, ratio {own / of_theirs:.2f} (limit {LIMIT})")
    same = (theirs.argmax(-1) == exact.argmax(-1)).double().mean().item()
    print(f"  same top token: ours {ours['top1_agreement']:.4f}, transformers' float32 {same:.4f}")
    failed |= ours["top1_agreement"] < 1
sys.exit(int(failed))
