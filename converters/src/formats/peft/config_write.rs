//! Converts [`AdapterConfig`] to the keys of `adapter_config.json`.

use serde_json::{Value, json};

use crate::config::AdapterConfig;
use crate::formats::peft::config_read::AUTHORS;

/// Every key of PEFT 0.20's `LoraConfig` with the value that switches it off. PEFT 0.21's `kasa_config` is left out:
/// PEFT 0.20 would warn, and its absence means the same.
fn switched_off() -> Value {
    json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false,
        "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null,
        "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
        "peft_type": "LORA", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": null,
        "target_modules": null, "target_parameters": null, "task_type": null,
        "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
        "use_rslora": false, "velora_config": null,
    })
}

/// Writes a whole number as an integer, as PEFT does for alpha.
fn number(value: f64) -> Value {
    let is_whole = value.fract() == 0.0 && value.abs() < 1e15;
    if is_whole {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// Returns all keys, sorted.
pub(crate) fn to_json(config: &AdapterConfig) -> Value {
    let Value::Object(mut keys) = switched_off() else {
        return Value::Null;
    };
    // PEFT would warn about the authors' keys.
    let kept = config
        .other
        .iter()
        .filter(|(key, _)| !AUTHORS.contains(&key.as_str()));
    keys.extend(kept.map(|(key, value)| (key.clone(), value.clone())));
    let mut set = json!(config);
    set["lora_alpha"] = number(config.lora_alpha);
    for (key, alpha) in &config.alpha_pattern {
        set["alpha_pattern"][key] = number(*alpha);
    }
    if let Some(settings) = set["monteclora_config"].as_object_mut() {
        settings.sort_keys();
    }
    set["peft_type"] = json!(config.peft_type.name());
    if let Value::Object(set) = set {
        keys.extend(set);
    }
    if let Some(Value::Object(settings)) = config.adalora.as_ref().map(|settings| json!(settings)) {
        keys.extend(settings);
    }
    keys.sort_keys();
    Value::Object(keys)
}

/// The text of a configuration file: two spaces of indentation, a newline at the end.
pub(crate) fn to_text(value: &Value) -> String {
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::Map;

    use super::*;
    use crate::config::{ExcludeModules, MonteCloraSettings, PeftType, TargetModules};

    fn names() -> impl Strategy<Value = Vec<String>> {
        prop::collection::btree_set("[a-z_.]{1,8}", 1..4)
            .prop_map(|names| names.into_iter().collect())
    }

    fn targets() -> impl Strategy<Value = TargetModules> {
        prop_oneof![
            names().prop_map(TargetModules::List),
            "[a-z.*]{1,8}".prop_map(TargetModules::Regex),
            Just(TargetModules::AllLinear),
        ]
    }

    fn settings() -> impl Strategy<Value = MonteCloraSettings> {
        (
            1usize..100,
            0f64..1.0,
            0f64..1.0,
            1e-3f64..9.0,
            any::<bool>(),
            1usize..200,
        )
            .prop_map(
                |(
                    num_samples,
                    sample_scaler,
                    kl_loss_weight,
                    dirichlet_prior,
                    use_entropy,
                    buffer_size,
                )| {
                    MonteCloraSettings {
                        num_samples,
                        sample_scaler,
                        kl_loss_weight,
                        dirichlet_prior,
                        use_entropy,
                        buffer_size,
                    }
                },
            )
    }

    prop_compose! {
        fn configs()(
            names_of in (prop::option::of("[a-z/]{1,8}"), prop::option::of("[a-z]{1,4}"), prop::option::of("[A-Z]{1,4}")),
            r in 1usize..64,
            lora_alpha in prop_oneof![(1u8..99).prop_map(f64::from), 0.1f64..9.0],
            lora_dropout in 0f64..1.0,
            target_modules in targets(),
            exclude_modules in prop::option::of(prop_oneof![
                names().prop_map(ExcludeModules::List),
                "[a-z.*]{1,8}".prop_map(ExcludeModules::Regex),
            ]),
            layers in prop::option::of((prop::collection::vec(0usize..9, 1..3), prop::option::of(names()))),
            rank_pattern in prop::collection::vec(("[a-z.]{1,6}", 1usize..9), 0..3),
            alpha_pattern in prop::collection::vec(("[a-z.]{1,6}", 0.5f64..9.0), 0..3),
            use_rslora in any::<bool>(),
            inference_mode in any::<bool>(),
            monteclora in prop::option::of(settings()),
        ) -> AdapterConfig {
            let layers = layers.filter(|_| matches!(target_modules, TargetModules::List(_)));
            AdapterConfig {
                base_model_name_or_path: names_of.0,
                revision: names_of.1,
                task_type: names_of.2,
                r,
                lora_alpha,
                lora_dropout,
                target_modules,
                exclude_modules,
                layers_to_transform: layers.clone().map(|(numbers, _)| numbers),
                layers_pattern: layers.and_then(|(_, pattern)| pattern),
                rank_pattern: rank_pattern.into_iter().collect(),
                alpha_pattern: alpha_pattern.into_iter().collect(),
                use_rslora,
                peft_type: PeftType::Lora,
                use_dora: false,
                adalora: None,
                inference_mode,
                monteclora,
                other: Map::new(),
            }
        }
    }

    proptest! {
        #[test]
        fn reading_what_was_written_gives_the_same(config in configs()) {
            let text = to_text(&config.to_json());
            let read = AdapterConfig::from_json(&text, Path::new("x")).expect("our own output");
            prop_assert_eq!(&read, &config);
            prop_assert_eq!(to_text(&read.to_json()), text);
        }
    }

    #[test]
    fn keys_are_sorted_and_only_those_of_peft_0_20() {
        let value = AdapterConfig {
            monteclora: Some(MonteCloraSettings::default()),
            ..AdapterConfig::default()
        }
        .to_json();
        let keys: Vec<&String> = value.as_object().expect("an object").keys().collect();
        assert!(keys.is_sorted());
        assert_eq!(keys.len(), 39);
        assert!(value.get("kasa_config").is_none());
        assert_eq!(
            value["monteclora_config"]
                .as_object()
                .expect("an object")
                .len(),
            6
        );
        assert_eq!(value["lora_alpha"], json!(8));
    }
}
