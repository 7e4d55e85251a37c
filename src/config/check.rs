//! From text to a checked run: presets, what keys say about each other, and every range; all problems in one report.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use monteclora_adapters::methods::monteclora::{self, MonteCloraConfig, Objective, Preset};
use monteclora_adapters::methods::{AdaLoraConfig, SaraConfig, SecondOrderConfig, SsfConfig, find};
use monteclora_converters::jinja::FIXED;
use monteclora_converters::{Problem, Problems};
use toml::Table;

use super::{
    document::{Document, Schema, field_names, one},
    run::{
        DataConfig, EvalConfig, LoraConfig, Method, ModelConfig, ModuleSelection, RunConfig,
        TrainConfig,
    },
};
use crate::data::{Split, directory_has};

impl RunConfig {
    /// Reads a file, applies `key.path=value` overrides, fills in defaults and checks everything.
    ///
    /// # Errors
    /// A file that cannot be read or is not TOML; every problem of a file that is: unknown keys, values of a wrong type or
    /// out of range, contradictions, and what is not supported.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, Problems> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| {
            one(format!(
                "cannot read `{name}`; give the path of a TOML file with -c: {source}"
            ))
        })?;
        let yaml = ["yaml", "yml"].iter().any(|known| {
            path.extension()
                .is_some_and(|found| found.eq_ignore_ascii_case(known))
        });
        if yaml {
            return Err(one(format!(
                "`{name}` is YAML, and a run is described in TOML; `monteclora init -m MODEL --data FILE` writes a file with every section, and docs/coming-from.md lists the keys of axolotl, mlx-lm and others beside ours"
            )));
        }
        Self::from_toml(&text, &name, overrides)
    }

    /// As [`Self::load`], from text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_toml(text: &str, name: &str, overrides: &[String]) -> Result<Self, Problems> {
        const PRESETS: &str = "lora.monteclora";
        let schema = schema();
        let mut document = Document::parse(text, name, overrides, &schema)?;
        let preset: Option<Preset> = document.value("lora.monteclora.preset");
        let preset = MonteCloraConfig::preset(preset.unwrap_or_default());
        document.defaults(PRESETS, Table::try_from(preset).unwrap_or_default());
        let mut config: Self = document.read(&schema);
        data(&mut document, &mut config.data);
        model(&mut document, &config.model);
        document.that(
            "train.bf16",
            !config.train.bf16 || matches!(config.model.dtype.0, "auto" | "bf16"),
            "holds the frozen weights in bfloat16; set model.dtype to \"bf16\" or \"auto\"",
        );
        lora(&mut document, &mut config.lora);
        if config.data.valid.is_none() {
            config.notes = without_valid(&document, &mut config.train);
        }
        config.notes.extend(unread(&document, &config.lora));
        train(&mut document, &mut config.train, &config.lora);
        eval(&mut document, &config.eval);
        let problems = document.into_problems();
        match problems.is_empty() {
            true => Ok(config),
            false => Err(Problems::from_iter(
                problems.into_iter().map(Problem::usage),
            )),
        }
    }
}

/// The sections and their keys, taken from the structures.
fn schema() -> Schema {
    vec![
        ("", field_names::<RunConfig>()),
        ("model", field_names::<ModelConfig>()),
        ("data", field_names::<DataConfig>()),
        ("lora", field_names::<LoraConfig>()),
        ("lora.monteclora", field_names::<MonteCloraConfig>()),
        ("lora.adalora", field_names::<AdaLoraConfig>()),
        ("lora.ssf", field_names::<SsfConfig>()),
        ("lora.sara", field_names::<SaraConfig>()),
        ("lora.second_order", field_names::<SecondOrderConfig>()),
        ("train", field_names::<TrainConfig>()),
        ("eval", field_names::<EvalConfig>()),
    ]
}

/// Checks that report and go on.
impl Document {
    fn that(&mut self, path: &str, holds: bool, message: impl AsRef<str>) {
        if !holds {
            self.problem(path, message);
        }
    }

    fn expect(&mut self, path: &str, holds: bool, value: impl Display, expected: &str) {
        self.that(path, holds, format!("found {value}, expected {expected}"));
    }

    /// NaN fails every one of these comparisons and is refused.
    fn above_zero(&mut self, path: &str, value: f64) {
        let holds = value > 0.0 && value.is_finite();
        self.expect(path, holds, value, "a finite number above 0");
    }

    fn not_negative(&mut self, path: &str, value: f64) {
        let holds = value >= 0.0 && value.is_finite();
        self.expect(path, holds, value, "a finite number of at least 0");
    }

    fn below_one(&mut self, path: &str, value: f64) {
        let holds = (0.0..1.0).contains(&value);
        self.expect(path, holds, value, "a number of at least 0 and below 1");
    }

    fn share(&mut self, path: &str, value: f64) {
        let holds = (0.0..=1.0).contains(&value);
        self.expect(path, holds, value, "a number from 0 to 1");
    }

    fn count(&mut self, path: &str, least: u64, value: u64) {
        self.expect(path, value >= least, value, &format!("at least {least}"));
    }

    fn required(&mut self, path: &str, given: bool, example: &str) {
        self.that(path, given, format!("is missing; {example}"));
    }

    fn path(&mut self, path: &str, value: Option<&PathBuf>) {
        self.that(
            path,
            value.is_none_or(|value| !value.as_os_str().is_empty()),
            "is empty; give a path or leave the key out",
        );
    }

    fn modules(&mut self, path: &str, selection: &ModuleSelection) {
        let names = match selection {
            ModuleSelection::AllLinear => return,
            ModuleSelection::Names(names) => names.as_slice(),
            ModuleSelection::Regex(pattern) => std::slice::from_ref(pattern),
        };
        self.that(path, !names.is_empty(), "is empty; name at least one");
        self.that(
            path,
            names.iter().all(|name| !name.trim().is_empty()),
            "holds an empty name; remove it",
        );
    }

    /// Which of two keys that exclude each other count: the one given on the command line replaces that of the file, and
    /// `second` a default of `first`.
    fn either(&mut self, first: &str, second: &str) -> (bool, bool) {
        if !(self.is_given(first) && self.is_given(second)) {
            return (!self.is_given(second), self.is_given(second));
        }
        let overridden = (self.is_override(first), self.is_override(second));
        if overridden.0 != overridden.1 {
            return overridden;
        }
        let name = first.rsplit('.').next().unwrap_or_default();
        let message = format!("cannot be given together with {name}; keep one of them");
        self.problem(second, message);
        (true, true)
    }
}

fn model(document: &mut Document, config: &ModelConfig) {
    document.required(
        "model.model_id",
        !config.model_id.is_empty(),
        "give a local directory or a Hub id",
    );
    document.path("model.chat_template", config.chat_template.as_ref());
}

fn data(document: &mut Document, config: &mut DataConfig) {
    document.required(
        "data.train",
        !config.train.as_os_str().is_empty(),
        "give a data file",
    );
    if let Some(length) = config.max_seq_length {
        document.count("data.max_seq_length", 2, length as u64);
    }
    for name in config.template_variables.keys() {
        document.that(
            "data.template_variables",
            !FIXED.contains(&name.as_str()),
            format!("`{name}` is what a conversation sets itself; remove it"),
        );
    }
    document.path("data.valid", config.valid.as_ref());
    if config.valid.is_none() && directory_has(&config.train, Split::Valid) {
        config.valid = Some(config.train.clone());
    }
}

/// Keys for which an adapter that a run starts from has a value of its own.
const SHAPE_KEYS: [&str; 15] = [
    "lora.r",
    "lora.lora_alpha",
    "lora.target_modules",
    "lora.exclude_modules",
    "lora.layers_to_transform",
    "lora.layers_pattern",
    "lora.rank_pattern",
    "lora.alpha_pattern",
    "lora.use_rslora",
    "lora.monteclora.preset",
    "lora.monteclora.num_samples",
    "lora.monteclora.sample_scaler",
    "lora.monteclora.kl_loss_weight",
    "lora.monteclora.dirichlet_prior",
    "lora.monteclora.use_entropy",
];

fn lora(document: &mut Document, config: &mut LoraConfig) {
    document.modules("lora.target_modules", &config.target_modules);
    if let Some(excluded) = &config.exclude_modules {
        document.modules("lora.exclude_modules", excluded);
        document.that(
            "lora.exclude_modules",
            *excluded != ModuleSelection::AllLinear,
            "\"all-linear\" would leave nothing to train; name the modules",
        );
    }
    if let Some(layers) = &config.layers_to_transform {
        document.that(
            "lora.layers_to_transform",
            !layers.is_empty(),
            "is empty; name at least one layer or leave the key out",
        );
        document.that(
            "lora.layers_to_transform",
            !matches!(config.target_modules, ModuleSelection::Regex(_)),
            "cannot be combined with a regular expression in target_modules; put the layers into the expression",
        );
    } else {
        document.that(
            "lora.layers_pattern",
            config.layers_pattern.is_empty(),
            "has no effect without layers_to_transform; add it or leave this key out",
        );
    }
    document.path("lora.init_from", config.init_from.as_ref());
    document.count("lora.r", 1, config.r as u64);
    let is_possible = config.r <= MAX_RANK;
    let message = format!("found {}, expected at most {MAX_RANK}", config.r);
    document.that("lora.r", is_possible, message);
    document.above_zero("lora.lora_alpha", config.lora_alpha);
    document.below_one("lora.lora_dropout", config.lora_dropout);
    for (pattern, rank) in &config.rank_pattern {
        document.that(
            "lora.rank_pattern",
            (1..=MAX_RANK).contains(rank),
            format!("`{pattern}`: found {rank}, expected 1 to {MAX_RANK}"),
        );
    }
    for (pattern, alpha) in &config.alpha_pattern {
        document.that(
            "lora.alpha_pattern",
            *alpha > 0.0 && alpha.is_finite(),
            format!("`{pattern}`: found {alpha}, expected a finite number above 0"),
        );
    }
    // Checked even where the method does not use it: the section stays in the file for the next run.
    if let Some(posterior) = &config.monteclora {
        posterior_ranges(document, posterior);
        if posterior.objective == Objective::Elbo {
            config.monteclora = Some(posterior.clone().of_evidence(config.r));
        }
    }
    other_ranges(document, config);
    if config.method != Method(monteclora::KIND.name) {
        config.monteclora = None;
    }
    let is = |name: &str| config.method.0 == name;
    let keeps = ["adalora", "ssf", "sara", "second-order"].map(is);
    let [adalora, ssf, sara, second_order] = keeps;
    config.adalora.take_if(|_| !adalora);
    config.ssf.take_if(|_| !ssf);
    config.sara.take_if(|_| !sara);
    config.second_order.take_if(|_| !second_order);
    if config.init_from.is_some() {
        let given = SHAPE_KEYS.iter().filter(|key| document.is_given(key));
        config.given = given.map(|key| (*key).to_owned()).collect();
    }
}

/// The ranges of the sections of AdaLoRA, SaRA and second-order selection.
fn other_ranges(document: &mut Document, config: &LoraConfig) {
    if let Some(adalora) = &config.adalora {
        let key = |name: &str| format!("lora.adalora.{name}");
        document.count(&key("target_r"), 1, adalora.target_r as u64);
        document.count(&key("delta_t"), 1, adalora.delta_t);
        for (name, beta) in [("beta1", adalora.beta1), ("beta2", adalora.beta2)] {
            document.below_one(&key(name), beta);
        }
        document.not_negative(&key("orth_reg_weight"), adalora.orth_reg_weight);
    }
    let fractions = [
        (
            "lora.sara.fraction",
            config.sara.as_ref().map(|s| s.fraction),
        ),
        (
            "lora.second_order.fraction",
            config.second_order.as_ref().map(|s| s.fraction),
        ),
    ];
    for (key, fraction) in fractions {
        if let Some(fraction) = fraction {
            document.above_zero(key, fraction);
            document.share(key, fraction);
        }
    }
    if let Some(sara) = &config.sara {
        document.not_negative("lora.sara.rank_weight", sara.rank_weight);
        document.share("lora.sara.reselect_at", sara.reselect_at);
    }
}

fn posterior_ranges(document: &mut Document, config: &MonteCloraConfig) {
    let key = |name: &str| format!("lora.monteclora.{name}");
    document.count(&key("num_samples"), 1, config.num_samples as u64);
    document.above_zero(&key("sample_scaler"), config.sample_scaler);
    document.not_negative(&key("kl_loss_weight"), config.kl_loss_weight);
    document.above_zero(&key("dirichlet_prior"), config.dirichlet_prior);
    document.share(&key("kl_warmup_ratio"), config.kl_warmup_ratio);
    document.that(
        &key("prior_std"),
        (1e-6..=1e3).contains(&config.prior_std),
        format!("found {}, expected 1e-6 to 1000", config.prior_std),
    );
    document.above_zero(&key("temperature"), config.temperature);
    let of_evidence = config.objective == Objective::Elbo;
    let (others, why) = match of_evidence {
        true => (
            &OF_DIVERGENCES[..],
            "has no meaning with objective = \"elbo\"; leave it out, or choose objective = \"exact\"",
        ),
        false => (
            &OF_EVIDENCE[..],
            "has a meaning with objective = \"elbo\" only; leave it out, or choose that objective",
        ),
    };
    for name in others {
        document.that(name, !document.is_given(name), why);
    }
}

/// The largest rank: above the width of every model.
const MAX_RANK: usize = 65_536;

/// The most epochs, above which a number is a mistake.
const MAX_EPOCHS: f64 = 1e6;

/// Keys that only `objective = "elbo"` reads.
const OF_EVIDENCE: [&str; 2] = ["lora.monteclora.prior_std", "lora.monteclora.temperature"];

/// Keys that it does not read.
const OF_DIVERGENCES: [&str; 7] = [
    "lora.monteclora.num_samples",
    "lora.monteclora.sample_scaler",
    "lora.monteclora.kl_loss_weight",
    "lora.monteclora.dirichlet_prior",
    "lora.monteclora.use_entropy",
    "lora.monteclora.kl_warmup_ratio",
    "train.variational_learning_rate",
];

/// Keys that were given and that the method does not read.
fn unread(document: &Document, config: &LoraConfig) -> Option<String> {
    let kind = find(config.method.0).ok()?;
    let given: Vec<&str> = (kind.unread.iter().copied())
        .filter(|key| document.is_given(key))
        .collect();
    (!given.is_empty()).then(|| {
        format!(
            "method \"{}\" does not read {}; leave it out",
            kind.name,
            given.join(", ")
        )
    })
}

/// Turns off what rests on validation rows, where there are none, and says what of it was asked for.
fn without_valid(document: &Document, config: &mut TrainConfig) -> Vec<String> {
    let mut notes = Vec::new();
    let best = std::mem::take(&mut config.load_best_model_at_end);
    let patience = std::mem::take(&mut config.early_stopping_patience);
    for (key, asked) in [
        ("load_best_model_at_end", best),
        ("early_stopping_patience", patience > 0),
    ] {
        if asked && document.is_given(&format!("train.{key}")) {
            notes.push(format!(
                "[train] {key} has no effect without validation rows; give data.valid"
            ));
        }
    }
    notes
}

fn train(document: &mut Document, config: &mut TrainConfig, lora: &LoraConfig) {
    document.required(
        "train.output_dir",
        !config.output_dir.as_os_str().is_empty(),
        "give the directory to write the adapter to",
    );
    let (ratio, steps) = document.either("train.warmup_ratio", "train.warmup_steps");
    if !ratio {
        config.warmup_ratio = TrainConfig::default().warmup_ratio;
    }
    config.warmup_steps = config.warmup_steps.filter(|_| steps);
    let (epochs, steps) = document.either("train.num_train_epochs", "train.max_steps");
    config.num_train_epochs = config.num_train_epochs.filter(|_| epochs);
    config.max_steps = config.max_steps.filter(|_| steps);
    if let Some(epochs) = config.num_train_epochs {
        document.above_zero("train.num_train_epochs", epochs);
        let message = format!("found {epochs}, expected at most {MAX_EPOCHS}");
        let is_possible = epochs.is_nan() || epochs <= MAX_EPOCHS;
        document.that("train.num_train_epochs", is_possible, message);
    }
    if let Some(steps) = config.max_steps {
        document.count("train.max_steps", 1, steps);
    }
    let batch_size = config.per_device_train_batch_size as u64;
    document.count("train.per_device_train_batch_size", 1, batch_size);
    let accumulation = config.gradient_accumulation_steps as u64;
    document.count("train.gradient_accumulation_steps", 1, accumulation);
    document.above_zero("train.learning_rate", config.learning_rate);
    if document.is_given("train.variational_learning_rate") {
        let rate = config.variational_learning_rate;
        document.not_negative("train.variational_learning_rate", rate);
    } else {
        let preset = lora.monteclora.as_ref().map_or(Preset::Peft, |m| m.preset);
        config.variational_learning_rate = config.learning_rate * preset.variational_rate_ratio();
    }
    document.above_zero("train.loraplus_lr_ratio", config.loraplus_lr_ratio);
    document.share("train.warmup_ratio", config.warmup_ratio);
    document.not_negative("train.weight_decay", config.weight_decay);
    document.below_one("train.adam_beta1", config.adam_beta1);
    document.below_one("train.adam_beta2", config.adam_beta2);
    document.above_zero("train.adam_epsilon", config.adam_epsilon);
    document.not_negative("train.max_grad_norm", config.max_grad_norm);
    document.count("train.logging_steps", 1, config.logging_steps);
    document.count("train.eval_steps", 1, config.eval_steps);
    document.count("train.save_steps", 1, config.save_steps);
}

fn eval(document: &mut Document, config: &EvalConfig) {
    document.count("eval.ece_bins", 1, config.ece_bins as u64);
    if config.posterior_samples > 0 {
        document.file_problem(
            "[eval] posterior_samples: a run evaluates the posterior mean; set it to 0 and use `monteclora eval --posterior-samples` afterwards",
        );
    }
}

#[cfg(test)]
mod tests;
