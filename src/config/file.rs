//! The file form of run.toml: every key optional, spelt as PEFT and Hugging Face spell it.

use std::path::PathBuf;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::{
    document::{Document, Schema, field_names},
    run::{DataFormat, DtypeChoice, LrSchedulerType, Method, Objective, Preset, Report},
};
use crate::data::{Overlong, TrainOn};

/// One value or a list of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value or a list of them")]
pub(super) enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values as a list.
    pub(super) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name { $(pub(super) $field: Option<$type>,)* }
    };
}

section!(
    /// Keys before the first section.
    TopFile {
        seed: u64,
    }
);
section!(
    /// `[model]`
    ModelFile {
        model_id: String,
        revision: String,
        dtype: DtypeChoice,
        chat_template: PathBuf,
    }
);
section!(
    /// `[data]`
    DataFile {
        train: PathBuf,
        valid: PathBuf,
        format: DataFormat,
        fields: IndexMap<String, String>,
        apply_chat_template: bool,
        train_on: TrainOn,
        max_seq_length: usize,
        overlong: Overlong,
        packing: bool,
    }
);
section!(
    /// `[lora]`
    LoraFile {
        method: Method,
        init_from: PathBuf,
        r: usize,
        lora_alpha: f64,
        lora_dropout: f64,
        target_modules: OneOrMany<String>,
        exclude_modules: OneOrMany<String>,
        layers_to_transform: OneOrMany<usize>,
        layers_pattern: OneOrMany<String>,
        rank_pattern: IndexMap<String, usize>,
        alpha_pattern: IndexMap<String, f64>,
        use_rslora: bool,
    }
);
section!(
    /// `[lora.monteclora]`
    MonteCloraFile {
        preset: Preset,
        objective: Objective,
        num_samples: usize,
        sample_scaler: f64,
        kl_loss_weight: f64,
        dirichlet_prior: f64,
        use_entropy: bool,
        kl_warmup_ratio: f64,
    }
);
section!(
    /// `[train]`
    TrainFile {
        output_dir: PathBuf,
        num_train_epochs: f64,
        max_steps: u64,
        per_device_train_batch_size: usize,
        gradient_accumulation_steps: usize,
        learning_rate: f64,
        variational_learning_rate: f64,
        loraplus_lr_ratio: f64,
        lr_scheduler_type: LrSchedulerType,
        warmup_ratio: f64,
        warmup_steps: u64,
        weight_decay: f64,
        adam_beta1: f64,
        adam_beta2: f64,
        adam_epsilon: f64,
        max_grad_norm: f64,
        logging_steps: u64,
        eval_steps: u64,
        save_steps: u64,
        save_total_limit: usize,
        load_best_model_at_end: bool,
        early_stopping_patience: u64,
        report_to: OneOrMany<Report>,
        gradient_checkpointing: bool,
        bf16: bool,
    }
);
section!(
    /// `[eval]`
    EvalFile {
        posterior_samples: usize,
        ece_bins: usize,
    }
);

/// A whole run.toml.
#[derive(Debug)]
pub(super) struct RunFile {
    pub(super) top: TopFile,
    pub(super) model: ModelFile,
    pub(super) data: DataFile,
    pub(super) lora: LoraFile,
    pub(super) monteclora: MonteCloraFile,
    pub(super) train: TrainFile,
    pub(super) eval: EvalFile,
}

impl RunFile {
    /// The sections and their keys, taken from the structs.
    pub(super) fn schema() -> Schema {
        vec![
            ("", field_names::<TopFile>()),
            ("model", field_names::<ModelFile>()),
            ("data", field_names::<DataFile>()),
            ("lora", field_names::<LoraFile>()),
            ("lora.monteclora", field_names::<MonteCloraFile>()),
            ("train", field_names::<TrainFile>()),
            ("eval", field_names::<EvalFile>()),
        ]
    }

    /// Reads every section; values of a wrong type become problems of the document.
    pub(super) fn read(document: &mut Document) -> Self {
        Self {
            top: document.section(""),
            model: document.section("model"),
            data: document.section("data"),
            lora: document.section("lora"),
            monteclora: document.section("lora.monteclora"),
            train: document.section("train"),
            eval: document.section("eval"),
        }
    }
}
