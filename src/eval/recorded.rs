//! Scores that scikit-learn and scipy computed, for tests.

use std::path::Path;

use serde_json::Value;

use super::Prediction;

/// Predictions and their recorded scores.
pub(super) struct Recorded {
    pub(super) name: String,
    pub(super) predictions: Vec<Prediction>,
    expected: Value,
}

/// The file of `tests/reference/make_calibration.py`.
pub(super) fn file() -> Value {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/calibration/calibration.json");
    let text = std::fs::read_to_string(path).expect("readable");
    serde_json::from_str(&text).expect("JSON")
}

/// Every case.
pub(super) fn cases() -> Vec<Recorded> {
    let file = file();
    let cases: Vec<Recorded> = file["cases"]
        .as_array()
        .expect("cases")
        .iter()
        .map(read)
        .collect();
    assert!(!cases.is_empty(), "no recorded case");
    cases
}

pub(super) fn numbers(list: &Value) -> Vec<f64> {
    let list = list.as_array().expect("a list").iter();
    list.map(|v| v.as_f64().expect("a number")).collect()
}

fn read(case: &Value) -> Recorded {
    let rows = case["log_scores"].as_array().expect("rows").iter();
    let answers = case["answers"].as_array().expect("answers").iter();
    let predictions = rows.zip(answers).map(|(scores, answer)| {
        let answer = answer.as_u64().expect("an index") as usize;
        Prediction::from_log_scores(&numbers(scores), answer).expect("finite")
    });
    Recorded {
        name: case["name"].as_str().expect("a name").to_owned(),
        predictions: predictions.collect(),
        expected: case["expected"].clone(),
    }
}

impl Recorded {
    /// The recorded score, `None` if it is undefined.
    pub(super) fn expected(&self, key: &str) -> Option<f64> {
        self.expected[key].as_f64()
    }

    pub(super) fn assert_close(&self, key: &str, found: Option<f64>, tolerance: f64) {
        let (name, expected) = (&self.name, self.expected(key));
        match (found, expected) {
            (None, None) => {}
            (Some(found), Some(expected)) => assert!(
                (found - expected).abs() <= tolerance * expected.abs().max(1.0),
                "{name}: {key}: {found} against {expected}"
            ),
            _ => panic!("{name}: {key}: {found:?} against {expected:?}"),
        }
    }
}
