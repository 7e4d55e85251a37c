use serde_json::{Value, json};

use super::*;
use crate::fixture_tests::serving::{Running, parse, toml_for};
use crate::fixture_tests::{servable, with_template};

const PATH: &str = "/v1/responses";

fn keys(body: Value) -> Result<ResponseKeys, ApiError> {
    take(&mut object(body.to_string().as_bytes())?)
}

fn messages(input: Value) -> Result<Vec<Value>, ApiError> {
    input::messages(Some(json!("Be brief.")), Some(input))
}

#[test]
fn items_become_messages() {
    let items = json!([
        {"role": "user", "content": "Why?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{\"a\":1}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
    ]);
    let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let expected = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call("c1", "f", "{\"a\":1}"), call("c2", "g", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "developer", "content": "a\nb"},
    ]);
    assert_eq!(Value::Array(messages(items).expect("sound")), expected);
    let plain = messages(json!("Why?")).expect("sound");
    assert_eq!(plain[1], json!({"role": "user", "content": "Why?"}));
}

#[test]
fn items_that_are_wrong_are_named_where_they_are() {
    let said = |part: Value| json!([{"role": "user", "content": [part]}]);
    for (input, at) in [
        (json!(3), "input"),
        (json!([]), "input"),
        (json!([1]), "input[0]"),
        (
            json!([{"type": "item_reference", "id": "msg_1"}]),
            "input[0]",
        ),
        (json!([{"type": "web_search_call"}]), "input[0].type"),
        (json!([{"content": "x"}]), "input[0].role"),
        (json!([{"role": "tool", "content": "x"}]), "input[0].role"),
        (json!([{"role": "user"}]), "input[0].content"),
        (
            json!([{"role": "user", "content": "x", "foo": 1}]),
            "input[0].foo",
        ),
        (
            said(json!({"type": "input_image", "image_url": "x"})),
            "input[0].content[0].type",
        ),
        (
            said(json!({"type": "input_text", "text": 1})),
            "input[0].content[0].text",
        ),
        (
            said(json!({"type": "input_text", "text": "x", "foo": 1})),
            "input[0].content[0].foo",
        ),
        (
            json!([{"type": "function_call", "name": "f", "arguments": "{}"}]),
            "input[0].call_id",
        ),
        (
            json!([{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]),
            "input[0].arguments",
        ),
        (
            json!([{"type": "function_call_output", "call_id": "c", "output": 3}]),
            "input[0].output",
        ),
        (
            json!([{"type": "reasoning", "encrypted_content": "x"}]),
            "input[0].encrypted_content",
        ),
    ] {
        let error = messages(input).expect_err("refused");
        assert_eq!(error.body()["error"]["param"], at);
    }
    for (body, at) in [
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"store": "no"}), "store"),
        (json!({"parallel_tool_calls": 1}), "parallel_tool_calls"),
    ] {
        let error = keys(body).err().expect("refused");
        assert_eq!(error.body()["error"]["param"], at);
    }
}

fn ask(server: &Running, more: Value, status: u16) -> Value {
    let mut body =
        json!({"model": "tuned", "input": "Why?", "temperature": 0, "max_output_tokens": 12});
    for (key, value) in more.as_object().expect("an object") {
        body[key] = value.clone();
    }
    parse(server.post(PATH, &body), status)
}

/// The names and data of all events before `[DONE]`.
fn events(server: &Running, more: &Value) -> Vec<(String, Value)> {
    let mut body = json!({"model": "tuned", "input": "Why?", "temperature": 0, "max_output_tokens": 12, "stream": true});
    for (key, value) in more.as_object().expect("an object") {
        body[key] = value.clone();
    }
    let text = server.post(PATH, &body).text().expect("readable");
    let text = text.strip_suffix("data: [DONE]\n\n").expect("an end");
    let read = |event: &str| {
        let (name, data) = event.split_once('\n').expect("a name and data");
        let data = data.strip_prefix("data: ").expect("data");
        let name = name.strip_prefix("event: ").expect("a name").to_owned();
        (name, serde_json::from_str(data).expect("JSON"))
    };
    let events: Vec<(String, Value)> = text.trim_end().split("\n\n").map(read).collect();
    for (number, (name, data)) in events.iter().enumerate() {
        assert_eq!(data["sequence_number"], number);
        assert_eq!(data["type"], **name);
    }
    events
}

/// The part of a response that is equal in two answers to one request.
fn comparable(response: &Value) -> Value {
    let mut response = response.clone();
    for key in ["id", "created_at", "completed_at"] {
        response[key] = Value::Null;
    }
    for item in response["output"].as_array_mut().expect("a list") {
        item["id"] = Value::Null;
        item["call_id"] = Value::Null;
    }
    response
}

#[test]
fn a_text_is_answered_whole_and_as_events_that_say_the_same() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let whole = ask(&server, json!({}), 200);
    assert_eq!(
        (&whole["object"], &whole["model"]),
        (&json!("response"), &json!("tuned"))
    );
    let chat = json!({"model": "tuned", "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": "Why?"}]});
    let chat = parse(server.post("/v1/chat/completions", &chat), 200);
    let item = &whole["output"][0];
    assert_eq!(
        item["content"][0]["text"],
        chat["choices"][0]["message"]["content"]
    );
    assert_eq!(
        whole["usage"]["input_tokens"],
        chat["usage"]["prompt_tokens"]
    );
    assert_eq!(
        whole["usage"]["output_tokens"],
        chat["usage"]["completion_tokens"]
    );
    let is_cut = chat["choices"][0]["finish_reason"] == "length";
    let status = if is_cut { "incomplete" } else { "completed" };
    assert_eq!(
        (&whole["status"], &item["status"]),
        (&json!(status), &json!(status))
    );
    assert_eq!(
        whole["incomplete_details"]["reason"] == "max_output_tokens",
        is_cut
    );

    let events = events(&server, &json!({}));
    let names: Vec<&str> = events.iter().map(|(name, _)| &**name).collect();
    let n_deltas = names
        .iter()
        .filter(|name| **name == "response.output_text.delta")
        .count();
    let mut expected = vec![
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ];
    expected.extend(vec!["response.output_text.delta"; n_deltas]);
    let last = format!("response.{status}");
    expected.extend([
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        &last,
    ]);
    assert_eq!(names, expected);
    let deltas = events.iter().filter_map(|(_, data)| data["delta"].as_str());
    assert_eq!(
        json!(deltas.collect::<String>()),
        item["content"][0]["text"]
    );
    let streamed = &events.last().expect("an end").1["response"];
    assert_eq!(comparable(streamed), comparable(&whole));
    assert_eq!(events[0].1["response"]["status"], "in_progress");
    server.finish().expect("a clean stop");
}

#[test]
fn log_probabilities_are_those_of_chat() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let more = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let whole = ask(&server, more.clone(), 200);
    let found = &whole["output"][0]["content"][0]["logprobs"];
    let chat = json!({"model": "tuned", "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": "Why?"}],
        "logprobs": true, "top_logprobs": 2});
    let chat = parse(server.post("/v1/chat/completions", &chat), 200);
    assert_eq!(*found, chat["choices"][0]["logprobs"]["content"]);
    assert!(found.as_array().is_some_and(|list| !list.is_empty()));
    let events = events(&server, &more);
    let streamed = &events.last().expect("an end").1["response"];
    assert_eq!(comparable(streamed), comparable(&whole));
    server.finish().expect("a clean stop");
}

#[test]
fn texts_are_held_to_formats_and_calls_are_items() {
    let (case, _dir) = with_template(crate::fixture_tests::TOOLS);
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    let format = json!({"type": "json_schema", "name": "animal", "strict": true, "schema": {"enum": ["cat"]}});
    let held = ask(
        &server,
        json!({"text": {"format": format}, "max_output_tokens": 60}),
        200,
    );
    assert_eq!(held["output"][0]["content"][0]["text"], "\"cat\"");
    assert_eq!(held["text"]["format"], format);

    let parameters = json!({"type": "object", "properties": {"kind": {"enum": ["oak"]}}, "required": ["kind"], "additionalProperties": false});
    let tool = json!({"type": "function", "name": "plant", "description": "d", "parameters": parameters, "strict": true});
    let asked = json!({"tools": [tool], "tool_choice": {"type": "function", "name": "plant"}, "max_output_tokens": 100});
    let called = ask(&server, asked.clone(), 200);
    let call = &called["output"][0];
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("plant"))
    );
    assert_eq!(call["arguments"], r#"{"kind":"oak"}"#);
    assert_eq!(called["status"], "completed");
    assert_eq!(called["tools"], json!([tool]));
    let events = events(&server, &asked);
    let streamed = &events.last().expect("an end").1["response"];
    assert_eq!(comparable(streamed), comparable(&called));
    let names: Vec<&str> = events.iter().map(|(name, _)| &**name).collect();
    assert_eq!(
        names[2..],
        [
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed"
        ]
    );
    // The next turn of the same conversation.
    let outcome =
        json!({"type": "function_call_output", "call_id": call["call_id"], "output": "tall"});
    let input = json!([{"role": "user", "content": "Why?"}, call, outcome]);
    let next = ask(&server, json!({"input": input, "tools": [tool]}), 200);
    let n_first = called["usage"]["input_tokens"].as_u64();
    assert!(next["usage"]["input_tokens"].as_u64() > n_first);
    server.finish().expect("a clean stop");
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    for (more, at) in [
        (
            json!({"previous_response_id": "resp_1"}),
            "previous_response_id",
        ),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"prompt": {"id": "pmpt_1"}}), "prompt"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
        (
            json!({"include": ["reasoning.encrypted_content"]}),
            "include",
        ),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (
            json!({"include": "message.output_text.logprobs"}),
            "include",
        ),
        (json!({"messages": []}), "messages"),
        (json!({"instructions": 3}), "instructions"),
        (json!({"metadata": 3}), "metadata"),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
        (json!({"text": {"foo": 1}}), "text.foo"),
        (
            json!({"text": {"format": {"type": "xml"}}}),
            "text.format.type",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "x"}}}),
            "text.format.schema",
        ),
        (
            json!({"reasoning": {"effort": "utmost"}}),
            "reasoning.effort",
        ),
        (
            json!({"reasoning": {"summary": "auto"}}),
            "reasoning.summary",
        ),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (
            json!({"tools": [{"type": "function", "name": "f", "foo": 1}]}),
            "tools[0].foo",
        ),
        (json!({"tool_choice": "any"}), "tool_choice"),
        (json!({"temperature": 3}), "temperature"),
        (
            json!({"input": [{"role": "user", "content": "x"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]}),
            "input",
        ),
    ] {
        let refused = ask(&server, more, 400);
        assert_eq!(refused["error"]["param"], at, "{refused}");
    }
    let harmless = json!({"store": true, "background": false, "truncation": "disabled", "include": [], "metadata": {"a": "b"}, "user": "u",
        "service_tier": "auto", "parallel_tool_calls": true, "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}},
        "previous_response_id": null, "max_tool_calls": null, "reasoning": {"effort": null}});
    let answer = ask(&server, harmless, 200);
    assert_eq!(
        (&answer["store"], &answer["metadata"]["a"]),
        (&json!(false), &json!("b"))
    );
    server.finish().expect("a clean stop");
}
