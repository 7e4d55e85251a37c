#!/usr/bin/env python3
"""A GGUF base model with random weights, of the size of a known one.

    pip install numpy gguf==0.19.0
    python3 benches/random_gguf.py OUT.gguf --size tiny|small|1b|8b [--type Q4_K] [--output TYPE] [--seed 0] [--check]

The blocks are random bytes with small scales, so that weights have a mean near 0 and a standard deviation near 0.02; nothing is
quantised. Embedding and projections are of --type, norms are ones in F32. A size with an output layer of its own has it in Q6_K, as
llama.cpp's Q4_K_M; --output gives it another type, and gives one to a size that shares the embedding. The file is written a few
megabytes at a time, with equal bytes for equal arguments. --check reads it back with gguf-py and prints the mean and the
standard deviation of every type. The tokenizer knows single bytes, two merges, three special tokens and fillers that no text has.
"""
import argparse
import math
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type, GGUFReader, GGUFWriter, LlamaFileType, dequantize

# hidden, intermediate, layers, heads, key/value heads, vocabulary, positions, factor of Llama 3's scaling, type of the output layer
SIZES = {
    "tiny": (256, 512, 2, 4, 2, 300, 512, None, None),
    "small": (768, 2048, 12, 12, 4, 32768, 8192, None, None),
    "1b": (2048, 8192, 16, 32, 8, 128256, 131072, 32.0, None),
    "8b": (4096, 14336, 32, 32, 8, 128256, 131072, 8.0, "Q6_K"),
}
THETA = 500000.0
STD = 0.02
CHUNK_BYTES = 1 << 23

# For each block format: the standard deviation of its values where the scale d is 1 and quants and 6-, 4- or 8-bit scales are random,
# where d stands in the block, and the minimum's place and what it is of d, so that the mean is 0.
BLOCKS = {
    "Q4_0": (4.64, 0, None, 0),
    "Q4_1": (4.61, 0, 2, -7.5),
    "Q5_0": (9.25, 0, None, 0),
    "Q5_1": (9.23, 0, 2, -15.5),
    "Q8_0": (73.9, 0, None, 0),
    "Q2_K": (13.9, 80, 82, 1.5),
    "Q3_K": (43.3, 108, None, 0),
    "Q4_K": (258.0, 0, 2, 7.5),
    "Q5_K": (527.0, 0, 2, 15.5),
    "Q6_K": (1366.0, 208, None, 0),
}
PLAIN = ("F32", "F16", "BF16")
TYPES = [*BLOCKS, "F16", "BF16"]
FILE_TYPES = {"Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def add_vocabulary(writer, n_tokens):
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    alphabet = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "\u0120he"]
    kinds = [3] * 3 + [1] * (n_tokens - 3)
    tokens += [f"<filler{idx}>" for idx in range(len(tokens), n_tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "\u0120 he"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def llama3_factors(head_dim, factor):
    """What llama.cpp divides the frequencies by for low 1, high 4 and an original length of 8192."""
    factors = []
    for frequency in THETA ** -(np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * math.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        kept = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - kept) / factor + kept))
    return np.array(factors, dtype=np.float32)


def tensors(size, kind, output):
    """Name, shape, and type or values of each tensor, in the order of the file."""
    hidden, intermediate, layers, heads, kv_heads, n_tokens, _, factor, own_output = size
    head_dim = hidden // heads
    kv = kv_heads * head_dim
    output = output or own_output
    ones = np.ones(hidden, dtype=np.float32)
    if factor is not None:
        yield "rope_freqs.weight", None, llama3_factors(head_dim, factor)
    yield "token_embd.weight", (n_tokens, hidden), kind
    for layer in range(layers):
        at = f"blk.{layer}."
        yield at + "attn_norm.weight", None, ones
        yield at + "attn_q.weight", (hidden, hidden), kind
        yield at + "attn_k.weight", (kv, hidden), kind
        yield at + "attn_v.weight", (kv, hidden), kind
        yield at + "attn_output.weight", (hidden, hidden), kind
        yield at + "ffn_norm.weight", None, ones
        yield at + "ffn_gate.weight", (intermediate, hidden), kind
        yield at + "ffn_up.weight", (intermediate, hidden), kind
        yield at + "ffn_down.weight", (hidden, intermediate), kind
    yield "output_norm.weight", None, ones
    if output is not None:
        yield "output.weight", (n_tokens, hidden), output


def random_bytes(random, kind, n_blocks):
    """`n_blocks` random blocks of a type as bytes, one row each."""
    if kind in PLAIN:
        values = random.standard_normal(n_blocks, dtype=np.float32) * np.float32(STD)
        if kind == "F16":
            values = values.astype(np.float16)
        elif kind == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.view(np.uint8).reshape(n_blocks, -1)
    std, at, minimum_at, ratio = BLOCKS[kind]
    _, n_bytes = GGML_QUANT_SIZES[Type[kind]]
    blocks = np.frombuffer(bytearray(random.bytes(n_blocks * n_bytes)), dtype=np.uint8).reshape(n_blocks, n_bytes)

    def put(place, value):
        scales = (value * random.uniform(0.75, 1.25, n_blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)

    put(at, STD / std)
    if minimum_at is not None:
        put(minimum_at, ratio * STD / std)
    return blocks


def write(args):
    size = SIZES[args.size]
    hidden, intermediate, layers, heads, kv_heads, n_tokens, positions, _, _ = size
    writer = GGUFWriter(args.out, "llama")
    writer.add_name(f"random {args.size} {args.type}")
    writer.add_file_type(LlamaFileType[FILE_TYPES.get(args.type, f"MOSTLY_{args.type}")])
    writer.add_quantization_version(2)
    writer.add_block_count(layers)
    writer.add_context_length(positions)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_tokens)
    add_vocabulary(writer, n_tokens)

    planned = list(tensors(size, args.type, args.output))
    for name, shape, what in planned:
        if shape is None:
            writer.add_tensor_info(name, what.shape, what.dtype, what.nbytes)
            continue
        block, n_bytes = GGML_QUANT_SIZES[Type[what]]
        row_bytes = shape[1] // block * n_bytes
        writer.add_tensor_info(name, (shape[0], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, Type[what])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    [file] = writer.fout
    writer.write_padding(file, file.tell())
    for idx, (_, shape, what) in enumerate(planned):
        begin = file.tell()
        if shape is None:
            file.write(what.tobytes())
        else:
            # A stream of its own for each tensor.
            random = np.random.default_rng([args.seed, idx])
            block, n_bytes = GGML_QUANT_SIZES[Type[what]]
            n_blocks, most = math.prod(shape) // block, CHUNK_BYTES // n_bytes
            for done in range(0, n_blocks, most):
                file.write(random_bytes(random, what, min(most, n_blocks - done)).data)
        writer.write_padding(file, file.tell() - begin)
    writer.close()


def check(path):
    """Whether gguf-py reads the file, all that it looks at is finite, and weights have the standard deviation that they should."""
    found, failed = {}, False
    for tensor in GGUFReader(path).tensors:
        rows = tensor.data[: max(1, (1 << 20) // int(tensor.shape[0]))]
        values = dequantize(rows, tensor.tensor_type).astype(np.float64)
        failed |= not np.isfinite(values).all()
        if len(tensor.shape) == 2:
            sums = found.setdefault(tensor.tensor_type.name, np.zeros(4))
            sums += [1, values.size, values.sum(), np.square(values).sum()]
    for kind, (n_tensors, n_values, total, squares) in sorted(found.items()):
        mean = total / n_values
        std = math.sqrt(squares / n_values - mean**2)
        failed |= not (0.9 * STD <= std <= 1.1 * STD and abs(mean) <= 0.15 * STD)
        print(f"{kind}: {n_tensors:.0f} tensors, {n_values:.0f} values looked at, mean {mean:.1e}, standard deviation {std:.4f}")
    return failed


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", metavar="OUT.gguf")
parser.add_argument("--size", choices=SIZES, required=True)
parser.add_argument("--type", choices=TYPES, default="Q4_K", help="type of the embedding and the projections (Q4_K)")
parser.add_argument("--output", choices=TYPES, help="type of an output layer of its own")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--check", action="store_true", help="read the file back; exits with 1 if it is not as it should be")
args = parser.parse_args()
write(args)
if args.check:
    sys.exit(int(check(args.out)))
