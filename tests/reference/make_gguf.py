#!/usr/bin/env python3
"""Small GGUF base models for the tests: one llama of every block type, one qwen2, one qwen3.

    pip install gguf numpy
    python tests/reference/make_gguf.py tests/data/gguf

Weights are random; a quantised tensor has random blocks with moderate scales. Equal bytes at every run.
"""
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, GGUFWriter, quant_shape_from_byte_shape

# Bytes of a block at which a half-precision scale stands.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}
PLAIN = {Type.F32: np.float32, Type.F16: np.float16}


def vocabulary(writer):
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    alphabet = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokens = ["<|start|>", "<|im_end|>", *alphabet, "he", "\u0120he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e", "\u0120 he"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    return len(tokens)


def write(path, architecture, hidden, types, seed):
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture)
    heads, head_dim, ffn = 2, hidden // 2, hidden
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(len(types))
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    n_tokens = vocabulary(writer)

    def add(name, shape, kind=Type.F32):
        if kind in PLAIN:
            writer.add_tensor(name, random.standard_normal(shape).astype(PLAIN[kind]) * PLAIN[kind](0.1))
        elif kind == Type.BF16:
            values = random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16
            writer.add_tensor(name, values.astype(np.uint16).view(np.uint8), raw_dtype=kind)
        else:
            block, n_bytes = GGML_QUANT_SIZES[kind]
            blocks = random.integers(0, 256, (shape[0] * shape[1] // block, n_bytes), dtype=np.uint8)
            for at in SCALES[kind]:
                scale = random.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
                blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
            blocks = blocks.reshape(shape[0], -1)
            assert tuple(quant_shape_from_byte_shape(blocks.shape, kind)) == tuple(shape)
            writer.add_tensor(name, blocks, raw_dtype=kind)

    add("token_embd.weight", (n_tokens, hidden), types[0][0])
    add("output_norm.weight", (hidden,))
    for layer, kinds in enumerate(types):
        at = f"blk.{layer}."
        add(at + "attn_norm.weight", (hidden,))
        add(at + "ffn_norm.weight", (hidden,))
        for index, (name, n_out, n_in) in enumerate([
            ("attn_q", heads * head_dim, hidden), ("attn_k", head_dim, hidden), ("attn_v", head_dim, hidden),
            ("attn_output", hidden, heads * head_dim), ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden), ("ffn_down", hidden, ffn),
        ]):
            add(at + name + ".weight", (n_out, n_in), kinds[index % len(kinds)])
        if architecture == "qwen2":
            for name, n_out in [("attn_q", heads * head_dim), ("attn_k", head_dim), ("attn_v", head_dim)]:
                add(at + name + ".bias", (n_out,))
        if architecture == "qwen3":
            add(at + "attn_q_norm.weight", (head_dim,))
            add(at + "attn_k_norm.weight", (head_dim,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
write(out / "llama-every-type.gguf", "llama", 256, [
    [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q4_0, Type.Q4_1],
    [Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.F16, Type.BF16, Type.Q6_K],
], 1)
write(out / "qwen2.gguf", "qwen2", 32, [[Type.F32, Type.Q8_0], [Type.Q4_0, Type.F16]], 2)
write(out / "qwen3.gguf", "qwen3", 32, [[Type.F32], [Type.Q5_0, Type.Q5_1]], 3)
