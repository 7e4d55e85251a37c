"""Writes nomad.json: the best values that NOMAD, a derivative-free optimiser by mesh adaptive direct search, finds.

Usage: make_nomad.py [OUT], where OUT is tests/data/tune/nomad.json unless given; needs PyNomadBBO. What is in the repository
was written with PyNomadBBO 4.6.0 (NOMAD 4.6.0) and Python 3.11.

Each function is minimised for each budget of evaluations and each seed, from the middle of the box. "default" is NOMAD
as it comes. "poll" is the poll of MADS alone, ORTHO 2N: no searches, and no quadratic models, which by default also
choose the last direction of a poll and the order in which its points are evaluated. "default" and "poll" of a budget
are medians over the seeds of the best value found; "default_worst" and "poll_worst" are the largest of these values.
Rastrigin's function is shifted: the middle is its minimum otherwise, and NOMAD 4.6.0 crashes with its defaults there.

Real variables are searched in [0, 1] and mapped to their ranges inside the function. Integers are given to NOMAD as
such, and so are the categories, as 0 to 2. The middle of 1..16 is 9 here, as 1 + floor(16 u) is at u = 0.5.
"""
import json
import math
import sys
from importlib.metadata import version
from statistics import median

import PyNomad

BUDGETS, SEEDS = (50, 100, 200), range(1, 11)
SETTINGS = {
    "default": [],
    "poll": ["QUAD_MODEL_SEARCH no", "NM_SEARCH no", "SPECULATIVE_SEARCH no", "DIRECTION_TYPE ORTHO 2N",
             "EVAL_QUEUE_SORT DIR_LAST_SUCCESS"],
}


def sphere(x):
    return sum((a - b) ** 2 for a, b in zip(x, (1.0, -2.0, 0.5)))


def rosenbrock(x):
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def ellipsoid(x):
    return sum(10.0 ** i * (a - 0.3) ** 2 for i, a in enumerate(x))


def rastrigin(x):
    shifted = [a - b for a, b in zip(x, (1.3, -0.8))]
    return sum(10.0 + a * a - 10.0 * math.cos(2.0 * math.pi * a) for a in shifted)


def mixed(x):
    return (x[0] - 0.7) ** 2 + (x[1] - 7.0) ** 2 / 10.0 + (0.3, 0.0, 0.6)[int(x[2])]


def real(n, low, high):
    return [("R", low, high)] * n


# The function and, of each variable, whether it is real or an integer, and its range.
FUNCTIONS = {
    "sphere": (sphere, real(3, -5.0, 5.0)),
    "rosenbrock": (rosenbrock, real(2, -2.0, 2.0)),
    "ellipsoid": (ellipsoid, real(4, -1.0, 1.0)),
    "rastrigin_shifted": (rastrigin, real(2, -5.12, 5.12)),
    "mixed": (mixed, [("R", 0.0, 1.0), ("I", 1, 16), ("I", 0, 2)]),
}


def best(function, variables, settings, budget, seed):
    """The lowest value among those that NOMAD evaluates."""
    values = []

    def evaluate(point):
        coordinates = [point.get_coord(i) for i in range(point.size())]
        x = [low + u * (high - low) if kind == "R" else u for u, (kind, low, high) in zip(coordinates, variables)]
        values.append(function(x))
        point.setBBO(repr(values[-1]).encode())
        return 1

    low = [0.0 if kind == "R" else low for kind, low, _ in variables]
    high = [1.0 if kind == "R" else high for kind, _, high in variables]
    start = [0.5 if kind == "R" else low + (high - low + 1) // 2 for kind, low, high in variables]
    kinds = " ".join(kind for kind, _, _ in variables)
    result = PyNomad.optimize(evaluate, start, low, high, [
        f"DIMENSION {len(variables)}", f"BB_INPUT_TYPE ( {kinds} )", "BB_OUTPUT_TYPE OBJ", f"MAX_BB_EVAL {budget}",
        f"SEED {seed}", "DISPLAY_DEGREE 0", *settings])
    assert len(values) == result["nb_evals"] <= budget
    # NOMAD takes values for equal that differ by less than 1e-13.
    assert abs(min(values) - result["f_single_best"]) < 1e-12
    return min(values)


def main():
    functions = {}
    for name, (function, variables) in FUNCTIONS.items():
        budgets = {}
        for budget in BUDGETS:
            found = {key: [best(function, variables, settings, budget, seed) for seed in SEEDS]
                     for key, settings in SETTINGS.items()}
            budgets[str(budget)] = {key: median(values) for key, values in found.items()}
            budgets[str(budget)].update({f"{key}_worst": max(values) for key, values in found.items()})
            print(name, budget, budgets[str(budget)])
        functions[name] = {"budget": budgets}
    with open(sys.argv[1] if len(sys.argv) > 1 else "tests/data/tune/nomad.json", "w") as file:
        json.dump({"nomad": version("PyNomadBBO"), "functions": functions}, file, allow_nan=False)
        file.write("\n")


main()
