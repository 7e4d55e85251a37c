//! The posterior predictive, against plain averages over the directories that `sample` writes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use monteclora::data::{
    ChoiceSet, ChoiceTokens, Dataset, EncodeOptions, Encoder, Overlong, Remedies, TrainOn,
    parse_question,
};
use monteclora::model::{ActiveAdapter, Decoder, Sequences};
use monteclora_converters::Adapter;
use serde_json::{Value, json};

use crate::cli::{own_adapter, run, tiny};
use crate::fixtures::{named, usable, with_own};

/// A posterior whose draws differ visibly, with its base and rows to score.
struct Site {
    dir: tempfile::TempDir,
    model: PathBuf,
    decoder: Decoder,
}

impl Site {
    fn new(adapter: &Path, model: &Path, scaler: f64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("adapter");
        fs::create_dir(&copy).unwrap();
        let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["monteclora_config"]["sample_scaler"] = json!(scaler);
        fs::write(copy.join("adapter_config.json"), config.to_string()).unwrap();
        let weights = "adapter_model.safetensors";
        fs::copy(adapter.join(weights), copy.join(weights)).unwrap();
        let rows = [
            json!({"prompt": "is grass green", "completion": "yes", "choices": ["yes", "no"]}),
            json!({"prompt": "is snow red", "choices": ["yes", "no", "who can tell"], "answer": 1}),
            json!({"prompt": "say it", "completion": "once and again"}),
        ];
        let rows: String = rows.iter().map(|row| format!("{row}\n")).collect();
        fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
        Self {
            dir,
            model: model.to_owned(),
            decoder: Decoder::load(model, &Device::Cpu).unwrap(),
        }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn eval(&self, more: &[&str]) -> Value {
        let (model, adapter, rows) = (
            self.model.display().to_string(),
            self.at("adapter"),
            self.at("rows.jsonl"),
        );
        let mut arguments = vec!["eval", "-m", &model, "-a", &adapter, "--data", &rows];
        arguments.extend(more);
        arguments.push("--json");
        let found = run(&arguments);
        assert_eq!(found.code, 0, "{}", found.stderr);
        serde_json::from_str(&found.stdout).unwrap()
    }

    /// The draws that `sample` writes for `seed`.
    fn draws(&self, seed: &str, n_draws: usize) -> Vec<ActiveAdapter> {
        let output = self.at(&format!("draws-{seed}"));
        let (adapter, k) = (self.at("adapter"), n_draws.to_string());
        let sampled = run(&[
            "sample", &adapter, "-k", &k, "--seed", seed, "-o", &output, "--force",
        ]);
        assert_eq!(sampled.code, 0, "{}", sampled.stderr);
        (0..n_draws)
            .map(|index| {
                let draw = Path::new(&output).join(format!("draw-{index:04}"));
                let draw = Adapter::read(&draw).unwrap();
                ActiveAdapter::from_adapter(&draw, self.decoder.config(), &Device::Cpu).unwrap()
            })
            .collect()
    }

    /// `[token]`: the probabilities of what follows each token.
    fn probabilities(&self, tokens: &[u32], adapter: &ActiveAdapter) -> Vec<Vec<f64>> {
        let logits = self.decoder.logits(&Sequences::new(&[tokens]), adapter);
        let rows = logits.unwrap().to_vec2::<f32>().unwrap();
        rows.into_iter()
            .map(|row| {
                let powers: Vec<f64> = row.iter().map(|v| f64::from(*v).exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.into_iter().map(|power| power / sum).collect()
            })
            .collect()
    }

    /// The distribution over the choices of a row.
    fn choices(&self, set: &ChoiceSet, adapter: &ActiveAdapter) -> Vec<f64> {
        let likelihood = |choice: &ChoiceTokens| -> f64 {
            let p = self.probabilities(&choice.tokens, adapter);
            (choice.n_prompt..choice.tokens.len())
                .map(|position| p[position - 1][choice.tokens[position] as usize])
                .product()
        };
        let likelihoods: Vec<f64> = set.choices.iter().map(likelihood).collect();
        let sum: f64 = likelihoods.iter().sum();
        likelihoods.into_iter().map(|l| l / sum).collect()
    }

    /// The greedy answer and whether a stop token ended it, one whole pass a token.
    fn greedy(&self, prompt: &[u32], adapter: &ActiveAdapter, most: usize) -> (Vec<u32>, bool) {
        let encoder = self.encoder();
        let stops = encoder.stop_ids();
        let mut tokens = prompt.to_vec();
        while tokens.len() < prompt.len() + most {
            let p = self.probabilities(&tokens, adapter).pop().unwrap();
            let best = (0..p.len()).max_by(|a, b| p[*a].total_cmp(&p[*b])).unwrap() as u32;
            if stops.contains(&best) {
                return (tokens[prompt.len()..].to_vec(), true);
            }
            tokens.push(best);
        }
        (tokens[prompt.len()..].to_vec(), false)
    }

    fn predict(&self, more: &[&str]) -> Value {
        let (model, adapter) = (self.model.display().to_string(), self.at("adapter"));
        let mut arguments = vec!["predict", "-m", &model, "-a", &adapter, "--max-tokens", "6"];
        arguments.extend(more);
        arguments.push("--json");
        let found = run(&arguments);
        assert_eq!(found.code, 0, "{}", found.stderr);
        serde_json::from_str::<Value>(&found.stdout).unwrap()["answers"].clone()
    }

    fn encoder(&self) -> Arc<Encoder> {
        let options = EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template: true,
            max_seq_length: 256,
            overlong: Overlong::Error,
            remedies: Remedies::Keys,
        };
        Encoder::from_dir(&self.model, None, options).unwrap()
    }
}

fn average(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

fn close(found: &Value, expected: f64, what: &str) {
    let found = found.as_f64().unwrap_or_else(|| panic!("{what}: {found}"));
    assert!(
        (found - expected).abs() < 1e-4 * (1.0 + expected.abs()),
        "{what}: {found} {expected}"
    );
}

/// Bases and adapters with a posterior that our decoder runs.
fn posteriors() -> Vec<(PathBuf, PathBuf)> {
    let cases = usable().into_iter().filter(|case| {
        Adapter::read(&case.dir).is_ok_and(|adapter| adapter.sites[0].posterior.is_some())
            && Decoder::load(&case.model, &Device::Cpu).is_ok()
    });
    let cases = with_own(cases.collect(), &["monteclora"]).into_iter();
    cases.map(|case| (case.dir, case.model)).collect()
}

/// The adapter of a test that says what its draws do.
fn own_posterior() -> (PathBuf, PathBuf) {
    let case = named("monteclora");
    (case.dir, case.model)
}

#[test]
fn eval_averages_the_probabilities_of_the_draws() {
    for (adapter, model) in posteriors() {
        let site = Site::new(&adapter, &model, 0.2);
        let draws = site.draws("9", 3);
        let found = site.eval(&["--posterior-samples", "3", "--seed", "9"]);
        let scores = &found["posterior"];
        assert_eq!(scores["draws"], 3);
        assert!(found["mean"].get("draws").is_none());
        let encoder = site.encoder();
        let rows = Path::new(&site.at("rows.jsonl")).to_owned();
        let data = Dataset::open(&rows, None, encoder.clone()).unwrap();

        let (mut loss, mut right, mut n_tokens) = (0.0, 0, 0);
        for example in 0..data.len() {
            let example = data.example(example).unwrap();
            let tokens = &example.input_ids;
            let of_draws: Vec<_> = draws
                .iter()
                .map(|draw| site.probabilities(tokens, draw))
                .collect();
            for position in (1..tokens.len()).filter(|position| example.loss_mask[*position]) {
                let p: Vec<f64> = (0..of_draws[0][0].len())
                    .map(|token| average(of_draws.iter().map(|draw| draw[position - 1][token])))
                    .collect();
                let label = tokens[position] as usize;
                loss -= p[label].ln();
                right += usize::from(p.iter().all(|other| *other <= p[label]));
                n_tokens += 1;
            }
        }
        close(&scores["loss"], loss / f64::from(n_tokens), "loss");
        let accuracy = right as f64 / f64::from(n_tokens);
        close(&scores["token_accuracy"], accuracy, "token accuracy");

        let (mut nll, mut brier, mut n_rows) = (0.0, 0.0, 0.0);
        for row in 0..data.len() {
            let Some(set) = encoder.choice_tokens(&data.row(row).unwrap().1).unwrap() else {
                continue;
            };
            let of_draws: Vec<_> = draws.iter().map(|draw| site.choices(&set, draw)).collect();
            let p: Vec<f64> = (0..set.choices.len())
                .map(|choice| average(of_draws.iter().map(|draw| draw[choice])))
                .collect();
            nll -= p[set.answer].ln();
            for (choice, p) in p.iter().enumerate() {
                brier += (p - f64::from(u8::from(choice == set.answer))).powi(2);
            }
            n_rows += 1.0;
        }
        close(&scores["nll"], nll / n_rows, "NLL");
        close(&scores["brier"], brier / n_rows, "Brier");
    }
}

#[test]
fn the_average_over_draws_is_not_the_mean() {
    let (adapter, model) = own_posterior();
    let found = Site::new(&adapter, &model, 0.2).eval(&["--posterior-samples", "3", "--seed", "9"]);
    let loss = |of: &str| found[of]["loss"].as_f64().unwrap();
    let away = (loss("mean") - loss("posterior")).abs();
    assert!(away > 1e-4, "the draws say what the mean says: {away}");
}

#[test]
fn draws_without_noise_are_the_mean_and_a_seed_repeats() {
    let (adapter, model) = &own_posterior();
    let still = Site::new(adapter, model, 0.0).eval(&["--posterior-samples", "4"]);
    for key in ["loss", "token_accuracy", "accuracy", "nll", "brier"] {
        close(
            &still["posterior"][key],
            still["mean"][key].as_f64().unwrap(),
            key,
        );
    }
    let site = Site::new(adapter, model, 0.2);
    let draws =
        |seed| site.eval(&["--posterior-samples", "2", "--seed", seed])["posterior"].clone();
    assert_eq!(draws("1"), draws("1"));
    assert_ne!(draws("1"), draws("2"));
    // The default seed is that of `sample`.
    let unsaid = site.eval(&["--posterior-samples", "2"]);
    assert_eq!(unsaid["posterior"], draws("42"));
    let none = site.eval(&["--posterior-samples", "0"]);
    assert!(none.get("posterior").is_none());
}

#[test]
fn what_has_no_posterior_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    fs::write(&rows, "{\"prompt\": \"a\", \"completion\": \"b\"}\n").unwrap();
    let (model, rows, plain) = (
        tiny(),
        rows.display().to_string(),
        own_adapter("plain-lora"),
    );
    let eval = ["eval", "-m", &model, "--data", &rows];
    let draws = ["--posterior-samples", "2"];
    let without = run(&[&eval[..], &draws].concat());
    assert_eq!(without.code, 2, "{}", without.stderr);
    assert!(without.stderr.contains("--adapter"), "{}", without.stderr);
    let found = run(&[&eval[..], &draws, &["-a", &plain]].concat());
    assert_eq!(found.code, 4, "{}", found.stderr);
    assert!(found.stderr.contains("posterior"), "{}", found.stderr);
    let many = ["--posterior-samples", "100000", "-a", &plain];
    assert_eq!(run(&[&eval[..], &many].concat()).code, 2);
}

fn entropy(p: &[f64]) -> f64 {
    -p.iter()
        .filter(|p| **p > 0.0)
        .map(|p| p * p.ln())
        .sum::<f64>()
}

/// `(H(mean), mean of H)` of several distributions.
fn entropies(of_draws: &[&[f64]]) -> (f64, f64) {
    let mean: Vec<f64> = (0..of_draws[0].len())
        .map(|idx| average(of_draws.iter().map(|draw| draw[idx])))
        .collect();
    (
        entropy(&mean),
        average(of_draws.iter().map(|draw| entropy(draw))),
    )
}

#[test]
fn predict_says_what_the_draws_say() {
    let rows = [
        json!({"prompt": "is grass green", "choices": ["yes", "no", "who can tell"]}),
        json!({"prompt": "say it"}),
        json!({"messages": [{"role": "user", "content": "and again"}]}),
    ];
    for (adapter, model) in posteriors() {
        let site = Site::new(&adapter, &model, 0.2);
        let path = site.at("questions.jsonl");
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        fs::write(&path, lines).unwrap();
        let draws = site.draws("9", 3);
        let asked = ["--data", &path, "--posterior-samples", "3", "--seed", "9"];
        let answers = site.predict(&asked);
        assert_eq!(answers.as_array().unwrap().len(), 3);
        let encoder = site.encoder();
        let mean = Adapter::read(Path::new(&site.at("adapter"))).unwrap();
        let mean = ActiveAdapter::from_adapter(&mean, site.decoder.config(), &Device::Cpu).unwrap();
        for (row, answer) in rows.iter().zip(answers.as_array().unwrap()) {
            let uncertainty = &answer["uncertainty"];
            assert_eq!(uncertainty["draws"], 3);
            let row = parse_question(row.to_string().as_bytes()).unwrap();
            let (predictive, expected, n_agreeing) = match encoder.choice_tokens(&row).unwrap() {
                Some(set) => {
                    let of_draws: Vec<_> =
                        draws.iter().map(|draw| site.choices(&set, draw)).collect();
                    let found = answer["choices"].as_array().unwrap();
                    let mut best = 0;
                    for (idx, choice) in found.iter().enumerate() {
                        let p = average(of_draws.iter().map(|draw| draw[idx]));
                        let away = of_draws.iter().map(|draw| (draw[idx] - p).powi(2));
                        close(&choice["probability"], p, "probability");
                        close(&choice["std"], average(away).sqrt(), "std");
                        if choice["probability"].as_f64() > found[best]["probability"].as_f64() {
                            best = idx;
                        }
                    }
                    assert_eq!(answer["text"], found[best]["text"]);
                    let agrees = |draw: &&Vec<f64>| draw.iter().all(|p| *p <= draw[best]);
                    let slices: Vec<&[f64]> = of_draws.iter().map(Vec::as_slice).collect();
                    let (predictive, expected) = entropies(&slices);
                    (predictive, expected, of_draws.iter().filter(agrees).count())
                }
                None => {
                    assert!(answer.get("choices").is_none());
                    let prompt = encoder.row_prompt(&row).unwrap();
                    let (tokens, stopped) = site.greedy(&prompt, &mean, 6);
                    let text = encoder.tokenizer().decode(&tokens, true).unwrap();
                    assert_eq!(answer["text"], text.as_str());
                    let whole = [prompt.as_slice(), &tokens].concat();
                    let of_draws: Vec<_> = draws
                        .iter()
                        .map(|draw| site.probabilities(&whole, draw))
                        .collect();
                    let n_steps = tokens.len() + usize::from(stopped);
                    let steps = (prompt.len() - 1..prompt.len() - 1 + n_steps).map(|position| {
                        let slices: Vec<&[f64]> =
                            of_draws.iter().map(|draw| &*draw[position]).collect();
                        entropies(&slices)
                    });
                    let steps: Vec<_> = steps.collect();
                    let agrees = |draw: &&ActiveAdapter| {
                        site.greedy(&prompt, draw, 6) == (tokens.clone(), stopped)
                    };
                    (
                        average(steps.iter().map(|step| step.0)),
                        average(steps.iter().map(|step| step.1)),
                        draws.iter().filter(agrees).count(),
                    )
                }
            };
            close(
                &uncertainty["predictive_entropy"],
                predictive,
                "predictive entropy",
            );
            close(
                &uncertainty["expected_entropy"],
                expected,
                "expected entropy",
            );
            let between = &uncertainty["mutual_information"];
            close(between, predictive - expected, "mutual information");
            close(
                &uncertainty["agreement"],
                n_agreeing as f64 / 3.0,
                "agreement",
            );
        }
    }
}

#[test]
fn draws_that_disagree_are_told() {
    let (adapter, model) = own_posterior();
    let site = Site::new(&adapter, &model, 0.2);
    let rows = site.at("rows.jsonl");
    let answers = site.predict(&["--data", &rows, "--posterior-samples", "3", "--seed", "9"]);
    for answer in answers.as_array().unwrap() {
        let between = &answer["uncertainty"]["mutual_information"];
        assert!(between.as_f64().unwrap() > 1e-6, "{answer}");
    }
}

#[test]
fn one_draw_or_none_knows_nothing_of_disagreement() {
    let (adapter, model) = &own_posterior();
    let site = Site::new(adapter, model, 0.2);
    let rows = site.at("rows.jsonl");
    let number = |value: &Value| value.as_f64().unwrap();
    let one = site.predict(&["--data", &rows, "--posterior-samples", "1"]);
    for answer in one.as_array().unwrap() {
        let found = &answer["uncertainty"];
        assert!(number(&found["mutual_information"]) < 1e-5, "{found}");
        assert!([0.0, 1.0].contains(&number(&found["agreement"])), "{found}");
        for choice in answer["choices"].as_array().into_iter().flatten() {
            assert_eq!(choice["std"], 0.0);
        }
    }
    let still = Site::new(adapter, model, 0.0);
    let rows = still.at("rows.jsonl");
    let still = still.predict(&["--data", &rows, "--posterior-samples", "3"]);
    let plain = site.predict(&["--data", &rows]);
    for (answer, plain) in still
        .as_array()
        .unwrap()
        .iter()
        .zip(plain.as_array().unwrap())
    {
        assert_eq!(answer["text"], plain["text"]);
        assert_eq!(answer["uncertainty"]["agreement"], 1.0);
        assert!(number(&answer["uncertainty"]["mutual_information"]) < 1e-5);
        assert!(plain.get("uncertainty").is_none());
    }
    let prompt = site.predict(&["--prompt", "say it"]);
    assert_eq!(prompt[0]["text"], plain[2]["text"]);
}

#[test]
fn what_cannot_be_predicted_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    fs::write(
        &rows,
        "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n{\"prompt\": 3}\n",
    )
    .unwrap();
    let (model, rows) = (tiny(), rows.display().to_string());
    let predict = |more: &[&str]| run(&[&["predict", "-m", &model], more].concat());
    let bad = predict(&["--data", &rows]);
    assert_eq!(bad.code, 3, "{}", bad.stderr);
    for line in ["rows.jsonl:2: ", "rows.jsonl:3: prompt"] {
        assert!(bad.stderr.contains(line), "{}", bad.stderr);
    }
    assert_eq!(predict(&[]).code, 2);
    assert_eq!(predict(&["--prompt", "a", "--data", &rows]).code, 2);
    assert_eq!(
        predict(&["--prompt", "a", "--posterior-samples", "2"]).code,
        2
    );
    assert_eq!(predict(&["--prompt", "a", "--max-tokens", "0"]).code, 2);
    let long = predict(&["--prompt", "a", "--max-tokens", "100000"]);
    assert_eq!(long.code, 2);
    assert!(
        long.stderr.contains("lower --max-tokens"),
        "{}",
        long.stderr
    );
    let plain = own_adapter("plain-lora");
    let plain = predict(&["--prompt", "a", "-a", &plain, "--posterior-samples", "2"]);
    assert_eq!(plain.code, 4, "{}", plain.stderr);
    let base = predict(&["--prompt", "a", "--max-tokens", "3"]);
    assert_eq!(base.code, 0, "{}", base.stderr);
}
