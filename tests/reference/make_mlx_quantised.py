#!/usr/bin/env python3
"""Two small llamas as mlx-lm quantises them, with the weights that they stand for.

    pip install "mlx[cpu]" mlx-lm==0.32.2
    python tests/reference/make_mlx_quantised.py OUT

OUT/4bit has groups of 32, bf16 and a head of its own. OUT/8bit has groups of 64, f16, a tied head, one projection with 4 bits in groups of 32 and one that is
not quantised. The model is in `base`; beside it lie `reference.safetensors`: every weight in float32, of quantised ones `scale * quant + bias` computed in float32;
and `expected.safetensors`: `input_ids` and the `logits` that mlx-lm computes in float32 from these weights. Equal bytes at every run.
Prints how far `mx.dequantize` in the stored type is from the reference. Exits with 1 if in float32 it is not the same, bit for bit, on
the CPU.
"""
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

N_TOKENS = 259
TOKENIZER = Path(__file__).parent.parent / "data/fixtures/models/tiny-llama"
MIXED = {"model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 4, "mode": "affine"}, "model.layers.0.mlp.down_proj": False}


def config(hidden, heads, intermediate, tied):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": hidden // heads,
        "vocab_size": N_TOKENS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }


def random_model(settings, dtype, seed):
    random = np.random.default_rng(seed)
    model = Model(ModelArgs.from_dict(settings))
    weights = []
    for name, value in sorted(tree_flatten(model.parameters())):
        values = random.standard_normal(value.shape) * 0.1 + (1 if "norm" in name else 0)
        weights.append((name, mx.array(values.astype(np.float32)).astype(dtype)))
    model.load_weights(weights)
    return model


def whole_weights(directory):
    """Every weight in float32, and the largest distance of `mx.dequantize` in the stored type, relative to the largest weight."""
    stored = mx.load(str(directory / "model.safetensors"))
    quantization = json.loads((directory / "config.json").read_text())["quantization"]
    found, farthest = {}, 0.0
    for name, value in stored.items():
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in stored:
            if not name.endswith((".scales", ".biases")):
                found[name] = np.array(value.astype(mx.float32))
            continue
        own = quantization.get(module, quantization)
        bits, group = own["bits"], own["group_size"]
        scales, biases = stored[f"{module}.scales"], stored[f"{module}.biases"]
        words = np.array(value)
        # The first value is in the lowest bits.
        quants = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
        quants = quants.reshape(*scales.shape, group).astype(np.float32)
        wide = [part.astype(mx.float32) for part in (scales, biases)]
        weight = (np.array(wide[0])[..., None] * quants + np.array(wide[1])[..., None]).reshape(len(words), -1)
        assert weight.dtype == np.float32
        same = np.array(mx.dequantize(value, *wide, group_size=group, bits=bits))
        if (same.view(np.uint32) != weight.view(np.uint32)).any():
            sys.exit(f"{name}: mx.dequantize computes something else in float32")
        narrow = mx.dequantize(value, scales, biases, group_size=group, bits=bits)
        assert narrow.dtype == scales.dtype
        farthest = max(farthest, np.abs(np.array(narrow.astype(mx.float32)) - weight).max() / np.abs(weight).max())
        found[name] = weight
    return found, farthest


def write(case, settings, dtype, bits, group, own, seed):
    shutil.rmtree(case, ignore_errors=True)
    directory = case / "base"
    directory.mkdir(parents=True)
    model = random_model(settings, dtype, seed)
    predicate = (lambda path, _: own.get(path, True)) if own else None
    model, settings = quantize_model(model, settings, group, bits, quant_predicate=predicate)
    save_model(directory, model)
    save_config(settings, directory / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(TOKENIZER / name, directory)

    weights, farthest = whole_weights(directory)
    save = lambda name, tensors: mx.save_safetensors(str(case / name), tensors, metadata={"format": "mlx"})
    save("reference.safetensors", {name: mx.array(value) for name, value in sorted(weights.items())})
    whole = Model(ModelArgs.from_dict(settings))
    whole.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    ids = mx.array(np.random.default_rng(seed).integers(3, N_TOKENS, (1, 24)))
    logits = whole(ids)
    save("expected.safetensors", {"input_ids": ids.astype(mx.int64), "logits": logits})
    loaded, _ = load_model(directory)
    difference = mx.abs(loaded(ids).astype(mx.float32) - logits).max().item()
    size = sum((directory / name).stat().st_size for name in ("model.safetensors", "config.json", "model.safetensors.index.json"))
    print(f"{case.name}: {size} bytes; mx.dequantize in {dtype} is off by {farthest:.1e} of the largest weight; "
          f"largest logit {mx.abs(logits).max().item():.2f}, mlx-lm's from the quantised model in that type differ by {difference:.1e}")


mx.set_default_device(mx.cpu)
out = Path(sys.argv[1])
# The tied model is the larger one.
write(out / "4bit", config(32, 2, 64, False), mx.bfloat16, 4, 32, {}, 1)
write(out / "8bit", config(64, 4, 64, True), mx.float16, 8, 64, MIXED, 2)
