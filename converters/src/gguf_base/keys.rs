//! Look-up of the keys below a file's architecture; what has been asked for counts as read.

use std::collections::BTreeSet;

use super::Findings;
use crate::tensors::gguf::{GgufArray, GgufFile, GgufValue};

/// Largest value accepted for a dimension: their products stay far from overflow.
const DIMENSION_MAX: u64 = 1 << 28;

/// Typed look-up of `<architecture>.<key>`; what is missing or malformed becomes a problem and a harmless value.
pub(super) struct Keys<'a> {
    pub(super) source: &'a GgufFile,
    pub(super) findings: &'a mut Findings,
    /// `general.architecture`.
    pub(super) prefix: &'a str,
    read: BTreeSet<String>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(source: &'a GgufFile, prefix: &'a str, findings: &'a mut Findings) -> Self {
        Self {
            source,
            findings,
            prefix,
            read: BTreeSet::new(),
        }
    }

    /// The keys that were looked up, without the architecture.
    pub(super) fn into_read(self) -> BTreeSet<String> {
        self.read
    }

    /// The whole name of a key.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    pub(super) fn refuse(&mut self, code: &'static str, key: &str, message: impl Into<String>) {
        let at = self.full(key);
        self.findings.problem(code, at, message, "");
    }

    fn get(&mut self, key: &str) -> Option<&'a GgufValue> {
        self.read.insert(key.to_owned());
        self.source.metadata().get(&self.full(key))
    }

    /// Whether the key is there.
    pub(super) fn has(&mut self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn text(&mut self, key: &str) -> Option<&'a str> {
        self.get(key)?.as_str()
    }

    pub(super) fn dimension(&mut self, key: &str) -> usize {
        if !self.has(key) {
            self.refuse("metadata", key, "missing");
            return 1;
        }
        self.optional_dimension(key).unwrap_or(1)
    }

    pub(super) fn optional_dimension(&mut self, key: &str) -> Option<usize> {
        let value = self.get(key)?;
        match value.as_u64() {
            Some(value) if (1..=DIMENSION_MAX).contains(&value) => usize::try_from(value).ok(),
            Some(value) => {
                let message = format!("{value} is not between 1 and {DIMENSION_MAX}");
                self.refuse("metadata", key, message);
                None
            }
            None => {
                let message = "is not one whole number; a value per layer is not supported";
                self.refuse("metadata", key, message);
                None
            }
        }
    }

    /// As [`Self::optional_dimension`], where 0 is as good as absent.
    pub(super) fn dimension_above_0(&mut self, key: &str) -> Option<usize> {
        match self.get(key)?.as_u64() {
            Some(0) => None,
            _ => self.optional_dimension(key),
        }
    }

    pub(super) fn positive(&mut self, key: &str, default: Option<f64>) -> f64 {
        let found = match self.has(key) {
            true => self.source.number(&self.full(key)),
            false => default,
        };
        match found {
            Some(value) if value > 0.0 && value.is_finite() => value,
            _ => {
                self.refuse("metadata", key, "missing or not a positive number");
                1.0
            }
        }
    }

    /// A number above 0; nothing where the key is absent or 0.
    pub(super) fn above_0(&mut self, key: &str) -> Option<f64> {
        match self.get(key)?.as_f64() {
            Some(0.0) => None,
            _ => Some(self.positive(key, None)),
        }
    }

    /// What a key says for each of `n_layers`, as a list of flags, or as a number n: all layers but every n-th, where 0 is all layers.
    pub(super) fn pattern(&mut self, key: &str, n_layers: usize) -> Option<Vec<bool>> {
        let value = self.get(key)?;
        let flags: Option<Vec<bool>> = match value {
            GgufValue::Array(GgufArray::Bool(flags)) => Some(flags.clone()),
            GgufValue::Array(GgufArray::Unsigned(flags)) => {
                Some(flags.iter().map(|flag| *flag != 0).collect())
            }
            GgufValue::Array(GgufArray::Signed(flags)) => {
                Some(flags.iter().map(|flag| *flag != 0).collect())
            }
            number => number
                .as_u64()
                .and_then(|every| usize::try_from(every).ok())
                .map(|every| all_but(every, n_layers)),
        };
        match flags {
            Some(flags) if flags.len() == n_layers => Some(flags),
            Some(flags) => {
                let message = format!("has {} entries for {n_layers} blocks", flags.len());
                self.refuse("metadata", key, message);
                None
            }
            None => {
                let message = "is neither a whole number nor a flag for each block";
                self.refuse("metadata", key, message);
                None
            }
        }
    }
}

/// All of `n_layers` but every n-th; 0 is all.
pub(super) fn all_but(every: usize, n_layers: usize) -> Vec<bool> {
    (1..=n_layers)
        .map(|number| every == 0 || !number.is_multiple_of(every))
        .collect()
}
