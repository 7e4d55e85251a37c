//! The keys of the rotary embedding. transformers 5 writes as `rope_parameters` what version 4 wrote as `rope_scaling`
//! and `rope_theta`. If several keys are present, all are read and must agree.

use serde_json::{Map, Value};

use super::{Keys, plain};
use crate::architecture::{
    Family, Llama3Scaling, LongRopeScaling, QueryScaling, Rope, RopeKind, RotaryLayers, YarnScaling,
};

/// Every kind of rescaling, with the fields that it reads.
const KINDS: [(&str, &[&str]); 6] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &[
            "factor",
            ORIGINAL,
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
    ),
    (
        "longrope",
        &[
            "factor",
            ORIGINAL,
            "attention_factor",
            "short_factor",
            "long_factor",
        ],
    ),
    (
        "llama3",
        &["factor", "low_freq_factor", "high_freq_factor", ORIGINAL],
    ),
];

/// Positions of the model's original training.
const ORIGINAL: &str = "original_max_position_embeddings";

/// Types of layers that may have their own parameters.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The field that scales queries with their position.
const BETA: &str = "llama_4_scaling_beta";

/// Fields that every kind may have.
const COMMON: [&str; 3] = ["rope_type", "rope_theta", "partial_rotary_factor"];
/// Fields that record how the model was made. No reader uses them unless the kind does.
const RECORDS: [&str; 3] = [
    "original_max_position_embeddings",
    "max_position_embeddings",
    "finetuned",
];

/// Properties that all rotations of a model share.
#[derive(Clone, Copy)]
struct Common {
    family: &'static Family,
    head_dim: usize,
    positions: usize,
}

/// The object that a rotation is read from, and its path.
struct Source<'a> {
    name: &'a str,
    fields: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// Returns the rotations of a model: one, or one for layers with full attention and one for layers with a sliding
    /// window.
    pub(super) fn ropes(
        &mut self,
        family: &'static Family,
        head_dim: usize,
        positions: usize,
    ) -> Vec<Rope> {
        let common = Common {
            family,
            head_dim,
            positions,
        };
        let RotaryLayers::ByWindow { theta, key } = family.rotary.layers else {
            return vec![self.rope(common)];
        };
        let local = key.and_then(|key| Some((key, self.number_if_there(key)?)));
        let parameters = match self.get("rope_parameters") {
            Some(Value::Object(found)) => found.clone(),
            _ => {
                let scaling = self.get("rope_scaling").and_then(Value::as_object);
                let is_old = |all: &Map<String, Value>| {
                    all.contains_key("type") && !all.contains_key("rope_type")
                };
                if scaling.is_some_and(is_old) {
                    let message = "stands in place of rope_type, which alone transformers reads of a model with types of layers: it would not scale";
                    let fix =
                        "call it rope_type if the model was made with it, else remove rope_scaling";
                    self.refuse("rope_scaling.type", message, fix);
                }
                let global = self.rope(common);
                let local = local.map_or(theta, |(_, theta)| theta);
                let (dim, positions) = (common.head_dim, common.positions);
                return vec![global, Rope::new(RopeKind::Default, local, dim, positions)];
            }
        };
        if self.get("rope_scaling").is_some() {
            let message = "stands beside rope_parameters, which has parameters for each type of layer: readers differ in what they take";
            self.refuse(
                "rope_scaling",
                message,
                "write all of it into rope_parameters",
            );
        }
        for name in parameters.keys() {
            if name != FULL && name != SLIDING {
                let message = format!(
                    "expected parameters of {FULL} and {SLIDING}: transformers reads nothing else there"
                );
                self.problem(&format!("rope_parameters.{name}"), message);
            }
        }
        let defaults = [(FULL, family.defaults.rope_theta), (SLIDING, theta)];
        defaults
            .into_iter()
            .map(|(kind, default)| {
                let place = format!("rope_parameters.{kind}");
                let fields = self.fields_of(&place, parameters.get(kind).filter(|v| !v.is_null()));
                let inside =
                    self.positive(&format!("{place}.rope_theta"), fields.get("rope_theta"));
                let beside = match kind {
                    FULL => self
                        .number_if_there("rope_theta")
                        .map(|v| ("rope_theta", v)),
                    _ => local,
                };
                if let (Some(inside), Some((key, beside))) = (inside, beside)
                    && inside != beside
                {
                    let message = format!("{beside}, but {place} says {inside}");
                    self.refuse(key, message, "keep the one that the model was made with");
                }
                let theta = inside.or(beside.map(|(_, theta)| theta)).unwrap_or(default);
                let source = Source {
                    name: &place,
                    fields: &fields,
                };
                self.rope_of(common, &source, theta)
            })
            .collect()
    }

    /// Reads the rotary embedding as transformers 5 does: a `rope_scaling` that is not empty replaces
    /// `rope_parameters`. Other readers use the other key, so what only the replaced object says is refused.
    fn rope(&mut self, common: Common) -> Rope {
        let parameters = self.rope_fields("rope_parameters");
        let scaling = self.rope_fields("rope_scaling");
        let (name, mut fields, other) = match scaling.is_empty() {
            true => ("rope_parameters", parameters, Map::new()),
            false => ("rope_scaling", scaling, parameters),
        };
        let rotary = &common.family.rotary;
        if let Some(absent) = rotary.absent
            && fields.is_empty()
            && let Ok(Value::Object(found)) = serde_json::from_str(absent)
        {
            fields = found;
        }
        let theta = self
            .one_of(name, &fields, "rope_theta")
            .unwrap_or(common.family.defaults.rope_theta);
        let kind = fields.get("rope_type").map_or("default".to_owned(), plain);
        self.replaced(&other, &fields, &kind, theta);
        let source = Source {
            name,
            fields: &fields,
        };
        self.rope_of(common, &source, theta)
    }

    /// Returns the rotation that the fields describe, with this base.
    fn rope_of(&mut self, common: Common, source: &Source<'_>, theta: f64) -> Rope {
        let rotary = &common.family.rotary;
        let partial = self.one_of(source.name, source.fields, "partial_rotary_factor");
        let share = match (partial, rotary.partial) {
            (partial, Some(default)) => partial.unwrap_or(default),
            (Some(partial), None) if partial != 1.0 => {
                let message = format!("{partial} is not supported");
                self.refuse("partial_rotary_factor", message, "only 1.0 is");
                1.0
            }
            _ => 1.0,
        };
        let dim = (common.head_dim as f64 * share) as usize;
        let is_odd = !dim.is_multiple_of(2) || dim == 0 || dim > common.head_dim;
        if is_odd && common.head_dim.is_multiple_of(2) && common.head_dim > 0 {
            let message = format!(
                "{share} of a head of {} are {dim} entries; rotary embedding needs pairs of a head's entries",
                common.head_dim
            );
            self.problem("partial_rotary_factor", message);
        }
        let dim = if is_odd { common.head_dim } else { dim };
        let (kind, original) = self.rope_kind(common, source, dim);
        let mut rope = Rope::new(kind, theta, dim, common.positions);
        let beta = self.positive(&format!("{}.{BETA}", source.name), source.fields.get(BETA));
        if rotary.scales_queries {
            if beta.is_none() && !source.fields.contains_key(BETA) {
                let message = "missing; transformers computes with it";
                self.problem(&format!("{}.{BETA}", source.name), message);
            }
            rope.query_scaling = beta.map(|beta| QueryScaling {
                beta,
                original_max_position_embeddings: original,
            });
        }
        rope
    }

    /// Returns the fields of an object of rotary parameters, without nulls, with its type under the current name.
    fn rope_fields(&mut self, key: &str) -> Map<String, Value> {
        let found = self.get(key).cloned();
        self.fields_of(key, found.as_ref())
    }

    fn fields_of(&mut self, key: &str, found: Option<&Value>) -> Map<String, Value> {
        let mut fields = match found {
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

    /// Reads a number that may be in the object or beside it.
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

    /// Returns the rescaling that the fields describe, and the original length.
    fn rope_kind(&mut self, common: Common, source: &Source<'_>, dim: usize) -> (RopeKind, usize) {
        let (place, fields) = (source.name, source.fields);
        let name = fields.get("rope_type").map_or("default".to_owned(), plain);
        // Phi-3's files used these names before transformers supported the kind.
        let name = match common.family.defaults.original_max_position_embeddings {
            Some(_) if name == "su" || name == "yarn" => "longrope".to_owned(),
            _ => name,
        };
        let Some((name, own)) = KINDS.iter().find(|(known, _)| *known == name).copied() else {
            let message = format!("`{name}` is not supported");
            let known: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
            let fix = format!("supported are {}", known.join(", "));
            self.refuse(&format!("{place}.rope_type"), message, &fix);
            return (RopeKind::Default, common.positions);
        };
        for (field, value) in fields {
            let is_read = COMMON.contains(&field.as_str())
                || own.contains(&field.as_str())
                || (field == BETA && common.family.rotary.scales_queries);
            let is_neutral = field == "factor" && value.as_f64() == Some(1.0);
            if is_read || is_neutral || RECORDS.contains(&field.as_str()) {
                continue;
            }
            let message = match fields.get("rope_type") {
                Some(_) => format!("{value} is not read for rope_type `{name}`"),
                None => format!("{value} is not read without a rope_type, which means `default`"),
            };
            let fix = "give the rope_type that the model was made with, or remove the key";
            self.refuse(&format!("{place}.{field}"), message, fix);
        }
        let original = self.original_length(common, source, own);
        let optional = |keys: &mut Self, field: &str| {
            keys.positive(&format!("{place}.{field}"), fields.get(field))
        };
        let needed = |keys: &mut Self, field: &str| {
            let key = format!("{place}.{field}");
            if !fields.contains_key(field) {
                let message = format!("missing; rope type `{name}` needs it");
                keys.problem(&key, message);
            }
            keys.positive(&key, fields.get(field)).unwrap_or(1.0)
        };
        let kind = match name {
            "linear" => RopeKind::Linear {
                factor: needed(self, "factor"),
            },
            "dynamic" => RopeKind::Dynamic {
                factor: needed(self, "factor"),
            },
            "yarn" => {
                // transformers treats 0 as absent.
                let given = |keys: &mut Self, field: &str| match fields.get(field) {
                    Some(value) if value.as_f64() == Some(0.0) => None,
                    _ => optional(keys, field),
                };
                let lengthened = common.positions as f64 / original as f64;
                let mscales = [given(self, "mscale"), given(self, "mscale_all_dim")];
                RopeKind::Yarn(YarnScaling {
                    factor: match self.is_null(place, "factor") {
                        true => lengthened,
                        false => needed(self, "factor"),
                    },
                    original_max_position_embeddings: original,
                    beta_fast: given(self, "beta_fast").unwrap_or(32.0),
                    beta_slow: given(self, "beta_slow").unwrap_or(1.0),
                    truncate: self.truncates(source),
                    attention_factor: optional(self, "attention_factor"),
                    mscales: mscales[0].zip(mscales[1]),
                })
            }
            "longrope" => RopeKind::LongRope(LongRopeScaling {
                short_factor: self.factors(source, "short_factor", dim / 2),
                long_factor: self.factors(source, "long_factor", dim / 2),
                factor: optional(self, "factor"),
                original_max_position_embeddings: original,
                attention_factor: optional(self, "attention_factor"),
            }),
            "llama3" => RopeKind::Llama3(Llama3Scaling {
                factor: needed(self, "factor"),
                low_freq_factor: needed(self, "low_freq_factor"),
                high_freq_factor: needed(self, "high_freq_factor"),
                original_max_position_embeddings: original,
            }),
            _ => RopeKind::Default,
        };
        (kind, original)
    }

    /// Whether this field of the object at `place` is null. For YaRN's factor a null means that the lengths determine
    /// it.
    fn is_null(&self, place: &str, field: &str) -> bool {
        let mut parts = place.split('.');
        let object = parts.next().and_then(|key| self.config.get(key));
        let object = parts.fold(object, |object, key| object?.get(key));
        object
            .and_then(|object| object.get(field))
            .is_some_and(Value::is_null)
    }

    /// Whether the bounds of YaRN's ramp are whole numbers. transformers looks for the field in `rope_parameters`
    /// itself, so it does not read it among the parameters of a type of layers.
    fn truncates(&mut self, source: &Source<'_>) -> bool {
        let key = format!("{}.truncate", source.name);
        match source.fields.get("truncate") {
            None | Some(Value::Bool(true)) => true,
            Some(Value::Bool(false)) if !source.name.contains('.') => false,
            Some(Value::Bool(false)) => {
                let message = "false is not read among the parameters of a type of layers";
                self.refuse(&key, message, "remove it: transformers takes true there");
                true
            }
            Some(value) => {
                let message = format!("expected true or false, found {value}");
                self.problem(&key, message);
                true
            }
        }
    }

    /// Reads a list with one factor per frequency.
    fn factors(&mut self, source: &Source<'_>, field: &str, n_frequencies: usize) -> Vec<f64> {
        let values = source.fields.get(field).and_then(Value::as_array);
        let found: Option<Vec<f64>> = values.and_then(|values| {
            let positive = |value: &Value| value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
            values.iter().map(positive).collect()
        });
        match found {
            Some(found) if found.len() == n_frequencies => found,
            found => {
                let message = match found {
                    Some(found) => format!(
                        "has {} entries for {n_frequencies} frequencies of a head",
                        found.len()
                    ),
                    None => format!("expected a list of {n_frequencies} positive numbers"),
                };
                self.problem(&format!("{}.{field}", source.name), message);
                vec![1.0; n_frequencies]
            }
        }
    }

    /// Returns the length before rescaling. If the object does not give it, transformers uses the key beside the
    /// object, or the number of positions. If the class has that key, its default takes precedence even over the
    /// object.
    fn original_length(&mut self, common: Common, source: &Source<'_>, own: &[&str]) -> usize {
        if !own.contains(&ORIGINAL) {
            return common.positions;
        }
        let length = match source.name.contains('.') {
            true => self.positive(
                &format!("{}.{ORIGINAL}", source.name),
                source.fields.get(ORIGINAL),
            ),
            false => self.one_of(source.name, source.fields, ORIGINAL),
        };
        if let (Some(default), Some(length), None) = (
            common.family.defaults.original_max_position_embeddings,
            length,
            self.get(ORIGINAL),
        ) && length as usize != default
        {
            let message = format!(
                "missing beside {}: transformers then takes {default}, not the {length} in there",
                source.name
            );
            self.refuse(
                ORIGINAL,
                message,
                "write it beside the rotary parameters too",
            );
        }
        let length = length.map(|length| length as usize);
        length
            .or(common.family.defaults.original_max_position_embeddings)
            .unwrap_or(common.positions)
    }
}
