#!/usr/bin/env python3
"""How step time and memory grow with batch, sequence, rank, layers and model size.

    cargo build --release
    benches/scale.py [--monteclora target/release/monteclora] [--only size,batch,...] [--dtype bf16] [--json]

Runs `bench train --random-weights` on config.json files of known Llama shapes, a few steps each, and prints for every point
the median step, the peak, the arithmetic a step needs and the rate reached, and for every sweep the exponent p of the least
squares fit `time = c * x^p` (1 is linear). Give it the machine to itself.
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

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


def measure(args, shape, batch, seq, rank):
    with tempfile.TemporaryDirectory() as scratch:
        pathlib.Path(scratch, "config.json").write_text(json.dumps(config(shape)))
        command = [args.monteclora, "bench", "train", "-m", scratch, "--random-weights", "--batch", batch, "--seq", seq, "--rank", rank,
                   "--steps", args.steps, "--dtype", args.dtype, "--json"] + (["--gradient-checkpointing"] if args.gradient_checkpointing else [])
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"bench train failed with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    seconds = batch * seq / found["tokens_per_second"]
    work = gflop(shape, batch, seq, rank)
    return {"batch": batch, "seq": seq, "rank": rank, "layers": shape[2], "parameters": sizes(shape)[2], "step_s": seconds,
            "peak_gb": found["peak_gb"], "gflop": work, "gflop_per_s": work / seconds}


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
    parser.add_argument("--only", default="batch,seq,rank,layers,size")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
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
