//! The keys of the rotary embedding. `rope_parameters` is how transformers 5 writes what 4 wrote as `rope_scaling` and
//! `rope_theta`; where several say it, all are read and must agree.

use serde_json::{Map, Value};

use super::{Keys, plain};
use crate::architecture::{Llama3Scaling, Rope, RopeKind};

/// Fields that every kind may have.
const COMMON: [&str; 3] = ["rope_type", "rope_theta", "partial_rotary_factor"];
/// Fields that record how the model was made, and that no reader uses where the kind does not.
const RECORDS: [&str; 3] = [
    "original_max_position_embeddings",
    "max_position_embeddings",
    "finetuned",
];

impl Keys<'_> {
    /// The rotary embedding, read as transformers 5 does: a `rope_scaling` that is not empty replaces `rope_parameters`. Other
    /// readers take the other key, so what is only in the one that is replaced is refused.
    pub(super) fn rope(&mut self, default_theta: f64, head_dim: usize, positions: usize) -> Rope {
        let parameters = self.rope_fields("rope_parameters");
        let scaling = self.rope_fields("rope_scaling");
        let (source, fields, other) = match scaling.is_empty() {
            true => ("rope_parameters", parameters, Map::new()),
            false => ("rope_scaling", scaling, parameters),
        };
        let theta = self
            .one_of(source, &fields, "rope_theta")
            .unwrap_or(default_theta);
        if let Some(partial) = self.one_of(source, &fields, "partial_rotary_factor")
            && partial != 1.0
        {
            let message = format!("{partial} is not supported");
            self.refuse("partial_rotary_factor", message, "only 1.0 is");
        }
        let name = fields.get("rope_type").map_or("default".to_owned(), plain);
        self.replaced(&other, &fields, &name, theta);
        let kind = self.rope_kind(source, &fields, &name, positions);
        Rope::new(kind, theta, head_dim)
    }

    /// What an object of rotary parameters holds, nulls left out, its type under the name of today.
    fn rope_fields(&mut self, key: &str) -> Map<String, Value> {
        let mut fields = match self.get(key) {
            None => return Map::new(),
            Some(Value::Object(found)) => found.clone(),
            Some(other) => {
                let message = format!("expected an object, found {other}");
                self.problem(key, message);
                return Map::new();
            }
        };
        fields.retain(|_, value| !value.is_null());
        // `type` is what `rope_type` was called before transformers 4.43.
        if let Some(kind) = fields.shift_remove("type") {
            let newer = fields.entry("rope_type").or_insert(kind.clone());
            if *newer != kind {
                let message = format!("{kind} beside rope_type {newer}");
                self.refuse(&format!("{key}.type"), message, "keep one of the two");
            }
        }
        fields
    }

    /// A number that stands in the object or beside it.
    fn one_of(&mut self, source: &str, fields: &Map<String, Value>, name: &str) -> Option<f64> {
        let beside = self.get(name).cloned();
        let beside = self.positive(name, beside.as_ref());
        let inside = self.positive(&format!("{source}.{name}"), fields.get(name));
        if let (Some(beside), Some(inside)) = (beside, inside)
            && beside != inside
        {
            let message = format!("{beside}, but {source} says {inside}");
            self.refuse(name, message, "keep the one that the model was made with");
        }
        inside.or(beside)
    }

    /// Refuses what only the replaced object says.
    fn replaced(
        &mut self,
        other: &Map<String, Value>,
        fields: &Map<String, Value>,
        kind: &str,
        theta: f64,
    ) {
        let differs = |name: &str, value: &Value| match name {
            "rope_type" => value != "default" && plain(value) != kind,
            "rope_theta" => value.as_f64() != Some(theta),
            "partial_rotary_factor" => value.as_f64() != Some(1.0),
            _ => match (fields.get(name), value.as_f64()) {
                (None, Some(value)) => value != 1.0 && !RECORDS.contains(&name),
                (Some(found), Some(value)) => found.as_f64() != Some(value),
                (found, None) => found != Some(value),
            },
        };
        let lost: Vec<String> = other
            .iter()
            .filter(|(name, value)| differs(name, value))
            .map(|(name, value)| format!("{name} {}", plain(value)))
            .collect();
        if !lost.is_empty() {
            let message = format!(
                "stands beside rope_parameters, whose {} it does not repeat: transformers 5 reads rope_scaling alone (with rope_theta {theta}), others rope_parameters",
                lost.join(", ")
            );
            self.refuse(
                "rope_scaling",
                message,
                "write all of it into one of the two",
            );
        }
    }

    fn rope_kind(
        &mut self,
        source: &str,
        fields: &Map<String, Value>,
        name: &str,
        positions: usize,
    ) -> RopeKind {
        let own: &[&str] = match name {
            "default" => &[],
            "linear" => &["factor"],
            "llama3" => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            other => {
                let message = format!("`{other}` is not supported");
                let fix = "supported are default, linear, llama3";
                self.refuse(&format!("{source}.rope_type"), message, fix);
                return RopeKind::Default;
            }
        };
        for (field, value) in fields {
            let is_read = COMMON.contains(&field.as_str()) || own.contains(&field.as_str());
            let is_neutral = field == "factor" && value.as_f64() == Some(1.0);
            if is_read || is_neutral || RECORDS.contains(&field.as_str()) {
                continue;
            }
            let message = match fields.get("rope_type") {
                Some(_) => format!("{value} is not read for rope_type `{name}`"),
                None => format!("{value} is not read without a rope_type, which means `default`"),
            };
            let fix = "give the rope_type that the model was made with, or remove the key";
            self.refuse(&format!("{source}.{field}"), message, fix);
        }
        let original = self.original_length(source, fields, name, positions);
        let mut needed = |field: &str| {
            let key = format!("{source}.{field}");
            if !fields.contains_key(field) {
                let message = format!("missing; rope type `{name}` needs it");
                self.problem(&key, message);
            }
            self.positive(&key, fields.get(field)).unwrap_or(1.0)
        };
        match name {
            "linear" => RopeKind::Linear {
                factor: needed("factor"),
            },
            "llama3" => RopeKind::Llama3(Llama3Scaling {
                factor: needed("factor"),
                low_freq_factor: needed("low_freq_factor"),
                high_freq_factor: needed("high_freq_factor"),
                original_max_position_embeddings: original,
            }),
            _ => RopeKind::Default,
        }
    }

    /// The length before scaling; where the object does not say it, transformers takes the key beside it, or the positions.
    fn original_length(
        &mut self,
        source: &str,
        fields: &Map<String, Value>,
        kind: &str,
        positions: usize,
    ) -> usize {
        if kind != "llama3" {
            return positions;
        }
        let length = self.one_of(source, fields, "original_max_position_embeddings");
        length.map_or(positions, |length| length as usize)
    }
}
