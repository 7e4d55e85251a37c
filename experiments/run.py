"""Runs the jobs of the experiment, one result line each, and goes on where it was stopped."""

import argparse
import array
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import plan

HERE = Path(__file__).resolve().parent
DIVERGED = 5
INTERRUPTED = 130
GRACE_SECONDS = 240
MOST_FAILURES = 3
EVALUATION_SEED = 100  # added to the job's seed, so that a fit is not judged on the draws it was made with


def environment():
    """The program's environment: under mpirun each process runs jobs of its own, and the program is no rank of theirs."""
    of_ranks = ("OMPI_", "PMIX_", "PMI_", "MV2_COMM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(of_ranks)}


class Stopped(Exception):
    """The time is up, or a signal came."""


class Diverged(Exception):
    """The program found a number that is not finite in this step."""


class Failed(Exception):
    """The program failed for another reason; the job is left for another time."""


class Busy(Exception):
    """Another process is at this job."""


# --- result lines -----------------------------------------------------------------------------------------------------


def finished(path):
    """The ids of the jobs that have a whole line in a result file."""
    if not path.exists():
        return set()
    lines = path.read_bytes().split(b"\n")[:-1]
    return {json.loads(line)["job"]["id"] for line in lines if line.strip()}


def append(path, record):
    """Adds one whole line to a result file, after removing a torn one, and waits until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        written = file.read()
        file.truncate(written.rfind(b"\n") + 1)
        file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_whole(path, text):
    """Writes a file so that it is there complete or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


# --- the program ------------------------------------------------------------------------------------------------------


class Program:
    """The command line program, the base it works on and the time that is left."""

    def __init__(self, path, base, end):
        self.path = path
        self.base = str(Path(base).resolve())
        self.end = end
        said = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=True)
        self.version = said.stdout.strip()

    def call(self, arguments, log, lock):
        """Runs one command and returns what it printed, read as JSON."""
        if time.monotonic() > self.end:
            raise Stopped
        command = [self.path, *map(str, arguments)]
        with log.open("ab") as errors:
            # A session of its own: ctrl-c reaches the program once, through us. The lock stays held while the program runs.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True, pass_fds=[lock.fileno()], env=environment()
            )
            try:
                output, _ = process.communicate(timeout=max(1, self.end + GRACE_SECONDS - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self.end = 0.0  # a step that is complete all the same is kept; none follows it
                process.terminate()
                output, _ = process.communicate()
        if process.returncode == DIVERGED:
            raise Diverged
        if process.returncode in (INTERRUPTED, -signal.SIGTERM):
            raise Stopped
        if process.returncode != 0:
            raise Failed(f"`{' '.join(command)}` ended with {process.returncode}; see {log}")
        return json.loads(output)


# --- one job ----------------------------------------------------------------------------------------------------------


class Workplace:
    """The folder of one job: each step leaves NAME.json there when it is complete, and is then not done again."""

    def __init__(self, job, work, program, rows):
        self.job = job
        self.root = work
        self.program = program
        self.rows = rows
        self.folder = work / job["id"]
        self.adapter = self.folder / "adapter"
        self.files = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise Busy from None
        return self

    def __exit__(self, *_):
        self.lock.close()

    def data(self, name, rows):
        """A data file of this job; the rows are a function of the plan, so that it is written once."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.files[name] = path
        return path

    def step(self, name, arguments, needs=None):
        """What a command printed; the command is run unless its output, and the path it `needs` to leave, are there."""
        done = self.folder / f"{name}.json"
        if not done.exists() or not (needs is None or needs.exists()):
            begin = time.monotonic()
            try:
                output = self.program.call([*arguments, "--json"], self.folder / "log.txt", self.lock)
            except Diverged:
                raise Diverged(name) from None
            seconds = round(time.monotonic() - begin, 2)
            write_whole(done, json.dumps({"seconds": seconds, "output": output}))
        return json.loads(done.read_text())["output"]

    def seconds(self):
        """How long each step took that is complete, without attempts that were broken off."""
        steps = {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}
        return {name: step["seconds"] for name, step in steps.items()}

    def train(self):
        """Trains the adapter, from its newest checkpoint if there is one."""
        job = self.job
        train = self.data("train-rows", self.rows.train(job["task"], job["seed"]))
        config = self.folder / "run.toml"
        write_whole(config, plan.run_toml(job, self.program.base, train.resolve(), self.adapter.resolve()))
        complete = self.adapter / "adapter_config.json"
        begun = any(self.adapter.glob("checkpoint-*"))
        if not begun and not (complete.exists() and (self.folder / "train.json").exists()):
            shutil.rmtree(self.adapter, ignore_errors=True)
        resume = ["--resume", "auto"] if begun else []
        self.step("train", ["train", "-c", config, *resume], needs=complete)
        for left in [*self.adapter.glob("checkpoint-*"), self.adapter / "best"]:
            shutil.rmtree(left, ignore_errors=True)

    def fit(self, geometry):
        """Fits the scale of a posterior in one geometry; returns the fitted adapter and what the program says of it."""
        fitted = self.folder / f"fit-{geometry}"
        valid = self.data("fit-rows", self.rows.fit(self.job["task"]))
        done = self.folder / f"fit-{geometry}.json"
        if not done.exists():
            shutil.rmtree(fitted, ignore_errors=True)
        arguments = ["fit", *self.on(self.adapter, valid, self.job["seed"]), "-o", fitted]
        arguments += ["--geometry", geometry, "--criterion", "nll", "--draws", plan.FIT_DRAWS, "--rows", plan.FIT_ROWS]
        return fitted, self.step(f"fit-{geometry}", arguments, needs=fitted)

    def on(self, adapters, data, seed):
        """The arguments that fit, calibrate and eval have in common."""
        adapters = adapters if isinstance(adapters, list) else [adapters]
        named = [part for adapter in adapters for part in ("-a", adapter)]
        return ["-m", self.program.base, *named, "--data", data, "--seed", seed, "--no-chat-template"]

    def evaluate(self, name, adapters, data, draws, base=False):
        """The program's scores of a data file and its values of every row; those of the base too, if it is asked for."""
        per_row = self.folder / f"{name}.rows"
        arguments = ["eval", *self.on(adapters, data, self.evaluation_seed()), "--per-row", per_row]
        arguments += [] if base else ["--no-base"]
        arguments += ["--posterior-samples", draws] if draws else []
        scores = self.step(name, arguments, needs=per_row)
        with per_row.open(encoding="utf-8") as lines:
            return scores, [json.loads(line) for line in lines]

    def calibrate(self, name, adapter, draws):
        """A temperature, fitted on validation rows that no scale was fitted on."""
        data = self.data("temperature-rows", self.rows.temperature(self.job["task"]))
        arguments = ["calibrate", *self.on(adapter, data, self.evaluation_seed())]
        arguments += ["--posterior-samples", draws] if draws else []
        output = self.step(name, arguments)
        (adapter / "calibration.json").unlink(missing_ok=True)  # so that nothing later can be calibrated by it
        return without_paths(output)

    def evaluation_seed(self):
        """The seed of the draws that are judged."""
        return EVALUATION_SEED + self.job.get("seed", 0)

    def clear(self):
        """Removes what is large; the adapters of stage A stay, since an ensemble needs them."""
        keep = {"adapter"} if self.job["stage"] == "a" else set()
        for path in self.folder.iterdir():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path)
            elif path.suffix == ".rows":
                path.unlink()


def run_adapter(place, record):
    """Stage A and the pilot: trains one adapter, fits its posterior in two geometries, and judges all of them."""
    job, task = place.job, place.job["task"]
    pilot = job["stage"] == "pilot"
    has_posterior = job["method"] in plan.WITH_POSTERIOR
    sets = {
        "test": place.data("test-rows", place.rows.test(task, pilot)),
        "ood": place.data("ood-rows", place.rows.out_of_domain(task, pilot)),
    }
    place.train()
    record["training"] = training(place.adapter)
    own = "posterior" if has_posterior else "mean"
    fits = {geometry: place.fit(geometry) for geometry in plan.geometries(job["method"])}
    record["fit"] = {geometry: without_paths(output) for geometry, (_, output) in fits.items()}
    adapters = {own: place.adapter, **{geometry: fitted for geometry, (fitted, _) in fits.items()}}
    record["scores"] = {}
    for part, data in sets.items():
        record[part] = {}
        for kind, adapter in adapters.items():
            draws = 0 if kind == "mean" else plan.DRAWS
            with_base = part == "test" and kind == own
            scores, rows = place.evaluate(f"{part}-{kind}", adapter, data, draws, with_base)
            if kind == own:
                record[part].update(answer=[row["answer"] for row in rows], mean=columns(rows, "mean"))
            if draws:
                record[part][kind] = columns(rows, "posterior")
            if with_base:
                record["scores"]["base"] = brief(scores, "base")
            if part == "test":
                record["scores"][kind] = brief(scores, "posterior" if draws else "mean")
    if job["method"] == "monteclora-elbo" and task == "cola":
        train = place.data("train-rows", place.rows.train(task, job["seed"]))
        record["rise"] = rise(place.evaluate("train-posterior", place.adapter, train, plan.DRAWS)[0])
    record["temperature"] = {"mean": place.calibrate("calibrate-mean", place.adapter, 0)}
    for kind, adapter in adapters.items():
        if kind != "mean":
            record["temperature"][kind] = place.calibrate(f"calibrate-{kind}", adapter, plan.DRAWS)


def run_ensemble(place, record):
    """Averages plain LoRA adapters of several seeds; an adapter that is gone is trained again."""
    job, task = place.job, place.job["task"]
    adapters = []
    for seed in job["members"]:
        member = plan.adapter_job(job["stage"], task, "lora", seed)
        with Workplace(member, place.root, place.program, place.rows) as other:
            other.train()
            adapters.append(other.adapter)
    rows = place.data("temperature-rows", place.rows.temperature(task))
    _, calibration = place.evaluate("calibrate-ensemble", adapters, rows, 0)
    record["temperature"] = {"ensemble": {"temperature": fitted_temperature(calibration), "rows": len(calibration)}}
    for part, rows in (("test", place.rows.test(task)), ("ood", place.rows.out_of_domain(task))):
        scores, rows = place.evaluate(f"{part}-ensemble", adapters, place.data(f"{part}-rows", rows), 0)
        record[part] = {"answer": [row["answer"] for row in rows], "ensemble": columns(rows, "ensemble")}
        if part == "test":
            record["scores"] = {"ensemble": brief(scores, "ensemble")}


def run_grid(place, record):
    """Stage B: trains one adapter and judges its mean."""
    place.train()
    record["training"] = training(place.adapter)
    data = place.data("test-rows", place.rows.test("sst2"))
    scores, rows = place.evaluate("test-mean", place.adapter, data, 0)
    record["scores"] = {"mean": brief(scores, "mean")}
    record["test"] = {"answer": [row["answer"] for row in rows], "mean": columns(rows, "mean")}


def run_job(job, work, program, rows):
    """Runs what is missing of a job and returns its result."""
    steps = run_grid if job["stage"] == "b" else run_ensemble if job["method"] == "ensemble" else run_adapter
    record = {"job": job, "status": "done", "program": program.version, "processor": processor()}
    with Workplace(job, work, program, rows) as place:
        try:
            steps(place, record)
        except Diverged as step:
            record.update(status="diverged", step=str(step))
        record["data"] = {name: sha256(path) for name, path in sorted(place.files.items())}
        for task, split in sources(job):
            record["data"][f"{task}/{split}"] = sha256(rows.source(task, split))
        record["seconds"] = place.seconds()
    return record


def sources(job):
    """The files that a job's rows come from."""
    if job["stage"] == "b":
        return [("sst2", "train"), ("sst2", "test")]
    return [(task, split) for task in ("cola", "mrpc") for split in ("train", "valid", "test")]


# --- what is kept of the program's output -----------------------------------------------------------------------------


def digits(value):
    """A number to five significant digits."""
    return float(f"{value:.5g}")


def columns(rows, predictor):
    """The values of every row of one predictor, column by column."""
    parts = [row[predictor] for row in rows]
    kept = {
        "nll": [digits(part["nll"]) for part in parts],
        "confidence": [digits(part["confidence"]) for part in parts],
        "correct": [int(part["correct"]) for part in parts],
        "p1": [digits(part["probabilities"][1]) for part in parts],
    }
    for name in ("predictive_entropy", "mutual_information"):
        if name in parts[0]:
            kept[name] = [digits(part[name]) for part in parts]
    return kept


def brief(scores, predictor):
    """The program's own scores over all rows, against which the analysis checks its own."""
    part = scores.get(predictor, {})
    return {name: digits(part[name]) for name in ("accuracy", "nll", "ece", "brier", "auroc") if part.get(name) is not None}


def rise(scores):
    """The loss of a draw, mean over draws, beside that of the mean: nats per trained token, end tokens included."""
    return {"mean_loss": digits(scores["mean"]["loss"]), "draw_loss": digits(scores["posterior"]["draw_loss"])}


def log_share(log_probabilities, answer):
    """The logarithm of a choice's share of what all choices have."""
    largest = max(log_probabilities)
    total = sum(math.exp(value - largest) for value in log_probabilities)
    return log_probabilities[answer] - largest - math.log(total)


def fitted_temperature(rows):
    """The temperature of an ensemble: least NLL of p^(1/T) renormalised, by golden section in ln T over [1/20, 20]."""

    def loss(log_temperature):
        scale = math.exp(-log_temperature)
        total = 0.0
        for row in rows:
            logs = [scale * math.log(max(p, 1e-300)) for p in row["ensemble"]["probabilities"]]
            total -= log_share(logs, row["answer"])
        return total

    low, high = -math.log(20), math.log(20)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return digits(math.exp((low + high) / 2))


def training(adapter):
    """What is kept of a training: its record without paths, its last metrics, and where its posterior stands."""
    record = json.loads((adapter / "run.json").read_text())
    with (adapter / "metrics.jsonl").open() as lines:
        metrics = [line for line in map(json.loads, lines) if line.get("type") == "train"]
    rows = record.get("train") or {}
    kept = {
        "base": (record.get("base") or {}).get("fingerprint"),
        "total_steps": record.get("total_steps"),
        "trainable_parameters": record.get("trainable_parameters"),
        "examples": rows.get("examples"),
        "trained_tokens": rows.get("trained_tokens"),
        "metrics": metrics[-1] if metrics else {},
    }
    posterior = ((record.get("config") or {}).get("lora") or {}).get("monteclora")
    if posterior:
        kept["monteclora"] = posterior
        kept["posterior"] = posterior_of(adapter / "adapter_model.safetensors")
    return without_paths(kept)


def posterior_of(path):
    """Of an adapter's ln v over rows: standard deviation in each module and over all, and sum of in (1 - e^{2s})."""
    tensors = dict(read_tensors(path, (".std_prior", ".lora_A.weight")))
    spreads, everything, taken = [], [], 0.0
    for name, (_, log_std) in tensors.items():
        if not name.endswith(".std_prior"):
            continue
        module = name.split(".lora_monteclora_sampler")[0]
        (_, in_features), _ = tensors[f"{module}.lora_A.weight"]
        log_variances = [2 * value for value in log_std]
        spreads.append(deviation(log_variances))
        everything += log_variances
        taken += in_features * sum(-math.expm1(value) for value in log_variances)
    return {
        "modules": len(spreads),
        "spread_largest": digits(max(spreads)),
        "spread_median": digits(sorted(spreads)[len(spreads) // 2]),
        "spread_all": digits(deviation(everything)),
        "log_variance_mean": digits(sum(everything) / len(everything)),
        "in_one_minus_variance": digits(taken),
    }


def read_tensors(path, endings):
    """Names, shapes and, of vectors, float32 values of the tensors of a safetensors file whose names end so."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
        for name, tensor in header.items():
            if not name.endswith(endings):
                continue
            values = array.array("f")
            if len(tensor["shape"]) == 1:
                if tensor["dtype"] != "F32":
                    raise Failed(f"{name} is {tensor['dtype']}, not F32")
                first, last = tensor["data_offsets"]
                file.seek(begin + first)
                values.frombytes(file.read(last - first))
            yield name, (tensor["shape"], values)


def deviation(values):
    """The standard deviation over all values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def without_paths(value):
    """A value without the texts in it that name a file."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items() if not is_path(part)}
    if isinstance(value, list):
        return [without_paths(part) for part in value if not is_path(part)]
    return value


def is_path(value):
    """Whether a value is the absolute path of a file."""
    return isinstance(value, str) and os.path.isabs(value)


def sha256(path):
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def processor():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} threads"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads"


# --- the command ------------------------------------------------------------------------------------------------------


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the directory with cola/, mrpc/ and sst2/")
    parser.add_argument("--base", type=Path, help="the base model's directory")
    parser.add_argument("--program", default="monteclora", help="the program (default: monteclora)")
    parser.add_argument("--work", type=Path, help="where steps and adapters are kept until a job is finished")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the result lines go")
    parser.add_argument("--stage", choices=plan.STAGES, help="only this stage (default: pilot, a, b)")
    parser.add_argument("--minutes", type=float, default=55, help="no step begins after so many minutes (default: 55)")
    parser.add_argument("--list", action="store_true", help="print the jobs as JSON lines and stop")
    parser.add_argument("--job", metavar="ID", help="run this job only")
    chosen = parser.parse_args()
    needed = ("data", "base", "work")
    if not chosen.list and any(getattr(chosen, name) is None for name in needed):
        parser.error("--data, --base and --work are needed")
    return chosen


def interrupt(*_):
    """Treats SIGTERM as ctrl-c."""
    raise KeyboardInterrupt


def main():
    """Runs the jobs that have no result line, until they are done or the time is up; returns the exit code."""
    chosen = arguments()
    stages = [chosen.stage] if chosen.stage else list(plan.STAGES)
    jobs = [job for stage in stages for job in plan.STAGES[stage]()]
    if chosen.job:
        jobs = [job for job in jobs if job["id"] == chosen.job]
        if not jobs:
            print(f"there is no job {chosen.job}", file=sys.stderr)
            return 2
    if chosen.list:
        sys.stdout.write("".join(json.dumps(job) + "\n" for job in jobs))
        return 0
    os.nice(19)
    signal.signal(signal.SIGTERM, interrupt)
    program = Program(chosen.program, chosen.base, time.monotonic() + 60 * chosen.minutes)
    rows = plan.Rows(chosen.data)
    failures = 0
    for job in jobs:
        results = chosen.results / f"{job['stage']}.jsonl"
        if job["id"] in finished(results):
            continue
        if time.monotonic() > program.end or failures == MOST_FAILURES:
            break
        print(job["id"], end=" ", flush=True)
        try:
            record = run_job(job, chosen.work, program, rows)
            append(results, record)
            Workplace(job, chosen.work, program, rows).clear()
            print(record["status"], f"{sum(record['seconds'].values()):.0f} s", flush=True)
        except Busy:
            print("is run by another process", flush=True)
        except (Stopped, KeyboardInterrupt):
            print("stopped; the next run goes on", flush=True)
            return INTERRUPTED
        except Failed as reason:
            print(f"failed: {reason}", flush=True)
            failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
