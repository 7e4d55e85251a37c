//! Tests that log-probabilities over HTTP equal the references, whatever the request's form.

use serde_json::{Value, json};

use super::forms::end_token;
use super::parity::{expected, tolerance};
use super::serving::{Running, chat, events, parse, toml_for};
use super::{Case, cases, servable};

/// Natural logarithms of the softmax of `row`.
fn log_softmax(row: &[f32]) -> Vec<f64> {
    let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    row.iter()
        .map(|logit| f64::from(*logit) - total.ln())
        .collect()
}

fn numbers(values: &Value) -> Vec<Option<f64>> {
    values
        .as_array()
        .expect("a list")
        .iter()
        .map(Value::as_f64)
        .collect()
}

fn texts(values: &Value) -> Vec<&str> {
    let values = values.as_array().expect("a list").iter();
    values
        .map(|value| value.as_str().expect("a text"))
        .collect()
}

/// `echo` scores the prompt as the reference does, and the most probable tokens are the reference's argmax.
#[test]
fn scores_of_prompts_are_those_of_the_references() {
    let mut n_compared = 0;
    let served = |case: &Case| !case.must_refuse() && case.loader().check().is_ok();
    for case in cases().into_iter().filter(served).chain([servable()]) {
        let expected = expected(&case);
        let n_tokens = expected.sequences[0].len();
        if n_tokens > case.loader().check().expect("checked").max_sequence_length {
            continue;
        }
        let (server, _dir) = Running::start(&toml_for(&case, ""));
        for (model, name) in [("base", "base_logits"), ("tuned", "logits")] {
            let body = json!({"model": model, "prompt": expected.sequences, "max_tokens": 0, "echo": true, "logprobs": 1});
            let answer = parse(server.post("/v1/completions", &body), 200);
            let choices = answer["choices"].as_array().expect("a list");
            assert_eq!(choices.len(), expected.sequences.len());
            assert_eq!(answer["usage"]["completion_tokens"], 0);
            for (idx, choice) in choices.iter().enumerate() {
                assert_eq!(
                    (&choice["index"], &choice["finish_reason"]),
                    (&json!(idx), &json!("length"))
                );
                let logprobs = &choice["logprobs"];
                let found = numbers(&logprobs["token_logprobs"]);
                assert_eq!((found.len(), found[0]), (n_tokens, None), "{answer}");
                assert_eq!(logprobs["top_logprobs"][0], Value::Null);
                let logits = &expected.logits[name][idx];
                let bound = f64::from(tolerance(logits));
                let rows = logits.chunks(logits.len() / n_tokens).map(log_softmax);
                for (at, row) in (1..n_tokens).zip(rows) {
                    let token = expected.sequences[idx][at] as usize;
                    let score = found[at].expect("a number");
                    assert!(
                        (score - row[token]).abs() < bound,
                        "{} {model}: {score} at {at}, not {}",
                        case.name,
                        row[token]
                    );
                    let top = logprobs["top_logprobs"][at].as_object().expect("an object");
                    let best = top
                        .values()
                        .filter_map(Value::as_f64)
                        .fold(f64::MIN, f64::max);
                    let wanted = row.iter().copied().fold(f64::MIN, f64::max);
                    assert!((best - wanted).abs() < bound, "{best} is not {wanted}");
                    n_compared += 1;
                }
            }
        }
        server.finish().expect("a clean stop");
    }
    assert!(n_compared > 0);
}

/// The score of a generated token equals its score as part of the prompt; sampling, penalties and bias do not change
/// it.
#[test]
fn scores_of_answers_are_the_models_own() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let ask = |change: Value| {
        let mut body = json!({"model": "tuned", "prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 2, "seed": 3, "echo": true});
        for (key, value) in change.as_object().expect("an object") {
            body[key] = value.clone();
        }
        parse(server.post("/v1/completions", &body), 200)["choices"][0].clone()
    };
    for change in [
        json!({"temperature": 0}),
        json!({"temperature": 2}),
        json!({"temperature": 1.5, "top_p": 0.9, "presence_penalty": 1.5, "repetition_penalty": 1.3}),
        json!({"temperature": 0, "logit_bias": {"9": 100}}),
        json!({"temperature": 1, "guided_regex": "[a-z]{30}"}),
    ] {
        let choice = ask(change.clone());
        let logprobs = &choice["logprobs"];
        let tokens = texts(&logprobs["tokens"]);
        assert_eq!(tokens.len(), 9, "{choice}");
        let found = numbers(&logprobs["token_logprobs"]);
        let n_characters = |token: &&str| match token.starts_with("bytes:") {
            true => 1,
            false => token.chars().count(),
        };
        let lengths = tokens.iter().map(n_characters);
        let offsets: Vec<usize> = lengths
            .scan(0, |at, n| Some(std::mem::replace(at, *at + n)))
            .collect();
        assert_eq!(logprobs["text_offset"], json!(offsets));
        for (at, top) in logprobs["top_logprobs"]
            .as_array()
            .expect("a list")
            .iter()
            .enumerate()
            .skip(1)
        {
            let top = top.as_object().expect("an object");
            let highest = top
                .values()
                .filter_map(Value::as_f64)
                .fold(f64::MIN, f64::max);
            assert!(
                found[at].expect("a number") <= highest && top.len() <= 3,
                "{choice}"
            );
        }
        // The bias makes a token certain; the model's own probability of it stays the same.
        if change.get("logit_bias").is_some() {
            assert!(found[3].expect("a number") < -0.1, "{choice}");
        }
    }
    server.finish().expect("a clean stop");
}

/// Evaluation harnesses drop the last score, which must be a generated token's, so a token that ends the answer is
/// scored.
#[test]
fn the_token_that_ends_a_completion_is_scored() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let end = end_token(&servable());
    for stop in [json!(null), json!("x")] {
        let body = json!({"model": "tuned", "prompt": [[5, 6, 7], [8]], "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 1,
            "seed": 1234, "stop": stop, "logit_bias": {end.to_string(): 100}});
        let answer = parse(server.post("/v1/completions", &body), 200);
        for (idx, n_prompt) in [(0, 3), (1, 1)] {
            let logprobs = &answer["choices"][idx]["logprobs"];
            let found = numbers(&logprobs["token_logprobs"]);
            assert_eq!(found.len(), n_prompt + 1, "{answer}");
            assert!(found[n_prompt].is_some_and(|score| score < 0.0));
            let top = logprobs["top_logprobs"][n_prompt]
                .as_object()
                .expect("an object");
            assert!(top.values().any(|value| value.as_f64() == found[n_prompt]));
        }
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    server.finish().expect("a clean stop");
}

/// A stream has the same scores as the whole answer, for chats and completions, to the last token.
#[test]
fn streams_carry_the_same_scores() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let chunks = |path: &str, body: &Value| -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let events = events(server.post(path, &body));
        let parsed = events.iter().filter(|data| *data != "[DONE]");
        parsed
            .map(|data| serde_json::from_str(data).expect("JSON"))
            .collect()
    };
    let joined = |chunks: &[Value], list: &str| -> Vec<Value> {
        let lists = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0]["logprobs"][list]);
        lists
            .filter_map(Value::as_array)
            .flatten()
            .cloned()
            .collect()
    };
    for (seed, stop) in [
        (1, json!(null)),
        (2, json!(["a", "e", "\n"])),
        (3, json!(null)),
    ] {
        let mut body = chat("tuned", false);
        body["max_tokens"] = json!(24);
        body["temperature"] = json!(2);
        body["seed"] = json!(seed);
        body["stop"] = stop.clone();
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(3);
        let path = "/v1/chat/completions";
        let whole = parse(server.post(path, &body), 200);
        let content = whole["choices"][0]["logprobs"]["content"]
            .as_array()
            .expect("a list");
        assert_eq!(joined(&chunks(path, &body), "content"), *content);
        let text = whole["choices"][0]["message"]["content"]
            .as_str()
            .expect("a text");
        let bytes: Vec<u8> = content
            .iter()
            .flat_map(|entry| {
                let bytes = entry["bytes"].as_array().expect("a list").iter();
                bytes
                    .map(|byte| u8::try_from(byte.as_u64().expect("a byte")).expect("a byte"))
                    .collect::<Vec<_>>()
            })
            .collect();
        let spelled = String::from_utf8_lossy(&bytes);
        if stop.is_null() {
            // A last character that the limit cuts is not shown, but its tokens are.
            let shown = spelled.trim_start().trim_end_matches('\u{fffd}');
            assert_eq!(shown, text);
            assert_eq!(json!(content.len()), whole["usage"]["completion_tokens"]);
        } else {
            // The token that contains the stop text may begin before it.
            assert!(
                spelled.trim_start().starts_with(text),
                "{spelled:?} {text:?}"
            );
        }
        assert!(content.iter().all(|entry| {
            entry["top_logprobs"]
                .as_array()
                .is_some_and(|top| top.len() == 3)
        }));

        let body = json!({"model": "tuned", "prompt": ["Why", "What"], "n": 2, "max_tokens": 5, "temperature": 1, "seed": seed,
            "logprobs": 0, "echo": true});
        let path = "/v1/completions";
        let whole = parse(server.post(path, &body), 200);
        let chunks = chunks(path, &body);
        for choice in whole["choices"].as_array().expect("a list") {
            let of: Vec<Value> = chunks
                .iter()
                .filter(|chunk| chunk["choices"][0]["index"] == choice["index"])
                .cloned()
                .collect();
            for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
                assert_eq!(json!(joined(&of, list)), choice["logprobs"][list], "{list}");
            }
            let text: String = of
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
                .collect();
            assert_eq!(text, choice["text"]);
        }
    }
    server.finish().expect("a clean stop");
}

#[test]
fn several_prompts_are_answered_in_their_order() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let ask = |prompt: Value| {
        let body = json!({"model": "tuned", "prompt": prompt, "max_tokens": 4, "temperature": 0});
        parse(server.post("/v1/completions", &body), 200)
    };
    let text = |answer: &Value, idx: usize| answer["choices"][idx]["text"].clone();
    let (one, other) = (ask(json!("Why")), ask(json!([9, 10, 11])));
    let both = ask(json!(["Why", "Why not"]));
    assert_eq!(text(&both, 0), text(&one, 0));
    let tokens = ask(json!([[9, 10, 11], [12]]));
    assert_eq!(text(&tokens, 0), text(&other, 0));
    assert_eq!(tokens["usage"]["prompt_tokens"], 4);
    // mistral.rs makes one more step for an answer that is complete with its first token.
    for n_prompts in [1, 2, 4] {
        let prompts: Vec<Value> = (0..n_prompts).map(|n| json!([9 + n, 10])).collect();
        let body = json!({"model": "tuned", "prompt": prompts, "max_tokens": 1, "logprobs": 1, "temperature": 0});
        for _ in 0..5 {
            let answer = parse(server.post("/v1/completions", &body), 200);
            assert_eq!(answer["usage"]["completion_tokens"], n_prompts, "{answer}");
            for choice in answer["choices"].as_array().expect("a list") {
                let n_tokens = choice["logprobs"]["tokens"].as_array().map(Vec::len);
                assert_eq!(n_tokens, Some(1), "{choice}");
            }
        }
    }
    for (body, param) in [
        (json!({"prompt": [9_999_999]}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": "Why", "max_tokens": 0}), "max_tokens"),
        (
            json!({"prompt": "Why", "max_tokens": 0, "logprobs": 21, "echo": true}),
            "logprobs",
        ),
        (json!({"prompt": vec!["Why"; 500]}), "prompt"),
    ] {
        let answer = parse(server.post("/v1/completions", &body), 400);
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
    let empty = json!({"model": "tuned", "prompt": "Why", "max_tokens": 0, "echo": true});
    let empty = parse(server.post("/v1/completions", &empty), 200);
    assert_eq!(
        (text(&empty, 0), &empty["choices"][0]["logprobs"]),
        (json!("Why"), &Value::Null)
    );
    server.finish().expect("a clean stop");
}
