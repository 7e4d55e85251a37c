//! How answers are sampled where a request does not say.

use mistralrs_core::ModelGenerationDefaults;
use serde_json::{Map, Value, json};

/// Temperature where neither the request nor the model has one; OpenAI's, vLLM's and mistral.rs's.
const TEMPERATURE: f64 = 1.0;

/// Sampling settings of a model for the keys that a request leaves out.
///
/// They are those of its `generation_config.json`, which vLLM applies too and mistral.rs 0.8.1 reads and leaves to its callers:
/// temperature (0, which is greedy, if `do_sample` is false), top-k, top-p, min-p and the repetition penalty. Values that
/// switch an option off, or that no request could ask for, are left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct SamplingDefaults(Map<String, Value>);

impl SamplingDefaults {
    pub(crate) fn of(model: Option<&ModelGenerationDefaults>) -> Self {
        let mut defaults = Map::new();
        let mut set = |key: &str, value: Value| defaults.insert(key.to_owned(), value);
        let of_model = |of: fn(&ModelGenerationDefaults) -> Option<f64>| model.and_then(of);
        let greedy = model.is_some_and(|model| model.do_sample == Some(false));
        let own = of_model(|model| model.temperature).filter(|value| *value >= 0.0);
        let otherwise = if greedy { 0.0 } else { TEMPERATURE };
        set("temperature", json!(own.unwrap_or(otherwise)));
        if let Some(top_k) = model.and_then(|model| model.top_k).filter(|k| *k > 0) {
            set("top_k", json!(top_k));
        }
        for (key, value) in [
            ("top_p", of_model(|model| model.top_p)),
            ("min_p", of_model(|model| model.min_p)),
        ] {
            if let Some(value) = value.filter(|value| *value > 0.0 && *value < 1.0) {
                set(key, json!(value));
            }
        }
        let penalty = of_model(|model| model.repetition_penalty.map(f64::from));
        if let Some(penalty) = penalty.filter(|penalty| *penalty > 0.0) {
            set("repetition_penalty", json!(penalty));
        }
        Self(defaults)
    }

    /// Adds what `fields` leave out.
    pub(crate) fn fill(&self, fields: &mut Map<String, Value>) {
        for (key, value) in &self.0 {
            fields.entry(key).or_insert_with(|| value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields::tests::fields;
    use super::*;

    fn filled(model: Value, request: Value) -> Value {
        let model: ModelGenerationDefaults = serde_json::from_value(model).expect("settings");
        let mut body = fields(request);
        SamplingDefaults::of(Some(&model)).fill(&mut body);
        Value::Object(body)
    }

    #[test]
    fn a_request_goes_before_the_model_and_the_model_before_the_habit() {
        let mut body = Map::new();
        SamplingDefaults::of(None).fill(&mut body);
        assert_eq!(Value::Object(body), json!({"temperature": 1.0}));
        let model = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0,
            "repetition_penalty": 1.5});
        assert_eq!(
            filled(model.clone(), json!({"temperature": 0, "top_p": 1})),
            json!({"temperature": 0, "top_p": 1, "top_k": 20, "repetition_penalty": 1.5})
        );
        assert_eq!(filled(model, json!({}))["temperature"], 0.6);
        let greedy = json!({"do_sample": false});
        assert_eq!(filled(greedy, json!({})), json!({"temperature": 0.0}));
        let off = json!({"top_k": 0, "top_p": 1.0, "repetition_penalty": 0.0, "temperature": -1.0});
        assert_eq!(filled(off, json!({})), json!({"temperature": 1.0}));
    }
}
