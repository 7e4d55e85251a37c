//! Tests of constrained answers: they end, they can be abandoned, and faults of a constraint are reported.

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::serving::{Running, chat, parse, toml_for};
use super::{Case, servable};

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let text = fs::read_to_string(path).unwrap_or_else(|_| "{}".to_owned());
    let mut value: Value = serde_json::from_str(&text).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("written");
}

/// llguidance finds an end token by its text; the model's files may name another token.
#[test]
fn an_answer_in_a_form_ends_with_stop_whatever_the_models_end_token_is() {
    let tokenizer = servable().base.join("tokenizer.json");
    let tokenizer: Value =
        serde_json::from_str(&fs::read_to_string(tokenizer).expect("readable")).expect("JSON");
    let added = tokenizer["added_tokens"].as_array().expect("a list");
    let ids: Vec<(u64, String)> = added
        .iter()
        .map(|token| {
            (
                token["id"].as_u64().expect("an id"),
                token["content"].to_string(),
            )
        })
        .collect();
    assert!(ids.len() >= 2, "{ids:?}");
    for (id, _) in &ids {
        for list in [json!(id), json!([id, ids[0].0])] {
            let (case, _copy) = servable().on_changed_base(|base| {
                edit(&base.join("generation_config.json"), |file| {
                    file["eos_token_id"] = list.clone()
                });
                edit(&base.join("tokenizer_config.json"), |file| {
                    let text = added
                        .iter()
                        .find(|token| token["id"] == *id)
                        .expect("known");
                    file["eos_token"] = text["content"].clone();
                });
            });
            let (server, _dir) = Running::start(&toml_for(&case, ""));
            let schema = json!({"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"], "additionalProperties": false});
            let format =
                json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
            for form in [
                json!({"response_format": format}),
                json!({"guided_choice": ["cat", "dog"]}),
                json!({"structured_outputs": {"regex": "[ab]{3}"}}),
            ] {
                for stream in [false, true] {
                    let mut body = chat("tuned", stream);
                    body["max_tokens"] = json!(160);
                    for (key, value) in form.as_object().expect("an object") {
                        body[key] = value.clone();
                    }
                    let response = server.post("/v1/chat/completions", &body);
                    let reason = if stream {
                        let events = super::serving::events(response);
                        let last: Value =
                            serde_json::from_str(&events[events.len() - 2]).expect("JSON");
                        last["choices"][0]["finish_reason"].clone()
                    } else {
                        parse(response, 200)["choices"][0]["finish_reason"].clone()
                    };
                    assert_eq!(reason, "stop", "{list} {form}");
                }
            }
            server.finish().expect("a clean stop");
        }
    }
}

/// In a text that may continue forever, only the client's leaving ends the answer.
#[test]
fn a_client_that_leaves_under_a_grammar_frees_the_engine() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let n_canceled = |text: &str| {
        let line = "monteclora_answers_total{outcome=\"canceled\"} ";
        let n = text.lines().find_map(|found| found.strip_prefix(line));
        n.map_or(0, |n| n.parse::<u32>().expect("a number"))
    };
    for stream in [false, true] {
        let mut body = chat("tuned", stream);
        body.as_object_mut()
            .expect("an object")
            .remove("max_tokens");
        body["guided_regex"] = json!("\"[a-z]*");
        let body = body.to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let before = n_canceled(&server.metrics_with("monteclora_requests_in_flight 0"));
        // The model is so small that an answer may be finished before its client has left.
        let left = (0..20).any(|_| {
            let clients: Vec<TcpStream> = (0..4)
                .map(|_| {
                    let mut client = TcpStream::connect(server.address).expect("accepted");
                    client.write_all(request.as_bytes()).expect("sent");
                    client
                })
                .collect();
            std::thread::sleep(Duration::from_millis(5));
            drop(clients);
            let left = Instant::now();
            let text = server.metrics_with("monteclora_requests_in_flight 0");
            assert!(
                left.elapsed() < Duration::from_secs(2),
                "{:?}",
                left.elapsed()
            );
            n_canceled(&text) > before
        });
        assert!(left, "no answer was left");
        parse(
            server.post("/v1/chat/completions", &chat("tuned", false)),
            200,
        );
    }
    server.finish().expect("a clean stop");
}

#[test]
fn what_is_wrong_with_a_form_is_said_under_its_key() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let wrong =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}});
    for (form, key) in [
        (
            json!({"grammar": {"type": "lark", "value": "start: start"}}),
            "grammar",
        ),
        (
            json!({"grammar": {"type": "lark", "value": "start: \"a\" ("}}),
            "grammar",
        ),
        (
            json!({"grammar": {"type": "regex", "value": "("}}),
            "grammar",
        ),
        (json!({"guided_regex": "("}), "guided_regex"),
        (
            json!({"structured_outputs": {"json": {"type": "nothing"}}}),
            "structured_outputs.json",
        ),
        (json!({"response_format": wrong}), "response_format"),
    ] {
        for (path, prompt) in [
            ("/v1/chat/completions", "messages"),
            ("/v1/completions", "prompt"),
        ] {
            if path == "/v1/completions" && key == "response_format" {
                continue;
            }
            let mut body = form.clone();
            body["model"] = json!("tuned");
            body[prompt] = match prompt {
                "prompt" => json!("Why"),
                _ => json!([{"role": "user", "content": "Why?"}]),
            };
            let answer = parse(server.post(path, &body), 400);
            assert_eq!(answer["error"]["param"], key, "{answer}");
            let message = answer["error"]["message"].as_str().expect("a text");
            assert!(message.contains("grammar"), "{message}");
        }
    }
    parse(
        server.post("/v1/chat/completions", &chat("tuned", false)),
        200,
    );
    server.finish().expect("a clean stop");
}

/// Tests vLLM's keys for the length of an answer.
#[test]
fn answers_are_as_long_as_they_must_be() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let tokenizer = tokenizers::Tokenizer::from_file(servable().base.join("tokenizer.json"))
        .expect("a tokenizer");
    let [a, b] = ["a", "b"].map(|token| tokenizer.token_to_id(token).expect("in the vocabulary"));
    let ask = |change: Value| {
        let mut body = json!({"model": "tuned", "prompt": "Why", "max_tokens": 8, "temperature": 1, "seed": 5});
        for (key, value) in change.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let answer = parse(server.post("/v1/completions", &body), 200);
        let choice = &answer["choices"][0];
        (
            choice["text"].as_str().expect("a text").to_owned(),
            choice["finish_reason"]
                .as_str()
                .expect("a reason")
                .to_owned(),
            answer["usage"]["completion_tokens"]
                .as_u64()
                .expect("counted"),
        )
    };
    let only = |ids: &[u32]| -> Value {
        ids.iter()
            .map(|id| (id.to_string(), json!(100)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let stopped = ask(json!({"logit_bias": only(&[a]), "stop_token_ids": [a]}));
    assert_eq!((stopped.0.as_str(), stopped.1.as_str()), ("", "stop"));
    let later = ask(json!({"logit_bias": only(&[a, b]), "stop_token_ids": [a], "min_tokens": 4}));
    assert!(later.0.starts_with("bbbb"), "{later:?}");
    let forms = ask(json!({"guided_regex": "a", "min_tokens": 3}));
    assert_eq!((forms.0.as_str(), forms.1.as_str()), ("a", "stop"));
    let end = end_token(&servable());
    let ended = ask(json!({"logit_bias": only(&[end])}));
    assert_eq!((ended.0.as_str(), ended.1.as_str()), ("", "stop"));
    let endless = ask(json!({"logit_bias": only(&[end]), "ignore_eos": true}));
    assert_eq!((endless.1.as_str(), endless.2), ("length", 8));
    let longer = ask(json!({"logit_bias": only(&[end]), "min_tokens": 5}));
    assert_eq!((longer.1.as_str(), longer.2), ("stop", 6));
    for (body, key) in [
        (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens"),
        (json!({"min_tokens": 1, "stop": "x"}), "min_tokens"),
        (json!({"skip_special_tokens": false}), "skip_special_tokens"),
        (json!({"stop_token_ids": ["a"]}), "stop_token_ids"),
        (json!({"stop_token_ids": [99_999_999]}), "stop_token_ids"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (
            json!({"max_completion_tokens": "x"}),
            "max_completion_tokens",
        ),
    ] {
        let mut body = body;
        body["prompt"] = json!("Why");
        let answer = parse(server.post("/v1/completions", &body), 400);
        assert_eq!(answer["error"]["param"], key, "{answer}");
    }
    server.finish().expect("a clean stop");
}

/// The end token of the model of `case`.
pub(super) fn end_token(case: &Case) -> u32 {
    let text = fs::read_to_string(case.base.join("config.json")).expect("readable");
    let config: Value = serde_json::from_str(&text).expect("JSON");
    let end = &config["eos_token_id"];
    let end = end.as_u64().or_else(|| end[0].as_u64()).expect("an id");
    u32::try_from(end).expect("an id")
}
