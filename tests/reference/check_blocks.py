#!/usr/bin/env python3
"""What `import-gguf` writes is, bit for bit, what gguf-py reads from the blocks of every tensor.

    pip install numpy gguf==0.19.0
    cargo build --release
    target/release/monteclora import-gguf BASE.gguf -o DIR --dtype f32
    python tests/reference/check_blocks.py BASE.gguf DIR

BASE.gguf may hold any model of text that llama.cpp and transformers both know: names are translated by gguf-py's own table. What
llama.cpp changes is undone: the order of rows in queries and keys, the 1 that is added to the norms of Gemma, the stacked experts.
In place of BASE.gguf there may be a directory that mlx-lm quantised with 2, 4 or 8 bits (`affine`), and DIR then holds the same names with whole
weights (such as `reference.safetensors` of make_mlx_quantised.py): they are `scale * quant + bias` in float32.
Prints the number of tensors and of differing values for each type. Exits with 1 on a difference, or if a tensor is left over.
"""
import collections
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

# llama.cpp's architectures in which the two halves of a query's and of a key's head are interleaved.
INTERLEAVED = {"llama", "mistral3", "granite", "smollm3"}
# Those whose norms have the 1 in them.
ADDED_ONE = {"gemma", "gemma2", "gemma3"}
# Read as parameters, not kept as tensors.
ROTARY = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
CHUNK_ELEMENTS = 1 << 24
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}


class Safetensors:
    """The tensors of a directory's files by name: type, and values as they lie in the file."""

    def __init__(self, path):
        self.tensors = {}
        for name in sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]:
            with open(name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            data = np.memmap(name, dtype=np.uint8, mode="r", offset=8 + length)
            header.pop("__metadata__", None)
            for key, entry in header.items():
                begin, end = entry["data_offsets"]
                values = data[begin:end].view(TYPES.get(entry["dtype"], np.uint8))
                self.tensors[key] = entry["dtype"], values.reshape(entry["shape"])

    def floats(self, name):
        kind, values = self.tensors[name]
        if kind == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


class Gguf:
    """The tensors of a GGUF file as transformers has them."""

    def __init__(self, path):
        reader = GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

        def value(key):
            field = reader.get_field(key)
            return None if field is None else field.contents()

        self.architecture = value("general.architecture")
        keys = f"{self.architecture}."
        heads = value(keys + "attention.head_count")
        self.head_dim = value(keys + "attention.key_length") or value(keys + "embedding_length") // heads
        [kind] = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == self.architecture]
        self.names = get_tensor_name_map(kind, value(keys + "block_count"))
        self.unread = set(self.tensors) - ROTARY

    def find(self, name):
        """The tensor that `name` is, or is the part of, the part's number, and its type."""
        expert = re.search(r"\.experts\.(\d+)\.", name)
        single = name.replace(expert.group(0), ".experts.") if expert else name
        found = self.names.get_name(single, try_suffixes=(".weight", ".bias"))
        tensor = self.tensors.get(found)
        if tensor is None:
            return None
        self.unread.discard(found)
        return tensor, int(expert.group(1)) if expert else None, tensor.tensor_type.name

    def shape(self, found):
        tensor, part, _ = found
        shape = [int(size) for size in reversed(tensor.shape)]
        return shape if part is None else shape[1:]

    def rows(self, found, begin, end):
        """Rows begin to end, whole heads, in float32."""
        tensor, part, kind = found
        data = tensor.data if part is None else tensor.data[part]
        values = dequantize(data[begin:end], tensor.tensor_type)
        if self.architecture in INTERLEAVED and re.search(r"\.attn_[qk]\.", tensor.name):
            half, rest = self.head_dim // 2, values.shape[1:]
            values = values.reshape(-1, half, 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
        if self.architecture in ADDED_ONE and tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)
        return values


class Mlx:
    """The tensors of a directory that mlx-lm quantised, as whole weights."""

    head_dim = 1

    def __init__(self, path):
        self.file = Safetensors(path)
        self.config = json.loads((path / "config.json").read_text())["quantization"]
        self.unread = set(self.file.tensors)

    def settings(self, module):
        own = self.config.get(module)
        own = own if isinstance(own, dict) else self.config
        assert own.get("mode", "affine") == "affine" and own["bits"] in (2, 4, 8), f"{module}: {own}"
        return own["bits"], own["group_size"]

    def find(self, name):
        """The tensor's name, its scales and biases if it is quantised, and what it is."""
        if name not in self.file.tensors:
            return None
        module = name.removesuffix(".weight")
        parts = [f"{module}.scales", f"{module}.biases"]
        self.unread.discard(name)
        if parts[0] not in self.file.tensors:
            return name, None, f"{self.file.tensors[name][0]}, not quantised"
        self.unread -= set(parts)
        bits, group = self.settings(module)
        scales, biases = map(self.file.floats, parts)
        return name, (bits, group, scales, biases), f"{bits} bits in groups of {group}"

    def shape(self, found):
        name, quantised, _ = found
        shape = list(self.file.tensors[name][1].shape)
        return shape if quantised is None else [shape[0], shape[1] * 32 // quantised[0]]

    def rows(self, found, begin, end):
        name, quantised, _ = found
        if quantised is None:
            return self.file.floats(name)[begin:end]
        bits, group, scales, biases = quantised
        words = self.file.tensors[name][1][begin:end]
        # The first value is in the lowest bits.
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        quants = (words[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.float32)
        quants = quants.reshape(*scales[begin:end].shape, group)
        return (quants * scales[begin:end, :, None] + biases[begin:end, :, None]).reshape(len(words), -1)


source_path, directory = map(Path, sys.argv[1:])
source = Mlx(source_path) if source_path.is_dir() else Gguf(source_path)
written = Safetensors(directory)
n_tensors, n_values, n_different = collections.Counter(), collections.Counter(), collections.Counter()
failed = False
for name, (dtype, values) in written.tensors.items():
    found = source.find(name)
    if found is None or dtype != "F32" or list(values.shape) != source.shape(found):
        failed = True
        print(f"{name}: {dtype} {list(values.shape)}, in the source {source.shape(found) if found else 'nothing'}")
        continue
    kind = found[2]
    n_tensors[kind] += 1
    n_values[kind] += values.size
    # Whole heads at a time.
    step = max(1, CHUNK_ELEMENTS // math.prod(values.shape[1:]) // source.head_dim) * source.head_dim
    for begin in range(0, len(values), step):
        expected = np.ascontiguousarray(source.rows(found, begin, begin + step))
        assert expected.dtype == np.float32
        different = np.count_nonzero(expected.view(np.uint32) != values[begin : begin + step].view(np.uint32))
        if different and not n_different[kind]:
            print(f"{name}: differs within the {len(expected)} rows from {begin}")
        n_different[kind] += different
for kind in sorted(n_tensors):
    print(f"{kind}: {n_tensors[kind]} tensors, {n_values[kind]} values, {n_different[kind]} differ")
for name in sorted(source.unread):
    print(f"{name}: not in {directory}")
sys.exit(int(failed or not n_tensors or bool(source.unread) or sum(n_different.values()) > 0))
