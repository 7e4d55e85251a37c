//! Tests of request settings: sampling, stop texts, tools, formats.

use std::fs;

use serde_json::{Value, json};

use super::servable;
use super::serving::{Running, chat, events, parse, toml_for};

/// Missing settings come from the model's own `generation_config.json`; the default temperature is 1.
#[test]
fn a_request_that_does_not_say_is_sampled_as_the_model_is() {
    let (case, _copy) = servable().on_changed_base(|_| {});
    let greedy = chat("tuned", false);
    let mut silent = greedy.clone();
    silent
        .as_object_mut()
        .expect("an object")
        .remove("temperature");
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].to_string();
    let answers = |settings: &str| {
        fs::write(case.base.join("generation_config.json"), settings).expect("written");
        let (server, _dir) = Running::start(&toml_for(&case, ""));
        let ask = |body: &Value| text(&parse(server.post("/v1/chat/completions", body), 200));
        let mut found: Vec<String> = (0..6).map(|_| ask(&silent)).collect();
        found.push(ask(&greedy));
        let mut seeded = silent.clone();
        seeded["seed"] = json!(3);
        found.push(ask(&seeded));
        server.finish().expect("a clean stop");
        found
    };
    let certain = answers(r#"{"do_sample": false}"#);
    assert!(
        certain.iter().all(|text| *text == certain[0]),
        "{certain:?}"
    );
    let likeliest = answers(r#"{"do_sample": true, "temperature": 0.7, "top_k": 1}"#);
    assert_eq!(likeliest, certain);
    let sampled = answers(r#"{"do_sample": true}"#);
    assert_eq!(sampled[6], certain[6]);
    assert!(
        sampled[..6].iter().any(|text| *text != sampled[0]),
        "{sampled:?}"
    );
    assert_ne!(sampled[7], certain[6], "a seed makes no answer greedy");
}

pub(super) fn a_call_that_must_be_made_is_made(server: &Running) {
    let tool = |name: &str, kinds: Value| {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object",
            "properties": {"kind": {"$ref": "#/$defs/Kind"}}, "required": ["kind"], "additionalProperties": false,
            "$defs": {"Kind": {"enum": kinds}}}}})
    };
    let mut asked = chat("tuned", false);
    asked["max_tokens"] = json!(120);
    asked["tools"] = json!([
        tool("animal", json!(["cat", "dog"])),
        tool("plant", json!(["oak"]))
    ]);
    for (choice, stream) in [
        (json!("required"), false),
        (
            json!({"type": "function", "function": {"name": "plant"}}),
            false,
        ),
        (
            json!({"type": "function", "function": {"name": "plant"}}),
            true,
        ),
    ] {
        asked["tool_choice"] = choice.clone();
        asked["stream"] = json!(stream);
        let response = server.post("/v1/chat/completions", &asked);
        let calls = if stream {
            let data = events(response)
                .into_iter()
                .find(|data| data.contains("tool_calls"));
            let chunk: Value = serde_json::from_str(&data.expect("a call")).expect("JSON");
            chunk["choices"][0]["delta"]["tool_calls"].clone()
        } else {
            parse(response, 200)["choices"][0]["message"]["tool_calls"].clone()
        };
        let function = &calls[0]["function"];
        let arguments = function["arguments"].as_str().expect("a text");
        let arguments: Value = serde_json::from_str(arguments).expect("JSON");
        if choice.is_object() {
            assert_eq!(function["name"], "plant");
            assert_eq!(arguments, json!({"kind": "oak"}));
        } else {
            assert!(["animal", "plant"].contains(&function["name"].as_str().expect("a name")));
            assert!(arguments["kind"].is_string(), "{arguments}");
        }
    }
    // A call that is cut in its name is not a call. A call that is cut later is returned with its available arguments.
    // Neither is an error.
    for (max_tokens, name) in [(3, json!(null)), (34, json!("plant"))] {
        asked["max_tokens"] = json!(max_tokens);
        asked["stream"] = json!(false);
        let answer = parse(server.post("/v1/chat/completions", &asked), 200);
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "length", "{answer}");
        assert_eq!(choice["message"]["content"], json!(null), "{answer}");
        let function = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(function["name"], name, "{answer}");
        asked["stream"] = json!(true);
        let chunks = events(server.post("/v1/chat/completions", &asked));
        let chunks = chunks
            .iter()
            .filter_map(|data| serde_json::from_str::<Value>(data).ok());
        let deltas: Vec<Value> = chunks
            .map(|chunk| chunk["choices"][0]["delta"].clone())
            .collect();
        assert!(
            deltas.iter().all(|delta| delta["content"] == ""),
            "{deltas:?}"
        );
        let called = deltas.iter().find(|delta| delta["tool_calls"].is_array());
        let streamed = called.map(|delta| delta["tool_calls"][0]["function"].clone());
        assert_eq!(streamed.unwrap_or_default(), *function);
    }
}

/// A grammar may not allow the end at the place of a stop text.
#[test]
fn a_stop_text_ends_an_answer_that_a_grammar_holds() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let mut body = chat("tuned", false);
    body["max_tokens"] = json!(100);
    body["guided_regex"] = json!("[a-z]{80}");
    let whole = parse(server.post("/v1/chat/completions", &body), 200);
    let whole = whole["choices"][0]["message"]["content"].as_str();
    let text: Vec<char> = whole.expect("a text").chars().collect();
    let stop: String = text[2..4].iter().collect();
    body["stop"] = json!([stop]);
    let cut = parse(server.post("/v1/chat/completions", &body), 200);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    let n_tokens = cut["usage"]["completion_tokens"].as_u64();
    assert!(n_tokens.expect("counted") < 10, "{cut}");
    server.finish().expect("a clean stop");
}

/// mistral.rs panics on a stop text after bytes that are not a character, so it does not get any stop text.
#[test]
fn a_stop_text_behind_broken_characters_ends_the_answer_early() {
    let case = servable();
    let tokenizer = tokenizers::Tokenizer::from_file(case.base.join("tokenizer.json"));
    let tokenizer = tokenizer.expect("a tokenizer");
    // The byte 0x80, which is not a character on its own.
    let [byte, a, b] = ["\u{122}", "a", "b"].map(|token| {
        let id = tokenizer.token_to_id(token);
        id.expect("a vocabulary of bytes")
    });
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    let mut body = chat("tuned", false);
    body["temperature"] = json!(2);
    body["max_tokens"] = json!(40);
    body["logit_bias"] = json!({byte.to_string(): 100, a.to_string(): 100, b.to_string(): 100});
    body["stop"] = json!(["ab"]);
    let mut n_behind = 0;
    for seed in 0..16 {
        body["seed"] = json!(seed);
        let answer = parse(server.post("/v1/chat/completions", &body), 200);
        let choice = &answer["choices"][0];
        let text = choice["message"]["content"].as_str().expect("a text");
        assert!(!text.contains("ab"), "{text:?}");
        if choice["finish_reason"] != "stop" {
            continue;
        }
        let n_tokens = text.chars().count() + 2;
        assert_eq!(answer["usage"]["completion_tokens"], n_tokens, "{text:?}");
        n_behind += usize::from(text.contains('\u{fffd}'));
    }
    assert!(n_behind > 0, "no stop text came behind a lone byte");
    server.finish().expect("a clean stop");
}

#[test]
fn sampling_options_do_what_they_say_or_are_refused() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let path = "/v1/chat/completions";
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].to_string();

    let mut seeded = chat("tuned", false);
    seeded["temperature"] = json!(1.5);
    seeded["seed"] = json!(11);
    let first = text(&parse(server.post(path, &seeded), 200));
    assert_eq!(text(&parse(server.post(path, &seeded), 200)), first);
    let others = (0..5).map(|seed| {
        seeded["seed"] = json!(seed);
        text(&parse(server.post(path, &seeded), 200))
    });
    assert!(
        others.into_iter().any(|other| other != first),
        "the seed changes nothing"
    );

    // Each of these settings leaves only the most probable token.
    let greedy = text(&parse(server.post(path, &chat("tuned", false)), 200));
    for (key, value) in [
        ("top_k", json!(1)),
        ("top_p", json!(0)),
        ("top_p", json!(1e-6)),
        ("min_p", json!(1)),
        ("min_p", json!(0.99999)),
    ] {
        let mut narrow = chat("tuned", false);
        narrow["temperature"] = json!(1.5);
        narrow[key] = value.clone();
        let found = text(&parse(server.post(path, &narrow), 200));
        assert_eq!(found, greedy, "{key} {value}");
    }

    let mut formatted = chat("tuned", false);
    formatted["max_tokens"] = json!(100);
    formatted["response_format"] = json!({"type": "json_schema",
        "json_schema": {"name": "animal", "schema": {"enum": ["cat", "dog"]}}});
    let answer = parse(server.post(path, &formatted), 200);
    let content = answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("a text");
    let value: String = serde_json::from_str(content).expect("JSON");
    assert!(["cat", "dog"].contains(&value.as_str()), "{content}");

    let tool = json!({"type": "function", "function": {"name": "f", "description": "d",
        "parameters": {"type": "object", "properties": {}}}});
    let mut tools = chat("tuned", false);
    tools["tools"] = json!([tool]);
    parse(server.post(path, &tools), 400);
    let choice =
        json!({"prompt": "a", "max_tokens": 2, "tools": tools["tools"], "tool_choice": "required"});
    let refused = parse(server.post("/v1/completions", &choice), 400);
    assert!(["tools", "tool_choice"].contains(&refused["error"]["param"].as_str().expect("a key")));

    // Wherever the limit cuts, even within a character, a stream sends a finish reason and its end.
    for max_tokens in 1..=16 {
        let mut cut = chat("tuned", true);
        cut["max_tokens"] = json!(max_tokens);
        let stream = events(server.post(path, &cut));
        assert_eq!(stream.last().map(String::as_str), Some("[DONE]"));
        let last: Value = serde_json::from_str(&stream[stream.len() - 2]).expect("JSON");
        let reason = &last["choices"][0]["finish_reason"];
        assert!(reason == "length" || reason == "stop", "{last}");
    }
    let stopped = {
        let whole = parse(server.post(path, &chat("tuned", false)), 200);
        let content = whole["choices"][0]["message"]["content"]
            .as_str()
            .expect("a text");
        content.chars().filter(|c| c.is_ascii()).nth(2)
    };
    if let Some(stop) = stopped {
        let mut body = chat("tuned", true);
        body["stop"] = json!(stop.to_string());
        let stream = events(server.post(path, &body));
        assert_eq!(stream.last().map(String::as_str), Some("[DONE]"));
        assert!(stream[stream.len() - 2].contains("\"finish_reason\":\"stop\""));
    }
    server.finish().expect("a clean stop");
}

/// A tokenizer may have tokens without a vector in the embedding; mistral.rs would fail in the step.
#[test]
fn a_token_without_a_vector_is_refused() {
    let (case, _copy) = servable().on_changed_base(|base| {
        let path = base.join("tokenizer.json");
        let text = fs::read_to_string(&path).expect("readable");
        let mut tokenizer: Value = serde_json::from_str(&text).expect("JSON");
        let added = tokenizer["added_tokens"].as_array_mut().expect("a list");
        let mut beyond = added[0].clone();
        beyond["id"] = json!(259);
        beyond["content"] = json!("<beyond>");
        added.push(beyond);
        fs::write(&path, tokenizer.to_string()).expect("written");
    });
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    for prompt in [json!("a <beyond> b"), json!([5, 259])] {
        let body = json!({"model": "tuned", "prompt": prompt, "max_tokens": 2});
        let refused = parse(server.post("/v1/completions", &body), 400);
        let message = refused["error"]["message"].as_str().expect("a text");
        assert!(message.contains("259 (`<beyond>`)"), "{message}");
    }
    server.finish().expect("a clean stop");
}
