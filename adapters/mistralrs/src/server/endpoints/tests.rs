//! Checks every endpoint of the list: its answer to a sample, its rights, and its row in the docs.

use std::fs;
use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use super::endpoints;
use crate::fixture_tests::servable;
use crate::fixture_tests::serving::{Running, toml_for};
use crate::server::guard::Right;

/// Endpoint, request body, and status of the answer.
fn samples() -> Vec<(&'static str, Value, u16)> {
    let none = Value::Null;
    let messages = json!([{"role": "user", "content": "Why?"}]);
    vec![
        (
            "POST /v1/chat/completions",
            json!({"messages": messages, "max_tokens": 2}),
            200,
        ),
        (
            "POST /v1/completions",
            json!({"prompt": "Why", "max_tokens": 2}),
            200,
        ),
        (
            "POST /v1/responses",
            json!({"input": "Why?", "max_output_tokens": 2}),
            200,
        ),
        // No model of the sample has scoring enabled.
        (
            "POST /v1/monteclora/score",
            json!({"messages": messages, "choices": ["yes", "no"]}),
            400,
        ),
        ("GET /v1/models", none.clone(), 200),
        ("GET /v1/models/NAME", none.clone(), 404),
        ("GET /healthz", none.clone(), 200),
        ("GET /health", none.clone(), 200),
        ("GET /readyz", none.clone(), 200),
        ("GET /metrics", none.clone(), 200),
        (
            "POST /v1/load_lora_adapter",
            json!({"lora_name": "copy", "lora_path": "copy"}),
            200,
        ),
        (
            "POST /v1/unload_lora_adapter",
            json!({"lora_name": "copy"}),
            200,
        ),
        ("GET /v1/lora_adapters", none.clone(), 200),
        ("POST /v1/reload", none.clone(), 200),
        ("GET /", none.clone(), 200),
        ("GET /ui/style.css", none.clone(), 200),
        ("GET /ui/page.js", none.clone(), 200),
        ("GET /ui/examples.json", none, 200),
    ]
}

fn shown_path(path: &str) -> String {
    path.replace("{*name}", "NAME")
}

#[test]
fn every_endpoint_answers_its_sample_to_those_who_may_ask() {
    let case = servable();
    let extra = "[auth]\napi_keys_file = 'keys.txt'\nadmin_keys_file = 'admin.txt'\n[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    let (server, dir) = Running::start_changed(&toml_for(&case, extra), |config| config.ui = true);
    let copy = dir.path().join("adapters/copy");
    case.copy_adapter(&copy);
    let endpoints = endpoints();
    let samples = samples();
    assert_eq!(endpoints.len(), samples.len());
    for endpoint in &endpoints {
        let path = shown_path(endpoint.path);
        let name = format!("{} {path}", endpoint.method);
        let sample = samples.iter().find(|(sampled, ..)| *sampled == name);
        let (_, body, status) = sample.unwrap_or_else(|| panic!("no sample for {name}"));
        let ask = |method: &Method, key: Option<&str>| {
            let mut request = server.client.request(method.clone(), server.url(&path));
            if let Some(key) = key {
                request = request.bearer_auth(key);
            }
            if !body.is_null() {
                request = request.json(body);
            }
            request.send().expect("answered").status().as_u16()
        };
        let keys = [
            (Right::Anyone, None),
            (Right::Inference, Some("user-key")),
            (Right::Administrator, Some("admin-key")),
        ];
        for (right, key) in keys {
            let expected = if right < endpoint.right { 401 } else { *status };
            assert_eq!(ask(&endpoint.method, key), expected, "{name} {right:?}");
        }
        assert_eq!(ask(&Method::DELETE, Some("admin-key")), 405, "{name}");
    }
    server.finish().expect("a clean stop");
}

#[test]
fn every_endpoint_has_a_row_in_the_docs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/serve.md");
    let docs = fs::read_to_string(path).expect("the docs are there");
    let rows: Vec<&str> = docs.lines().filter(|line| line.starts_with('|')).collect();
    assert!(!rows.is_empty());
    for endpoint in endpoints() {
        let name = format!("`{} {}`", endpoint.method, shown_path(endpoint.path));
        let found = rows.iter().any(|row| row.contains(&name));
        assert!(found, "docs/serve.md has no row with {name}");
    }
}

#[test]
fn a_wrong_key_of_an_administrators_request_is_named() {
    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read")]
    struct Two {
        first: String,
        second: usize,
    }
    for (body, key) in [
        (json!({"first": 1, "second": 2}), "first"),
        (json!({"first": "x", "second": "y"}), "second"),
        (json!({"first": "x", "second": 2, "third": 3}), "third"),
        (json!({"first": "x"}), "second"),
        (json!({"first": null, "second": 2}), "first"),
        (json!([]), "body"),
    ] {
        let error = super::parse::<Two>(body.to_string().as_bytes());
        assert_eq!(error.expect_err("refused").body()["error"]["param"], key);
    }
}
