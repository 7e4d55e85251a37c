//! `eval --per-row`: the losses and predictions of each predictor for every row.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use monteclora_converters::Error;
use serde_json::{Map, Value, json};

use super::Subject;
use crate::data::Dataset;
use crate::eval::{ChoiceRows, Prediction, entropies};
use crate::output::write_named;

/// Writes one JSON object per row of `rows`, in order, with the losses and predictions of `subjects`.
pub(super) fn write(
    path: &Path,
    data: &Dataset,
    rows: &[usize],
    choices: &ChoiceRows,
    subjects: &[Subject],
) -> Result<()> {
    let write = |error| Error::io("write", path)(error);
    write_named(path, |file| {
        let mut with_choices = 0;
        for (at, example) in rows.iter().enumerate() {
            let set = choices.of(*example);
            let mut line = Map::from_iter([("line".to_owned(), json!(data.line(*example)))]);
            if let Some(set) = set {
                line.insert("answer".to_owned(), json!(set.answer));
            }
            for subject in subjects {
                let loss = &subject.scored.losses[at];
                let mut said = json!({"loss": loss.nll / loss.n_tokens.max(1) as f64, "tokens": loss.n_tokens});
                if set.is_some() {
                    of_choices(&mut said, &subject.scored.choices[with_choices], subject);
                }
                line.insert(subject.key.to_owned(), said);
            }
            with_choices += usize::from(set.is_some());
            serde_json::to_writer(&mut *file, &line).map_err(|e| write(e.into()))?;
            file.write_all(b"\n").map_err(write)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Adds the predictions of a subject's adapters for a row's choices.
fn of_choices(said: &mut Value, adapters: &[Prediction], subject: &Subject) {
    let Some(average) = Prediction::average(adapters) else {
        return;
    };
    said["probabilities"] = json!(average.probabilities());
    said["nll"] = json!(average.nll());
    said["confidence"] = json!(average.confidence());
    said["correct"] = json!(average.correct());
    if let Some(calibrated) = &subject.scores.calibrated {
        let tempered = average.tempered(calibrated.temperature);
        said["calibrated"] =
            json!({"probabilities": tempered.probabilities(), "confidence": tempered.confidence()});
    }
    if let (true, Some((predictive, expected))) =
        (subject.scores.draws.is_some(), entropies(adapters))
    {
        let draws: Vec<&[f64]> = adapters.iter().map(Prediction::log_probabilities).collect();
        said["draws"] = json!(draws);
        said["predictive_entropy"] = json!(predictive);
        said["expected_entropy"] = json!(expected);
        said["mutual_information"] = json!((predictive - expected).max(0.0));
    }
}
