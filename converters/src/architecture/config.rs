//! The one reader of config.json: what it says, what transformers assumes where it is silent, and a refusal of the rest.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Activation, Family, Layer, ModelShape, Multiplier, Multipliers, Windows};
use crate::error::{Error, Result};
use crate::model_files::{ModelFiles, declared_quantization};
use crate::problem::Problem;

mod keys;
mod rope;

/// More layers than any model has.
const MAX_LAYERS: usize = 1 << 16;

impl ModelShape {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// As [`ModelFiles::read_config`]; a refusal with every key that is missing, malformed or not understood.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        Self::from_config(&ModelFiles::read_config(dir)?)
            .map_err(|problems| Error::refused(dir, problems))
    }

    /// Reads the contents of a `config.json`.
    ///
    /// # Errors
    /// Every key that is missing, malformed or not understood.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let (shape, mut problems) = read(config)?;
        problems.extend(keys::refused(shape.family, shape.head_dim, config));
        match problems.is_empty() {
            true => Ok(shape),
            false => Err(problems),
        }
    }

    /// As [`Self::from_config`], for what needs names and shapes of tensors alone: what is wrong with other keys is let pass.
    ///
    /// # Errors
    /// Every key that the tensors depend on and that is missing or malformed.
    pub(crate) fn layout(config: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let (shape, mut problems) = read(config)?;
        problems.retain(|problem| {
            let key = problem.at.strip_prefix(AT).unwrap_or_default();
            LAYOUT.contains(&key) || shape.family.bias_keys().contains(&key)
        });
        match problems.is_empty() {
            true => Ok(shape),
            false => Err(problems),
        }
    }
}

/// What the place of a problem with a key begins with.
const AT: &str = "config.json: ";

/// Keys that names and shapes of tensors depend on, biases apart.
const LAYOUT: [&str; 8] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
];

/// The shape, and what is wrong with the keys that it was read from.
fn read(config: &Map<String, Value>) -> Result<(ModelShape, Vec<Problem>), Vec<Problem>> {
    let family = family(config).map_err(|problem| vec![problem])?;
    let mut keys = Keys {
        config,
        problems: Vec::new(),
    };
    let shape = keys.shape(family);
    Ok((shape, keys.problems))
}

/// What config.json says that nothing reads, one warning for each kind; what changes the numbers is refused instead.
pub(crate) fn unread(config: &Map<String, Value>) -> Vec<Problem> {
    family(config).map_or_else(|_| Vec::new(), |family| keys::unread(family, config))
}

/// The family by `model_type`, or, where that is absent, by the class in `architectures`.
pub(crate) fn family(config: &Map<String, Value>) -> Result<&'static Family, Problem> {
    type Name = fn(&Family) -> &'static str;
    let model_type = config.get("model_type").filter(|value| !value.is_null());
    let class = || config.get("architectures")?.get(0)?.as_str();
    let (key, found, name): (_, _, Name) = match (model_type, class()) {
        (None, Some(class)) => ("architectures", class.to_owned(), |family| {
            family.class_name
        }),
        (found, _) => {
            let found = found.map_or("absent".to_owned(), plain);
            ("model_type", found, |family| family.model_type)
        }
    };
    let mut families = super::FAMILIES.iter().copied();
    families
        .find(|family| name(family) == found)
        .ok_or_else(|| {
            let known: Vec<_> = super::FAMILIES.iter().map(|family| name(family)).collect();
            Problem::new(
                "architecture",
                format!("config.json: {key}"),
                format!("`{found}` is not supported"),
                format!("supported are {}", known.join(", ")),
            )
        })
}

/// A text as it is, and any other value as JSON writes it.
fn plain(value: &Value) -> String {
    value.as_str().map_or(value.to_string(), str::to_owned)
}

/// Query heads, and key and value heads, of a config.json of which nothing else is needed.
///
/// # Errors
/// The first thing that is wrong with these keys.
pub(crate) fn heads(
    family: &Family,
    config: &Map<String, Value>,
) -> Result<(usize, usize), Problem> {
    let mut keys = Keys {
        config,
        problems: Vec::new(),
    };
    let heads = keys.heads(family);
    keys.problems.into_iter().next().map_or(Ok(heads), Err)
}

/// Whether the output head is the embedding, if the configuration or its family says so.
pub(crate) fn ties_embeddings(config: &Map<String, Value>) -> Option<bool> {
    let written = config.get("tie_word_embeddings").and_then(Value::as_bool);
    written.or_else(|| Some(family(config).ok()?.defaults.tie_word_embeddings))
}

/// Reads keys of a configuration and gathers what is wrong with them; a bad value is replaced by a harmless one so that the
/// other keys can still be checked.
struct Keys<'a> {
    config: &'a Map<String, Value>,
    problems: Vec<Problem>,
}

impl Keys<'_> {
    fn problem(&mut self, key: &str, message: impl Into<String>) {
        self.refuse(key, message, "correct config.json");
    }

    fn refuse(&mut self, key: &str, message: impl Into<String>, fix: &str) {
        let location = format!("{AT}{key}");
        self.problems
            .push(Problem::new("model-config", location, message, fix));
    }

    /// Whether none of `keys` has a problem already: what follows from a bad value is no problem of its own.
    fn sound(&self, keys: &[&str]) -> bool {
        let is_at = |problem: &Problem, key| problem.at.strip_prefix(AT) == Some(key);
        let mut problems = self.problems.iter();
        !problems.any(|problem| keys.iter().any(|key| is_at(problem, key)))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    fn shape(&mut self, family: &'static Family) -> ModelShape {
        self.refuse_quantised();
        let defaults = &family.defaults;
        let hidden_size = self.size("hidden_size");
        let num_hidden_layers = self.size("num_hidden_layers");
        if num_hidden_layers > MAX_LAYERS {
            let message = format!("{num_hidden_layers} layers; at most {MAX_LAYERS} are read");
            self.problem("num_hidden_layers", message);
        }
        let (num_attention_heads, num_key_value_heads) = self.heads(family);
        let heads = ["num_attention_heads", "num_key_value_heads"];
        if !num_attention_heads.is_multiple_of(num_key_value_heads) && self.sound(&heads) {
            let message = format!(
                "{num_attention_heads} attention heads are not a multiple of {num_key_value_heads}"
            );
            self.problem("num_key_value_heads", message);
        }
        let head_dim = self
            .optional_size("head_dim", defaults.head_dim)
            .unwrap_or(hidden_size / num_attention_heads);
        let from: &[&str] = match self.get("head_dim") {
            Some(_) => &["head_dim"],
            None => &["hidden_size", "num_attention_heads"],
        };
        if (head_dim == 0 || !head_dim.is_multiple_of(2)) && self.sound(from) {
            let message = format!("{head_dim} is odd; rotary embedding needs pairs");
            self.problem("head_dim", message);
        }
        let max_position_embeddings = self
            .optional_size("max_position_embeddings", None)
            .unwrap_or(defaults.max_position_embeddings);
        let rope = self.rope(defaults.rope_theta, head_dim, max_position_embeddings);
        ModelShape {
            family,
            vocab_size: self.size("vocab_size"),
            hidden_size,
            intermediate_size: self.size("intermediate_size"),
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: self.number("rms_norm_eps", defaults.rms_norm_eps),
            max_position_embeddings,
            tie_word_embeddings: self.flag("tie_word_embeddings", defaults.tie_word_embeddings),
            activation: self.activation(family),
            multipliers: self.multipliers(family),
            bias_keys: {
                let mut keys = family.bias_keys();
                keys.retain(|key| self.flag(key, false));
                keys
            },
            ropes: vec![rope],
            layers: self
                .windows(family, num_hidden_layers.min(MAX_LAYERS))
                .into_iter()
                .map(|window| Layer {
                    window,
                    rope: Some(0),
                })
                .collect(),
        }
    }

    fn heads(&mut self, family: &Family) -> (usize, usize) {
        let query = self.size("num_attention_heads");
        let key_value =
            self.optional_size("num_key_value_heads", family.defaults.num_key_value_heads);
        (query, key_value.unwrap_or(query))
    }

    /// A key that must be there.
    fn size(&mut self, key: &str) -> usize {
        if self.get(key).is_none() {
            let message = "missing; is this the config.json of a decoder?";
            self.problem(key, message);
        }
        self.optional_size(key, None).unwrap_or(1)
    }

    /// `default` where the key is absent, nothing where it is null.
    fn optional_size(&mut self, key: &str, default: Option<usize>) -> Option<usize> {
        if !self.config.contains_key(key) {
            return default;
        }
        let value = self.get(key)?;
        match value.as_u64() {
            Some(size) if (1..1 << 32).contains(&size) => Some(size as usize),
            _ => {
                let message = format!("expected a positive whole number, found {value}");
                self.problem(key, message);
                Some(1)
            }
        }
    }

    fn number(&mut self, key: &str, default: f64) -> f64 {
        let value = self.get(key).cloned();
        self.positive(key, value.as_ref()).unwrap_or(default)
    }

    /// `value`, of `key`, as a number above 0.
    fn positive(&mut self, key: &str, value: Option<&Value>) -> Option<f64> {
        let value = value?;
        let number = value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
        if number.is_none() {
            let message = format!("expected a positive number, found {value}");
            self.problem(key, message);
        }
        number
    }

    fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.get(key) {
            None => default,
            Some(Value::Bool(value)) => *value,
            Some(value) => {
                let message = format!("expected true or false, found {value}");
                self.problem(key, message);
                default
            }
        }
    }

    fn refuse_quantised(&mut self) {
        if let Some((key, method)) = declared_quantization(self.config) {
            let message = format!("the weights are quantised ({method})");
            let fix = "use the full-precision checkpoint, or `import-gguf` for a GGUF file";
            self.refuse(key, message, fix);
        }
    }

    /// Both names of the key are looked at, so that neither is dropped silently.
    fn activation(&mut self, family: &Family) -> Activation {
        let mut activation = family.defaults.activation;
        for key in ["hidden_act", "hidden_activation"] {
            let Some(value) = self.get(key) else { continue };
            let found = value.as_str().and_then(Activation::named);
            match found {
                Some(found) if key == family.activation_key => activation = found,
                Some(found) if found == activation => {}
                _ => {
                    let message = format!("activation `{}` is not supported", plain(value));
                    self.refuse(key, message, &format!("only {} is", activation.name()));
                }
            }
        }
        activation
    }

    fn multipliers(&mut self, family: &Family) -> Multipliers {
        let mut factors = Multipliers::default();
        for (multiplier, key) in family.multipliers {
            let value = self.get(key).cloned();
            let Some(value) = self.positive(key, value.as_ref()) else {
                continue;
            };
            match multiplier {
                Multiplier::Embedding => factors.embedding = value,
                Multiplier::Attention => factors.attention = Some(value),
                Multiplier::Residual => factors.residual = value,
                Multiplier::LogitsDivisor => factors.logits_divisor = value,
            }
        }
        factors
    }

    /// Each layer's window.
    fn windows(&mut self, family: &Family, n_layers: usize) -> Vec<Option<usize>> {
        let none = vec![None; n_layers];
        let window = match family.windows {
            Windows::No => return none,
            _ => self.optional_size("sliding_window", family.defaults.sliding_window),
        };
        let Windows::From(first) = family.windows else {
            return vec![window; n_layers];
        };
        let slides = self.flag("use_sliding_window", false);
        if let Some(kinds) = self.get("layer_types") {
            // Without `use_sliding_window` transformers knows no window but the one that is written down.
            let window = window.filter(|_| slides || self.get("sliding_window").is_some());
            let kinds: Option<Vec<_>> = kinds.as_array().and_then(|kinds| {
                kinds
                    .iter()
                    .map(|kind| match kind.as_str() {
                        Some("full_attention") => Some(None),
                        Some("sliding_attention") => window.map(Some),
                        _ => None,
                    })
                    .collect()
            });
            return match kinds {
                Some(kinds) if kinds.len() == n_layers => kinds,
                Some(_) if !self.sound(&["num_hidden_layers"]) => none,
                Some(kinds) => {
                    let message = format!("has {} entries for {n_layers} layers", kinds.len());
                    self.problem("layer_types", message);
                    none
                }
                None => {
                    let message = "expected a list of full_attention and, if there is a sliding_window, sliding_attention";
                    self.problem("layer_types", message);
                    none
                }
            };
        }
        // 0 is a layer, so this is no size.
        let first = match self
            .get("max_window_layers")
            .map(|v| (v.as_u64(), v.to_string()))
        {
            None => first,
            Some((Some(first), _)) => first as usize,
            Some((None, found)) => {
                let message = format!("expected a whole number, found {found}");
                self.problem("max_window_layers", message);
                first
            }
        };
        let window = window.filter(|_| slides);
        (0..n_layers)
            .map(|layer| window.filter(|_| layer >= first))
            .collect()
    }
}

#[cfg(test)]
mod tests;
