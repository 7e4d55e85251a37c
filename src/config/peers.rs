//! Keys of other trainers, and what stands here in their place: PEFT, TRL and transformers, axolotl, unsloth, LLaMA-Factory, mlx-lm.

use super::document::field_names;
use super::{DataConfig, LoraConfig, ModelConfig, TrainConfig};

/// Names that other trainers have for something, and the remedy for who writes them here.
const KEYS: [(&[&str], &str); 38] = [
    (
        &[
            "base_model",
            "model",
            "model_name",
            "model_name_or_path",
            "model_path",
            "pretrained_model_name_or_path",
        ],
        "write `model_id` in [model]",
    ),
    (
        &[
            "dataset",
            "datasets",
            "dataset_name",
            "dataset_path",
            "train_file",
            "train_dataset",
            "train_data",
        ],
        "write `train` in [data]",
    ),
    (
        &[
            "eval_dataset",
            "valid_file",
            "validation",
            "validation_file",
            "eval_file",
            "test_datasets",
            "valid_data",
        ],
        "write `valid` in [data]",
    ),
    (
        &["val_set_size", "val_size", "validation_split", "eval_split"],
        "rows are not split here; give rows of their own as `valid` in [data]",
    ),
    (
        &[
            "max_length",
            "max_seq_len",
            "sequence_len",
            "cutoff_len",
            "model_max_length",
            "seq_length",
            "context_length",
        ],
        "write `max_seq_length` in [data]",
    ),
    (
        &["sample_packing", "pad_to_sequence_len", "neat_packing"],
        "write `packing` in [data]",
    ),
    (
        &[
            "train_on_inputs",
            "train_on_prompt",
            "mask_prompt",
            "assistant_only_loss",
            "completion_only_loss",
            "train_on_responses_only",
        ],
        "write `train_on` in [data]",
    ),
    (
        &["prompt_template", "chat_template_path"],
        "write `chat_template` in [model]",
    ),
    (
        &["rank", "lora_r", "lora_rank", "lora_dim", "adapter_rank"],
        "write `r` in [lora]",
    ),
    (&["alpha", "lora_scaling"], "write `lora_alpha` in [lora]"),
    (
        &["scale"],
        "mlx-lm's scale is lora_alpha / r; write `lora_alpha` in [lora]",
    ),
    (&["dropout"], "write `lora_dropout` in [lora]"),
    (
        &[
            "lora_target_modules",
            "lora_target",
            "target",
            "keys",
            "lora_target_linear",
        ],
        "write `target_modules` in [lora]",
    ),
    (
        &["num_layers", "lora_layers", "layers"],
        "write `layers_to_transform` in [lora], with the indices of the layers from 0: [26, 27, 28, 29] are the last four of 30 (num_hidden_layers in config.json tells how many there are)",
    ),
    (
        &[
            "use_dora",
            "use_dora_qlora",
            "peft_use_dora",
            "fine_tune_type",
        ],
        "write `method` in [lora], with the value \"dora\"; for plain LoRA leave it out",
    ),
    (
        &["peft_type", "peft_method", "adapter", "finetuning_type"],
        "write `method` in [lora]: \"lora\", \"adalora\", \"dora\", ...",
    ),
    (
        &["init_r"],
        "write `r` in [lora]: it is the rank at the start; `target_r` stands in [lora.adalora]",
    ),
    (&["deltaT"], "`delta_t` in [lora.adalora] is this"),
    (&["target_rank"], "`target_r` in [lora.adalora] is this"),
    (
        &["ortho_reg_weight", "orthogonal_reg_weight"],
        "`orth_reg_weight` in [lora.adalora] is this",
    ),
    (
        &["total_step"],
        "the length of the run is `max_steps` or `num_train_epochs` of [train]; leave it out",
    ),
    (
        &["task_type"],
        "adapters are trained on causal language models; leave it out",
    ),
    (
        &["bias", "lora_bias"],
        "biases are not trained, but for the shift of method \"ssf\"; leave it out",
    ),
    (
        &["init_lora_weights"],
        "A begins with Kaiming's uniform values and B with zeros, as PEFT's default; leave it out",
    ),
    (
        &[
            "lora_plus_lr_ratio",
            "loraplus_ratio",
            "loraplus_lr_embedding",
        ],
        "write `loraplus_lr_ratio` in [train]",
    ),
    (
        &[
            "load_in_4bit",
            "load_in_8bit",
            "quantization_bit",
            "quantization_config",
            "bnb_4bit_quant_type",
            "bnb_4bit_compute_dtype",
            "bnb_4bit_use_double_quant",
            "quantize",
        ],
        "a base is trained on as it is stored; give a quantised .gguf file (Q4_K_M, Q8_0, ...) or a quantised model of mlx-lm as `model_id` in [model]",
    ),
    (
        &[
            "nproc_per_node",
            "nnodes",
            "num_processes",
            "num_machines",
            "deepspeed",
            "fsdp",
        ],
        "several processes of one run are started with mpirun -n N; docs/scale.md",
    ),
    (&["lr"], "write `learning_rate` in [train]"),
    (
        &["epochs", "num_epochs", "n_epochs", "max_epochs"],
        "write `num_train_epochs` in [train]",
    ),
    (
        &["iters", "steps", "num_steps", "max_iters", "train_steps"],
        "write `max_steps` in [train]",
    ),
    (
        &[
            "batch_size",
            "micro_batch_size",
            "train_batch_size",
            "per_gpu_train_batch_size",
        ],
        "write `per_device_train_batch_size` in [train]",
    ),
    (
        &[
            "gradient_accumulation",
            "grad_accumulation_steps",
            "grad_accum",
            "accumulation_steps",
        ],
        "write `gradient_accumulation_steps` in [train]",
    ),
    (
        &[
            "grad_checkpoint",
            "use_gradient_checkpointing",
            "activation_checkpointing",
        ],
        "write `gradient_checkpointing` in [train]",
    ),
    (
        &["lr_scheduler", "lr_schedule", "scheduler"],
        "write `lr_scheduler_type` in [train]",
    ),
    (
        &["optim", "optimizer", "optim_args"],
        "the optimiser is AdamW; leave it out",
    ),
    (
        &["fp16", "half_precision", "mixed_precision"],
        "write `bf16` in [train]; there is no fp16",
    ),
    (
        &[
            "wandb",
            "wandb_project",
            "wandb_entity",
            "use_wandb",
            "mlflow_tracking_uri",
            "use_swanlab",
        ],
        "write `report_to` in [train]: \"jsonl\", \"tensorboard\", or a command that reads the metrics",
    ),
    (
        &["push_to_hub", "hub_model_id", "hub_token", "hub_strategy"],
        "`monteclora push DIR REPO` publishes an adapter afterwards; leave it out",
    ),
];

/// The remedy for a key of another trainer; none for any other name.
pub(super) fn remedy(key: &str) -> Option<&'static str> {
    let found = KEYS.iter().find(|(names, _)| names.contains(&key));
    found.map(|(_, remedy)| *remedy)
}

/// What to write in place of a flag that `train` has not: `--set` for a key of run.toml, the key here for one of another trainer.
///
/// `flag` as it was typed, such as `--logging-steps`. None for any other name.
pub fn flag_remedy(flag: &str) -> Option<String> {
    let key = flag.trim_start_matches('-').replace('-', "_");
    let sections = sections();
    let section = sections.iter().find(|(_, fields)| fields.contains(&&*key));
    match section {
        Some((section, _)) => Some(format!("write --set {section}.{key}=VALUE")),
        None => remedy(&key).map(str::to_owned),
    }
}

/// The sections of run.toml that a run always has, with their keys.
fn sections() -> [(&'static str, &'static [&'static str]); 4] {
    [
        ("model", field_names::<ModelConfig>()),
        ("data", field_names::<DataConfig>()),
        ("lora", field_names::<LoraConfig>()),
        ("train", field_names::<TrainConfig>()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A remedy that names a key names one that is there, in that section; and no key of ours is taken for another's.
    #[test]
    fn remedies_name_keys_that_are_there() {
        let sections = sections();
        for (names, remedy) in KEYS {
            if let Some((_, rest)) = remedy.split_once("write `").or(remedy.split_once("as `")) {
                let (key, rest) = rest.split_once('`').expect("a quoted key");
                let (_, rest) = rest.split_once("in [").expect("a section");
                let (section, _) = rest.split_once(']').expect("a section");
                let fields = sections.iter().find(|(name, _)| *name == section);
                let (_, fields) = fields.expect("a section of run.toml");
                assert!(fields.contains(&key), "[{section}] {key}");
            }
            for name in names {
                for (section, fields) in &sections {
                    assert!(!fields.contains(name), "{name} is a key of [{section}]");
                }
                assert_eq!(super::remedy(name), Some(remedy), "{name} stands twice");
            }
        }
        assert_eq!(super::remedy("learning_rat"), None);
    }

    #[test]
    fn flags_of_keys_are_answered() {
        for (flag, expected) in [
            ("--logging-steps", "write --set train.logging_steps=VALUE"),
            ("--sample-packing", "write `packing` in [data]"),
        ] {
            assert_eq!(flag_remedy(flag).as_deref(), Some(expected));
        }
        assert_eq!(flag_remedy("--zzz"), None);
    }
}
