//! How answers are sampled: what the model says where a request does not, the draws of a seed, and what mistral.rs would pass over.

use mistralrs_core::ModelGenerationDefaults;
use serde_json::{Map, Value, json};

use super::answer::ApiError;
use super::request::positive;
use super::steps::SeededDraw;

/// Sampling below this temperature is greedy, as in mistral.rs.
const GREEDY: f64 = 1e-7;

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

    /// Adds what `fields` leave out. A top-k of 0 or -1 is vLLM's way of asking for none.
    pub(crate) fn fill(&self, fields: &mut Map<String, Value>) {
        for (key, value) in &self.0 {
            fields.entry(key).or_insert_with(|| value.clone());
        }
        if matches!(fields.get("top_k").and_then(Value::as_i64), Some(-1 | 0)) {
            fields.remove("top_k");
        }
    }
}

/// The draw that `seed` asks for; greedy answers need none. It takes over temperature, top-k, top-p and min-p.
pub(crate) fn seeded(fields: &mut Map<String, Value>) -> Result<Option<SeededDraw>, ApiError> {
    let seed = match fields.remove("seed") {
        None => return Ok(None),
        Some(value) => value
            .as_u64()
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .ok_or_else(|| ApiError::invalid("seed", "`seed` must be an integer"))?,
    };
    let number = |key: &str| fields.get(key).and_then(Value::as_f64);
    let temperature = number("temperature").unwrap_or(TEMPERATURE);
    if temperature < GREEDY {
        return Ok(None);
    }
    let draw = SeededDraw {
        seed,
        temperature,
        top_k: positive(fields, "top_k", u64::MAX)?,
        top_p: number("top_p"),
        min_p: number("min_p"),
    };
    for key in ["top_k", "top_p", "min_p"] {
        fields.remove(key);
    }
    fields.insert("temperature".to_owned(), json!(0.0));
    Ok(Some(draw))
}

/// Says top-p and min-p as mistral.rs 0.8.1 understands them: it takes a top-p of 0 for none, and a min-p of 1, or one
/// without a top-p below 1, too.
pub(crate) fn keep_to_mistralrs(fields: &mut Map<String, Value>) {
    let number = |key: &str| fields.get(key).and_then(Value::as_f64);
    let (top_p, min_p) = (number("top_p"), number("min_p"));
    if top_p == Some(0.0) || min_p.is_some_and(|min_p| min_p >= 1.0) {
        fields.remove("top_p");
        fields.remove("min_p");
        fields.insert("top_k".to_owned(), json!(1));
    } else if min_p.is_some_and(|min_p| min_p > 0.0) && top_p.is_none_or(|top_p| top_p >= 1.0) {
        fields.insert("top_p".to_owned(), json!(1.0 - f32::EPSILON));
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
        assert_eq!(filled(model.clone(), json!({}))["temperature"], 0.6);
        assert_eq!(filled(model, json!({"top_k": -1})).get("top_k"), None);
        let greedy = json!({"do_sample": false});
        assert_eq!(filled(greedy, json!({})), json!({"temperature": 0.0}));
        let off = json!({"top_k": 0, "top_p": 1.0, "repetition_penalty": 0.0, "temperature": -1.0});
        assert_eq!(filled(off, json!({})), json!({"temperature": 1.0}));
    }

    #[test]
    fn limits_that_mistralrs_would_pass_over_are_said_otherwise() {
        let said = |request: Value| {
            let mut body = fields(request);
            keep_to_mistralrs(&mut body);
            Value::Object(body)
        };
        let almost_one = json!(1.0 - f32::EPSILON);
        for (request, expected) in [
            (json!({"top_p": 0, "min_p": 0.1}), json!({"top_k": 1})),
            (json!({"min_p": 1, "top_k": 5}), json!({"top_k": 1})),
            (
                json!({"min_p": 0.1}),
                json!({"min_p": 0.1, "top_p": almost_one}),
            ),
            (
                json!({"min_p": 0.1, "top_p": 1}),
                json!({"min_p": 0.1, "top_p": almost_one}),
            ),
            (
                json!({"min_p": 0.1, "top_p": 0.5}),
                json!({"min_p": 0.1, "top_p": 0.5}),
            ),
            (
                json!({"min_p": 0, "top_p": 1, "top_k": 3}),
                json!({"min_p": 0, "top_p": 1, "top_k": 3}),
            ),
        ] {
            assert_eq!(said(request), expected);
        }
    }

    #[test]
    fn a_seed_takes_over_sampling_and_is_not_needed_for_greedy_answers() {
        let mut greedy = fields(json!({"seed": 1, "temperature": 0, "top_p": 0.5}));
        assert_eq!(seeded(&mut greedy).expect("sound"), None);
        assert!(!greedy.contains_key("seed") && greedy.contains_key("top_p"));

        let mut body = fields(json!({"seed": -1, "temperature": 0.5, "top_p": 0.5, "top_k": 3}));
        let draw = seeded(&mut body).expect("sound").expect("a draw");
        assert_eq!((draw.seed, draw.temperature), (u64::MAX, 0.5));
        assert_eq!((draw.top_k, draw.top_p), (Some(3), Some(0.5)));
        assert_eq!(Value::Object(body), json!({"temperature": 0.0}));

        for wrong in [json!({"seed": "x"}), json!({"seed": 1.5})] {
            assert!(seeded(&mut fields(wrong)).is_err());
        }
    }
}
