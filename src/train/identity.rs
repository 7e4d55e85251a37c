//! The identity of a run. A continued run compares it with the one in its checkpoint to find what changed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Keys of the configuration that may change between a checkpoint and the continued run. They do not affect the steps
/// before the checkpoint, or a hash covers their content.
const FREE: [&str; 16] = [
    "train.output_dir",
    "train.num_train_epochs",
    "train.max_steps",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.load_best_model_at_end",
    "train.early_stopping_patience",
    "train.report_to",
    "train.gradient_checkpointing",
    "model.model_id",
    "model.revision",
    "model.chat_template",
    "data.train",
    "data.valid",
];

/// Keys of [`FREE`] that determine which steps follow or which of them are evaluated.
const COURSE: [&str; 3] = [
    "train.num_train_epochs",
    "train.max_steps",
    "train.eval_steps",
];

/// Keys that checkpoints of earlier versions do not have. They are left out while they are off, so that such a checkpoint
/// can be continued.
const YOUNG: [&str; 1] = ["train.tf32"];

/// The resolved configuration by dotted key, and the hashes of base model, template, tokenizer and data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    config: BTreeMap<String, Value>,
    /// SHA-256 hashes with the keys `base`, `tokenizer`, `chat_template`, `data.train` and `data.valid`.
    hashes: BTreeMap<String, String>,
}

/// The differences between a checkpoint and the run that continues it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drift {
    /// Differences that are not allowed, one line each.
    pub refused: Vec<String>,
    /// Whether a data file differs.
    pub data: bool,
    /// Keys that differ and may differ.
    pub allowed: Vec<String>,
}

impl Drift {
    /// Whether the later steps or evaluations differ from those that the checkpoint's run would have had.
    pub fn changes_course(&self) -> bool {
        self.allowed
            .iter()
            .any(|key| COURSE.contains(&key.as_str()))
    }
}

impl Identity {
    /// The identity of a run with the resolved configuration `config`. A hash is `None` if the run has no such input.
    pub fn new(config: &Value, hashes: [(&str, Option<&str>); 5]) -> Self {
        let mut flat = BTreeMap::new();
        flatten("", config, &mut flat);
        flat.retain(|key, value| !YOUNG.contains(&key.as_str()) || *value != Value::Bool(false));
        Self {
            config: flat,
            hashes: hashes
                .into_iter()
                .filter_map(|(what, hash)| Some((what.to_owned(), hash?.to_owned())))
                .collect(),
        }
    }

    /// The differences between this identity, the one at the checkpoint, and `now`.
    pub fn drift(&self, now: &Self) -> Drift {
        let mut drift = Drift::default();
        for (key, then, now) in differences(&self.config, &now.config) {
            if FREE.contains(&key) || key.starts_with("eval.") || key == "lora.init_from" {
                drift.allowed.push(key.to_owned());
            } else {
                let (then, now) = (shown(then), shown(now));
                let what = match key {
                    // Two ranks with one batch each are one rank with two.
                    "train.gradient_accumulation_steps" => {
                        "train.gradient_accumulation_steps times the number of ranks"
                    }
                    key => key,
                };
                drift
                    .refused
                    .push(format!("{what}: {then} at the checkpoint, {now} now"));
            }
        }
        for (what, then, now) in differences(&self.hashes, &now.hashes) {
            drift.data |= what.starts_with("data.");
            let change = match (then, now) {
                (Some(_), Some(_)) => "the content changed",
                (Some(_), None) => "was there, is not now",
                _ => "was not there, is now",
            };
            drift.refused.push(format!("{what}: {change}"));
        }
        drift
    }
}

/// Keys whose values may differ between ranks: where a rank finds its files, and what only rank 0 writes.
const PLACES: [&str; 7] = [
    "train.output_dir",
    "train.report_to",
    "model.model_id",
    "model.revision",
    "model.chat_template",
    "data.train",
    "data.valid",
];

impl Identity {
    /// What `other`, the identity that another rank has, does not share with this one, rank 0's, one line each; and whether a
    /// data file is among it.
    pub fn unlike(&self, other: &Self) -> (Vec<String>, bool) {
        let keys = differences(&self.config, &other.config).into_iter();
        let mut found: Vec<String> = keys
            .filter(|(key, ..)| !PLACES.contains(key) && *key != "lora.init_from")
            .map(|(key, first, own)| {
                format!("{key} is {} on rank 0, {} there", shown(first), shown(own))
            })
            .collect();
        let mut is_data = false;
        for (what, first, own) in differences(&self.hashes, &other.hashes) {
            is_data |= what.starts_with("data.");
            let hash = |hash: Option<&String>| {
                hash.map_or("absent", |hash| &hash[..12.min(hash.len())])
                    .to_owned()
            };
            found.push(format!(
                "{what} has another content: SHA-256 {} on rank 0, {} there",
                hash(first),
                hash(own)
            ));
        }
        (found, is_data)
    }
}

/// A value as messages show it.
fn shown(value: Option<&Value>) -> String {
    value.map_or("absent".to_owned(), Value::to_string)
}

fn differences<'a, T: PartialEq>(
    then: &'a BTreeMap<String, T>,
    now: &'a BTreeMap<String, T>,
) -> Vec<(&'a str, Option<&'a T>, Option<&'a T>)> {
    let mut keys: Vec<&String> = then.keys().chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .map(|key| (key.as_str(), then.get(key), now.get(key)))
        .filter(|(_, then, now)| then != now)
        .collect()
}

/// Turns nested tables into dotted keys. `null` values are left out.
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(table) => {
            for (key, value) in table {
                let path = match prefix {
                    "" => key.clone(),
                    prefix => format!("{prefix}.{key}"),
                };
                flatten(&path, value, into);
            }
        }
        Value::Null => {}
        value => {
            into.insert(prefix.to_owned(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn identity(config: &Value, train: &str) -> Identity {
        let hashes = [
            ("base", Some("b")),
            ("tokenizer", Some("t")),
            ("chat_template", None),
            ("data.train", Some(train)),
            ("data.valid", None),
        ];
        Identity::new(config, hashes)
    }

    #[test]
    fn what_a_step_depends_on_is_refused_by_name() {
        let config = |rate: f64, logging: u64, steps: &str| json!({"train": {"learning_rate": rate, "logging_steps": logging, steps: 3, "kl": null}});
        let then = identity(&config(1e-3, 10, "max_steps"), "x");
        assert_eq!(then.drift(&then), Drift::default());
        let now = identity(&config(2e-3, 1, "num_train_epochs"), "y");
        let drift = then.drift(&now);
        assert_eq!(
            drift.refused,
            [
                "train.learning_rate: 0.001 at the checkpoint, 0.002 now",
                "data.train: the content changed"
            ]
        );
        assert!(drift.data && drift.changes_course());
        assert_eq!(
            drift.allowed,
            [
                "train.logging_steps",
                "train.max_steps",
                "train.num_train_epochs"
            ]
        );
        let only_logging = then.drift(&identity(&config(1e-3, 1, "max_steps"), "x"));
        assert!(only_logging.refused.is_empty() && !only_logging.changes_course());
    }

    /// A checkpoint from before a key was there is continued with the key off, and refused with the key on.
    #[test]
    fn a_young_key_may_be_absent_while_it_is_off() {
        let of = |train: Value| identity(&json!({ "train": train }), "x");
        let before = of(json!({ "bf16": false }));
        let off = of(json!({ "bf16": false, "tf32": false }));
        assert_eq!(before, off);
        let on = of(json!({ "bf16": false, "tf32": true }));
        assert_eq!(before.drift(&on).refused.len(), 1);
    }

    /// An identity read back from a checkpoint is equal, floating-point values included.
    #[test]
    fn survives_its_file() {
        let then = identity(&json!({"a": 0.1 + 0.2, "b": 5e-324, "c": [1, "x"]}), "x");
        let text = serde_json::to_string(&then).expect("serialises");
        let read: Identity = serde_json::from_str(&text).expect("reads");
        assert_eq!(then, read);
    }
}
