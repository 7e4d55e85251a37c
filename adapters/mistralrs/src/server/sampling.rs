//! Sampling settings: those of a request, completed by those of the model.

use mistralrs_core::ModelGenerationDefaults;

use super::seeded::{GREEDY, SeededDraw};

/// Temperature if neither the request nor the model sets one; the same as in OpenAI, vLLM and mistral.rs.
const TEMPERATURE: f64 = 1.0;

/// Sampling settings of a request, or of a model as defaults.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Sampling {
    /// 0 is greedy.
    pub(crate) temperature: Option<f64>,
    /// 0 means no limit.
    pub(crate) top_k: Option<usize>,
    pub(crate) top_p: Option<f64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f32>,
}

impl Sampling {
    /// Reads the settings of a model's `generation_config.json`. vLLM applies them too; mistral.rs leaves them to its
    /// callers.
    ///
    /// `do_sample: false` means temperature 0. Values that switch an option off, or that a request could not set, are
    /// left out.
    pub(crate) fn of(model: Option<&ModelGenerationDefaults>) -> Self {
        let Some(model) = model else {
            return Self {
                temperature: Some(TEMPERATURE),
                ..Self::default()
            };
        };
        let greedy = model.do_sample == Some(false);
        let otherwise = if greedy { 0.0 } else { TEMPERATURE };
        let share = |value: Option<f64>| value.filter(|value| *value > 0.0 && *value < 1.0);
        Self {
            temperature: model
                .temperature
                .filter(|value| *value >= 0.0)
                .or(Some(otherwise)),
            top_k: model.top_k.filter(|k| *k > 0),
            top_p: share(model.top_p),
            min_p: share(model.min_p),
            repetition_penalty: model.repetition_penalty.filter(|penalty| *penalty > 0.0),
        }
    }

    /// Completes missing settings with those of `model`.
    pub(crate) fn or(self, model: &Self) -> Self {
        Self {
            temperature: self.temperature.or(model.temperature),
            top_k: self.top_k.or(model.top_k).filter(|k| *k > 0),
            top_p: self.top_p.or(model.top_p),
            min_p: self.min_p.or(model.min_p),
            repetition_penalty: self.repetition_penalty.or(model.repetition_penalty),
        }
    }

    /// Returns the draw for `seed`. Greedy answers need none, unless every token must be `known`. The draw takes over
    /// temperature, top-k, top-p and min-p.
    pub(crate) fn seeded(&mut self, seed: Option<u64>, known: bool) -> Option<SeededDraw> {
        let temperature = self.temperature.unwrap_or(TEMPERATURE);
        if !known && (seed.is_none() || temperature < GREEDY) {
            return None;
        }
        self.temperature = Some(0.0);
        Some(SeededDraw {
            seed: seed.unwrap_or_else(random_seed),
            temperature,
            top_k: self.top_k.take(),
            top_p: self.top_p.take(),
            min_p: self.min_p.take(),
        })
    }
}

/// Returns another seed at every call.
fn random_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn filled(model: Value, request: Sampling) -> Sampling {
        let model: ModelGenerationDefaults = serde_json::from_value(model).expect("settings");
        request.or(&Sampling::of(Some(&model)))
    }

    #[test]
    fn a_request_goes_before_the_model_and_the_model_before_the_habit() {
        let silent = Sampling::default;
        let habit = silent().or(&Sampling::of(None));
        let expected = Sampling {
            temperature: Some(1.0),
            ..silent()
        };
        assert_eq!(habit, expected);
        let model = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0,
            "repetition_penalty": 1.5});
        let asked = Sampling {
            temperature: Some(0.0),
            top_p: Some(1.0),
            ..silent()
        };
        let whole = Sampling {
            top_k: Some(20),
            repetition_penalty: Some(1.5),
            ..asked.clone()
        };
        assert_eq!(filled(model.clone(), asked), whole);
        assert_eq!(filled(model.clone(), silent()).temperature, Some(0.6));
        let none = Sampling {
            top_k: Some(0),
            ..silent()
        };
        assert_eq!(filled(model, none).top_k, None);
        let greedy = filled(json!({"do_sample": false}), silent());
        assert_eq!(greedy.temperature, Some(0.0));
        let off = json!({"top_k": 0, "top_p": 1.0, "repetition_penalty": 0.0, "temperature": -1.0});
        assert_eq!(filled(off, silent()), expected);
    }

    #[test]
    fn a_seed_takes_over_sampling_and_is_not_needed_for_greedy_answers() {
        let mut greedy = Sampling {
            temperature: Some(0.0),
            top_p: Some(0.5),
            ..Sampling::default()
        };
        assert_eq!(greedy.seeded(Some(1), false), None);
        assert_eq!(greedy.top_p, Some(0.5));

        let mut sampled = Sampling {
            temperature: Some(0.5),
            top_p: Some(0.5),
            top_k: Some(3),
            ..Sampling::default()
        };
        assert_eq!(sampled.clone().seeded(None, false), None);
        let draw = sampled.seeded(Some(u64::MAX), false).expect("a draw");
        assert_eq!((draw.seed, draw.temperature), (u64::MAX, 0.5));
        assert_eq!((draw.top_k, draw.top_p), (Some(3), Some(0.5)));
        let left = Sampling {
            temperature: Some(0.0),
            ..Sampling::default()
        };
        assert_eq!(sampled, left);
        let known = greedy.seeded(None, true).expect("a draw");
        assert_eq!((known.temperature, known.top_p), (0.0, Some(0.5)));
        let again = Sampling::default().seeded(None, true).expect("a draw");
        assert_ne!(known.seed, again.seed);
    }
}
