//! File form -> resolved form: defaults, presets and every check, all problems in one report.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use super::{
    document::Document,
    error::ConfigError,
    file::{
        DataFile, EvalFile, LoraFile, ModelFile, MonteCloraFile, OneOrMany, RunFile, TrainFile,
    },
    run::{
        DEFAULT_SEED, DataConfig, DtypeChoice, EvalConfig, Length, LoraConfig, Method, ModelConfig,
        ModuleSelection, MonteCloraConfig, Preset, RunConfig, TrainConfig,
    },
};
use crate::data::{FieldNames, Split, directory_has};

impl RunConfig {
    /// Reads a file, applies `key.path=value` overrides, fills in defaults and checks everything.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Syntax`], and [`ConfigError::Invalid`] with every problem: unknown keys,
    /// values of a wrong type or out of range, contradictions, and what is not supported.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_toml(&text, &path.display().to_string(), overrides)
    }

    /// As [`Self::load`], from text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`], [`ConfigError::Invalid`].
    pub fn from_toml(text: &str, name: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut document = Document::parse(text, name, overrides, &RunFile::schema())?;
        let file = RunFile::read(&mut document);
        let mut check = Check(&mut document);
        let data = data(&mut check, file.data);
        let model = model(&mut check, file.model);
        check.that(
            "train.bf16",
            file.train.bf16 != Some(true)
                || matches!(model.dtype, DtypeChoice::Auto | DtypeChoice::Bf16),
            "holds the frozen weights in bfloat16; set model.dtype to \"bf16\" or \"auto\"",
        );
        let lora = lora(&mut check, file.lora, file.monteclora);
        let mut notes = Vec::new();
        if data.valid.is_none() {
            without_valid(&file.train, &mut notes);
        }
        let config = Self {
            seed: file.top.seed.unwrap_or(DEFAULT_SEED),
            model,
            train: train(&mut check, file.train, &lora, data.valid.is_some()),
            lora,
            eval: eval(&mut check, file.eval),
            data,
            notes,
        };
        let name = document.name().to_owned();
        let mut problems = document.into_problems();
        problems.extend(
            config
                .unsupported()
                .into_iter()
                .map(|message| format!("{name}: {message}")),
        );
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid { problems })
        }
    }
}

/// Checks that report and go on.
struct Check<'a>(&'a mut Document);

impl Check<'_> {
    fn that(&mut self, path: &str, holds: bool, message: impl AsRef<str>) {
        if !holds {
            self.0.problem(path, message);
        }
    }

    /// NaN fails every one of these comparisons and is refused.
    fn above(&mut self, path: &str, bound: f64, value: f64) {
        let holds = value > bound && value.is_finite();
        self.that(
            path,
            holds,
            format!("found {value}, expected a finite number above {bound}"),
        );
    }

    fn at_least(&mut self, path: &str, bound: f64, value: f64) {
        let holds = value >= bound && value.is_finite();
        self.that(
            path,
            holds,
            format!("found {value}, expected a finite number of at least {bound}"),
        );
    }

    fn below_one(&mut self, path: &str, value: f64) {
        let holds = (0.0..1.0).contains(&value);
        self.that(
            path,
            holds,
            format!("found {value}, expected a number of at least 0 and below 1"),
        );
    }

    fn count<T: PartialOrd + From<u8> + Display>(&mut self, path: &str, least: u8, value: T) {
        let holds = value >= T::from(least);
        self.that(
            path,
            holds,
            format!("found {value}, expected at least {least}"),
        );
    }

    fn required(&mut self, path: &str, given: bool, example: &str) {
        self.that(path, given, format!("is missing; {example}"));
    }

    fn path(&mut self, path: &str, value: Option<PathBuf>) -> Option<PathBuf> {
        if let Some(value) = &value {
            self.that(
                path,
                !value.as_os_str().is_empty(),
                "is empty; give a path or leave the key out",
            );
        }
        value
    }

    fn names(&mut self, path: &str, values: &[String]) {
        self.that(path, !values.is_empty(), "is empty; name at least one");
        self.that(
            path,
            values.iter().all(|name| !name.trim().is_empty()),
            "holds an empty name; remove it",
        );
    }
}

fn model(check: &mut Check<'_>, file: ModelFile) -> ModelConfig {
    let model_id = file.model_id.unwrap_or_default();
    check.required(
        "model.model_id",
        !model_id.is_empty(),
        "give a local directory or a Hub id",
    );
    ModelConfig {
        model_id,
        revision: file.revision,
        dtype: file.dtype.unwrap_or_default(),
        chat_template: check.path("model.chat_template", file.chat_template),
    }
}

fn data(check: &mut Check<'_>, file: DataFile) -> DataConfig {
    let default = DataConfig::default();
    let train = file.train.unwrap_or_default();
    check.required(
        "data.train",
        !train.as_os_str().is_empty(),
        "give a data file",
    );
    if let Some(length) = file.max_seq_length {
        check.count("data.max_seq_length", 2, length);
    }
    let fields = match FieldNames::new(file.fields.unwrap_or_default()) {
        Ok(fields) => fields,
        Err(problem) => {
            check.that("data.fields", false, &problem);
            FieldNames::default()
        }
    };
    let valid = check
        .path("data.valid", file.valid)
        .or_else(|| directory_has(&train, Split::Valid).then(|| train.clone()));
    DataConfig {
        train,
        valid,
        fields,
        format: file.format.unwrap_or(default.format),
        apply_chat_template: file
            .apply_chat_template
            .unwrap_or(default.apply_chat_template),
        train_on: file.train_on.unwrap_or(default.train_on),
        max_seq_length: file.max_seq_length,
        overlong: file.overlong.unwrap_or(default.overlong),
        packing: file.packing.unwrap_or(default.packing),
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

fn lora(check: &mut Check<'_>, file: LoraFile, monteclora: MonteCloraFile) -> LoraConfig {
    let default = LoraConfig::default();
    let target_modules = file.target_modules.map_or(default.target_modules, |value| {
        selection(check, "lora.target_modules", value)
    });
    let exclude_modules = file
        .exclude_modules
        .map(|value| selection(check, "lora.exclude_modules", value));
    check.that(
        "lora.exclude_modules",
        exclude_modules != Some(ModuleSelection::AllLinear),
        "\"all-linear\" would leave nothing to train; name the modules",
    );
    let layers_to_transform = file.layers_to_transform.map(OneOrMany::into_vec);
    let layers_pattern = file
        .layers_pattern
        .map(OneOrMany::into_vec)
        .unwrap_or_default();
    if let Some(layers) = &layers_to_transform {
        check.that(
            "lora.layers_to_transform",
            !layers.is_empty(),
            "is empty; name at least one layer or leave the key out",
        );
        check.that(
            "lora.layers_to_transform",
            !matches!(target_modules, ModuleSelection::Regex(_)),
            "cannot be combined with a regular expression in target_modules; put the layers into the expression",
        );
    } else {
        check.that(
            "lora.layers_pattern",
            layers_pattern.is_empty(),
            "has no effect without layers_to_transform; add it or leave this key out",
        );
    }
    let config = LoraConfig {
        method: file.method.unwrap_or(default.method),
        init_from: check.path("lora.init_from", file.init_from),
        r: file.r.unwrap_or(default.r),
        lora_alpha: file.lora_alpha.unwrap_or(default.lora_alpha),
        lora_dropout: file.lora_dropout.unwrap_or(default.lora_dropout),
        target_modules,
        exclude_modules,
        layers_to_transform,
        layers_pattern,
        rank_pattern: file.rank_pattern.unwrap_or_default(),
        alpha_pattern: file.alpha_pattern.unwrap_or_default(),
        use_rslora: file.use_rslora.unwrap_or(default.use_rslora),
        given: Vec::new(),
        monteclora: None,
    };
    check.that(
        "lora.r",
        config.r > 0,
        format!("found {}, expected at least 1", config.r),
    );
    check.above("lora.lora_alpha", 0.0, config.lora_alpha);
    check.below_one("lora.lora_dropout", config.lora_dropout);
    for (pattern, rank) in &config.rank_pattern {
        check.that(
            "lora.rank_pattern",
            *rank > 0,
            format!("`{pattern}`: found {rank}, expected at least 1"),
        );
    }
    for (pattern, alpha) in &config.alpha_pattern {
        check.that(
            "lora.alpha_pattern",
            *alpha > 0.0 && alpha.is_finite(),
            format!("`{pattern}`: found {alpha}, expected a finite number above 0"),
        );
    }
    // Checked even where the method does not use it: the section stays in the file for the next run.
    let monteclora = self::monteclora(check, monteclora);
    let given = match config.init_from {
        Some(_) => SHAPE_KEYS
            .iter()
            .filter(|key| check.0.is_given(key))
            .map(|key| (*key).to_owned())
            .collect(),
        None => Vec::new(),
    };
    LoraConfig {
        given,
        monteclora: (config.method == Method::MonteClora).then_some(monteclora),
        ..config
    }
}

fn selection(check: &mut Check<'_>, path: &str, value: OneOrMany<String>) -> ModuleSelection {
    match value {
        OneOrMany::One(name) if name.eq_ignore_ascii_case("all-linear") => {
            ModuleSelection::AllLinear
        }
        OneOrMany::One(pattern) => {
            check.names(path, std::slice::from_ref(&pattern));
            ModuleSelection::Regex(pattern)
        }
        OneOrMany::Many(names) => {
            check.names(path, &names);
            ModuleSelection::Names(names)
        }
    }
}

fn monteclora(check: &mut Check<'_>, file: MonteCloraFile) -> MonteCloraConfig {
    let preset = MonteCloraConfig::preset(file.preset.unwrap_or_default());
    let config = MonteCloraConfig {
        objective: file.objective.unwrap_or(preset.objective),
        num_samples: file.num_samples.unwrap_or(preset.num_samples),
        sample_scaler: file.sample_scaler.unwrap_or(preset.sample_scaler),
        kl_loss_weight: file.kl_loss_weight.unwrap_or(preset.kl_loss_weight),
        dirichlet_prior: file.dirichlet_prior.unwrap_or(preset.dirichlet_prior),
        use_entropy: file.use_entropy.unwrap_or(preset.use_entropy),
        kl_warmup_ratio: file.kl_warmup_ratio.unwrap_or(preset.kl_warmup_ratio),
        preset: preset.preset,
    };
    let key = |name: &str| format!("lora.monteclora.{name}");
    check.that(
        &key("num_samples"),
        config.num_samples > 0,
        format!("found {}, expected at least 1", config.num_samples),
    );
    check.above(&key("sample_scaler"), 0.0, config.sample_scaler);
    check.at_least(&key("kl_loss_weight"), 0.0, config.kl_loss_weight);
    check.above(&key("dirichlet_prior"), 0.0, config.dirichlet_prior);
    check.that(
        &key("kl_warmup_ratio"),
        (0.0..=1.0).contains(&config.kl_warmup_ratio),
        format!(
            "found {}, expected a number from 0 to 1",
            config.kl_warmup_ratio
        ),
    );
    config
}

/// What of `[train]` rests on validation rows, where there are none.
fn without_valid(file: &TrainFile, notes: &mut Vec<String>) {
    let asked = [
        (
            "load_best_model_at_end",
            file.load_best_model_at_end == Some(true),
        ),
        (
            "early_stopping_patience",
            file.early_stopping_patience.is_some_and(|n| n > 0),
        ),
    ];
    for (key, _) in asked.into_iter().filter(|(_, asked)| *asked) {
        notes.push(format!(
            "[train] {key} has no effect without validation rows; give data.valid"
        ));
    }
}

fn train(
    check: &mut Check<'_>,
    file: TrainFile,
    lora: &LoraConfig,
    has_valid: bool,
) -> TrainConfig {
    let default = TrainConfig::default();
    let output_dir = file.output_dir.clone().unwrap_or_default();
    check.required(
        "train.output_dir",
        !output_dir.as_os_str().is_empty(),
        "give the directory to write the adapter to",
    );
    let learning_rate = file.learning_rate.unwrap_or(default.learning_rate);
    let preset = lora.monteclora.as_ref().map_or(Preset::Peft, |m| m.preset);
    let (warmup_ratio, warmup_steps) = warmup(check, &file);
    let config = TrainConfig {
        output_dir,
        length: length(check, &file).unwrap_or(default.length),
        per_device_train_batch_size: file
            .per_device_train_batch_size
            .unwrap_or(default.per_device_train_batch_size),
        gradient_accumulation_steps: file
            .gradient_accumulation_steps
            .unwrap_or(default.gradient_accumulation_steps),
        learning_rate,
        variational_learning_rate: file
            .variational_learning_rate
            .unwrap_or(learning_rate * preset.variational_rate_ratio()),
        loraplus_lr_ratio: file.loraplus_lr_ratio.unwrap_or(default.loraplus_lr_ratio),
        lr_scheduler_type: file.lr_scheduler_type.unwrap_or(default.lr_scheduler_type),
        warmup_ratio: warmup_ratio.unwrap_or(default.warmup_ratio),
        warmup_steps,
        weight_decay: file.weight_decay.unwrap_or(default.weight_decay),
        adam_beta1: file.adam_beta1.unwrap_or(default.adam_beta1),
        adam_beta2: file.adam_beta2.unwrap_or(default.adam_beta2),
        adam_epsilon: file.adam_epsilon.unwrap_or(default.adam_epsilon),
        max_grad_norm: file.max_grad_norm.unwrap_or(default.max_grad_norm),
        logging_steps: file.logging_steps.unwrap_or(default.logging_steps),
        eval_steps: file.eval_steps.unwrap_or(default.eval_steps),
        save_steps: file.save_steps.unwrap_or(default.save_steps),
        save_total_limit: file.save_total_limit.unwrap_or(default.save_total_limit),
        load_best_model_at_end: has_valid
            && file
                .load_best_model_at_end
                .unwrap_or(default.load_best_model_at_end),
        early_stopping_patience: if has_valid {
            file.early_stopping_patience
                .unwrap_or(default.early_stopping_patience)
        } else {
            0
        },
        report_to: file
            .report_to
            .map_or(default.report_to, OneOrMany::into_vec),
        gradient_checkpointing: file
            .gradient_checkpointing
            .unwrap_or(default.gradient_checkpointing),
        bf16: file.bf16.unwrap_or(default.bf16),
    };
    let batch = config.per_device_train_batch_size as u64;
    check.count("train.per_device_train_batch_size", 1, batch);
    let accumulation = config.gradient_accumulation_steps as u64;
    check.count("train.gradient_accumulation_steps", 1, accumulation);
    check.above("train.learning_rate", 0.0, config.learning_rate);
    if let Some(rate) = file.variational_learning_rate {
        check.above("train.variational_learning_rate", 0.0, rate);
    }
    check.above("train.loraplus_lr_ratio", 0.0, config.loraplus_lr_ratio);
    check.that(
        "train.warmup_ratio",
        (0.0..=1.0).contains(&config.warmup_ratio),
        format!(
            "found {}, expected a number from 0 to 1",
            config.warmup_ratio
        ),
    );
    check.at_least("train.weight_decay", 0.0, config.weight_decay);
    check.below_one("train.adam_beta1", config.adam_beta1);
    check.below_one("train.adam_beta2", config.adam_beta2);
    check.above("train.adam_epsilon", 0.0, config.adam_epsilon);
    check.at_least("train.max_grad_norm", 0.0, config.max_grad_norm);
    check.count("train.logging_steps", 1, config.logging_steps);
    check.count("train.eval_steps", 1, config.eval_steps);
    check.count("train.save_steps", 1, config.save_steps);
    config
}

/// One of warmup_ratio and warmup_steps; one given on the command line replaces the other of the file.
fn warmup(check: &mut Check<'_>, file: &TrainFile) -> (Option<f64>, Option<u64>) {
    const RATIO: &str = "train.warmup_ratio";
    const STEPS: &str = "train.warmup_steps";
    let (ratio, steps) = (file.warmup_ratio, file.warmup_steps);
    if ratio.is_some() && steps.is_some() {
        match (check.0.is_override(RATIO), check.0.is_override(STEPS)) {
            (true, false) => return (ratio, None),
            (false, true) => return (None, steps),
            _ => check.0.problem(
                STEPS,
                "cannot be given together with warmup_ratio; keep one of them",
            ),
        }
    }
    (ratio, steps)
}

/// One of num_train_epochs and max_steps; one given on the command line replaces the other of the file.
fn length(check: &mut Check<'_>, file: &TrainFile) -> Option<Length> {
    const EPOCHS: &str = "train.num_train_epochs";
    const STEPS: &str = "train.max_steps";
    let (mut epochs, mut steps) = (file.num_train_epochs, file.max_steps);
    if epochs.is_some() && steps.is_some() {
        match (check.0.is_override(EPOCHS), check.0.is_override(STEPS)) {
            (true, false) => steps = None,
            (false, true) => epochs = None,
            _ => check.0.problem(
                STEPS,
                "cannot be given together with num_train_epochs; keep one of them",
            ),
        }
    }
    if let Some(epochs) = epochs {
        check.above(EPOCHS, 0.0, epochs);
    }
    if let Some(steps) = steps {
        check.count(STEPS, 1, steps);
    }
    steps.map(Length::Steps).or(epochs.map(Length::Epochs))
}

fn eval(check: &mut Check<'_>, file: EvalFile) -> EvalConfig {
    let default = EvalConfig::default();
    let config = EvalConfig {
        posterior_samples: file.posterior_samples.unwrap_or(default.posterior_samples),
        ece_bins: file.ece_bins.unwrap_or(default.ece_bins),
    };
    check.count("eval.ece_bins", 1, config.ece_bins as u64);
    config
}

#[cfg(test)]
mod tests;
