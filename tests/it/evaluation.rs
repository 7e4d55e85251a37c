//! `eval` on multiple-choice rows, against the softmax of the decoder's own logits.

use std::path::Path;

use candle_core::Device;
use monteclora::cli::Cli;
use monteclora::data::{EncodeOptions, Encoder, Overlong, Remedies, TrainOn, parse_row};
use monteclora::eval::{ChoiceRows, LengthNormalisation, log_likelihoods};
use monteclora::model::{ActiveAdapter, Decoder, Sequences};
use serde_json::{Value, json};

use crate::cli::{run, tiny};
use crate::fixtures::own;

/// Choices of one token and of several, answers by completion, index and text, prompts and messages.
fn rows() -> Vec<Value> {
    vec![
        json!({"prompt": "is grass green", "completion": "yes", "choices": ["yes", "no"]}),
        json!({"prompt": "is snow red", "choices": ["yes", "no", "who can tell"], "answer": 1}),
        json!({"prompt": "what is the sky", "choices": ["blue and wide", "blue"], "answer": "blue"}),
    ]
}

fn write(path: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(path, text).unwrap();
}

fn evaluate(data: &Path, more: &[&str]) -> crate::cli::Run {
    let (model, data) = (tiny(), data.display().to_string());
    let mut arguments = vec!["eval", "-m", &model, "--data", &data, "--json"];
    arguments.extend(more);
    run(&arguments)
}

#[test]
fn choices_are_scored_by_their_likelihood_in_the_answers_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    write(&path, &rows());
    let model = own().join("models/tiny-llama");
    let options = EncodeOptions {
        train_on: TrainOn::Assistant,
        apply_chat_template: true,
        max_seq_length: 256,
        overlong: Overlong::Error,
        remedies: Remedies::Keys,
    };
    let encoder = Encoder::from_dir(&model, None, options).unwrap();
    let data = monteclora::data::Dataset::open(&path, None, encoder.clone()).unwrap();
    let decoder = Decoder::load(&model, &Device::Cpu).unwrap();
    let choices = ChoiceRows::read(&data).unwrap();
    let base = ActiveAdapter::default();
    let scores = log_likelihoods(choices.sets(), &decoder, &base).unwrap();

    let mut expected = Vec::new();
    for row in rows() {
        let (_, row) = parse_row(row.to_string().as_bytes(), None).unwrap();
        let set = encoder.choice_tokens(&row).unwrap().unwrap();
        let mut sums = Vec::new();
        for choice in &set.choices {
            let logits = decoder
                .logits(&Sequences::new(&[&choice.tokens]), &base)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap();
            let log_p = |position: usize, token: u32| {
                let row = &logits[position];
                let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
                f64::from(row[token as usize]) - sum.ln()
            };
            let sum: f64 = (choice.n_prompt..choice.tokens.len())
                .map(|position| log_p(position - 1, choice.tokens[position]))
                .sum();
            sums.push((sum, choice.tokens.len() - choice.n_prompt));
        }
        expected.push((sums, set.answer));
    }
    for (found, (expected, _)) in scores.iter().zip(&expected) {
        for (found, (expected, _)) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }

    // The command's accuracy, NLL and Brier from the same numbers.
    for (flags, per_token) in [(vec![], false), (vec!["--length-normalised"], true)] {
        let found = evaluate(&path, &flags);
        assert_eq!(found.code, 0, "{}", found.stderr);
        let found: Value = serde_json::from_str(&found.stdout).unwrap();
        assert_eq!(
            (&found["rows"], &found["choice_rows"]),
            (&json!(3), &json!(3))
        );
        assert_eq!(found["ece_bins"], 15);
        let (mut right, mut nll, mut brier) = (0.0, 0.0, 0.0);
        for (sums, answer) in &expected {
            let weights: Vec<f64> = sums
                .iter()
                .map(|(sum, n)| if per_token { sum / *n as f64 } else { *sum })
                .map(f64::exp)
                .collect();
            let total: f64 = weights.iter().sum();
            let best = (0..weights.len())
                .max_by(|a, b| weights[*a].total_cmp(&weights[*b]))
                .unwrap();
            right += f64::from(u8::from(best == *answer)) / 3.0;
            nll -= (weights[*answer] / total).ln() / 3.0;
            for (idx, weight) in weights.iter().enumerate() {
                let hit = f64::from(u8::from(idx == *answer));
                brier += (weight / total - hit).powi(2) / 3.0;
            }
        }
        for (key, expected) in [("accuracy", right), ("nll", nll), ("brier", brier)] {
            let found = found["base"][key].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-4, "{key} {found} {expected}");
        }
        let ece = found["base"]["ece"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&ece), "{ece}");
        assert!(found.get("mean").is_none());
    }
    assert_eq!(LengthNormalisation::default(), LengthNormalisation::None);
}

#[test]
fn rows_without_choices_have_no_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    write(&path, &[json!({"prompt": "a", "completion": "b"})]);
    let plain: Value = serde_json::from_str(&evaluate(&path, &[]).stdout).unwrap();
    assert_eq!(plain["choice_rows"], 0);
    for key in ["accuracy", "nll", "ece", "brier", "auroc"] {
        assert!(plain["base"].get(key).is_none(), "{key}");
    }
    let mut mixed = rows();
    mixed.push(json!({"prompt": "a", "completion": "b"}));
    write(&path, &mixed);
    let mixed: Value = serde_json::from_str(&evaluate(&path, &[]).stdout).unwrap();
    assert_eq!(
        (&mixed["rows"], &mixed["choice_rows"]),
        (&json!(4), &json!(3))
    );
}

#[test]
fn what_cannot_be_evaluated_is_refused_with_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let missing = evaluate(&path, &[]);
    assert_eq!(missing.code, 3, "{}", missing.stderr);
    write(
        &path,
        &[json!({"prompt": "a", "choices": ["b", "c"], "answer": 2})],
    );
    let wrong = evaluate(&path, &[]);
    assert_eq!(wrong.code, 3, "{}", wrong.stderr);
    assert!(
        wrong.stderr.contains("rows.jsonl:1: answer: found 2"),
        "{}",
        wrong.stderr
    );
    write(&path, &rows());
    assert_eq!(evaluate(&path, &["--ece-bins", "0"]).code, 2);
    let short = evaluate(&path, &["--max-seq-length", "10"]);
    assert_eq!(short.code, 3, "{}", short.stderr);
    assert!(
        short.stderr.contains("; raise --max-seq-length\n") && !short.stderr.contains("data."),
        "{}",
        short.stderr
    );
}

/// clap's definition holds together, and its default of `--ece-bins` is that of run.toml.
#[test]
fn the_command_line_is_sound() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}
