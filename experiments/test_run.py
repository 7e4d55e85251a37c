"""Self-test of the experiment's scripts with a stand-in for the program: python3 -m unittest test_run (in this folder)."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import unittest
import unittest.mock
from importlib.util import find_spec
from pathlib import Path

import plan
import run

HERE = Path(__file__).resolve().parent
CHOICES = {"cola": (" no", " yes"), "mrpc": (" no", " yes"), "sst2": (" negative", " positive")}
COUNTS = {"cola": (60, 40, 400), "mrpc": (60, 40, 620), "sst2": (60, 40, 50)}


def write_data(folder):
    """Small sets in the shape of the real ones."""
    for task, counts in COUNTS.items():
        (folder / task).mkdir(parents=True)
        for split, count in zip(("train", "valid", "test"), counts):
            rows = [row(task, f"{split} {index}", index) for index in range(count)]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(task, text, index):
    """One row."""
    prompts = {
        "cola": f"Sentence: {text}\nIs it grammatical?",
        "mrpc": f"Sentence 1: {text}\nSentence 2: {text}\nDo they mean the same?",
        "sst2": f"Review: {text}\nSentiment:",
    }
    return {"prompt": prompts[task], "completion": CHOICES[task][index % 3 > 0], "choices": list(CHOICES[task])}


class Experiment(unittest.TestCase):
    """Runs of run.py in a folder of their own."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        write_data(self.folder / "data")
        (self.folder / "base").mkdir()
        self.calls = self.folder / "calls.txt"
        self.calls.touch()
        self.program = self.folder / "monteclora"
        fake = shlex.quote(str(HERE / "fake_monteclora.py"))
        self.program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {fake} "$@"\n')
        self.program.chmod(0o755)

    def start(self, job, slow=""):
        """Starts run.py on one job."""
        command = [sys.executable, HERE / "run.py", "--job", job, "--program", self.program]
        for name in ("data", "base", "work", "results"):
            command += [f"--{name}", self.folder / name]
        environment = {**os.environ, "FAKE_CALLS": str(self.calls), "FAKE_SLOW": slow}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run_job(self, job):
        """Runs one job to its end."""
        process = self.start(job)
        output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, output)

    def run_here(self, jobs):
        """Runs jobs to their end without a process of their own."""
        program = run.Program(str(self.program), self.folder / "base", time.monotonic() + 60)
        with unittest.mock.patch.dict(os.environ, FAKE_CALLS=str(self.calls)):
            for job in jobs:
                record = run.run_job(job, self.folder / "work", program, plan.Rows(self.folder / "data"))
                run.append(self.folder / "results" / f"{job['stage']}.jsonl", record)

    def stop_in(self, job, command):
        """Starts a job and stops it while the program is at a command."""
        process = self.start(job, slow=command)
        until = time.monotonic() + 20
        while not any(line.startswith(command) for line in self.called()) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        self.assertEqual(process.returncode, run.INTERRUPTED)

    def called(self):
        """The commands that the program was given."""
        return self.calls.read_text().splitlines()

    def results(self, stage):
        """The result lines of a stage."""
        path = self.folder / "results" / f"{stage}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def analyse(self):
        """Runs analyse.py; returns its page."""
        docs = self.folder / "docs"
        docs.mkdir(exist_ok=True)
        command = [sys.executable, HERE / "analyse.py", "--results", self.folder / "results", "--docs", docs]
        subprocess.run(command, check=True)
        return (docs / "experiment.md").read_text()

    def test_a_stopped_training_is_resumed(self):
        self.stop_in("a-cola-lora-1", "train")
        self.assertEqual(self.results("a"), [])
        self.run_job("a-cola-lora-1")
        trainings = [line for line in self.called() if line.startswith("train")]
        self.assertEqual([line.count("--resume auto") for line in trainings], [0, 1])
        self.assertFalse((self.folder / "work" / "a-cola-lora-1" / "adapter" / "checkpoint-60").exists())

    def test_steps_that_are_complete_are_not_done_again(self):
        self.stop_in("a-cola-monteclora-elbo-1", "fit")
        self.run_job("a-cola-monteclora-elbo-1")
        self.run_job("a-cola-monteclora-elbo-1")
        self.assertEqual(sum(line.startswith("train") for line in self.called()), 1)
        (result,) = self.results("a")
        self.assertEqual(set(result["test"]), {"answer", "mean", "posterior", "rows", "svd"})
        self.assertEqual(set(result["temperature"]), {"mean", "posterior", "rows", "svd"})
        self.assertEqual(len(result["ood"]["svd"]["mutual_information"]), 200)
        self.assertAlmostEqual(result["training"]["posterior"]["spread_all"], 0.01, places=5)
        self.assertNotIn(str(self.folder), json.dumps(result))

    def test_of_compared_methods_the_mean_alone_is_judged(self):
        jobs = {job["id"]: job for job in plan.stage_a()}
        self.run_here([jobs["a-cola-adalora-1"]])
        (result,) = self.results("a")
        self.assertEqual(set(result["test"]), {"answer", "mean"})
        self.assertEqual(set(result["temperature"]), {"mean"})
        config = tomllib.loads((self.folder / "work" / "a-cola-adalora-1" / "run.toml").read_text())
        self.assertEqual(config["lora"]["r"], 24)
        self.assertEqual(config["lora"]["adalora"], {"target_r": 16})

    def test_a_torn_line_is_replaced(self):
        path = self.folder / "results" / "b.jsonl"
        run.append(path, {"job": {"id": "one"}})
        with path.open("a") as file:
            file.write('{"job": {"id": "two')
        self.assertEqual(run.finished(path), {"one"})
        run.append(path, {"job": {"id": "three"}})
        self.assertEqual(run.finished(path), {"one", "three"})

    @unittest.skipUnless(find_spec("numpy"), "analyse.py needs numpy")
    def test_everything_is_analysed(self):
        jobs = {job["id"]: job for job in plan.stage_a()}
        self.run_here([jobs[f"a-cola-lora-{seed}"] for seed in plan.SEEDS])
        adapter = self.folder / "work" / "a-cola-lora-2" / "adapter"
        (adapter / "adapter_config.json").unlink()
        names = ("a-cola-ensemble", "a-cola-monteclora-elbo-1", "a-cola-dora-1", "a-mrpc-lora-1")
        self.run_here([jobs[name] for name in names])
        self.assertTrue((adapter / "adapter_config.json").exists())
        grid = [job for job in plan.stage_b() if job["seed"] == 1]
        self.run_here([job for job in grid if job["method"] in ("lora", "monteclora-paper", "adalora")])
        self.assertEqual(sum(result["status"] == "diverged" for result in self.results("b")), 6)
        page = self.analyse()
        self.assertEqual(page, self.analyse())
        for text in ("| DoRA | mean | 1 |", "| AdaLoRA | all rates |"):
            self.assertIn(text, page)
        for text in ("H1: worst-best", "H2: NLL", "H3: AUROC", "Not finished in stage b", "agree", "risk-coverage-cola.svg"):
            self.assertIn(text, page)


class Parts(unittest.TestCase):
    """Functions on their own."""

    def test_the_program_is_no_rank_of_the_experiment(self):
        with unittest.mock.patch.dict(os.environ, OMPI_COMM_WORLD_SIZE="2", PMIX_RANK="1", PMI_SIZE="2", KEPT="1"):
            found = run.environment()
        self.assertEqual([name for name in found if name.startswith(("OMPI_", "PMI"))], [])
        self.assertEqual(found["KEPT"], "1")

    def test_parts_of_the_rows_do_not_meet(self):
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder))
            rows = plan.Rows(folder)
            for task in ("cola", "mrpc"):
                fit, rest = ({row["prompt"] for row in part} for part in (rows.fit(task), rows.temperature(task)))
                self.assertEqual((len(fit), len(rest), fit & rest), (20, 20, set()))
            judged = {plan.sentence_of(row) for row in rows.test("mrpc")}
            self.assertFalse(judged & {plan.sentence_of(row) for row in rows.out_of_domain("cola")})

    def test_jobs_have_ids_of_their_own(self):
        jobs = [job["id"] for make in plan.STAGES.values() for job in make()]
        self.assertEqual(len(jobs), len(set(jobs)))

    def test_temperature_undoes_a_factor(self):
        rows = []
        for index in range(2000):
            share = (index % 100 + 0.5) / 100
            odds = 3 * math.log(share / (1 - share))  # three times too sure
            p = 1 / (1 + math.exp(-odds))
            rows.append({"answer": int((index * 37 % 2000) / 2000 < share), "ensemble": {"probabilities": [1 - p, p]}})
        self.assertAlmostEqual(run.fitted_temperature(rows), 3, delta=0.3)


if __name__ == "__main__":
    unittest.main()
