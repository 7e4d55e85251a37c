//! Converts the keys of `adapter_config.json` to [`AdapterConfig`]. Everything that is not understood becomes a
//! problem.

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::stored::MERGE;
use crate::config::{
    AdaLoraSettings, AdapterConfig, ExcludeModules, MonteCloraSettings, PeftType, TargetModules,
};
use crate::problem::Problem;

/// Largest rank that is accepted.
const MAX_RANK: u64 = 1 << 16;
/// Largest number of mixture components that is accepted.
const MAX_COUNT: u64 = 1 << 20;

const RETRAIN: &str = "only LoRA and MonteCLoRA on linear layers can be converted; train without it, or merge it with the tool that made it";

/// PEFT keys that change the model unless they are null, false or empty: key, code and meaning.
const CHANGES_MODEL: &str = "\
lora_bias | bias | a trained bias on B
modules_to_save | modules-to-save | modules that were fully trained
trainable_token_indices | trainable-tokens | trained token embeddings
target_parameters | target-parameters | LoRA on bare parameters, not on linear modules
layer_replication | layer-replication | layers that the base does not have
alora_invocation_tokens | alora | activated LoRA: the update depends on the tokens
arrow_config | arrow | Arrow routing: the update depends on the input
use_qalora | qalora | QALoRA pools the input of A
use_bdlora | bdlora | block-diagonal LoRA
megatron_config | megatron | Megatron's parallel layers
fan_in_fan_out | fan-in-fan-out | transposed base weights (Conv1D)
kasa_config | kasa | KaSA changes the base weights
velora_config | velora | VeLoRA
corda_config | corda | CorDA changes the base weights
lora_ga_config | lora-ga | LoRA-GA changes the base weights
loftq_config | loftq | LoftQ changes the base weights
ensure_weight_tying | weight-tying | adapters shared between tied layers";

/// PEFT keys that describe the training setup. Their values cannot change what the adapter computes.
const NEUTRAL: [(&str, &str); 6] = [
    ("peft_version", ""),
    ("auto_mapping", ""),
    ("eva_config", ""),
    ("qalora_group_size", "16"),
    ("megatron_core", "\"megatron.core\""),
    ("runtime_config", ""),
];

/// Flat keys of the authors' own code (LCS2-IIITD/MonteCLoRA). It saves only A and B and evaluates with them, so the
/// keys describe a training whose posterior is not stored.
pub(crate) const AUTHORS: [&str; 10] = [
    "use_monteclora",
    "monteclora_at",
    "monteclora_targets",
    "monteclora_n",
    "monteclora_m",
    "sample_scaler",
    "use_entropy",
    "dirichlet_prior",
    "kl_loss_weight",
    "mc_training",
];

/// Initialisations of A and B that do not change the base.
const KIND_INITS: [&str; 5] = ["gaussian", "eva", "orthogonal", "mica", "true"];

/// Whether a value switches nothing on: it is null, false or empty.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// The remaining keys and the problems found.
struct Reader<'a> {
    keys: Map<String, Value>,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    fn wrong(&mut self, key: &str, value: &Value, expected: &str) {
        let mut shown = value.to_string();
        if shown.len() > 80 {
            shown = format!("{}...", shown.chars().take(77).collect::<String>());
        }
        let message = format!("expected {expected}, found {shown}");
        self.push("config-value", key, message, "correct adapter_config.json");
    }

    fn push(&mut self, code: &'static str, key: &str, message: impl Into<String>, fix: &str) {
        self.problems.push(Problem::new(code, key, message, fix));
    }

    /// Takes `key`; null counts as absent.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.keys.shift_remove(key).filter(|value| !value.is_null())
    }

    /// Takes `key` and reads it with `read`, or keeps `default` and notes a problem.
    fn read<T>(
        &mut self,
        key: &str,
        default: T,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> T {
        let Some(value) = self.take(key) else {
            return default;
        };
        read(&value).unwrap_or_else(|| {
            self.wrong(key, &value, expected);
            default
        })
    }

    fn flag(&mut self, key: &str) -> bool {
        self.read(key, false, "true or false", Value::as_bool)
    }

    fn text(&mut self, key: &str) -> Option<String> {
        self.read(key, None, "a string", |value| {
            value.as_str().map(|text| Some(text.to_owned()))
        })
        .filter(|text| !text.is_empty())
    }
}

fn count(value: &Value, max: u64) -> Option<usize> {
    let count = value.as_u64().filter(|count| (1..=max).contains(count))?;
    usize::try_from(count).ok()
}

fn strings(value: &Value) -> Option<Vec<String>> {
    let names = value.as_array()?.iter();
    names.map(|name| name.as_str().map(str::to_owned)).collect()
}

fn pattern<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<IndexMap<String, T>> {
    let entries = value.as_object()?.iter();
    entries
        .map(|(key, value)| Some((key.clone(), read(value)?)))
        .collect()
}

fn finite(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| number.is_finite())
}

fn not_negative(value: &Value) -> Option<f64> {
    finite(value).filter(|number| *number >= 0.0)
}

/// Reads the keys, and adds to `problems` everything that is wrong or not understood.
pub(crate) fn from_object(keys: Map<String, Value>, problems: &mut Vec<Problem>) -> AdapterConfig {
    let mut reader = Reader { keys, problems };
    let defaults = AdapterConfig::default();
    let peft_type = read_peft_type(&mut reader);
    refuse_other_methods(&mut reader);
    let adalora = (peft_type == PeftType::AdaLora).then(|| read_adalora(&mut reader));
    let mut config = AdapterConfig {
        peft_type,
        use_dora: reader.flag("use_dora"),
        base_model_name_or_path: reader.text("base_model_name_or_path"),
        revision: reader.text("revision"),
        r: reader.read("r", defaults.r, "a whole number of at least 1", |value| {
            count(value, MAX_RANK)
        }),
        lora_alpha: reader.read("lora_alpha", defaults.lora_alpha, "a number", finite),
        lora_dropout: reader.read("lora_dropout", 0.0, "a probability", |value| {
            not_negative(value).filter(|p| *p <= 1.0)
        }),
        target_modules: read_targets(&mut reader),
        exclude_modules: reader.read(
            "exclude_modules",
            None,
            "a list of names or a pattern",
            |value| match value {
                value if is_off(value) => Some(None),
                Value::String(text) => Some(Some(ExcludeModules::Regex(text.clone()))),
                value => strings(value).map(|names| Some(ExcludeModules::List(sorted(names)))),
            },
        ),
        layers_to_transform: reader.read("layers_to_transform", None, "layer numbers", |value| {
            let layers = match value {
                Value::Array(layers) => layers.iter().map(layer_number).collect::<Option<_>>()?,
                single => vec![layer_number(single)?],
            };
            Some(Some(layers).filter(|layers| !layers.is_empty()))
        }),
        layers_pattern: reader.read(
            "layers_pattern",
            None,
            "a pattern or a list of patterns",
            |value| {
                let patterns = match value {
                    Value::String(text) if text.is_empty() => Vec::new(),
                    Value::String(text) => vec![text.clone()],
                    value => strings(value)?,
                };
                Some(Some(patterns).filter(|patterns| !patterns.is_empty()))
            },
        ),
        rank_pattern: reader.read(
            "rank_pattern",
            IndexMap::new(),
            "a map from names to ranks",
            |value| pattern(value, |rank| count(rank, MAX_RANK)),
        ),
        alpha_pattern: reader.read(
            "alpha_pattern",
            IndexMap::new(),
            "a map from names to alphas",
            |value| pattern(value, finite),
        ),
        use_rslora: reader.flag("use_rslora"),
        task_type: reader.text("task_type"),
        inference_mode: reader.flag("inference_mode"),
        monteclora: read_monteclora(&mut reader),
        adalora,
        other: Map::new(),
    };
    if let Some(settings) = &config.adalora {
        config.r = settings.init_r;
    }
    check_method(&config, &mut reader);
    check_layers(&config, &mut reader);
    read_init(&mut reader, &mut config);
    let mut rest = reader.keys;
    rest.retain(|key, value| keep_or_refuse(key, value, reader.problems));
    config.other.extend(rest);
    config.other.sort_keys();
    config
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names.dedup();
    names
}

fn layer_number(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

fn read_peft_type(reader: &mut Reader<'_>) -> PeftType {
    match reader.take("peft_type") {
        Some(value) => {
            let known = PeftType::ALL
                .into_iter()
                .find(|known| value.as_str() == Some(known.name()));
            if known.is_none() {
                let message = format!("{value} is not LORA or ADALORA");
                reader.push("peft-type", "peft_type", message, RETRAIN);
            }
            known.unwrap_or_default()
        }
        None => {
            let message = "missing, so this is not known to be a LoRA adapter";
            let fix = "add \"peft_type\": \"LORA\" if it is one";
            reader.push("peft-type", "peft_type", message, fix);
            PeftType::Lora
        }
    }
}

/// AdaLoRA's keys. PEFT reads neither `r` nor the patterns and `use_rslora` of LoRA; its `rank_pattern` says which singular values are
/// kept, and is read with the tensors.
fn read_adalora(reader: &mut Reader<'_>) -> AdaLoraSettings {
    const STEPS: &str = "a whole number of steps";
    let defaults = AdaLoraSettings::default();
    for key in ["r", "rank_pattern", "alpha_pattern", "use_rslora"] {
        let _ = reader.take(key);
    }
    let rank = |value: &Value| count(value, MAX_RANK);
    let share = |value: &Value| not_negative(value).filter(|share| *share < 1.0);
    AdaLoraSettings {
        init_r: reader.read("init_r", defaults.init_r, "a rank of at least 1", rank),
        target_r: reader.read("target_r", defaults.target_r, "a rank of at least 1", rank),
        tinit: reader.read("tinit", defaults.tinit, STEPS, Value::as_u64),
        tfinal: reader.read("tfinal", defaults.tfinal, STEPS, Value::as_u64),
        delta_t: reader.read("deltaT", defaults.delta_t, STEPS, Value::as_u64),
        beta1: reader.read("beta1", defaults.beta1, "a number from 0 to 1", share),
        beta2: reader.read("beta2", defaults.beta2, "a number from 0 to 1", share),
        orth_reg_weight: reader.read(
            "orth_reg_weight",
            defaults.orth_reg_weight,
            "a number of at least 0",
            not_negative,
        ),
        total_step: reader.read("total_step", None, STEPS, |value| value.as_u64().map(Some)),
    }
}

/// Refuses settings of two methods at once.
fn check_method(config: &AdapterConfig, reader: &mut Reader<'_>) {
    let (kind, is_lora) = (config.peft_type.name(), config.peft_type == PeftType::Lora);
    for (key, is_set) in [
        ("use_dora", config.use_dora),
        ("monteclora_config", config.monteclora.is_some()),
    ] {
        if is_set && !is_lora {
            let message = format!("set, and peft_type is {kind}, which does not have it");
            reader.push("config-value", key, message, "correct adapter_config.json");
        }
    }
    if config.use_dora && config.monteclora.is_some() {
        let message = "set together with monteclora_config: noise on the direction of a weight is not supported";
        reader.push("dora", "use_dora", message, RETRAIN);
    }
}

fn refuse_other_methods(reader: &mut Reader<'_>) {
    if let Some(bias) = reader.take("bias")
        && bias.as_str() != Some("none")
    {
        let message = format!("{bias}: biases of the base were trained with the adapter");
        reader.push("bias", "bias", message, RETRAIN);
    }
    for row in CHANGES_MODEL.lines() {
        if let [key, code, meaning] = row.split(" | ").collect::<Vec<_>>()[..]
            && reader
                .keys
                .shift_remove(key)
                .is_some_and(|value| !is_off(&value))
        {
            let fix = match code {
                "modules-to-save" => MERGE,
                _ => RETRAIN,
            };
            let message = format!("{meaning}; this cannot be expressed as B A");
            reader.push(code, key, message, fix);
        }
    }
}

/// PEFT's default if the key is null: q and v for Llama, Mistral, Qwen2 and Qwen3 alike.
const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];

fn read_targets(reader: &mut Reader<'_>) -> TargetModules {
    let missing = TargetModules::List(Vec::new());
    match reader.take("target_modules") {
        None => TargetModules::List(DEFAULT_TARGETS.map(str::to_owned).to_vec()),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => {
            TargetModules::AllLinear
        }
        Some(Value::String(text)) if !text.is_empty() => TargetModules::Regex(text),
        Some(value) if !is_off(&value) => match strings(&value) {
            // PEFT stores a set, so the order in the file has no meaning.
            Some(names) => TargetModules::List(sorted(names)),
            None => {
                let expected = "a list of names, a pattern or \"all-linear\"";
                reader.wrong("target_modules", &value, expected);
                missing
            }
        },
        _ => {
            let message = "empty: it is not known which modules the adapter belongs to";
            let fix = "list the adapted modules in adapter_config.json";
            reader.push("config-value", "target_modules", message, fix);
            missing
        }
    }
}

fn read_monteclora(reader: &mut Reader<'_>) -> Option<MonteCloraSettings> {
    let value = reader
        .take("monteclora_config")
        .filter(|value| *value != Value::Bool(false))?;
    let Value::Object(keys) = value else {
        reader.wrong("monteclora_config", &value, "an object or null");
        return None;
    };
    let mut settings = MonteCloraSettings::default();
    for (key, value) in &keys {
        let at = format!("monteclora_config.{key}");
        let known = match key.as_str() {
            "num_samples" => count(value, MAX_COUNT).map(|n| settings.num_samples = n),
            "buffer_size" => count(value, MAX_COUNT).map(|n| settings.buffer_size = n),
            "sample_scaler" => not_negative(value).map(|number| settings.sample_scaler = number),
            "kl_loss_weight" => not_negative(value).map(|number| settings.kl_loss_weight = number),
            "dirichlet_prior" => finite(value)
                .filter(|number| *number > 0.0)
                .map(|number| settings.dirichlet_prior = number),
            "use_entropy" => value.as_bool().map(|flag| settings.use_entropy = flag),
            _ => {
                let message = "unknown key, on which PEFT fails too";
                reader.push("unknown-key", &at, message, "remove it");
                Some(())
            }
        };
        if known.is_none() {
            reader.wrong(&at, value, "a number in range (or a flag)");
        }
    }
    Some(settings)
}

/// Refuses the combinations that PEFT refuses.
fn check_layers(config: &AdapterConfig, reader: &mut Reader<'_>) {
    let is_list = matches!(config.target_modules, TargetModules::List(_));
    for (key, is_set) in [
        ("layers_to_transform", config.layers_to_transform.is_some()),
        ("layers_pattern", config.layers_pattern.is_some()),
    ] {
        if is_set && !is_list {
            let message = "cannot be used when target_modules is a string";
            let fix = "list the modules, or put the layers into the pattern";
            reader.push("config-value", key, message, fix);
        }
    }
    if config.layers_pattern.is_some() && config.layers_to_transform.is_none() {
        let message = "has no effect without layers_to_transform";
        let fix = "set layers_to_transform too, or remove it";
        reader.push("config-value", "layers_pattern", message, fix);
    }
}

/// Refuses initialisations that change the base weights: they make A and B meaningless on the original base.
fn read_init(reader: &mut Reader<'_>, config: &mut AdapterConfig) {
    let Some(value) = reader.take("init_lora_weights") else {
        return;
    };
    let is_harmless = match &value {
        Value::Bool(true) => return,
        Value::String(kind) => KIND_INITS.contains(&kind.to_ascii_lowercase().as_str()),
        other => *other == Value::Bool(false),
    };
    if is_harmless {
        config.other.insert("init_lora_weights".into(), value);
        return;
    }
    let message = format!(
        "{value} changes the base weights, so the update is not relative to the published base"
    );
    let fix = "convert it to a plain LoRA in PEFT (path_initial_model_for_weight_conversion)";
    reader.push("init", "init_lora_weights", message, fix);
}

/// Whether to keep a remaining key. A key without effect is kept, a key with its default value is not, and any other
/// key is refused.
fn keep_or_refuse(key: &str, value: &Value, problems: &mut Vec<Problem>) -> bool {
    if let Some((_, default)) = NEUTRAL.iter().find(|(known, _)| *known == key) {
        let text = value.to_string();
        return !value.is_null() && text != *default;
    }
    let is_kept = is_off(value) || AUTHORS.contains(&key);
    if !is_kept {
        let message = "unknown key with a value that may change the result";
        let fix = "remove it if it is known to have no effect";
        problems.push(Problem::new("unknown-key", key, message, fix));
    }
    is_kept
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(extra: Value) -> (AdapterConfig, Vec<Problem>) {
        let mut object = json!({"peft_type": "LORA", "target_modules": ["q_proj"]});
        for (key, value) in extra.as_object().expect("an object") {
            object[key] = value.clone();
        }
        let Value::Object(keys) = object else {
            unreachable!("made above")
        };
        let mut problems = Vec::new();
        let config = from_object(keys, &mut problems);
        (config, problems)
    }

    #[test]
    fn absent_keys_take_pefts_defaults() {
        let (config, problems) = read(json!({"monteclora_config": {}}));
        assert_eq!(problems, []);
        let expected = AdapterConfig {
            target_modules: TargetModules::List(vec!["q_proj".into()]),
            monteclora: Some(MonteCloraSettings::default()),
            ..AdapterConfig::default()
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn every_offending_key_is_reported_at_once() {
        let (_, problems) = read(json!({
            "use_dora": true, "bias": "all", "modules_to_save": ["lm_head"], "lora_bias": true,
            "trainable_token_indices": [1], "layer_replication": [[0, 1]], "use_qalora": true,
            "use_bdlora": {"nblocks": 2}, "alora_invocation_tokens": [3], "megatron_config": {"a": 1},
            "init_lora_weights": "pissa_niter_4", "frobnicate": 3, "r": 0, "lora_alpha": "x",
            "monteclora_config": {"num_samples": -1, "surprise": null},
        }));
        let codes: Vec<&str> = problems.iter().map(|problem| problem.code).collect();
        for code in [
            "dora",
            "bias",
            "modules-to-save",
            "trainable-tokens",
            "layer-replication",
            "qalora",
            "bdlora",
            "alora",
            "megatron",
            "init",
            "unknown-key",
            "config-value",
        ] {
            assert!(codes.contains(&code), "{code} is missing in {codes:?}");
        }
        assert!(
            problems
                .iter()
                .any(|problem| problem.at == "monteclora_config.surprise")
        );
        assert!(
            problems
                .iter()
                .any(|problem| problem.at == "monteclora_config.num_samples")
        );
        assert_eq!(
            codes.iter().filter(|code| **code == "config-value").count(),
            3
        );
    }

    #[test]
    fn keys_without_effect_are_kept() {
        let (config, problems) = read(json!({
            "future_option": null, "another": [], "init_lora_weights": "gaussian", "megatron_core": "megatron.core",
            "qalora_group_size": 16, "peft_version": "0.21.2", "loftq_config": {},
        }));
        assert_eq!(problems, []);
        let kept: Vec<&str> = config.other.keys().map(String::as_str).collect();
        assert_eq!(
            kept,
            [
                "another",
                "future_option",
                "init_lora_weights",
                "peft_version"
            ]
        );
    }

    #[test]
    fn targets_left_to_peft_are_its_default_for_these_models() {
        for keys in [
            json!({"target_modules": null}),
            json!({"target_modules": []}),
        ] {
            let is_null = keys["target_modules"].is_null();
            let (config, problems) = read(keys);
            assert_eq!(problems.is_empty(), is_null);
            if is_null {
                let expected = TargetModules::List(vec!["q_proj".into(), "v_proj".into()]);
                assert_eq!(config.target_modules, expected);
            }
        }
    }

    #[test]
    fn other_adapter_types_are_refused() {
        for kind in [json!("LOHA"), json!("PREFIX_TUNING"), json!(null), json!(7)] {
            let (_, problems) = read(json!({"peft_type": kind}));
            assert_eq!(problems[0].code, "peft-type");
        }
    }
}
