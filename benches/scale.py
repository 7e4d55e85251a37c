#!/usr/bin/env python3
"""How step time and memory grow with batch, sequence, rank, layers and model size.

    cargo build --release
    benches/scale.py [--monteclora target/release/monteclora] [--only size,batch,...] [--dtype bf16] [--bf16] [--json]

Runs `bench train --random-weights` on config.json files of known Llama shapes, a few steps each, and prints for every point
the median step, the peak, the arithmetic a step needs and the rate reached, and for every sweep the exponent p of the least
squares fit `time = c * x^p` (1 is linear). `samples` runs 1 to 32 mixture components in turns. `load` writes a checkpoint of 3.2
billion random bf16 weights, drops it from the page cache and reads it with `cat` and with the trainer. Give it the machine to
itself.

`families` scales the smallest model of every family in tests/data to one size (of Llama, a dynamic one), and lengthens its sequence. `experts` does the same
with more experts, of which each token takes two. `blocks` lengthens the sequence on every kind of quantised blocks; it needs numpy and
gguf (see random_gguf.py). `ranks` trains with 1, 2 and 4 processes of one thread each, 4 x 128 tokens per process; it needs Open MPI and
a program built with `--features mpi`.
"""
import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

# hidden, intermediate, layers, heads, key/value heads, vocabulary, tied
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    "SmolLM2-360M": (960, 2560, 32, 15, 5, 49152, True),
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "TinyLlama-1.1B": (2048, 5632, 22, 32, 4, 32000, False),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
}
BASE = "SmolLM2-135M"
FIXTURES = pathlib.Path(__file__).parent.parent / "tests/data/fixtures/architectures"


def config(shape):
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = shape
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 8192}


def sizes(shape):
    """Weights in projections and head, sum of in + out over a block's projections, and all parameters."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = shape
    kv = kv_heads * hidden // heads
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate
    ends = 4 * hidden + 2 * (hidden + kv) + 3 * (hidden + intermediate)
    products = layers * block + vocab * hidden
    return products, layers * ends, products + (0 if tied else vocab * hidden) + (2 * layers + 1) * hidden


def gflop(shape, batch, seq, rank):
    """Forward and the gradient of activations (4 a weight and token), the adapters (6), and causal attention: two products
    forward, five backward, half of them hidden."""
    products, ends, _ = sizes(shape)
    attention = shape[2] * 7 * seq * shape[0]
    return batch * seq * (4 * products + 6 * rank * ends + attention) / 1e9


def run(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def bench(args, model, batch, seq, rank, num_samples=8):
    """`model` is a configuration, for random weights, or the path of a model."""
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, dict):
            pathlib.Path(scratch, "config.json").write_text(json.dumps(model))
        where = [scratch, "--random-weights"] if isinstance(model, dict) else [model]
        command = [args.monteclora, "bench", "train", "-m", *where, "--batch", batch, "--seq", seq, "--rank", rank,
                   "--steps", args.steps, "--dtype", args.dtype, "--num-samples", num_samples, "--json"]
        command += ["--gradient-checkpointing"] * args.gradient_checkpointing + ["--bf16"] * args.bf16
        found = json.loads(run(command))
    return {"batch": batch, "seq": seq, "rank": rank, "step_s": batch * seq / found["tokens_per_second"], "peak_gb": found["peak_gb"]}


def measure(args, shape, batch, seq, rank, num_samples=8):
    found = bench(args, config(shape), batch, seq, rank, num_samples)
    seconds = found["step_s"]
    work = gflop(shape, batch, seq, rank)
    return {**found, "layers": shape[2], "parameters": sizes(shape)[2], "gflop": work, "gflop_per_s": work / seconds}


def fitted(args, name, key, points):
    """The points of one curve and the exponents of its time and memory, printed in a line."""
    slopes = {"time": exponent(points, key, "step_s"), "memory": exponent(points, key, "peak_gb")}
    if not args.json:
        values = "; ".join(f"{point[key]}: {point['step_s']:.3f} s, {point['peak_gb']:.2f} GB" for point in points)
        print(f"{name:<24} time ~ {key}^{slopes['time']:.2f}, memory ~ {key}^{slopes['memory']:.2f}   ({values})", flush=True)
    return {"points": points, "exponents": slopes}


def family(name, **changes):
    """The configuration of a family's smallest model in the size of a small one."""
    found = json.loads((FIXTURES / name / "model" / "config.json").read_text())
    layers = 6
    found |= {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9,
              "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 8192}
    known = {"moe_intermediate_size": 512, "sliding_window": 256, "query_pre_attn_scalar": 64}
    found |= {key: value for key, value in known.items() if found.get(key) is not None}
    if "layer_types" in found:
        kinds = found["layer_types"]
        found["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    if "no_rope_layers" in found:
        found["no_rope_layers"] = [found["no_rope_layers"][layer % len(found["no_rope_layers"])] for layer in range(layers)]
    return found | changes


def families(args):
    """Step time by length of the sequence for every family, at one size."""
    names = sorted(path.parent.parent.name for path in FIXTURES.glob("*/model/config.json"))
    by_type = {}
    for name in names:
        kind = json.loads((FIXTURES / name / "model" / "config.json").read_text()).get("model_type")
        if not name.startswith("nested-"):
            by_type.setdefault(kind, name)
    names = sorted(by_type.values())
    lengths = (128, 256, 512, 1024)
    return {name: fitted(args, name, "seq", [bench(args, family(name), 1, seq, 16) for seq in lengths]) for name in names}


def experts(args):
    """Step time by number of experts, of which each token takes two."""
    found = {}
    for name, key in (("qwen3_moe", "num_experts"), ("mixtral", "num_local_experts")):
        points = []
        for count in (4, 8, 16, 32):
            model = family(name, **{key: count, "num_local_experts": count})
            points.append({"experts": count, **bench(args, model, 4, 128, 16)})
        found[name] = fitted(args, name, "experts", points)
    return found


def blocks(args):
    """Step time by length of the sequence for every kind of blocks."""
    found = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
            file = pathlib.Path(scratch, f"{kind}.gguf")
            run([sys.executable, pathlib.Path(__file__).parent / "random_gguf.py", file, "--size", "small", "--type", kind])
            points = [bench(args, file, 1, seq, 16) for seq in (128, 256, 512, 1024)]
            found[kind] = fitted(args, kind, "seq", points)
            file.unlink()
    return found


def ranks(args):
    """Seconds per step by number of processes, of one thread each, with the same number of rows per process."""
    points = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = pathlib.Path(scratch, "rows.jsonl")
        rows.write_text("".join(json.dumps({"text": f"{index} " + "word " * 126}) + "\n" for index in range(512)))
        for count in (1, 2, 4):
            out = pathlib.Path(scratch, f"out-{count}")
            command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", count, "-x", "RAYON_NUM_THREADS=1", args.monteclora,
                       "train", "-m", args.base, "--data", rows, "-o", out, "--max-steps", args.steps + 3, "--batch-size", 4,
                       "--set", "train.logging_steps=1", "--max-seq-length", 128]
            run(command)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            ends = [line["wall_s"] for line in lines if line["type"] == "train"]
            seconds = [later - earlier for earlier, later in zip(ends, ends[1:])]
            # The memory is that of rank 0.
            points.append({"ranks": count, "step_s": sorted(seconds)[len(seconds) // 2],
                           "peak_gb": max(line.get("peak_memory_bytes", 0) for line in lines) / 1e9})
    return fitted(args, "ranks, memory per rank", "ranks", points)


def samples(args):
    """Step time by number of mixture components, in turns, so that the machine's drift hits all alike; the best of each."""
    counts, best = (1, 2, 4, 8, 16, 32), {}
    for _ in range(args.rounds):
        for count in counts:
            seconds = measure(args, SHAPES[BASE], 4, 128, 16, count)["step_s"]
            best[count] = min(seconds, best.get(count, math.inf))
    if not args.json:
        print("samples: " + ", ".join(f"{count}: {best[count]:.3f} s" for count in counts)
              + f"; slowest over fastest {max(best.values()) / min(best.values()):.3f}\n", flush=True)
    return best


def write_checkpoint(path, shape):
    """A model directory with random bf16 weights, written tensor by tensor."""
    hidden, intermediate, layers, heads, kv_heads, vocab, tied = shape
    kv = kv_heads * hidden // heads
    tensors = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {prefix + "input_layernorm.weight": [hidden], prefix + "post_attention_layernorm.weight": [hidden]}
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": [rows, columns] for name, rows, columns in
                    (("q", hidden, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, hidden))}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": [rows, columns] for name, rows, columns in
                    (("gate", intermediate, hidden), ("up", intermediate, hidden), ("down", hidden, intermediate))}
    if not tied:
        tensors["lm_head.weight"] = [vocab, hidden]
    header, end = {}, 0
    for name, dims in tensors.items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # 0x3c.. is about 0.01 in bf16.
    block = bytes(value if index % 2 == 0 else 0x3C for index, value in enumerate(os.urandom(1 << 20)))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config(shape)))
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(end // len(block)):
            file.write(block)
        file.write(block[:end % len(block)])
        file.flush()
        os.fsync(file.fileno())
    return path / "model.safetensors"


def load(args):
    """Seconds to read a checkpoint of about 3 billion weights that is not in the page cache: `cat`, and the trainer."""
    shape = (3072, 8192, 28, 24, 8, 128256, True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        file = write_checkpoint(pathlib.Path(scratch), shape)
        size, found = file.stat().st_size, {"cat": [], "trainer": []}
        for _ in range(args.rounds):
            for name in found:
                with open(file) as handle:
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if name == "cat":
                    began = time.monotonic()
                    subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
                    found[name].append(time.monotonic() - began)
                else:
                    command = [args.monteclora, "bench", "train", "-m", scratch, "--dtype", "bf16", "--batch", 1, "--seq", 8, "--rank", 1,
                               "--steps", 2, "--json"]
                    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True, text=True)
                    found[name].append(json.loads(done.stdout)["load_s"])
    best = {name: min(seconds) for name, seconds in found.items()}
    if not args.json:
        print(f"load: {size / 1e9:.2f} GB; cat {best['cat']:.2f} s, trainer {best['trainer']:.2f} s, "
              f"{size / 1e9 / best['trainer']:.2f} GB/s, {best['cat'] / best['trainer']:.2f} of cat's speed\n", flush=True)
    return {"bytes": size, **found}


def exponent(points, key, value):
    """Slope of log(value) over log(key)."""
    xs, ys = [math.log(p[key]) for p in points], [math.log(p[value]) for p in points]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--monteclora", default="target/release/monteclora", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=["auto", "f32", "bf16"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="products with frozen weights in bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="of samples and load")
    parser.add_argument("--scratch", help="where load writes its 6.4 GB, and blocks and ranks their files; default: the system's directory for temporary files")
    parser.add_argument("--only", default="samples,batch,seq,rank,layers,size", help="sweeps; there are also families, experts, blocks, ranks and load")
    parser.add_argument("--base", help="the base model of ranks")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if "ranks" in args.only.split(",") and not args.base:
        parser.error("ranks needs --base")
    others = {"samples": samples, "load": load, "families": families, "experts": experts, "blocks": blocks, "ranks": ranks}
    base = SHAPES[BASE]
    layers = lambda n: base[:2] + (n,) + base[3:]
    sweeps = {
        "batch": ("batch", [(BASE, base, batch, 128, 16) for batch in (1, 2, 4, 8)]),
        "seq": ("seq", [(BASE, base, 1, seq, 16) for seq in (128, 256, 512, 1024)]),
        "rank": ("rank", [(BASE, base, 4, 128, rank) for rank in (4, 16, 64)]),
        "layers": ("layers", [(f"{BASE}, {n} layers", layers(n), 4, 128, 16) for n in (8, 15, 30)]),
        "size": ("parameters", [(name, shape, 2, 128, 16) for name, shape in SHAPES.items()]),
    }
    results = {}
    for sweep in args.only.split(","):
        if sweep in others:
            results[sweep] = others[sweep](args)
            continue
        key, points = sweeps[sweep]
        found = []
        for name, shape, batch, seq, rank in points:
            point = {"model": name, **measure(args, shape, batch, seq, rank)}
            found.append(point)
            if not args.json:
                print(f"{name:<24} batch {batch} x {seq:<5} r {rank:<3} {point['parameters'] / 1e9:6.2f} B {point['step_s']:8.2f} s "
                      f"{point['peak_gb']:6.2f} GB {point['gflop']:8.0f} GFLOP {point['gflop_per_s']:6.0f} GFLOP/s", flush=True)
        slopes = {"time": exponent(found, key, "step_s"), "memory": exponent(found, key, "peak_gb")}
        results[sweep] = {"points": found, "exponents": slopes}
        if not args.json:
            print(f"{sweep}: time ~ {key}^{slopes['time']:.2f}, memory ~ {key}^{slopes['memory']:.2f}\n", flush=True)
    if args.json:
        print(json.dumps(results))


main()
