"""Sends the metrics of a run to Weights & Biases. In run.toml:

    [train]
    report_to = ["jsonl", "command:python examples/wandb_sink.py"]

`monteclora train` writes one JSON object per line to the standard input of this script; docs/watch.md lists their keys.
Set WANDB_PROJECT, and WANDB_RUN_ID to go on with the same run after `--resume auto`.
"""

import json
import os
import pathlib
import sys

import wandb

out = pathlib.Path(os.environ["MONTECLORA_OUTPUT_DIR"])
record = json.loads((out / "run.json").read_text())
run = wandb.init(name=out.name, config=record["config"], resume="allow")
for line in sys.stdin:
    metrics = json.loads(line)
    kind, step = metrics.pop("type"), metrics.pop("step")
    if kind != "event":
        run.log({f"{kind}/{key}": value for key, value in metrics.items()}, step=step)
run.finish()
