//! Properties that differ between layers: windows, rotations, mixtures of experts.

use serde_json::Value;

use super::Keys;
use crate::architecture::{ExpertSizes, Family, Layer, Normalised, RotaryLayers, Windows};

impl Keys<'_> {
    /// Sizes of the mixture, if the family has one.
    pub(super) fn experts(&mut self, family: &Family) -> Option<ExpertSizes> {
        let experts = family.experts?;
        let (names, default) = experts.count;
        let there: Vec<&str> = names
            .iter()
            .copied()
            .filter(|key| self.get(key).is_some())
            .collect();
        let counts: Vec<usize> = there
            .iter()
            .filter_map(|key| self.optional_size(key, None))
            .collect();
        if let [first, second] = counts[..]
            && first != second
        {
            let message = format!("{first}, but {} says {second}", there[1]);
            self.problem(there[0], message);
        }
        let count = counts.first().copied().unwrap_or(default);
        let key = "num_experts_per_tok";
        let per_token = self.optional_size(key, None).unwrap_or(experts.per_token);
        if per_token > count && self.sound(&[key]) && self.sound(names) {
            self.problem(key, format!("{per_token}, but there are {count} experts"));
        }
        let (key, default) = experts.width;
        Some(ExpertSizes {
            count,
            per_token,
            width: self.optional_size(key, None).unwrap_or(default),
            is_normalised: match experts.normalised {
                Normalised::Yes => true,
                Normalised::Key(key) => self.flag(key, false),
            },
        })
    }

    /// Whether a mixture of experts replaces the feed-forward layer, per layer.
    fn mixed(&mut self, family: &Family, n_layers: usize) -> Vec<bool> {
        let Some(experts) = family.experts else {
            return vec![false; n_layers];
        };
        if !experts.has_dense_layers {
            return vec![true; n_layers];
        }
        let key = "decoder_sparse_step";
        let step = self.optional_size(key, None).unwrap_or(1);
        let key = "mlp_only_layers";
        let dense: Option<Vec<u64>> = match self.get(key) {
            None => Some(Vec::new()),
            Some(value) => value
                .as_array()
                .and_then(|all| all.iter().map(Value::as_u64).collect()),
        };
        let dense = dense.unwrap_or_else(|| {
            self.problem(key, "expected a list of numbers of layers");
            Vec::new()
        });
        (0..n_layers)
            .map(|layer| !dense.contains(&(layer as u64)) && (layer + 1).is_multiple_of(step))
            .collect()
    }

    /// Returns the properties of each layer.
    pub(super) fn layers(&mut self, family: &Family, n_layers: usize) -> Vec<Layer> {
        let rotates = self.rotates(family, n_layers);
        let windows = self.windows(family, &rotates);
        let mixed = self.mixed(family, n_layers);
        let by_window = matches!(family.rotary.layers, RotaryLayers::ByWindow { .. });
        let layers = windows.into_iter().zip(rotates).zip(mixed);
        layers
            .map(|((window, rotates), has_experts)| Layer {
                window,
                rope: rotates.then_some(usize::from(by_window && window.is_some())),
                has_experts,
            })
            .collect()
    }

    /// Whether queries and keys are rotated, per layer.
    fn rotates(&mut self, family: &Family, n_layers: usize) -> Vec<bool> {
        let RotaryLayers::Marked { interval } = family.rotary.layers else {
            return vec![true; n_layers];
        };
        let key = "no_rope_layers";
        let Some(marks) = self.get(key) else {
            let key = "no_rope_layer_interval";
            let interval = self.optional_size(key, None).unwrap_or(interval);
            return (0..n_layers)
                .map(|layer| !(layer + 1).is_multiple_of(interval))
                .collect();
        };
        let marks: Option<Vec<bool>> = marks.as_array().and_then(|marks| {
            let marks = marks.iter();
            marks
                .map(|mark| mark.as_bool().or(mark.as_u64().map(|mark| mark != 0)))
                .collect()
        });
        match marks {
            Some(marks) if marks.len() == n_layers => marks,
            Some(_) if !self.sound(&["num_hidden_layers"]) => vec![true; n_layers],
            marks => {
                let message = match marks {
                    Some(marks) => format!("has {} entries for {n_layers} layers", marks.len()),
                    None => "expected a list of 0 and 1".to_owned(),
                };
                self.problem(key, message);
                vec![true; n_layers]
            }
        }
    }

    /// Returns each layer's window. `rotates` says, per layer, whether queries and keys are rotated.
    fn windows(&mut self, family: &Family, rotates: &[bool]) -> Vec<Option<usize>> {
        let n_layers = rotates.len();
        let none = vec![None; n_layers];
        let window = match family.windows {
            Windows::No => return none,
            _ => self.optional_size("sliding_window", family.defaults.sliding_window),
        };
        let slides = self.flag("use_sliding_window", false);
        match family.windows {
            Windows::No => none,
            Windows::All => vec![window; n_layers],
            Windows::AllIfUsed => vec![window.filter(|_| slides); n_layers],
            _ if self.get("layer_types").is_some() => {
                // Without `use_sliding_window`, transformers applies only a window that config.json states.
                let is_known = !matches!(family.windows, Windows::From(_) | Windows::Unrotated)
                    || slides
                    || self.get("sliding_window").is_some();
                self.layer_types(window.filter(|_| is_known), n_layers)
            }
            Windows::From(first) => {
                let first = self.first_window(first);
                let window = window.filter(|_| slides);
                (0..n_layers)
                    .map(|layer| window.filter(|_| layer >= first))
                    .collect()
            }
            Windows::AllBut(every, keys) => {
                let key = keys.iter().find(|key| self.get(key).is_some());
                let every = key
                    .and_then(|key| self.optional_size(key, None))
                    .unwrap_or(every);
                if window.is_none() && n_layers > 0 && every > 1 {
                    let message = "missing, but there are layers that see only a window";
                    self.problem("sliding_window", message);
                }
                (0..n_layers)
                    .map(|layer| window.filter(|_| !(layer + 1).is_multiple_of(every)))
                    .collect()
            }
            Windows::Unrotated => {
                let window = window.filter(|_| slides);
                let layers = rotates.iter();
                layers.map(|rotates| window.filter(|_| !rotates)).collect()
            }
        }
    }

    /// Returns the windows that `layer_types` gives.
    fn layer_types(&mut self, window: Option<usize>, n_layers: usize) -> Vec<Option<usize>> {
        let none = vec![None; n_layers];
        let kinds = self.get("layer_types").and_then(Value::as_array);
        let kinds: Option<Vec<_>> = kinds.and_then(|kinds| {
            kinds
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Some(None),
                    Some("sliding_attention") => window.map(Some),
                    _ => None,
                })
                .collect()
        });
        match kinds {
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
        }
    }

    /// Returns the first layer with a window. It may be 0, so it is not read as a size.
    fn first_window(&mut self, first: usize) -> usize {
        let found = self.get("max_window_layers");
        match found.map(|value| (value.as_u64(), value.to_string())) {
            None => first,
            Some((Some(first), _)) => first as usize,
            Some((None, found)) => {
                let message = format!("expected a whole number, found {found}");
                self.problem("max_window_layers", message);
                first
            }
        }
    }
}
