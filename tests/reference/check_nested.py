#!/usr/bin/env python3
"""What is trained, collapsed and merged for a model that nests its language model is what transformers and PEFT load on its class.

    pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0 safetensors
    python tests/reference/check_nested.py target/release/monteclora [FIXTURES]

For every fixture `architectures/nested-*`: three steps are trained with leaf names as targets, PEFT loads the result with every tensor used
and no module left without one, and the merged directory gives PEFT's logits, with the vision tower as it was. The same for the base
under the names of the modules in memory. Exits with 1 on any difference.
"""
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

binary = sys.argv[1]
fixtures = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent.parent / "data" / "fixtures")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
RUN = """[model]
model_id = "{model}"
[data]
train = "{rows}"
[train]
output_dir = "{out}"
max_steps = 3
learning_rate = 0.02
[lora]
method = "monteclora"
r = 4
lora_alpha = 8
target_modules = ["q_proj", "down_proj"]
"""


def run(*command):
    result = subprocess.run([binary, *map(str, command)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{command}: {result.stderr}")
    return result.stdout + result.stderr


def load(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, report = model_class.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] - {"lm_head.weight"} and not report["unexpected_keys"], report
    return model.eval()


def in_memory(model_dir, out):
    """The same model under the names of its modules."""
    shutil.copytree(model_dir, out)
    state = load(model_dir).state_dict()
    if "tie_word_embeddings" not in json.loads((model_dir / "config.json").read_text()):
        del state["lm_head.weight"]
    save_file({name: tensor.clone() for name, tensor in state.items()}, out / "model.safetensors", {"format": "pt"})
    return out


failed = False
with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    rows = scratch / "rows.jsonl"
    turns = lambda i: [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"world {i}"}]
    rows.write_text("".join(json.dumps({"messages": turns(i)}) + "\n" for i in range(4)))
    for case in sorted((fixtures / "architectures").glob("nested-*")):
        inputs = load_file(case / "expected.safetensors")["input_ids"]
        for names, base in [("on disk", case / "model"), ("in memory", in_memory(case / "model", scratch / f"{case.name}-memory"))]:
            out, merged, plain = (scratch / f"{base.parent.name}-{base.name}-{what}" for what in ("out", "merged", "plain"))
            toml = scratch / "run.toml"
            toml.write_text(RUN.format(model=base, rows=rows, out=out))
            run("train", "--config", toml)
            run("collapse", out, "-o", plain)
            run("merge", "-m", base, "-a", out, "-o", merged)
            logits = []
            for adapter in (out, plain):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    adapted = PeftModel.from_pretrained(load(base), adapter).eval()
                stored = set(load_file(adapter / "adapter_model.safetensors"))
                used = set(get_peft_model_state_dict(adapted))
                failed |= stored != used
                with torch.no_grad():
                    logits.append(adapted(input_ids=inputs).logits)
            with torch.no_grad():
                logits.append(load(merged)(input_ids=inputs).logits)
                change = (load(base)(input_ids=inputs).logits - logits[0]).abs().max().item()
            before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
            kept = all(torch.equal(before[name], after[name]) for name in before if "vision" in name or "projector" in name)
            difference = max((other - logits[0]).abs().max().item() for other in logits[1:])
            failed |= set(before) != set(after) or not kept or difference > 1e-4 or change < 1e-3
            print(f"{case.name}, names {names}: {len(used)} of {len(stored)} tensors used, largest logit difference {difference:.2e}, by the adapter {change:.2e}")
sys.exit(int(failed))
