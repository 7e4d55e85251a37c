"""Writes svd.json: singular values of the B of small LoRA modules and what follows from them, by numpy in float64.

Usage: make_svd.py [OUT]; needs numpy. "name", "rank" (r), "in", "out", A (r x in) and B (out x r) are as an adapter has them
(every number is a float32 exactly); "singular_values" are those of B, largest first; "product" is B@A; "sigma" is
0.02 / max(d_k, 1e-3 d_1).
"""
import json
import sys

import numpy as np

SIGMA, FLOOR = 0.02, 1e-3
SHAPES = [("small", 2, 3, 4), ("tall", 4, 9, 7), ("rank-one", 3, 5, 3), ("one-row", 1, 6, 5)]


def module(name, rank, n_in, n_out, random):
    a = random.normal(0.0, 0.5, (rank, n_in)).astype(np.float32)
    b = random.normal(0.0, 0.5, (n_out, rank)).astype(np.float32)
    if name == "rank-one":
        b[:, 1] = b[:, 0]
        b[:, 2] = 0.0
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    d = np.linalg.svd(wide_b, full_matrices=False)[1]
    sigma = SIGMA / np.maximum(d, FLOOR * d[0])
    return {
        "name": name, "rank": rank, "in": n_in, "out": n_out,
        "A": a.astype(float).tolist(), "B": b.astype(float).tolist(),
        "expected": {"singular_values": d.tolist(), "product": (wide_b @ wide_a).tolist(), "sigma": sigma.tolist()},
    }


def main():
    random = np.random.default_rng(1)
    modules = [module(*shape, random) for shape in SHAPES]
    for m in modules:
        print(m["name"], np.array(m["expected"]["singular_values"]), np.array(m["expected"]["sigma"]))
    with open(sys.argv[1] if len(sys.argv) > 1 else "svd.json", "w") as file:
        json.dump({"sigma": SIGMA, "floor": FLOOR, "modules": modules}, file, indent=1)
        file.write("\n")


main()
