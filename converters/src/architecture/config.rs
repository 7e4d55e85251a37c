//! The only reader of config.json. It applies transformers' defaults for absent keys and refuses what it does not
//! understand.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Activation, Factor, Family, ModelShape, Multiplier, Multipliers, SoftcapPlace, Wrapper,
};
use crate::error::{Error, Result};
use crate::model_files::{ModelFiles, QUANTISED_FIX, declared_quantization, is_read_in_blocks};
use crate::problem::Problem;

mod keys;
mod language;
mod layers;
mod rope;

use language::{Language, language};
pub(crate) use language::{body, entry, family, ties_by_files, ties_embeddings, with_entry};

/// Maximum number of layers, more than any model has.
const MAX_LAYERS: usize = 1 << 16;

impl ModelShape {
    /// Reads `config.json` in `dir`. If config.json leaves it to the weights whether the head is the embedding, this
    /// also reads the headers of the weight files, if there are any.
    ///
    /// # Errors
    /// Returns an error as [`ModelFiles::read_config`] does, or a refusal with every key that is missing, malformed or
    /// not understood.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = ModelFiles::read_config(dir)?;
        let mut shape =
            Self::from_config(&config).map_err(|problems| Error::refused(dir, problems))?;
        if ties_by_files(&config)
            && let Ok(files) = ModelFiles::open(dir)
        {
            shape.tie_word_embeddings = files.ties_embeddings();
        }
        Ok(shape)
    }

    /// Reads the contents of a `config.json`.
    ///
    /// # Errors
    /// Returns a problem for every key that is missing, malformed or not understood.
    pub fn from_config(config: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let language = language(config).map_err(|problem| vec![problem])?;
        let (shape, mut problems) = read(&language);
        problems.extend(keys::refused(&language, shape.head_dim));
        match problems.is_empty() {
            true => Ok(shape),
            false => Err(problems),
        }
    }

    /// As [`Self::from_config`], for callers that need only names and shapes of tensors: problems with other keys are
    /// ignored.
    ///
    /// # Errors
    /// Returns a problem for every missing or malformed key that the tensors depend on.
    pub(crate) fn layout(config: &Map<String, Value>) -> Result<Self, Vec<Problem>> {
        let language = language(config).map_err(|problem| vec![problem])?;
        let (shape, mut problems) = read(&language);
        problems.retain(|problem| {
            let mut keys = LAYOUT.into_iter().chain(shape.family.bias_keys());
            keys.any(|key| problem.at == language.at(key))
        });
        match problems.is_empty() {
            true => Ok(shape),
            false => Err(problems),
        }
    }
}

/// Keys that determine the names and shapes of tensors, except those of biases.
const LAYOUT: [&str; 13] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
];

/// Returns the shape, and the problems of the keys that it was read from.
fn read(language: &Language<'_>) -> (ModelShape, Vec<Problem>) {
    let mut keys = Keys::of(language);
    let shape = keys.shape(language.family, language.wrapper);
    (shape, keys.problems)
}

/// Returns a warning for each kind of key that nothing reads. Keys that change the numbers are refused instead.
pub(crate) fn unread(config: &Map<String, Value>) -> Vec<Problem> {
    language(config).map_or_else(|_| Vec::new(), |language| keys::unread(&language, config))
}

/// Returns a text as it is, and any other value as JSON.
fn plain(value: &Value) -> String {
    value.as_str().map_or(value.to_string(), str::to_owned)
}

/// Returns the numbers of query heads and of key and value heads, from a config.json whose other keys are not needed.
///
/// # Errors
/// Returns the first problem with these keys.
pub(crate) fn heads(config: &Map<String, Value>) -> Result<(usize, usize), Problem> {
    let language = language(config)?;
    let mut keys = Keys::of(&language);
    let heads = keys.heads(language.family);
    keys.problems.into_iter().next().map_or(Ok(heads), Err)
}

/// Reads keys of a configuration and collects their problems. A bad value is replaced by a harmless one, so that the
/// other keys can still be checked.
struct Keys<'a> {
    config: &'a Map<String, Value>,
    language: &'a Language<'a>,
    problems: Vec<Problem>,
}

impl<'a> Keys<'a> {
    fn of(language: &'a Language<'a>) -> Self {
        Self {
            config: &language.config,
            language,
            problems: Vec::new(),
        }
    }

    fn problem(&mut self, key: &str, message: impl Into<String>) {
        self.refuse(key, message, "correct config.json");
    }

    fn refuse(&mut self, key: &str, message: impl Into<String>, fix: &str) {
        let location = self.language.at(key);
        self.problems
            .push(Problem::new("model-config", location, message, fix));
    }

    /// Whether none of `keys` has a problem yet. A consequence of a bad value is not reported as a problem of its own.
    fn sound(&self, keys: &[&str]) -> bool {
        let mut problems = self.problems.iter();
        !problems.any(|problem| keys.iter().any(|key| problem.at == self.language.at(key)))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    fn shape(&mut self, family: &'static Family, wrapper: Option<&'static Wrapper>) -> ModelShape {
        self.refuse_quantised();
        let defaults = &family.defaults;
        let sizes = defaults.sizes.as_ref();
        let hidden_size = self.size("hidden_size", sizes.map(|sizes| sizes.hidden_size));
        let num_hidden_layers = self.size(
            "num_hidden_layers",
            sizes.map(|sizes| sizes.num_hidden_layers),
        );
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
        let ropes = self.ropes(family, head_dim, max_position_embeddings);
        let [score_cap, logit_cap] = self.softcaps(family);
        let layers = self.layers(family, num_hidden_layers.min(MAX_LAYERS));
        ModelShape {
            family,
            wrapper,
            vocab_size: self.size("vocab_size", sizes.map(|sizes| sizes.vocab_size)),
            hidden_size,
            intermediate_size: self.size(
                "intermediate_size",
                sizes.map(|sizes| sizes.intermediate_size),
            ),
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: self.number("rms_norm_eps", defaults.rms_norm_eps),
            max_position_embeddings,
            tie_word_embeddings: self.flag("tie_word_embeddings", defaults.tie_word_embeddings),
            activation: self.activation(family),
            multipliers: self.multipliers(family, hidden_size),
            score_cap,
            logit_cap,
            experts: self.experts(family),
            bias_keys: {
                let mut keys = family.bias_keys();
                keys.retain(|key| self.flag(key, defaults.biases));
                keys
            },
            ropes,
            layers,
        }
    }

    fn heads(&mut self, family: &Family) -> (usize, usize) {
        let default = family.defaults.sizes.as_ref();
        let query = self.size(
            "num_attention_heads",
            default.map(|sizes| sizes.num_attention_heads),
        );
        let key_value =
            self.optional_size("num_key_value_heads", family.defaults.num_key_value_heads);
        (query, key_value.unwrap_or(query))
    }

    /// Reads a key that is required unless its family has a `default`.
    fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        if self.get(key).is_none() && default.is_none() {
            let message = "missing; is this the config.json of a decoder?";
            self.problem(key, message);
        }
        self.optional_size(key, default).or(default).unwrap_or(1)
    }

    /// Returns `default` if the key is absent, and `None` if it is null.
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
        self.number_if_there(key).unwrap_or(default)
    }

    fn number_if_there(&mut self, key: &str) -> Option<f64> {
        let value = self.get(key).cloned();
        self.positive(key, value.as_ref())
    }

    /// Reads `value`, the value of `key`, as a number above 0.
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
        if let Some((key, method)) = declared_quantization(self.config)
            && !is_read_in_blocks(self.config)
        {
            let message = format!("the weights are quantised ({method})");
            let fix = QUANTISED_FIX;
            self.refuse(key, message, fix);
        }
    }

    /// Checks both names of the key, so that neither is dropped silently.
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

    fn multipliers(&mut self, family: &Family, hidden_size: usize) -> Multipliers {
        let mut factors = Multipliers::default();
        for (multiplier, factor) in family.multipliers {
            let value = match factor {
                Factor::Key(key) => self.number(key, 1.0),
                Factor::InverseRoot(key, default) => self.number(key, *default).powf(-0.5),
                Factor::RootOfWidth => (hidden_size as f64).sqrt(),
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

    /// The bounds on scores and on logits.
    fn softcaps(&mut self, family: &Family) -> [Option<f64>; 2] {
        [SoftcapPlace::Scores, SoftcapPlace::Logits].map(|place| {
            let cap = family.softcaps.iter().find(|cap| cap.place == place)?;
            match self.config.get(cap.key) {
                None => cap.default,
                Some(value) => self.positive(cap.key, Some(value).filter(|value| !value.is_null())),
            }
        })
    }
}

#[cfg(test)]
mod tests;
