#!/usr/bin/env python3
"""Tiny models that hold their language model beside a vision tower, with an adapter, and what transformers and PEFT compute from text.

    pip install torch==2.9.1 peft==0.21.2 transformers==5.17.0 safetensors
    python tests/reference/make_nested.py tests/data/fixtures TOOLS

TOOLS is the folder of make_fixtures.py, which wrote the other fixtures: its tokenizer, texts and random numbers are used. The files of a
case are those of the other architectures; see tests/data/fixtures/README.md. `nested-gemma3` has a config.json that leaves out
`tie_word_embeddings` and sizes of `text_config`, as published ones do. `nested-mistral3` has a head of its own.
"""
import json
import os
import sys

sys.path.insert(0, sys.argv[2])
import torch
import transformers as T
from make_fixtures import ids, randomise, relativise, tokenizer
from peft import LoraConfig, MontecloraConfig, get_peft_model
from safetensors.torch import save_file

SIZES = dict(vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=512, rms_norm_eps=1e-5)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
YARN = dict(rope_theta=1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
            mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
# Leaf names alone mean modules of the vision tower too.
TARGETS = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def mistral3():
    text = dict(SIZES, model_type="ministral3", num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_parameters=YARN)
    config = T.Mistral3Config(text_config=text, vision_config=dict(VISION, model_type="pixtral", head_dim=16), tie_word_embeddings=False)
    return T.Mistral3ForConditionalGeneration, config, lambda config: config


def gemma3():
    # Heads are those that the class assumes, so that config.json can leave them out.
    text = dict(SIZES, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=16, query_pre_attn_scalar=20,
                sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    config = T.Gemma3Config(text_config=text, vision_config=dict(VISION, vision_use_head=False), mm_tokens_per_image=4)

    def published(config):
        del config["tie_word_embeddings"]
        for key in ["num_attention_heads", "num_key_value_heads", "rope_parameters", "tie_word_embeddings", "hidden_activation"]:
            del config["text_config"][key]
        return config

    return T.Gemma3ForConditionalGeneration, config, published


def build(kind, make, out, seed):
    model_class, config, rewritten = make()
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="eager").float()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, *((-0.3, 0.3) if kind == "gemma3" else (0.7, 1.3)))
        else:
            torch.nn.init.normal_(parameter, std=0.05)
    case = os.path.join(out, "architectures", "nested-" + kind)
    model_dir, adapter_dir = os.path.join(case, "model"), os.path.join(case, "adapter")
    model.save_pretrained(model_dir)
    tokenizer().save_pretrained(model_dir)
    path = os.path.join(model_dir, "config.json")
    with open(path) as file:
        config = rewritten(json.load(file))
    with open(path, "w") as file:
        json.dump(config, file, indent=2)
    torch.manual_seed(seed + 1)
    model = model_class.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", monteclora_config=MontecloraConfig(num_samples=4, buffer_size=2))
    adapted = get_peft_model(model, lora)
    randomise(adapted, seed + 2)
    adapted.eval()
    adapted.save_pretrained(adapter_dir)
    relativise(adapter_dir, model_dir)
    inputs = ids()
    labels = inputs.clone()
    labels[:, :8] = -100
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(input_ids=inputs).logits
    output = adapted(input_ids=inputs, labels=labels)
    output.loss.backward()
    expected = {"input_ids": inputs, "labels": labels, "base_logits": plain, "logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and parameter.grad is not None and "sampler" not in name:
            expected["grad." + name.removeprefix("base_model.model.").replace(".default", "")] = parameter.grad
    for name, module in adapted.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            expected["delta." + name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    save_file({name: tensor.contiguous().clone() for name, tensor in expected.items()}, os.path.join(case, "expected.safetensors"))
    change = (output.logits - plain).abs().max().item()
    print(kind, f"loss {output.loss.item():.4f}, logit change {change:.3f},", len(expected), "tensors")


for index, (kind, make) in enumerate({"mistral3": mistral3, "gemma3": gemma3}.items()):
    build(kind, make, sys.argv[1], 300 + 10 * index)
