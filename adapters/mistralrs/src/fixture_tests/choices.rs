//! Tests of several choices of one request, and of the request bodies of common clients.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};

use serde_json::{Value, json};

use super::servable;
use super::serving::{Running, chat, events, long_chat, parse, toml_for};

const PATH: &str = "/v1/chat/completions";

/// The text and the number of finish reasons of each choice in a stream's events, and the last event with a usage.
fn gathered(events: &[String], n: usize) -> (Vec<(String, usize)>, Value) {
    let mut found = vec![(String::new(), 0); n];
    let mut usage = Value::Null;
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    for data in &events[..events.len() - 1] {
        let chunk: Value = serde_json::from_str(data).expect("JSON");
        for choice in chunk["choices"].as_array().expect("a list") {
            let (text, ends) = &mut found[choice["index"].as_u64().expect("a number") as usize];
            assert_eq!(*ends, 0, "a choice goes on after its end");
            text.push_str(choice["delta"]["content"].as_str().expect("a text"));
            *ends += usize::from(choice["finish_reason"].is_string());
        }
        if chunk["usage"].is_object() {
            usage = chunk["usage"].clone();
        }
    }
    (found, usage)
}

#[test]
fn several_choices_are_answers_of_their_own() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let single = parse(server.post(PATH, &chat("tuned", false)), 200);
    let mut greedy = chat("tuned", false);
    greedy["n"] = json!(3);
    let answer = parse(server.post(PATH, &greedy), 200);
    let choices = answer["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 3);
    for (idx, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], idx);
        assert_eq!(choice["message"], single["choices"][0]["message"]);
    }
    let tokens = |answer: &Value, key: &str| answer["usage"][key].as_u64().expect("counted");
    assert_eq!(
        tokens(&answer, "completion_tokens"),
        3 * tokens(&single, "completion_tokens")
    );
    assert_eq!(
        tokens(&answer, "prompt_tokens"),
        tokens(&single, "prompt_tokens")
    );

    // Sampling with a seed: the choices differ, and repeat with the same seed.
    let mut sampled = greedy.clone();
    sampled["temperature"] = json!(1.5);
    sampled["seed"] = json!(5);
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().expect("a list").iter();
        choices
            .map(|choice| choice["message"]["content"].to_string())
            .collect()
    };
    let first = texts(&parse(server.post(PATH, &sampled), 200));
    assert!(first.iter().collect::<BTreeSet<_>>().len() > 1, "{first:?}");
    assert_eq!(texts(&parse(server.post(PATH, &sampled), 200)), first);

    let mut streamed = greedy.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = events(server.post(PATH, &streamed));
    // Clients concatenate the chunks, so each choice sends its role once.
    let roles = chunks.iter().filter(|chunk| chunk.contains("\"role\""));
    assert_eq!(roles.count(), 3);
    let (found, usage) = gathered(&chunks, 3);
    let whole = choices[0]["message"]["content"].as_str().expect("a text");
    for (text, ends) in &found {
        // An incomplete character at the end is U+FFFD in a whole answer, and is omitted in a stream.
        assert_eq!(text, whole.trim_end_matches('\u{fffd}'));
        assert_eq!(*ends, 1);
    }
    assert_eq!(usage, answer["usage"]);

    // A stop text ends each choice before it.
    let cut = whole.chars().take(2).last().expect("two characters");
    let mut stopped = streamed.clone();
    stopped["stop"] = json!([cut.to_string()]);
    let (found, _) = gathered(&events(server.post(PATH, &stopped)), 3);
    let before = whole.split(cut).next().expect("a start");
    assert!(found.iter().all(|choice| *choice == (before.to_owned(), 1)));
    server.finish().expect("a clean stop");
}

#[test]
fn who_leaves_between_choices_gives_the_turn_away() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let mut long = long_chat("tuned", true);
    long["n"] = json!(16);
    let whole = events(server.post(PATH, &long));
    assert_eq!(whole.last().map(String::as_str), Some("[DONE]"));
    drop(server.post(PATH, &long));
    parse(server.post(PATH, &chat("tuned", false)), 200);
    server.metrics_with(r#"monteclora_answers_total{outcome="canceled"} 1"#);
    server.finish().expect("a clean stop");
}

/// If an engine takes one request at a time, another request runs between the choices of a request with many choices.
#[test]
fn many_choices_let_others_come_between() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let mut many = long_chat("tuned", true);
    many["n"] = json!(16);
    let mut stream = BufReader::new(server.post(PATH, &many)).lines();
    stream.next().expect("begun").expect("readable");
    parse(server.post(PATH, &chat("tuned", false)), 200);
    // The end may be counted shortly after the answer has arrived.
    let metrics = server.metrics_with(r#"monteclora_answers_total{outcome="finished"} 1"#);
    assert!(
        metrics.contains("monteclora_requests_in_flight 1\n"),
        "{metrics}"
    );
    let rest: Vec<String> = stream.map(|line| line.expect("readable")).collect();
    assert!(rest.contains(&"data: [DONE]".to_owned()));
    server.finish().expect("a clean stop");
}

#[test]
fn every_choice_takes_a_place() {
    let limits = "[limits]\nmax_concurrent_requests = 4\n";
    let (server, _dir) = Running::start(&toml_for(&servable(), limits));
    let mut five = chat("tuned", false);
    five["n"] = json!(5);
    let refused = parse(server.post(PATH, &five), 400);
    assert_eq!(refused["error"]["param"], "n");
    let mut four = long_chat("tuned", true);
    four["n"] = json!(4);
    let stream = server.post(PATH, &four);
    parse(server.post(PATH, &chat("base", false)), 503);
    assert_eq!(events(stream).last().map(String::as_str), Some("[DONE]"));
    server.metrics_with("monteclora_requests_in_flight 0");
    parse(server.post(PATH, &chat("base", false)), 200);
    server.finish().expect("a clean stop");
}

#[test]
fn what_common_clients_send_is_understood() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let plain = parse(server.post(PATH, &chat("tuned", false)), 200);
    for extra in [
        json!({"n": 1, "best_of": 1, "logprobs": false, "top_logprobs": 0}),
        json!({"n": null, "stop": null, "seed": null, "logit_bias": null, "logprobs": null, "top_logprobs": null,
            "tools": null, "tool_choice": null, "response_format": null, "user": null, "stream_options": null,
            "parallel_tool_calls": null, "max_completion_tokens": null}),
        json!({"user": "u", "metadata": {"k": "v"}, "store": false, "service_tier": "auto", "safety_identifier": "s",
            "prompt_cache_key": "k"}),
        json!({"parallel_tool_calls": true, "modalities": ["text"], "response_format": {"type": "text"}, "tools": []}),
        json!({"presence_penalty": 0, "frequency_penalty": 0.0, "top_p": 1, "logit_bias": {}, "stop": []}),
        json!({"messages": [{"role": "user", "name": "me", "content": [{"type": "text", "text": "Why?"}]}]}),
    ] {
        let mut body = chat("tuned", false);
        for (key, value) in extra.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let response = server.post(PATH, &body);
        assert_eq!(response.status(), 200, "{extra}: {:?}", response.text());
        let answer: Value = response.json().expect("JSON");
        assert_eq!(answer["choices"], plain["choices"], "{extra}");
    }
    let mut misspelt = chat("tuned", false);
    misspelt["metdata"] = json!({});
    let refusal = parse(server.post(PATH, &misspelt), 400);
    let message = refusal["error"]["message"].to_string();
    assert!(message.contains("did you mean `metadata`?"), "{message}");
    server.finish().expect("a clean stop");
}
