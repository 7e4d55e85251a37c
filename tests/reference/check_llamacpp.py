#!/usr/bin/env python3
"""llama.cpp loads what `convert --to gguf` writes, and computes PEFT's probabilities.

    pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0 xllamacpp==2026.10.11549
    python tests/reference/check_llamacpp.py target/release/monteclora BASE_DIR BASE.gguf [ADAPTER]

BASE_DIR is a Hugging Face directory and BASE.gguf the same weights (`monteclora import-gguf BASE.gguf -o BASE_DIR --dtype f32`). A random
MonteCLoRA adapter with rslora, a rank pattern and all seven projections is made by PEFT, converted, and the log-probabilities
of the likeliest 50 next tokens are compared. llama.cpp's own arithmetic (its quantised base, its half-precision cache) sets
the scale: the adapter may not be off by more than three times what the base alone is off by. Exits with 1 otherwise.

With ADAPTER, which was trained on BASE.gguf itself, PEFT loads that one on BASE_DIR, `convert` is given BASE.gguf in place of the directory,
and `parity` on BASE.gguf must find our own logits at most twice as far from PEFT's in float64 as PEFT's in float32 are, in the largest
difference.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import xllamacpp
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

binary, base_dir, base_gguf, *trained = sys.argv[1:]


def likeliest(lora=None):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = base_gguf
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    # More threads wait for each other by spinning, which takes minutes where another program runs.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        parameters.lora_adapters = [adapter]
    request = {"prompt": ids[0].tolist(), "max_tokens": 1, "logprobs": 50, "temperature": 0.0, "cache_prompt": False}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return {entry["id"]: entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def mean_difference(found, expected):
    return sum(abs(value - expected[token].item()) for token, value in found.items()) / len(found)


def random_adapter(base):
    torch.manual_seed(0)
    model = get_peft_model(
        base,
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={r".*\.2\.mlp\.down_proj": 4},
            task_type="CAUSAL_LM",
            monteclora_config=MontecloraConfig(num_samples=4, sample_scaler=5e-3, buffer_size=1),
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def monteclora(*arguments):
    command = [binary, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
n_tokens = min(40000, base.config.vocab_size)
ids = torch.randint(100, n_tokens, (1, 24), generator=torch.Generator().manual_seed(1))
model = (PeftModel.from_pretrained(base, trained[0]) if trained else random_adapter(base)).eval()
failed = False
with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
    scratch = Path(scratch)
    adapter, known_by = (trained[0], base_gguf) if trained else (scratch / "adapter", base_dir)
    if not trained:
        model.save_pretrained(adapter)
    monteclora("convert", adapter, "-o", scratch / "adapter.gguf", "--to", "gguf", "-m", known_by)
    logits = model(input_ids=ids).logits
    adapted = logits[0, -1].log_softmax(-1)
    with model.disable_adapter():
        plain = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    base_found, found = likeliest(), likeliest(scratch / "adapter.gguf")
    if trained:
        exact = model.double()(input_ids=ids).logits
        limit = 2 * (logits - exact).abs().max().item()
        reference = scratch / "reference.safetensors"
        save_file({"input_ids": ids, "logits": exact.float().contiguous()}, reference)
        report = monteclora("parity", "-m", base_gguf, "-a", adapter, "--reference", reference, "--engine", "ours", "--json")
        difference = json.loads(report)["ours"]["max_abs_diff"]
        failed |= not difference <= limit
        print(f"our logits on {Path(base_gguf).name}: at most {difference:.2e} from PEFT's in float64 (limit {limit:.2e})")
base_off, ours, effect = mean_difference(base_found, plain), mean_difference(found, adapted), mean_difference(found, plain)
print(f"mean difference of log-probabilities: base alone {base_off:.2e}, with the adapter {ours:.2e}; the adapter's effect {effect:.2e}")
sys.exit(int(failed or not (ours <= 3 * base_off and ours < effect / 3)))
