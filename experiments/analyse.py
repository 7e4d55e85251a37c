"""Makes docs/experiment.md and its figures from the result lines."""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np

import figures
import metrics
import plan

HERE = Path(__file__).resolve().parent
PAPER_SCALE = 0.0207  # standard deviation of A's entries at the paper's preset, r = 16, N = 4, before training
METHOD_NAMES = {
    "lora": "LoRA",
    "lora-dropout": "LoRA + dropout",
    "lora-fa": "LoRA-FA",
    "fixed-noise": "fixed noise",
    "monteclora-paper": "MonteCLoRA paper",
    "monteclora-elbo": "MonteCLoRA elbo",
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "ensemble": "3 LoRA seeds",
}
KIND_NAMES = {
    "mean": "mean",
    "posterior": "average, as trained",
    "rows": "average, fit rows",
    "svd": "average, fit svd",
    "ensemble": "average",
}
TASK_NAMES = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2"}


class Cell:
    """One result line."""

    def __init__(self, record):
        self.record = record
        self.job = record["job"]
        self.diverged = record["status"] == "diverged"

    def kinds(self):
        """The predictors there are values of, the mean first."""
        return [kind for kind in KIND_NAMES if kind in self.record.get("test", {})]

    def predictions(self, kind, part="test"):
        """A predictor's values of the rows."""
        columns = self.record[part][kind]
        return metrics.Predictions(columns["nll"], columns["correct"])

    def column(self, kind, name, part="test"):
        """One column of a predictor."""
        return np.array(self.record[part][kind][name])

    def temperature(self, kind):
        """A predictor's temperature."""
        return self.record["temperature"][kind]["temperature"]

    def chosen(self):
        """The geometry whose fit says the lower NLL on the rows it was fitted on; of equals, rows."""
        return min(plan.GEOMETRIES, key=lambda geometry: self.record["fit"][geometry]["after"]["nll"])


class Results:
    """All result lines of a directory, by job."""

    def __init__(self, directory):
        self.cells = {}
        for stage in plan.STAGES:
            path = directory / f"{stage}.jsonl"
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            for line in filter(str.strip, lines):
                cell = Cell(json.loads(line))
                self.cells.setdefault(cell.job["id"], cell)

    def adapter(self, task, method, seed):
        """A finished cell of stage A that did not diverge, or none."""
        cell = self.cells.get(plan.adapter_job("a", task, method, seed)["id"])
        return cell if cell and not cell.diverged else None

    def adapters(self, task, method, seeds=plan.SEEDS):
        """The finished cells of a method."""
        if method == "ensemble":
            cell = self.cells.get(f"a-{task}-ensemble")
            return [cell] if cell and not cell.diverged else []
        return [cell for seed in seeds if (cell := self.adapter(task, method, seed))]

    def grid(self, method, rate, batch, seed):
        """A cell of stage B, or none."""
        return self.cells.get(plan.grid_job(method, rate, batch, seed)["id"])


# --- primary endpoints ------------------------------------------------------------------------------------------------


class Endpoint:
    """An estimate, its resampled values and what it rests on."""

    def __init__(self, name, supported_below, parts, estimate, values, complete):
        self.name = name
        self.supported_below = supported_below
        self.parts = parts
        self.estimate = estimate
        self.values = values
        self.complete = complete

    def verdict(self, adjusted_p=None):
        """What the interval, or for a primary endpoint Holm's p, says: for the claim, against it, or nothing."""
        low, high = metrics.interval(self.values)
        if adjusted_p is not None and adjusted_p >= 0.05:
            return "null"
        if low <= 0 <= high:
            return "null: the interval holds 0"
        return "supported" if (high < 0) == self.supported_below else "opposite sign"


def gap_endpoint(results, seeds, rates, name, first="monteclora-paper", second="lora", worst=False):
    """H1: difference between two methods' worst-best gap of NLL over the grid, mean over the seeds that both finished."""
    whole = {}
    for seed in seeds:
        pair = [grid_losses(results, method, rates, seed, worst) for method in (first, second)]
        if all(part is not None for part in pair):
            whole[seed] = pair
    if not whole:
        return None
    weights = metrics.resamples(len(next(iter(whole.values()))[0][0]), "sst2")
    differences, parts = [], []
    for seed, (one, other) in whole.items():
        differences.append(gap(weights, one) - gap(weights, other))
        observed = [float(np.ptp(losses.mean(axis=1))) for losses in (one, other)]
        parts.append((f"seed {seed}", observed[0] - observed[1]))
    estimate = statistics.mean(value for _, value in parts)
    return Endpoint(name, True, parts, estimate, np.mean(differences, axis=0), len(whole) == len(seeds))


def gap(weights, losses):
    """The worst-best gap of each resample; `losses` is [cells, rows]."""
    means = weights @ losses.T / losses.shape[1]
    return means.max(axis=1) - means.min(axis=1)


def grid_losses(results, method, rates, seed, worst=False):
    """NLL of every row in every cell of a seed's grid, [cells, rows]; none while a cell is not finished.

    A diverged cell has ln 2 in every row; with `worst`, the NLL of the worst cell of any method at that seed.
    """
    cells = [results.grid(method, rate, batch, seed) for batch in plan.BATCHES for rate in rates]
    if not all(cells):
        return None
    whole = [cell.predictions("mean").nll for cell in cells if not cell.diverged]
    if not whole:
        return None
    stand_in = np.full(len(whole[0]), math.log(2))
    if worst:
        others = [cell for cell in results.cells.values() if cell.job["stage"] == "b" and cell.job["seed"] == seed]
        losses = [cell.predictions("mean").nll for cell in others if not cell.diverged]
        stand_in = max([stand_in, *losses], key=np.mean)
    return np.array([stand_in if cell.diverged else cell.predictions("mean").nll for cell in cells])


def row_endpoint(results, seeds, name, supported_below, measure, method="lora", kind=None, tasks=("cola", "mrpc")):
    """H2 and H3: a difference `measure(cell, kind, weights)` between average and mean, mean over seeds and then tasks.

    The rows of a task are the same for every seed, so one draw of rows serves all its seeds.
    """
    parts, values, estimates, complete = [], [], [], True
    for task in tasks:
        cells = [cell for cell in results.adapters(task, method, seeds) if kind is None or kind in cell.kinds()]
        expected = 1 if method == "ensemble" else len(seeds)
        complete = complete and len(cells) == expected
        if not cells:
            continue
        rows = len(cells[0].record["test"]["answer"])
        weights = metrics.resamples(rows, task)
        once = np.ones((1, rows), dtype=np.float32)
        of_cells = [(cell, kind or cell.chosen()) for cell in cells]
        observed = [float(measure(cell, which, once)[0]) for cell, which in of_cells]
        for (cell, which), value in zip(of_cells, observed):
            parts.append((f"{TASK_NAMES[task]} seed {cell.job.get('seed', '1-3')} ({which})", value))
        estimates.append(statistics.mean(observed))
        values.append(np.mean([measure(cell, which, weights) for cell, which in of_cells], axis=0))
    if not estimates:
        return None
    return Endpoint(name, supported_below, parts, statistics.mean(estimates), np.mean(values, axis=0), complete)


def nll_difference(cell, kind, weights):
    """NLL(average) - NLL(temperature-scaled mean)."""
    mean = cell.predictions("mean").at(cell.temperature("mean"))
    return weights @ (cell.predictions(kind).nll - mean.nll) / weights.sum(axis=1)


def nll_difference_both(cell, kind, weights):
    """The same, the average with its own temperature too."""
    mean = cell.predictions("mean").at(cell.temperature("mean"))
    average = cell.predictions(kind).at(cell.temperature(kind))
    return weights @ (average.nll - mean.nll) / weights.sum(axis=1)


def auroc_difference(measure):
    """AUROC(average's entropy or mutual information) - AUROC(confidence of the mean), errors being those of each."""

    def difference(cell, kind, weights):
        average, mean = cell.predictions(kind), cell.predictions("mean")
        return metrics.auroc(doubt(cell, kind, measure), ~average.correct, weights) - metrics.auroc(
            mean.doubt, ~mean.correct, weights
        )

    return difference


def doubt(cell, kind, measure, part="test"):
    """How unsure a predictor is of each row."""
    if measure == "confidence":
        return cell.predictions(kind, part).doubt
    return cell.column(kind, measure, part)


def primaries(results, seeds):
    """The three primary endpoints; none for one that has no data."""
    return [
        gap_endpoint(results, plan.SEEDS, plan.LEARNING_RATES, "H1: worst-best gap of NLL, MonteCLoRA paper - LoRA"),
        row_endpoint(results, seeds, "H2: NLL, average - temperature-scaled mean", True, nll_difference),
        row_endpoint(
            results, seeds, "H3: AUROC of errors, average's entropy - mean's confidence", False,
            auroc_difference("predictive_entropy"),
        ),
    ]


# --- the report -------------------------------------------------------------------------------------------------------


def number(value, places=3):
    """A number as the tables print it."""
    return "" if value is None or math.isnan(value) else f"{value:.{places}f}"


def table(heads, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def average(values):
    """The mean of the values there are, or none."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.mean(values) if values else None


def state(results):
    """Which cells are finished, which diverged and which are missing."""
    rows, missing = [], []
    for stage, jobs in ((stage, make()) for stage, make in plan.STAGES.items()):
        cells = [results.cells.get(job["id"]) for job in jobs]
        diverged = sum(1 for cell in cells if cell and cell.diverged)
        rows.append((stage, len(jobs), sum(map(bool, cells)), diverged))
        absent = [job for job, cell in zip(jobs, cells) if not cell]
        if absent:
            missing.append(f"Not finished in stage {stage} ({len(absent)}): {named(absent)}.\n")
    processors = sorted({cell.record["processor"] for cell in results.cells.values()})
    programs = sorted({cell.record["program"] for cell in results.cells.values()})
    made_by = f"Programs: {', '.join(programs)}. Processors: {', '.join(processors)}.\n" if programs else ""
    return "\n".join([table(("stage", "cells planned", "finished", "of these diverged"), rows), made_by, *missing])


def named(jobs):
    """Jobs by task and method, with their seeds; of the grid, how many cells of each seed."""
    of_method = {}
    for job in jobs:
        of_method.setdefault((job["task"], job["method"]), []).append(job)
    parts = []
    for (task, method), members in of_method.items():
        seeds = sorted({job["seed"] for job in members if "seed" in job})
        counts = [sum(job.get("seed") == seed for job in members) for seed in seeds]
        of_seeds = [f"{seed} ({count} cells)" if "batch" in members[0] else str(seed) for seed, count in zip(seeds, counts)]
        parts.append(f"{TASK_NAMES[task]} {METHOD_NAMES[method]}" + (f" seed {', '.join(of_seeds)}" if seeds else ""))
    return "; ".join(parts)


def primary_section(results, seeds):
    """The three endpoints with intervals, p and Holm's p, and the value of every seed."""
    found = primaries(results, seeds)
    there = [endpoint for endpoint in found if endpoint]
    if not there:
        return "No cell of the primary endpoints is finished.\n"
    raw = [metrics.p_value(endpoint.values) if endpoint else 1.0 for endpoint in found]
    adjusted = metrics.holm(raw)
    rows = []
    for endpoint, p, holm in zip(found, raw, adjusted):
        if endpoint:
            low, high = metrics.interval(endpoint.values)
            verdict = endpoint.verdict(holm)
            status = verdict if endpoint.complete else f"not finished; so far {verdict}"
            rows.append((endpoint.name, number(endpoint.estimate, 4), f"{low:.4f} to {high:.4f}", number(p, 4), number(holm, 4), status))
    text = table(("endpoint", "estimate", "95 % interval", "p", "Holm p", "reading"), rows)
    for endpoint in there:
        values = "; ".join(f"{name}: {value:+.4f}" for name, value in endpoint.parts)
        text += f"\n{endpoint.name.split(':')[0]} by seed: {values}.\n"
    return text


def gap_section(results):
    """H1 with and without the largest rate, and the other methods against LoRA."""
    variants = [
        ("all rates", plan.LEARNING_RATES, False),
        ("without 1e-2", plan.LEARNING_RATES[:-1], False),
        ("all rates, diverged = worst cell", plan.LEARNING_RATES, True),
    ]
    rows = []
    for method in (*plan.METHODS_B[1:], *plan.COMPARED):
        for label, rates, worst in variants:
            endpoint = gap_endpoint(results, plan.SEEDS, rates, "", first=method, worst=worst)
            if endpoint:
                rows.append((METHOD_NAMES[method], label, *estimate_of(endpoint), len(endpoint.parts)))
    return table(("method - LoRA", "grid", "difference of gaps", "95 % interval", "reading", "seeds"), rows) if rows else ""


def estimate_of(endpoint):
    """Estimate, interval and reading of an endpoint, as table cells."""
    low, high = metrics.interval(endpoint.values)
    return number(endpoint.estimate, 4), f"{low:.4f} to {high:.4f}", endpoint.verdict()


def difference_section(results):
    """The differences of H2 and H3 for every posterior, without p: secondary."""
    measures = [
        ("NLL, average - mean with T", True, nll_difference),
        ("NLL, average with T - mean with T", True, nll_difference_both),
        ("AUROC, entropy - confidence", False, auroc_difference("predictive_entropy")),
        ("AUROC, mutual information - confidence", False, auroc_difference("mutual_information")),
    ]
    rows = []
    for method in plan.METHODS_A:
        for kind in ("posterior", *plan.GEOMETRIES):
            for label, below, measure in measures:
                endpoint = row_endpoint(results, plan.SEEDS, "", below, measure, method, kind)
                if endpoint:
                    name = f"{METHOD_NAMES[method]}, {KIND_NAMES[kind]}"
                    rows.append((name, label, *estimate_of(endpoint), len(endpoint.parts)))
    heads = ("posterior", "difference", "estimate", "95 % interval", "reading", "cells")
    return table(heads, rows) if rows else "No cell is finished.\n"


def groups(results, task):
    """(method, predictor, cells) of a task, in the order of the tables."""
    for method in (*plan.METHODS_A, *plan.COMPARED, "ensemble"):
        cells = results.adapters(task, method)
        for kind in KIND_NAMES:
            having = [cell for cell in cells if kind in cell.kinds()]
            if having:
                yield method, kind, having


def domain_section(results, task):
    """Scores of the test rows, means over seeds, without and with temperature."""
    plain, scaled = [], []
    for method, kind, cells in groups(results, task):
        name = (METHOD_NAMES[method], KIND_NAMES[kind], len(cells))
        raw = [metrics.scores(cell.predictions(kind)) for cell in cells]
        row = [average(score[key] for score in raw) for key in ("accuracy", "nll", "ece", "floor", "brier", "auroc")]
        row += [average(errors_auroc(cell, kind, measure) for cell in cells) for measure in ("predictive_entropy", "mutual_information")]
        row.append(average(score["aurc"] for score in raw))
        plain.append((*name, *map(number, row)))
        temperatures = [cell.temperature(kind) for cell in cells]
        cooled = [metrics.scores(cell.predictions(kind).at(t)) for cell, t in zip(cells, temperatures)]
        row = [average(temperatures), *(average(score[key] for score in cooled) for key in ("nll", "ece", "floor", "brier", "auroc", "aurc"))]
        scaled.append((*name, *map(number, row)))
    if not plain:
        return "No cell is finished.\n"
    heads = ("adapter", "prediction", "seeds")
    raw_heads = (*heads, "accuracy", "NLL", "ECE", "ECE floor", "Brier", "AUROC confidence", "AUROC entropy", "AUROC mutual information", "risk-coverage area")
    scaled_heads = (*heads, "T", "NLL", "ECE", "ECE floor", "Brier", "AUROC confidence", "risk-coverage area")
    return table(raw_heads, plain) + "\nWith temperature (accuracy is as above):\n\n" + table(scaled_heads, scaled)


def errors_auroc(cell, kind, measure):
    """AUROC of errors by a measure that only averages have."""
    if measure not in cell.record["test"][kind]:
        return None
    return float(metrics.auroc(cell.column(kind, measure), ~cell.predictions(kind).correct)[0])


def out_of_domain_section(results, task):
    """AUROC of telling the other set's rows from the test rows."""
    rows = []
    for method, kind, cells in groups(results, task):
        values = []
        for measure in ("confidence", "predictive_entropy", "mutual_information"):
            values.append(average(foreign_auroc(cell, kind, measure) for cell in cells))
        rows.append((METHOD_NAMES[method], KIND_NAMES[kind], len(cells), *map(number, values)))
    heads = ("adapter", "prediction", "seeds", "1 - confidence", "entropy", "mutual information")
    return table(heads, rows) if rows else "No cell is finished.\n"


def foreign_auroc(cell, kind, measure):
    """AUROC of one cell; none where the predictor has no such measure."""
    if measure != "confidence" and measure not in cell.record["test"][kind]:
        return None
    parts = [doubt(cell, kind, measure, part) for part in ("test", "ood")]
    foreign = np.repeat([False, True], [len(part) for part in parts])
    return float(metrics.auroc(np.concatenate(parts), foreign)[0])


def grid_section(results):
    """NLL and accuracy of every cell of stage B, and their spread."""
    heads = ["method", "batch", *(f"{rate:g}" for rate in plan.LEARNING_RATES)]
    rows, spreads = [], []
    for method in (*plan.METHODS_B, *plan.COMPARED):
        for batch in plan.BATCHES:
            rows.append((METHOD_NAMES[method], batch, *(grid_cell(results, method, rate, batch) for rate in plan.LEARNING_RATES)))
        row = spread_of(results, method)
        if row:
            spreads.append((METHOD_NAMES[method], *row))
    text = "Mean NLL over seeds (accuracy; diverged of finished):\n\n" + table(heads, rows)
    if spreads:
        heads = ("method", "whole seeds", "gap", "gap without 1e-2", "IQR", "median NLL", "best NLL", "accuracy gap", "diverged")
        text += "\nOver the grid of a seed, means over the seeds whose grid is finished:\n\n" + table(heads, spreads)
    return text


def grid_cell(results, method, rate, batch):
    """What the table says of one setting."""
    cells = [cell for seed in plan.SEEDS if (cell := results.grid(method, rate, batch, seed))]
    whole = [cell.predictions("mean") for cell in cells if not cell.diverged]
    if not cells:
        return ""
    diverged = f"; {len(cells) - len(whole)} of {len(cells)}" if len(whole) < len(cells) else ""
    if not whole:
        return f"diverged{diverged}"
    return f"{average(p.nll.mean() for p in whole):.3f} ({average(p.correct.mean() for p in whole):.3f}{diverged})"


def spread_of(results, method):
    """Gap, IQR, median and best of NLL and gap of accuracy over a method's grid."""
    rows, diverged = [], 0
    for seed in plan.SEEDS:
        losses = grid_losses(results, method, plan.LEARNING_RATES, seed)
        lower = grid_losses(results, method, plan.LEARNING_RATES[:-1], seed)
        if losses is None or lower is None:
            continue
        cells = [results.grid(method, rate, batch, seed) for batch in plan.BATCHES for rate in plan.LEARNING_RATES]
        diverged += sum(cell.diverged for cell in cells)
        right = [0.5 if cell.diverged else float(cell.predictions("mean").correct.mean()) for cell in cells]
        means = losses.mean(axis=1)
        upper, under = np.percentile(means, [75, 25])
        rows.append((np.ptp(means), np.ptp(lower.mean(axis=1)), upper - under, np.median(means), means.min(), np.ptp(right)))
    if not rows:
        return None
    return (len(rows), *(number(float(value)) for value in np.mean(rows, axis=0)), diverged)


def evidence_section(results):
    """The three predictions about the evidence bound and the scale of a fit."""
    rows = []
    cells = [cell for cell in results.cells.values() if cell.job["stage"] == "a" and not cell.diverged]
    for cell in cells:
        if cell.job["method"] != "monteclora-elbo":
            continue
        training = cell.record["training"]
        posterior = training["posterior"]
        predicted = predicted_rise(training)
        ratio, measured = None, None
        if "rise" in cell.record:
            measured = cell.record["rise"]["draw_loss"] - cell.record["rise"]["mean_loss"]
            ratio = predicted / measured if measured else None
        reading = "not measured" if ratio is None else "not small" if measured > 0.05 else "within 20 %" if abs(ratio - 1) <= 0.2 else "outside"
        rows.append((
            cell.job["id"], number(posterior["spread_all"], 4), number(posterior["spread_largest"], 4),
            "below .05" if posterior["spread_all"] < 0.05 else "not below .05",
            number(predicted, 5), number(measured, 5), number(ratio), reading,
        ))
    heads = ("cell", "sd of ln v, all rows", "largest of a module", "reading", "1/2 sum v in h", "measured rise", "ratio", "reading")
    text = table(heads, rows) if rows else "No cell with an evidence bound is finished.\n"
    scales = []
    for cell in cells:
        if cell.job["method"] == "lora":
            ratio = cell.record["fit"]["rows"]["sigma"] / PAPER_SCALE
            scales.append((cell.job["id"], number(ratio * PAPER_SCALE, 4), number(ratio, 2), "within 3 to 30" if 3 <= ratio <= 30 else "outside"))
    if scales:
        text += f"\nScale that a search accepts (fit rows), over the paper's {PAPER_SCALE}:\n\n"
        text += table(("cell", "sigma", "over the paper's", "reading"), scales)
    return text


def predicted_rise(training):
    """1/2 sum v in h, nats per trained token, from the posterior: at its fixed point h = (T/N) (1/v - 1/prior variance)."""
    temperature = training["monteclora"].get("temperature", 1.0)
    return 0.5 * temperature * training["posterior"]["in_one_minus_variance"] / training["trained_tokens"]


def cost_section(results):
    """Seconds of each step, by task and method: medians over the cells."""
    steps = {}
    for cell in results.cells.values():
        job = cell.job
        for name, seconds in cell.record["seconds"].items():
            step = name.split("-")[0] if name.split("-")[0] in ("test", "ood", "calibrate") else name
            steps.setdefault((job["stage"], TASK_NAMES[job["task"]], METHOD_NAMES[job["method"]]), {}).setdefault(step, []).append(seconds)
    heads = ["stage", "task", "method", "train", "fit-rows", "fit-svd", "calibrate", "test", "ood"]
    rows = [
        (*key, *(number(statistics.median(of[step]), 0) if step in of else "" for step in heads[3:]))
        for key, of in sorted(steps.items())
    ]
    return table(heads, rows) if rows else "No cell is finished.\n"


def disagreements(results):
    """Where the program's own scores of the test rows and those made here differ by more than rounding."""
    found = []
    for cell in results.cells.values():
        for kind, theirs in cell.record.get("scores", {}).items():
            if cell.diverged or kind == "base":
                continue
            ours = metrics.scores(cell.predictions(kind))
            found += [
                f"- `{cell.job['id']}` {kind} {name}: {theirs[name]} by the program, {ours[name]:.5g} here"
                for name in theirs
                if abs(ours[name] - theirs[name]) > 2e-3
            ]
    return "\n".join(found) + "\n" if found else "None: accuracy, NLL, ECE, Brier and AUROC of all finished cells agree.\n"


def report(results, images):
    """The whole page."""
    stage_a = []
    for task in ("cola", "mrpc"):
        stage_a += [
            f"### {TASK_NAMES[task]}\n", domain_section(results, task), "\n".join(images.get(task, [])),
            "Out of domain: AUROC of telling the other set's rows from the test rows.\n", out_of_domain_section(results, task),
        ]
    conclusions = HERE / "conclusions.md"
    parts = [
        "# Experiment: does the posterior help?\n",
        "Generated by `experiments/analyse.py` from `experiments/results/`; do not edit. Questions, formulas and order were fixed beforehand: "
        "[PREREGISTRATION](../experiments/PREREGISTRATION.md). T is temperature.\n",
        *([conclusions.read_text(encoding="utf-8")] if conclusions.exists() else []),
        "## State\n", state(results),
        "## Primary endpoints\n", primary_section(results, plan.SEEDS),
        "## Stage A: calibration and errors\n", *stage_a,
        "### Every posterior against the mean\n", "Secondary: intervals without correction.\n", difference_section(results),
        "## Stage B: robustness to learning rate and batch\n", grid_section(results), gap_section(results), "\n".join(images.get("sst2", [])),
        "## Predictions about the evidence bound\n", evidence_section(results),
        "## Cost\n", "Median seconds per step.\n", cost_section(results),
        "## Check of the program's own scores\n", disagreements(results),
    ]
    later = primary_section(results, plan.SEEDS + plan.LATER_SEEDS)
    if any(results.adapter(task, "lora", seed) for task in ("cola", "mrpc") for seed in plan.LATER_SEEDS):
        parts += ["## With all five seeds\n", "Secondary: H2 and H3 over seeds 1 to 5; H1 has three.\n", later]
    return "\n".join(part for part in parts if part)


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(results, folder):
    """Writes the figures there are data for; returns their Markdown by task."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    charts = [(task, name, make(results, task)) for task in ("cola", "mrpc") for name, make in (("risk-coverage", risk_chart), ("reliability", reliability_chart))]
    charts.append(("sst2", "nll", rate_chart(results)))
    for task, name, svg in charts:
        path = folder / f"{name}-{task}.svg"
        path.unlink(missing_ok=True)
        if svg:
            path.write_text(svg, encoding="utf-8")
            images.setdefault(task, []).append(f"![{name} of {TASK_NAMES[task]}]({folder.name}/{path.name})\n")
    return images


def shown(results, task):
    """The predictors that the figures show: LoRA's mean and averages, other methods' means, the ensemble and the trained posteriors."""
    wanted = {("lora", kind) for kind in KIND_NAMES} | {(method, "mean") for method in plan.COMPARED} | {("ensemble", "ensemble")} | {(m, "posterior") for m in plan.WITH_POSTERIOR}
    named_alone = {"ensemble": "ensemble", **{method: METHOD_NAMES[method] for method in plan.COMPARED}}
    for method, kind, cells in groups(results, task):
        if (method, kind) in wanted:
            label = named_alone.get(method, method.replace("monteclora", "trained"))
            label = f"LoRA {kind}" if method == "lora" else label
            yield label, kind, cells


def risk_chart(results, task):
    """Share of errors among the rows that are kept, least doubtful first, mean over seeds."""
    lines = []
    for label, kind, cells in shown(results, task):
        curves = [metrics.risk_coverage(p.doubt, p.correct) for p in (cell.predictions(kind) for cell in cells)]
        curve = np.mean(curves, axis=0)
        at = np.unique(np.linspace(0.05 * len(curve), len(curve), 60).astype(int)) - 1
        lines.append((label, [((i + 1) / len(curve), float(curve[i])) for i in at], False))
    if not lines:
        return None
    top = max(y for _, points, _ in lines for _, y in points) * 1.05 or 0.1
    x = figures.horizontal(0, 1, [0, 0.25, 0.5, 0.75, 1])
    return figures.chart(f"Risk and coverage, {TASK_NAMES[task]}", "share of rows answered", "share of errors", x, figures.vertical(0, top), lines)


def reliability_chart(results, task):
    """Accuracy over confidence in ten bins from .5 to 1, rows of all seeds together; bins of fewer than 10 rows are left out."""
    lines = []
    predictors = [(label, [cell.predictions(kind) for cell in cells]) for label, kind, cells in shown(results, task)]
    means = results.adapters(task, "lora")
    if means:
        predictors.insert(1, ("LoRA mean, with T", [cell.predictions("mean").at(cell.temperature("mean")) for cell in means]))
    for label, parts in predictors:
        confidence = np.concatenate([p.confidence for p in parts])
        correct = np.concatenate([p.correct for p in parts])
        bins = metrics.bins_of(confidence, 20)
        members = [bins == index for index in range(10, 20) if (bins == index).sum() >= 10]
        points = [(float(confidence[m].mean()), float(correct[m].mean())) for m in members]
        if points:
            lines.append((label, points, True))
    if not lines:
        return None
    low = min(0.5, *(y for _, points, _ in lines for _, y in points))
    x = figures.horizontal(0.5, 1, [0.5, 0.6, 0.7, 0.8, 0.9, 1])
    y = figures.vertical(low, 1)
    return figures.chart(f"Reliability, {TASK_NAMES[task]}", "confidence", "accuracy", x, y, lines, diagonal=True)


def rate_chart(results):
    """NLL over learning rate, mean over batches and seeds; diverged cells as ln 2."""
    lines = []
    for method in (*plan.METHODS_B, *plan.COMPARED):
        points = []
        for rate in plan.LEARNING_RATES:
            cells = [results.grid(method, rate, batch, seed) for batch in plan.BATCHES for seed in plan.SEEDS]
            losses = [math.log(2) if cell.diverged else float(cell.predictions("mean").nll.mean()) for cell in cells if cell]
            if losses:
                points.append((rate, statistics.mean(losses)))
        if points:
            lines.append((METHOD_NAMES[method], points, True))
    if not lines:
        return None
    top = max(y for _, points, _ in lines for _, y in points) * 1.05
    x = figures.horizontal(plan.LEARNING_RATES[0], plan.LEARNING_RATES[-1], plan.LEARNING_RATES, math.log)
    return figures.chart("NLL over learning rate, SST-2", "learning rate", "NLL", x, figures.vertical(0, top), lines)


def main():
    """Reads result lines, writes the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    chosen = parser.parse_args()
    results = Results(chosen.results)
    images = draw(results, chosen.docs / "experiment")
    (chosen.docs / "experiment.md").write_text(report(results, images), encoding="utf-8")


if __name__ == "__main__":
    main()
