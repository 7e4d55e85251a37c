"""The cells of the experiment: which jobs there are, in which order, on which rows and with which settings."""

import hashlib
import json
from pathlib import Path

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCHES = (32, 8)
SEEDS = (1, 2, 3)
LATER_SEEDS = (4, 5)
DRAWS = 8
FIT_DRAWS = 4
FIT_ROWS = 256
GEOMETRIES = ("rows", "svd")

METHODS_A = ("lora", "lora-dropout", "monteclora-elbo", "monteclora-paper")
METHODS_B = ("lora", "monteclora-paper", "fixed-noise", "lora-fa", "monteclora-elbo")
COMPARED = ("adalora", "dora")  # methods without a posterior, of which the mean alone is judged
WITH_POSTERIOR = ("monteclora-paper", "monteclora-elbo", "fixed-noise")

# What differs between the methods: keys of [lora], of the method's own section and of [train].
METHODS = {
    "lora": ({"method": "lora"}, {}, {}),
    "lora-dropout": ({"method": "lora", "lora_dropout": 0.1}, {}, {}),
    "lora-fa": ({"method": "lora-fa"}, {}, {}),
    "monteclora-paper": ({"method": "monteclora"}, {"preset": "paper"}, {}),
    "monteclora-elbo": ({"method": "monteclora"}, {"objective": "elbo"}, {}),
    "fixed-noise": (
        {"method": "monteclora"},
        {"preset": "paper", "kl_loss_weight": 0.0, "use_entropy": False},
        {"variational_learning_rate": 0.0},
    ),
    "adalora": ({"method": "adalora", "r": 24, "lora_alpha": 48}, {"target_r": 16}, {}),
    "dora": ({"method": "dora"}, {}, {}),
}


def stage_pilot():
    """The jobs of the pilot: seed 0, validation rows only."""
    return [adapter_job("pilot", "cola", method, 0) for method in ("lora", "monteclora-elbo")]


def stage_a():
    """The jobs of stage A in the order in which they are run."""
    jobs = []
    for task in ("cola", "mrpc"):
        jobs += [adapter_job("a", task, "lora", seed) for seed in SEEDS]
        jobs.append({"stage": "a", "id": f"a-{task}-ensemble", "task": task, "method": "ensemble", "members": list(SEEDS)})
    for task in ("cola", "mrpc"):
        jobs += [adapter_job("a", task, method, seed) for seed in SEEDS for method in COMPARED]
    for task in ("cola", "mrpc"):
        jobs += [adapter_job("a", task, method, seed) for seed in SEEDS for method in METHODS_A[1:]]
    for task in ("cola", "mrpc"):
        jobs += [adapter_job("a", task, method, seed) for seed in LATER_SEEDS for method in METHODS_A]
    return jobs


def geometries(method):
    """The geometries in which posteriors are fitted on an adapter of a method."""
    return () if method in COMPARED else GEOMETRIES


def adapter_job(stage, task, method, seed):
    """A job that trains one adapter and does to it all that is done afterwards."""
    return {"stage": stage, "id": f"{stage}-{task}-{method}-{seed}", "task": task, "method": method, "seed": seed}


def stage_b():
    """The jobs of stage B: the whole grid of one seed before the next."""
    return [
        grid_job(method, rate, batch, seed)
        for seed in SEEDS
        for methods in (METHODS_B, COMPARED)
        for batch in BATCHES
        for rate in LEARNING_RATES
        for method in methods
    ]


def grid_job(method, rate, batch, seed):
    """A cell of stage B."""
    name = f"b-{method}-lr{rate:g}-batch{batch}-{seed}"
    return {"stage": "b", "id": name, "task": "sst2", "method": method, "learning_rate": rate, "batch": batch, "seed": seed}


STAGES = {"pilot": stage_pilot, "a": stage_a, "b": stage_b}


def shuffled(rows, name):
    """The rows in the order of sha256("NAME:INDEX"), INDEX counting from 0: a shuffle that any language can repeat."""
    order = sorted(range(len(rows)), key=lambda index: hashlib.sha256(f"{name}:{index}".encode()).digest())
    return [rows[index] for index in order]


class Rows:
    """The rows of every part of the experiment, chosen from the files of a data directory."""

    def __init__(self, directory):
        self.directory = Path(directory)

    def source(self, task, split):
        """The file that a split is in."""
        return self.directory / task / f"{split}.jsonl"

    def file(self, task, split):
        """All rows of a file."""
        with self.source(task, split).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]

    def train(self, task, seed):
        """The training rows of a seed: 640 of CoLA or MRPC, 1,024 of SST-2."""
        count = 1024 if task == "sst2" else 640
        return shuffled(self.file(task, "train"), f"{task}/train/{seed}")[:count]

    def fit(self, task):
        """The validation rows on which the scale is fitted."""
        rows = self.file(task, "valid")
        return shuffled(rows, f"{task}/valid")[: fit_count(rows)]

    def temperature(self, task):
        """The other validation rows: temperatures are fitted on them."""
        rows = self.file(task, "valid")
        return shuffled(rows, f"{task}/valid")[fit_count(rows) :]

    def test(self, task, pilot=False):
        """The rows that are judged; those of the pilot are the temperature's."""
        if pilot:
            return self.temperature(task)
        rows = shuffled(self.file(task, "test"), f"{task}/test")
        return rows if task == "cola" else rows[:400]

    def out_of_domain(self, task, pilot=False):
        """200 rows of the other set's sentences in this set's template, with an answer that means nothing."""
        split = "valid" if pilot else "test"
        if task == "cola":
            skip = 0 if pilot else 400  # not those that MRPC itself is judged on
            rows = shuffled(self.file("mrpc", split), f"mrpc/{split}")[skip : skip + 200]
            prompts = [f"Sentence: {sentence_of(row)}\nIs it grammatical?" for row in rows]
        else:
            sentences = [sentence_of(row) for row in shuffled(self.file("cola", split), f"cola/{split}/pairs")[:400]]
            pairs = zip(sentences[:200], sentences[200:])
            prompts = [f"Sentence 1: {one}\nSentence 2: {two}\nDo they mean the same?" for one, two in pairs]
        return [{"prompt": prompt, "completion": " no", "choices": [" no", " yes"]} for prompt in prompts]


def fit_count(rows):
    """How many validation rows the fit gets: 256 of CoLA's 527, half of MRPC's 408."""
    return min(FIT_ROWS, len(rows) // 2)


def sentence_of(row):
    """The first sentence of a row of CoLA or MRPC."""
    return row["prompt"].split("\n")[0].split(": ", 1)[1]


def run_toml(job, base, train, output_dir):
    """The configuration of a job's training."""
    lora, own, rates = METHODS[job["method"]]
    sections = {
        "": {"seed": job["seed"]},
        "model": {"model_id": str(base)},
        "data": {
            "train": str(train),
            "format": "prompt_completion",
            "apply_chat_template": False,
            "max_seq_length": 256,
            "packing": False,
        },
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **lora},
        f"lora.{lora['method']}": own,
        "train": {
            "output_dir": str(output_dir),
            "num_train_epochs": 1 if job["stage"] == "b" else 6,
            "per_device_train_batch_size": job.get("batch", 16),
            "learning_rate": job.get("learning_rate", 1e-3),
            "lr_scheduler_type": "linear",
            "eval_steps": 1_000_000,
            "save_steps": 60,
            "save_total_limit": 1,
            "load_best_model_at_end": False,
            **rates,
        },
    }
    lines = []
    for section, keys in sections.items():
        if section and keys:
            lines.append(f"\n[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"
