//! `POST /v1/monteclora/score`: what the server says of its answers, against what `predict` says of them.

mod copies;
mod deployment;
mod draws;
mod router;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

use crate::cli::{copy, json as output, ok, own_adapter, run, text, tiny};
use crate::runtime::{Server, serve};

/// A directory with adapters, one that has a posterior and one that has none, and what serves them.
struct Site {
    dir: tempfile::TempDir,
    client: Client,
}

const POSTERIOR: &str = "monteclora";
const PLAIN: &str = "plain";

impl Site {
    fn new() -> Self {
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
            client: crate::fixtures::client(),
        };
        std::fs::create_dir(site.at("adapters")).unwrap();
        copy(Path::new(&own_adapter(POSTERIOR)), &site.adapter(POSTERIOR));
        let plain = site.adapter(PLAIN);
        ok(&["collapse", &own_adapter("all-linear"), "-o", text(&plain)]);
        site
    }

    fn adapter(&self, name: &str) -> PathBuf {
        self.dir.path().join("adapters").join(name)
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Starts a server with `uncertainty` in that section.
    fn serve(&self, first: &str, uncertainty: &str) -> Server {
        self.serve_draws(first, uncertainty, 0)
    }

    /// As [`Self::serve`], with `draws` of the posterior as models of their own.
    fn serve_draws(&self, first: &str, uncertainty: &str, draws: usize) -> Server {
        self.configure(first, uncertainty, draws);
        serve(&["-c", &self.at("serve.toml")])
    }

    /// Writes serve.toml.
    fn configure(&self, first: &str, uncertainty: &str, draws: usize) {
        let mut toml = format!(
            "[admin]\nenabled = true\nadapter_root = 'adapters'\n{first}\n[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\n[models.uncertainty]\n{uncertainty}\n",
            tiny()
        );
        for (name, draws) in [(POSTERIOR, draws), (PLAIN, 0)] {
            toml.push_str(&format!(
                "[[models.adapters]]\nalias = '{name}'\nsource = 'adapters/{name}'\ndraws = {draws}\n"
            ));
        }
        std::fs::write(self.at("serve.toml"), toml).unwrap();
    }

    fn metric(&self, server: &Server, name: &str) -> Option<u64> {
        let answer = self.client.get(format!("{}/metrics", server.url)).send();
        let text = answer.unwrap().text().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    }

    fn post(&self, server: &Server, path: &str, body: &Value) -> Response {
        let request = self.client.post(format!("{}{path}", server.url));
        request.json(body).send().unwrap()
    }

    fn score(&self, server: &Server, body: &Value) -> Value {
        let response = self.post(server, "/v1/monteclora/score", body);
        let (status, answer) = (response.status(), response.json::<Value>().unwrap());
        assert_eq!(status, 200, "{body}: {answer}");
        answer
    }

    /// Key and message of a request that is refused.
    fn refused(&self, server: &Server, body: &Value) -> (String, String) {
        let response = self.post(server, "/v1/monteclora/score", body);
        let (status, answer) = (response.status(), response.json::<Value>().unwrap());
        assert_eq!(status, 400, "{body}: {answer}");
        let text = |key: &str| answer["error"][key].as_str().unwrap_or_default().to_owned();
        (text("param"), text("message"))
    }

    /// Calibrates an adapter on 24 rows with two choices.
    fn calibrate(&self, adapter: &str, more: &[&str]) {
        let row = |at: usize| {
            let question = format!("is thing {at} green");
            json!({"prompt": question, "choices": ["yes", "no"], "answer": at / 2 % 2})
        };
        let rows: String = (0..24).map(|at| format!("{}\n", row(at))).collect();
        std::fs::write(self.at("rows.jsonl"), rows).unwrap();
        let (base, adapter, rows) = (tiny(), self.adapter(adapter), self.at("rows.jsonl"));
        let first = [
            "calibrate",
            "-m",
            &base,
            "-a",
            text(&adapter),
            "--data",
            &rows,
        ];
        ok(&[&first, more].concat());
    }

    /// Writes a threshold into an adapter's calibration, as `calibrate` does.
    fn set_threshold(&self, adapter: &str, threshold: f64) {
        let path = self.adapter(adapter).join("calibration.json");
        let mut found: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        found["posterior_scaling"]["abstention"] = json!({"target_error": 0.1, "threshold": threshold, "least_bound": 0.05,
            "chosen_on": 12, "checked_on": 12, "answered": 0.5, "error": 0.0, "error_bound": 0.1});
        std::fs::write(&path, found.to_string()).unwrap();
    }

    fn predict(&self, adapter: &str, more: &[&str]) -> Value {
        let (base, adapter) = (tiny(), self.adapter(adapter));
        let first = ["predict", "-m", &base, "-a", text(&adapter)];
        output(&[&first, more].concat())["answers"][0].clone()
    }
}

/// Both say the same of an answer; what only one of them tells is left out.
fn agree(score: &Value, predicted: &Value) {
    assert_eq!(score["answer"], predicted["text"], "{score} {predicted}");
    for key in ["p_correct", "calibrated"] {
        assert_eq!(score[key], predicted[key], "{key}: {score} {predicted}");
    }
    for key in [
        "draws",
        "predictive_entropy",
        "expected_entropy",
        "mutual_information",
        "agreement",
    ] {
        assert_eq!(
            score["uncertainty"][key], predicted["uncertainty"][key],
            "{key}"
        );
    }
    let choices = |of: &Value| of["choices"].as_array().cloned().unwrap_or_default();
    assert_eq!(choices(score).len(), choices(predicted).len());
    for (score, predicted) in choices(score).iter().zip(choices(predicted)) {
        for key in ["text", "probability", "std"] {
            assert_eq!(
                score.get(key).filter(|v| !v.is_null()),
                predicted.get(key),
                "{key}"
            );
        }
    }
}

const QUESTION: &str = "is the sky green";

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": QUESTION}]})
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

/// Choices and answers, conversations and texts, with and without draws, of other seeds: the numbers of `predict`, to the bit.
#[test]
fn scores_are_those_of_predict() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 4");
    let choices = json!({"choices": ["yes", "no", "who can tell"]});
    let asked = ["--prompt", QUESTION];
    let chosen = ["--choices", "yes", "no", "who can tell"];
    let short = ["--max-tokens", "6"];
    let mut compared = 0;
    for (model, draws) in [
        (POSTERIOR, &["--posterior-samples", "4"][..]),
        (POSTERIOR, &["--posterior-samples", "3", "--seed", "7"]),
        (POSTERIOR, &[]),
        (PLAIN, &[]),
    ] {
        let said = match draws {
            [_, n, rest @ ..] => {
                let mut said = json!({"draws": n.parse::<u64>().unwrap()});
                if let [_, seed] = rest {
                    said["seed"] = json!(seed.parse::<u64>().unwrap());
                }
                said
            }
            _ => json!({"draws": 0}),
        };
        for as_text in [false, true] {
            let body = match as_text {
                true => json!({"model": model, "prompt": QUESTION}),
                false => chat(model),
            };
            let plain: &[&str] = if as_text {
                &["--no-chat-template"]
            } else {
                &[]
            };
            let body = with(body, said.clone());
            let of_choices = site.score(&server, &with(body.clone(), choices.clone()));
            let arguments = [&asked[..], &chosen, draws, plain].concat();
            agree(&of_choices, &site.predict(model, &arguments));
            let open = site.score(&server, &with(body, json!({"max_tokens": 6})));
            agree(
                &open,
                &site.predict(model, &[&asked[..], &short, draws, plain].concat()),
            );
            assert_eq!(
                open["usage"]["prompt_tokens"],
                of_choices["usage"]["prompt_tokens"]
            );
            compared += 2;
        }
    }
    assert_eq!(compared, 16);
    // Without a word about draws all that are held are asked, and their spread is told.
    let answer = site.score(&server, &with(chat(POSTERIOR), choices));
    assert_eq!(answer["uncertainty"]["draws"], 4);
    for choice in answer["choices"].as_array().unwrap() {
        let number = |key: &str| choice[key].as_f64().unwrap();
        assert!(
            number("q05") < number("q95") && number("std") > 0.0,
            "{choice}"
        );
        assert!((number("q05")..=number("q95")).contains(&number("probability")));
    }
    // The base is a model, too.
    let base = site.score(
        &server,
        &with(chat("base"), json!({"choices": ["yes", "no"]})),
    );
    assert_eq!(
        (&base["uncertainty"], &base["calibration"]),
        (&Value::Null, &Value::Null)
    );
}

/// The calibration beside an adapter is applied where it holds, with its threshold, and no generation is mixed with another.
#[test]
fn calibrations_are_applied_and_swapped_with_their_adapter() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 4");
    let body = with(chat(POSTERIOR), json!({"choices": ["yes", "no"]}));
    let before = site.score(&server, &body);
    assert_eq!(before["calibrated"], false);
    let (_, message) = site.refused(&server, &with(body.clone(), json!({"target_error": 0.1})));
    assert!(
        message.contains("monteclora calibrate --target-error 0.1"),
        "{message}"
    );

    let draws = ["--posterior-samples", "3", "--seed", "5"];
    site.calibrate(POSTERIOR, &draws);
    let load = json!({"lora_name": POSTERIOR, "lora_path": POSTERIOR, "load_inplace": true});
    let loaded: Value = site
        .post(&server, "/v1/load_lora_adapter", &load)
        .json()
        .unwrap();
    let after = site.score(&server, &body);
    // The mean is the same, and yet it is another generation: its scores are others.
    assert_ne!(after["generation"], before["generation"]);
    assert_eq!(after["generation"], loaded["generation"]);
    let asked = ["--prompt", QUESTION, "--choices", "yes", "no"];
    agree(
        &after,
        &site.predict(POSTERIOR, &[&asked[..], &draws].concat()),
    );
    assert_eq!(
        (&after["calibrated"], &after["uncertainty"]["seed"]),
        (&json!(true), &json!(5))
    );
    assert_eq!(after["calibration"]["rows"], 24);
    assert_eq!(after["abstain"], Value::Null);
    // Of rows without a system message it says nothing of questions with one, and says so.
    let mut other = body.clone();
    other["messages"] =
        json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]);
    let other = site.score(&server, &other);
    assert_eq!(
        (&other["calibrated"], &other["calibration"]),
        (&json!(false), &Value::Null)
    );
    assert!(
        other["calibration_not_used"]
            .as_str()
            .unwrap()
            .contains("system message"),
        "{other}"
    );
    assert_eq!(after["calibration_not_used"], Value::Null);
    // What asks for what is done anyway is understood, and what the template does not read changes nothing.
    let done = with(body.clone(), json!({"stream": false, "temperature": 0}));
    assert_eq!(site.score(&server, &done), after);
    let thinking = with(body.clone(), json!({"enable_thinking": false}));
    assert_eq!(site.score(&server, &thinking), after);
    // Of other draws, or of a text without the template, it says nothing.
    for other in [
        json!({"draws": 2}),
        json!({"seed": 6}),
        json!({"length_normalised": true}),
    ] {
        let answer = site.score(&server, &with(body.clone(), other));
        assert_eq!(
            (&answer["calibrated"], &answer["calibration"]),
            (&json!(false), &Value::Null)
        );
    }
    let plain = json!({"model": POSTERIOR, "prompt": QUESTION, "choices": ["yes", "no"]});
    assert_eq!(site.score(&server, &plain)["calibrated"], false);

    // The remedy that was named.
    let (_, message) = site.refused(&server, &with(body.clone(), json!({"target_error": 0.98})));
    assert!(
        message.contains("monteclora calibrate --target-error 0.98"),
        "{message}"
    );
    site.calibrate(
        POSTERIOR,
        &[&draws[..], &["--target-error", "0.98"]].concat(),
    );
    site.post(&server, "/v1/load_lora_adapter", &load);
    let answer = site.score(&server, &with(body.clone(), json!({"target_error": 0.98})));
    assert!(answer["abstain"].is_boolean(), "{answer}");

    // A threshold, as `calibrate` writes it.
    let threshold = after["p_correct"].as_f64().unwrap() + 1e-6;
    site.set_threshold(POSTERIOR, threshold);
    site.post(&server, "/v1/load_lora_adapter", &load);
    for asked in [
        json!({}),
        json!({"target_error": 0.1}),
        json!({"target_error": 0.2}),
    ] {
        let answer = site.score(&server, &with(body.clone(), asked));
        assert_eq!(answer["abstain"], true, "{answer}");
        assert_eq!(answer["calibration"]["threshold"], json!(threshold));
    }
    let (key, message) = site.refused(&server, &with(body, json!({"target_error": 0.05})));
    assert!(
        key == "target_error" && message.contains("0.1"),
        "{message}"
    );
}

/// An answer that is cut is not one that anybody can be sure of.
#[test]
fn an_answer_that_is_cut_is_not_calibrated_and_not_given() {
    let site = Site::new();
    let adapter = site.adapter(POSTERIOR);
    let rows: String = (0..12)
        .map(|at| {
            format!(
                "{}\n",
                json!({"prompt": format!("is thing {at} green"), "completion": "yes"})
            )
        })
        .collect();
    std::fs::write(site.at("rows.jsonl"), rows).unwrap();
    let rows = site.at("rows.jsonl");
    ok(&[
        "calibrate",
        "-m",
        &tiny(),
        "-a",
        text(&adapter),
        "--data",
        &rows,
        "--posterior-samples",
        "2",
        "--max-tokens",
        "4",
    ]);
    site.set_threshold(POSTERIOR, 0.0);
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 2");
    let cut = site.score(&server, &with(chat(POSTERIOR), json!({"max_tokens": 2})));
    assert_eq!(
        (
            &cut["finish_reason"],
            &cut["calibrated"],
            &cut["abstain"],
            &cut["calibration"]
        ),
        (&json!("length"), &json!(false), &json!(true), &Value::Null),
        "{cut}"
    );
    assert!(
        cut["calibration_not_used"]
            .as_str()
            .unwrap()
            .contains("cut"),
        "{cut}"
    );
    let asked = [
        "--prompt",
        QUESTION,
        "--max-tokens",
        "2",
        "--posterior-samples",
        "2",
    ];
    let predicted = site.predict(POSTERIOR, &asked);
    agree(&cut, &predicted);
    assert_eq!(predicted["truncated"], true);
    // Under another system message the calibration says nothing.
    let (base, adapter) = (tiny(), site.adapter(POSTERIOR));
    let asked = [
        "predict",
        "-m",
        &base,
        "-a",
        text(&adapter),
        "--prompt",
        QUESTION,
        "--max-tokens",
        "2",
        "--posterior-samples",
        "2",
        "--abstain",
    ];
    let other = run(&[&asked[..], &["--system", "Be brief."]].concat());
    assert_eq!(other.code, 2, "{}", other.stderr);
    assert!(
        other.stderr.contains("another system message"),
        "{}",
        other.stderr
    );
    // The remedy that was named: ask as the rows did.
    let same = ok(&asked);
    assert!(same.stdout.contains("(no answer)"), "{}", same.stdout);
}

/// Who asks for what cannot be given hears which key it is, and why.
#[test]
fn requests_that_cannot_be_scored_name_their_key() {
    let site = Site::new();
    let server = site.serve(
        "[limits]\nmax_completion_tokens = 50\nmax_prompt_tokens = 100",
        "enabled = true\ndraws = 2",
    );
    let choices = json!(["yes", "no"]);
    for (key, body) in [
        ("draws", with(chat(POSTERIOR), json!({"draws": 3}))),
        ("draws", with(chat(PLAIN), json!({"draws": 1}))),
        ("seed", with(chat(PLAIN), json!({"seed": 1}))),
        ("draws", with(chat(PLAIN), json!({"draws": -1}))),
        ("choices", with(chat(PLAIN), json!({"choices": []}))),
        ("choices", with(chat(PLAIN), json!({"choices": ["yes"]}))),
        (
            "choices[0]",
            with(chat(PLAIN), json!({"choices": ["", "yes"]})),
        ),
        ("stream", with(chat(PLAIN), json!({"stream": true}))),
        (
            "temperature",
            with(chat(PLAIN), json!({"temperature": 0.5})),
        ),
        (
            "choices[1]",
            with(chat(PLAIN), json!({"choices": ["yes", "yes"]})),
        ),
        ("choices", with(chat(PLAIN), json!({"choices": "yes"}))),
        (
            "choices",
            with(
                chat(PLAIN),
                json!({"choices": (0..65).map(|at| at.to_string()).collect::<Vec<_>>()}),
            ),
        ),
        (
            "max_tokens",
            with(chat(PLAIN), json!({"choices": choices, "max_tokens": 5})),
        ),
        ("max_tokens", with(chat(PLAIN), json!({"max_tokens": 51}))),
        ("max_tokens", with(chat(PLAIN), json!({"max_tokens": 0}))),
        (
            "length_normalised",
            with(chat(PLAIN), json!({"length_normalised": true})),
        ),
        (
            "target_error",
            with(chat(PLAIN), json!({"target_error": 1.5})),
        ),
        ("prompt", with(chat(PLAIN), json!({"prompt": "a"}))),
        ("messages", json!({"model": PLAIN})),
        ("tools", json!({"model": PLAIN, "prompt": "a", "tools": []})),
        ("drawz", with(chat(PLAIN), json!({"drawz": 1}))),
        (
            "enable_thinking",
            json!({"model": PLAIN, "prompt": "a", "enable_thinking": false}),
        ),
        (
            "reasoning_effort",
            with(chat(PLAIN), json!({"reasoning_effort": "utmost"})),
        ),
        (
            "messages",
            json!({"model": PLAIN, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ),
        (
            "messages[0].role",
            json!({"model": PLAIN, "messages": [{"content": "a"}]}),
        ),
        (
            "prompt",
            json!({"model": PLAIN, "prompt": "word ".repeat(200)}),
        ),
        ("prompt", json!({"model": PLAIN, "prompt": ""})),
    ] {
        let (found, message) = site.refused(&server, &body);
        assert_eq!(found, key, "{body}: {message}");
        assert!(!message.contains(text(site.dir.path())), "{message}");
    }
    let unknown = site.post(&server, "/v1/monteclora/score", &chat("nobody"));
    assert_eq!(unknown.status(), 404);
    // It is off unless it is asked for, and says how to ask.
    drop(server);
    let server = site.serve("", "");
    let (key, message) = site.refused(&server, &chat(PLAIN));
    assert!(
        key == "model" && message.contains("[models.uncertainty]"),
        "{message}"
    );
}

/// What clients of chats send is understood here too: parts of a text, a developer's message, keys that are null.
#[test]
fn conversations_are_read_as_those_of_chats() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 2");
    let more = json!({"choices": ["yes", "no"], "draws": 0});
    let plain = json!({"model": PLAIN, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]});
    let parts = json!({"model": PLAIN, "user": "me", "target_error": null, "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": null, "content": [{"type": "text", "text": QUESTION}]}]});
    let [plain, parts] = [plain, parts].map(|body| site.score(&server, &with(body, more.clone())));
    assert_eq!(plain["choices"], parts["choices"]);
}

/// Who leaves is not waited for: the place is free for the next, and the score counts as canceled.
#[test]
fn a_score_that_nobody_waits_for_is_given_up() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 4");
    let impatient = Client::builder()
        .timeout(std::time::Duration::from_millis(3))
        .build()
        .unwrap();
    let body = with(chat(POSTERIOR), json!({"max_tokens": 200}));
    let metric = || {
        site.metric(&server, "monteclora_scores_total{outcome=\"canceled\"}")
            .unwrap_or(0)
    };
    for _ in 0..200 {
        let _ = impatient
            .post(format!("{}/v1/monteclora/score", server.url))
            .json(&body)
            .send();
        if metric() > 0 {
            break;
        }
    }
    assert!(metric() > 0, "no request was given up");
    let next = site.score(
        &server,
        &with(chat(POSTERIOR), json!({"choices": ["yes", "no"]})),
    );
    assert_eq!(next["uncertainty"]["draws"], 4);
}

/// Clients score and chat while the adapter changes: every score is of one generation, and nothing is lost.
#[test]
fn scores_keep_step_with_swaps() {
    let site = Site::new();
    // Adapters with one name, whose answers to the same question differ; two of them in their calibration alone.
    let server = site.serve(
        "",
        "enabled = true\ndtype = 'f32'\ndraws = 2\nmax_concurrent = 2",
    );
    let calibrated = site.adapter("calibrated");
    copy(Path::new(&own_adapter(POSTERIOR)), &calibrated);
    site.calibrate("calibrated", &["--posterior-samples", "2"]);
    const SWAPPED: [&str; 3] = [PLAIN, POSTERIOR, "calibrated"];
    let body = with(chat("moving"), json!({"choices": ["yes", "no"]}));
    let load = |path: &str| -> String {
        let load = json!({"lora_name": "moving", "lora_path": path, "load_inplace": true, "model": "base"});
        let answer: Value = site
            .post(&server, "/v1/load_lora_adapter", &load)
            .json()
            .unwrap();
        answer["generation"].as_str().unwrap().to_owned()
    };
    let mut expected = Vec::new();
    for path in SWAPPED {
        let generation = load(path);
        let score = site.score(&server, &body);
        assert_eq!(score["generation"], generation.as_str());
        expected.push((generation, score["choices"].clone()));
    }
    assert!(
        expected[0].1 != expected[1].1 && expected[1].1 != expected[2].1,
        "{expected:?}"
    );
    let stop = AtomicBool::new(false);
    let counts = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..4)
            .map(|asker| {
                let (site, server, stop, body, expected) =
                    (&site, &server, &stop, &body, &expected);
                scope.spawn(move || {
                    let mut seen = [0; SWAPPED.len()];
                    while !stop.load(Ordering::Relaxed) {
                        if asker % 2 == 1 {
                            let chat = with(chat("moving"), json!({"max_tokens": 3}));
                            assert_eq!(
                                site.post(server, "/v1/chat/completions", &chat).status(),
                                200
                            );
                            continue;
                        }
                        let score = site.score(server, body);
                        let at = expected.iter().position(|(generation, choices)| {
                            score["generation"] == generation.as_str()
                                && score["choices"] == *choices
                        });
                        seen[at.unwrap_or_else(|| panic!("mixed: {score}"))] += 1;
                    }
                    seen
                })
            })
            .collect();
        for swap in 0..12 {
            load(SWAPPED[swap % SWAPPED.len()]);
        }
        stop.store(true, Ordering::Relaxed);
        askers
            .into_iter()
            .map(|asker| asker.join().unwrap())
            .fold([0; SWAPPED.len()], |sum, seen| {
                std::array::from_fn(|at| sum[at] + seen[at])
            })
    });
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}
