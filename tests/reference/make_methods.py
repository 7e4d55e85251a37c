#!/usr/bin/env python3
"""Training runs of PEFT's AdaLoRA and DoRA, step by step, and an adapter of each as PEFT saves it.

    pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0
    python tests/reference/make_methods.py [--models tests/data/fixtures/models] [--out tests/data/fixtures]

`OUT/methods/CASE/{case.json,trajectory.safetensors}` for adalora, dora and dora-nonzero, `OUT/adapters/adalora`, and `OUT/adapters/dora`
from `OUT/adapters/must-refuse-dora`. All is float32 on the CPU. tests/data/fixtures/README.md lists the tensors. Along the way the script
holds PEFT against its formulas as case.json states them, and stops where they differ.
"""
import argparse
import json
import shutil
from pathlib import Path

import peft
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPTS = ["The posterior mean of A is what a server needs.", "Ünïcode, numbers 12345 and\nnew lines."]
OPTIMIZER = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
OPTIMIZER_TEXT = "AdamW lr=1e-2 betas=(0.9,0.999) eps=1e-8 weight_decay=0"
TASK_LOSS = "task loss = mean token cross entropy over labels != -100, shifted by one"
ADALORA = dict(
    init_r=6, target_r=3, lora_alpha=12, lora_dropout=0.0, tinit=2, tfinal=3, deltaT=2, total_step=14, beta1=0.85, beta2=0.85,
    orth_reg_weight=0.5,
)
ADALORA_NOTES = [
    "steps count from 0, as in PEFT's examples; a step is: loss, backward, AdamW, update_and_allocate(step), zero_grad",
    "update of a weight = lora_alpha / (init_r + 1e-5) * B (A * E); init_r + 1e-5 is a float32 sum; the divisor stays init_r however many triplets are masked, also in the reloaded adapter",
    "regulariser = orth_reg_weight * mean over all A and B (2 per module) of |A A^T - I|_F or |B^T B - I|_F, not squared, masked triplets included; losses holds it weighted",
    "sensitivity of an entry = |p * gradient|, with the gradient of task loss + regulariser and p as AdamW leaves it; updated at steps < total_step - tfinal",
    "exp_avg_ipt = beta1 * exp_avg_ipt + (1 - beta1) * ipt, then exp_avg_unc = beta2 * exp_avg_unc + (1 - beta2) * |ipt - exp_avg_ipt| with the new exp_avg_ipt; both start at 0, without bias correction",
    "score of a triplet = s(E_i) + mean over in_features of s(A_i) + mean over out_features of s(B_i), where s = exp_avg_ipt * exp_avg_unc per entry",
    "budget(step) = init_r * modules at steps <= tinit, target_r * modules at steps > total_step - tfinal, else truncated to an integer (init - target) * (1 - (step - tinit) / (total_step - tfinal - tinit))^3 + target",
    "E is masked at steps with tinit < step < total_step - tfinal and step % deltaT == 0, and at step total_step - tfinal, with the sensitivities of the step before",
    "threshold = the k-th smallest score of all triplets, k = init_r * modules - budget counted from 1; score <= threshold is masked, so ties at the threshold all go",
    "a mask sets E to 0 once; AdamW and its moments go on, so that E comes back until the next mask; A and B are never masked",
    "at steps > total_step - tfinal the pattern of step total_step - tfinal is applied after every AdamW step",
]
DORA_NOTES = [
    "y = base + (m / n - 1) * (base - bias) + m / n * scaling * B A x, with n = |W + scaling * B A| of each row, a constant for the gradient; scaling = lora_alpha / r",
    "m is a parameter that starts as |W + scaling * B A| of each row with B = 0; AdamW without weight decay trains A, B and m",
]


def base_model(models, name):
    return AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)


def batch(models, name):
    """Two rows of equal length; the first 8 tokens are not trained."""
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    length = min(map(len, rows))
    ids = torch.tensor([row[:length] for row in rows])
    labels = ids.clone()
    labels[:, :8] = -100
    return ids, labels


def short(name):
    return name.removeprefix("base_model.model.").replace(".default", "")


def trained(model):
    return {short(name): p for name, p in model.named_parameters() if p.requires_grad}


def module_names(model):
    return sorted({name.rsplit(".lora_", 1)[0] for name in trained(model)})


def snapshot(prefix, tensors):
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in tensors.items()}


def write(out, tensors, case):
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "trajectory.safetensors")
    case = {**case, "optimizer": OPTIMIZER_TEXT, "target_modules": TARGETS, "peft_version": peft.__version__}
    (out / "case.json").write_text(json.dumps(case, indent=1) + "\n")


def logits(model, ids):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def agree(what, ours, expected, bound=1e-5):
    ours, expected = torch.as_tensor(ours), torch.as_tensor(expected)
    difference = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert difference <= bound, f"{what}: differs by {difference}"


def orthogonality(parameters):
    covariances = [p @ p.T if name.endswith("lora_A") else p.T @ p for name, p in parameters.items() if not name.endswith("lora_E")]
    return sum(torch.linalg.norm(c - torch.eye(len(c))) for c in covariances) / len(covariances)


def triplet_scores(allocator, model):
    score = {short(name): allocator.exp_avg_ipt[name] * allocator.exp_avg_unc[name] for name in allocator.ipt}
    return {
        module: score[f"{module}.lora_E"][:, 0] + score[f"{module}.lora_A"].mean(1) + score[f"{module}.lora_B"].mean(0)
        for module in module_names(model)
    }


def adalora(models, out):
    # With this seed the scores next to a threshold differ by 3% or more, so that rounding changes no mask. One module loses all triplets.
    torch.manual_seed(50)
    model = get_peft_model(base_model(models, "tiny-llama"), AdaLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **ADALORA))
    model.train()
    allocator, modules = model.base_model.rankallocator, module_names(model)
    ids, labels = batch(models, "tiny-llama")
    record = {"input_ids": ids, "labels": labels, **snapshot("init", trained(model))}
    masks, losses, budgets = [], [], []
    mask_to_budget = allocator.mask_to_budget

    def record_mask(inner, budget):
        scores = triplet_scores(allocator, model)
        k, ordered = allocator.init_bgt - budget, torch.cat([scores[module] for module in modules]).sort().values
        pattern = mask_to_budget(inner, budget)
        for module in modules:
            kept = pattern[f"{module}.lora_E.default"]
            assert kept == (scores[module] > ordered[k - 1]).tolist(), f"step {step}: the mask of {module}"
        record.update(snapshot(f"score{step}", scores))
        threshold, next_score = ordered[k - 1 : k + 1].tolist()
        masks.append(dict(step=step, budget=budget, k=k, threshold=threshold, next_score=next_score, kept=sum(map(sum, pattern.values()))))
        return pattern

    allocator.mask_to_budget = record_mask
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **OPTIMIZER)
    last = ADALORA["total_step"] - ADALORA["tfinal"]
    for step in range(ADALORA["total_step"]):
        with torch.no_grad():  # the model below PEFT's AdaLoraModel, which adds the regulariser
            task = model.base_model.model(input_ids=ids, labels=labels).loss
            regulariser = ADALORA["orth_reg_weight"] * orthogonality(trained(model))
        total = model(input_ids=ids, labels=labels).loss
        agree(f"step {step}: total loss", task + regulariser, total.detach())
        losses.append([task.item(), regulariser.item(), total.item()])
        total.backward()
        if step == 0:
            record |= snapshot("grad0", {name: p.grad for name, p in trained(model).items()})
        optimizer.step()
        if step == last:
            for what in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
                record |= snapshot(what, {short(name): tensor for name, tensor in getattr(allocator, what).items()})
        model.base_model.update_and_allocate(step)
        budgets.append(allocator.budget_schedule(step)[0])
        optimizer.zero_grad()
        record |= snapshot(f"step{step}", {name: p for name, p in trained(model).items() if name.endswith("lora_E")})
    pattern = {short(name): kept for name, kept in model.peft_config["default"].rank_pattern.items()}
    record |= snapshot("final", trained(model))
    record |= {"final_logits": logits(model, ids), "losses": torch.tensor(losses), "budgets": torch.tensor(budgets)}
    case = {"model": "tiny-llama", "method": "adalora", **ADALORA, "steps": ADALORA["total_step"], "first_step": 0, "masks": masks, "rank_pattern": pattern}
    write(out / "methods" / "adalora", record, {**case, "notes": [TASK_LOSS, *ADALORA_NOTES]})
    return model


def save_adalora(model, models, out):
    """The adapter as PEFT saves it, and what PEFT computes with it after loading it again."""
    folder = out / "adapters" / "adalora"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": "tiny-llama", "target_modules": sorted(settings["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    loaded = PeftModel.from_pretrained(base_model(models, "tiny-llama"), folder)
    ids, _ = batch(models, "tiny-llama")
    expected = {"input_ids": ids, "logits": logits(loaded, ids)}
    agree("logits of the loaded AdaLoRA adapter", expected["logits"], logits(model, ids))
    with loaded.disable_adapter():
        expected["base_logits"] = logits(loaded, ids)
    for name in module_names(model):
        delta = loaded.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        agree(f"update of {name}", delta, model.base_model.model.get_submodule(name).get_delta_weight("default").detach())
        expected[f"delta.{name}"] = delta
    finish_adapter(folder, expected, base_model(models, "tiny-llama"))


def finish_adapter(folder, expected, plain):
    """Writes what is expected, after the updates alone gave the base model the same logits."""
    for name, tensor in expected.items():
        if name.startswith("delta."):
            plain.get_submodule(name.removeprefix("delta.")).weight.data += tensor
    agree(f"{folder.name}: logits with the updates added", logits(plain, expected["input_ids"]), expected["logits"])
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")
    (folder / "case.json").write_text(json.dumps({"model": "tiny-llama", "prompt": PROMPTS[0]}, indent=2))


def dora(models, out, name, base, seed, nonzero, steps=6):
    torch.manual_seed(seed)
    model = get_peft_model(base_model(models, base), LoraConfig(use_dora=True, r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.train()
    parameters = trained(model)
    if nonzero:
        for key, p in parameters.items():
            if ".lora_B." in key:
                torch.nn.init.normal_(p, std=0.05)
    ids, labels = batch(models, base)
    record = {"input_ids": ids, "labels": labels, **snapshot("init", parameters)}
    optimizer = torch.optim.AdamW(parameters.values(), **OPTIMIZER)
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        losses.append([loss.item()])
        loss.backward()
        if step == 0:
            record |= snapshot("grad0", {key: p.grad for key, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad()
    record |= snapshot("final", parameters)
    record |= {"final_logits": logits(model, ids), "losses": torch.tensor(losses)}
    start = "B is drawn after m was set, so that m / n is not 1 at step 0" if nonzero else "B starts at 0"
    case = {"model": base, "method": "dora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "steps": steps}
    write(out / "methods" / name, record, {**case, "notes": [TASK_LOSS, *DORA_NOTES, start]})


def dora_adapter(models, out):
    """The recorded DoRA adapter with the exact updates. The delta.* of must-refuse-dora are scaling * B A alone."""
    source, folder = out / "adapters" / "must-refuse-dora", out / "adapters" / "dora"
    folder.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    expected, plain = load_file(source / "expected.safetensors"), base_model(models, "tiny-llama")
    loaded = PeftModel.from_pretrained(base_model(models, "tiny-llama"), folder)
    agree("logits of the DoRA adapter", logits(loaded, expected["input_ids"]), expected["logits"])
    for name in [name for name in expected if name.startswith("delta.")]:
        module = loaded.base_model.model.get_submodule(name.removeprefix("delta."))
        weight, magnitude = module.get_base_layer().weight.detach(), module.lora_magnitude_vector["default"].weight.detach()
        directed = weight + module.get_delta_weight("default").detach()
        expected[name] = (magnitude / torch.linalg.norm(directed, dim=1))[:, None] * directed - weight
    finish_adapter(folder, expected, plain)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("tests/data/fixtures/models"))
    parser.add_argument("--out", type=Path, default=Path("tests/data/fixtures"))
    arguments = parser.parse_args()
    model = adalora(arguments.models, arguments.out)
    save_adalora(model, arguments.models, arguments.out)
    dora(arguments.models, arguments.out, "dora", "tiny-llama", seed=32, nonzero=False)
    dora(arguments.models, arguments.out, "dora-nonzero", "tiny-qwen2", seed=33, nonzero=True)
    dora_adapter(arguments.models, arguments.out)


if __name__ == "__main__":
    main()
