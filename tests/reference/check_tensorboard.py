#!/usr/bin/env python3
"""TensorBoard's own reader finds in tb/ what metrics.jsonl says, over an interruption too.

    pip install tensorboard
    cargo build --release
    python tests/reference/check_tensorboard.py target/release/monteclora [FIXTURES]

Trains the tiny Llama of the fixtures for 9 steps with checkpoints every 4, goes on from step 8 to step 12 as if the last step had
been lost, and compares every scalar of EventAccumulator with the lines of metrics.jsonl. Exits with 1 on any difference.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {
    "train": {"train/loss": "loss", "train/task_loss": "task_loss", "divergence/weighted": "kl_loss", "train/grad_norm": "grad_norm",
              "train/learning_rate": "learning_rate", "speed/tokens_per_second": "tokens_per_second"},
    "eval": {"eval/loss": "loss", "eval/perplexity": "perplexity", "eval/token_accuracy": "token_accuracy"},
}


def main():
    program = Path(sys.argv[1]).resolve()
    fixtures = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "data/fixtures"
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        rows = "".join(json.dumps({"prompt": f"what is {n}", "completion": f"the number {n}"}) + "\n" for n in range(40))
        (scratch / "rows.jsonl").write_text(rows)
        (scratch / "run.toml").write_text(f"""
[model]
model_id = "{(fixtures / 'models/tiny-llama').resolve()}"
[data]
train = "rows.jsonl"
valid = "rows.jsonl"
[lora]
r = 4
[train]
output_dir = "out"
per_device_train_batch_size = 2
logging_steps = 1
eval_steps = 3
save_steps = 4
report_to = ["jsonl", "tensorboard"]
""")
        train = [program, "train", "-c", "run.toml", "--resume", "auto", "--set"]
        subprocess.run([*train, "train.max_steps=9"], cwd=scratch, check=True, capture_output=True)
        shutil.rmtree(scratch / "out/checkpoint-9")
        subprocess.run([*train, "train.max_steps=12"], cwd=scratch, check=True, capture_output=True)
        lines = [json.loads(line) for line in (scratch / "out/metrics.jsonl").read_text().splitlines()]
        events = EventAccumulator(str(scratch / "out/tb"), size_guidance={"scalars": 0})
        events.Reload()
        wrong = 0
        for kind, tags in TAGS.items():
            expected = [line for line in lines if line["type"] == kind]
            for tag, key in tags.items():
                found = [(event.step, event.value) for event in events.Scalars(tag)]
                wanted = [(line["step"], line[key]) for line in expected]
                same = len(found) == len(wanted) and all(
                    a == b and abs(x - y) <= 1e-6 * max(1, abs(y)) for (a, x), (b, y) in zip(found, wanted))
                print(f"{tag}: {len(found)} values {'agree' if same else f'DIFFER: {found} {wanted}'}")
                wrong += not same
        sys.exit(wrong > 0)


main()
