//! Tests for operators: HTTPS, origins, metrics, request ids, changed keys.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::servable;
use super::serving::{Running, chat, parse, toml_for};

/// Writes a self-signed certificate for localhost, and returns it.
fn write_certificate(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    fs::write(dir.join("cert.pem"), made.cert.pem()).expect("written");
    fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).expect("written");
    made.cert.der().clone()
}

/// The answer to a request over TLS, from a client that trusts only `root`.
fn ask_over_tls(
    server: &Running,
    root: &CertificateDer<'static>,
    request: &str,
) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).expect("a root");
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    // The offer of most clients. The request is HTTP/1.1, which the server must choose.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").expect("a name");
    let client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut stream = StreamOwned::new(client, TcpStream::connect(server.address)?);
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn https_is_spoken_with_a_certificate_that_can_be_replaced() {
    let made = tempfile::tempdir().expect("a temporary directory");
    let first = write_certificate(made.path());
    let section = format!(
        "[admin]\nenabled = true\nadapter_root = 'adapters'\n[server]\nport = 0\ntls_cert = '{0}/cert.pem'\ntls_key = '{0}/key.pem'",
        made.path().display()
    );
    let toml = toml_for(&servable(), "").replace("[server]\nport = 0", &section);
    let (server, _dir) = Running::start(&toml);
    let request = "GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let answer = ask_over_tls(&server, &first, request).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    let second = write_certificate(made.path());
    ask_over_tls(&server, &second, request).expect_err("not in use yet");
    let reload = "POST /v1/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let answer = ask_over_tls(&server, &first, reload).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains(r#""kept":["base","tuned"]"#), "{answer}");
    ask_over_tls(&server, &second, request).expect("in use now");

    fs::write(made.path().join("key.pem"), "no key").expect("written");
    let answer = ask_over_tls(&server, &second, reload).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert!(
        !answer.contains(made.path().to_str().expect("UTF-8")),
        "{answer}"
    );
    ask_over_tls(&server, &second, request).expect("still in use");
    // Plain HTTP gets nothing.
    let mut plain = TcpStream::connect(server.address).expect("accepted");
    plain.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"));
    server.finish().expect("a clean stop");
}

#[test]
fn pages_of_other_origins_are_kept_out() {
    let (closed, _dir) = Running::start(&toml_for(&servable(), ""));
    let ask = |server: &Running, header: &str, value: &str| {
        server
            .client
            .get(server.url("/v1/models"))
            .header(header, value)
            .send()
            .expect("answered")
    };
    let refused = ask(&closed, "origin", "https://evil.example");
    assert!(
        refused
            .headers()
            .get("access-control-allow-origin")
            .is_none()
    );
    assert_eq!(parse(refused, 403)["error"]["code"], "origin_not_allowed");
    let refused = ask(&closed, "host", "evil.example:1234");
    assert_eq!(parse(refused, 403)["error"]["code"], "host_not_allowed");
    assert_eq!(ask(&closed, "host", "localhost").status(), 200);
    let same = format!("http://{}", closed.address);
    assert_eq!(ask(&closed, "origin", &same).status(), 200);
    closed.finish().expect("a clean stop");

    let toml = toml_for(&servable(), "").replace(
        "[server]",
        "[server]\nallowed_origins = ['https://app.example']",
    );
    let (open, _dir) = Running::start(&toml);
    let allowed = ask(&open, "origin", "https://app.example");
    assert_eq!(
        allowed.headers()["access-control-allow-origin"],
        "https://app.example"
    );
    assert_eq!(allowed.status(), 200);
    assert_eq!(ask(&open, "origin", "https://evil.example").status(), 403);
    let preflight = open
        .client
        .request(reqwest::Method::OPTIONS, open.url("/v1/chat/completions"))
        .header("origin", "https://app.example")
        .header("access-control-request-method", "POST")
        .header(
            "access-control-request-headers",
            "authorization,content-type",
        )
        .send()
        .expect("answered");
    assert_eq!(preflight.status(), 200);
    let methods = preflight.headers()["access-control-allow-methods"]
        .to_str()
        .expect("text");
    assert!(methods.contains("POST"), "{methods}");
    open.finish().expect("a clean stop");
}

#[test]
fn metrics_count_what_happens_and_need_the_administrators_key() {
    let extra = "[auth]\napi_keys_file = 'keys.txt'\nadmin_keys_file = 'admin.txt'\n[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    let (server, dir) = Running::start(&toml_for(&servable(), extra));
    let ask = |method: reqwest::Method, path: &str, key: &str, body: Option<&Value>| {
        let mut request = server
            .client
            .request(method, server.url(path))
            .bearer_auth(key);
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().expect("answered")
    };
    let get = |path: &str, key: &str| ask(reqwest::Method::GET, path, key, None);
    let post =
        |path: &str, key: &str, body: &Value| ask(reqwest::Method::POST, path, key, Some(body));
    assert_eq!(server.get("/metrics").status(), 401);
    assert_eq!(get("/metrics", "user-key").status(), 401);

    let answer = post("/v1/chat/completions", "user-key", &chat("tuned", false));
    assert_eq!(answer.headers()["x-request-id"].len(), 36);
    let tokens = parse(answer, 200)["usage"]["completion_tokens"]
        .as_u64()
        .expect("a number");
    let named = server
        .client
        .post(server.url("/v1/chat/completions"))
        .bearer_auth("user-key")
        .header("x-request-id", "mine-1")
        .json(&chat("nobody", false))
        .send()
        .expect("answered");
    assert_eq!(named.headers()["x-request-id"], "mine-1");
    assert_eq!(named.status(), 404);
    let missing = json!({"lora_name": "x", "lora_path": "missing"});
    assert_eq!(
        post("/v1/load_lora_adapter", "admin-key", &missing).status(),
        400
    );

    let scraped = get("/metrics", "admin-key");
    let kind = scraped.headers()["content-type"]
        .to_str()
        .expect("text")
        .to_owned();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let text = scraped.text().expect("text");
    let route = "route=\"/v1/chat/completions\"";
    for line in [
        format!("monteclora_requests_total{{{route},model=\"tuned\",status=\"200\"}} 1"),
        format!("monteclora_requests_total{{{route},model=\"\",status=\"404\"}} 1"),
        format!("monteclora_completion_tokens_total{{model=\"tuned\"}} {tokens}"),
        "monteclora_request_duration_seconds_count{model=\"tuned\"} 1".to_owned(),
        "monteclora_time_to_first_token_seconds_count{model=\"tuned\"} 1".to_owned(),
        "monteclora_adapter_loads_total{outcome=\"refused\"} 1".to_owned(),
        "monteclora_models 1".to_owned(),
        "monteclora_adapters 1".to_owned(),
        "monteclora_resident_generations 2".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    for secret in [
        "user-key",
        "admin-key",
        "nobody",
        dir.path().to_str().expect("UTF-8"),
    ] {
        assert!(!text.contains(secret), "{secret}");
    }

    // Keys change without a restart; an invalid key file changes nothing.
    fs::write(dir.path().join("keys.txt"), "another-key\n").expect("written");
    parse(post("/v1/reload", "admin-key", &json!({})), 200);
    assert_eq!(get("/v1/models", "user-key").status(), 401);
    assert_eq!(get("/v1/models", "another-key").status(), 200);
    fs::write(dir.path().join("keys.txt"), "sha256:short\n").expect("written");
    let refused = parse(post("/v1/reload", "admin-key", &json!({})), 422);
    assert!(
        !refused
            .to_string()
            .contains(dir.path().to_str().expect("UTF-8")),
        "{refused}"
    );
    assert_eq!(get("/v1/models", "another-key").status(), 200);
    server.finish().expect("a clean stop");
}

#[test]
fn a_budget_is_kept_and_freed_by_unloading() {
    let case = servable();
    let bytes = case.loader().weight_bytes().expect("readable");
    let on_disk: u64 = fs::read_dir(&case.base)
        .expect("readable")
        .filter_map(|entry| entry.ok())
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .ends_with(".safetensors")
        })
        .map(|entry| entry.metadata().expect("readable").len())
        .sum();
    // The fixtures are in float32, and the header of the file is small.
    assert!(
        (on_disk / 2..=on_disk * 2).contains(&bytes),
        "{bytes} {on_disk}"
    );

    let extra = "[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    // Memory for a base and one adapter, but not for two.
    let (server, dir) = Running::start_changed(&toml_for(&case, extra), |config| {
        config.max_memory = Some(bytes * 5 / 2);
    });
    let copy = dir.path().join("adapters/second");
    case.copy_adapter(&copy);
    let load = json!({"lora_name": "second", "lora_path": "second"});
    let refused = parse(server.post("/v1/load_lora_adapter", &load), 422);
    assert_eq!(refused["error"]["code"], "over_memory_budget", "{refused}");
    parse(
        server.post("/v1/unload_lora_adapter", &json!({"lora_name": "tuned"})),
        200,
    );
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while server.post("/v1/load_lora_adapter", &load).status() != 200 {
        assert!(
            std::time::Instant::now() < deadline,
            "the memory is never free"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    server.finish().expect("a clean stop");
}

#[test]
fn the_example_is_served_with_every_key_in_use() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/serve.toml");
    let example = fs::read_to_string(path).expect("the example is there");
    let case = servable();
    // Commented keys are valid too: `# key = value` and `# [section]`, unlike prose.
    let is_key = |line: &str| {
        let line = line.trim_start_matches("# ");
        let name = line.split(" = ").next().unwrap_or_default();
        let plain = |c: char| c.is_ascii_lowercase() || c == '_';
        line.starts_with('[') || (line.contains(" = ") && name.chars().all(plain))
    };
    let made = tempfile::tempdir().expect("a temporary directory");
    write_certificate(made.path());
    let text: Vec<String> = example
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(key) if is_key(line) => key.to_owned(),
            _ => line.to_owned(),
        })
        .filter(|line| !line.starts_with("chat_template") && !line.starts_with("revision"))
        .collect();
    let text = text
        .join("\n")
        .replace("1234", "0")
        .replace(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            &case.base.display().to_string(),
        )
        .replace("../out", &case.adapter.display().to_string())
        .replace(
            "cert.pem",
            &made.path().join("cert.pem").display().to_string(),
        )
        .replace(
            "key.pem",
            &made.path().join("key.pem").display().to_string(),
        )
        .replace("adapters/.monteclora", ".monteclora");
    for key in [
        "max_memory_mb",
        "api_keys_file",
        "adapter_root",
        "in_situ_quant",
        "default_model_id",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(key)),
            "{key} in\n{text}"
        );
    }
    // The scorer is not part of this crate.
    let (server, _dir) = Running::start_changed(&text, |config| {
        for model in &mut config.models {
            assert!(model.uncertainty.take().is_some() && !model.draws.is_empty());
            model.draws.clear();
        }
    });
    server.finish().expect("a clean stop");
}

#[test]
fn an_answer_that_takes_too_long_is_ended() {
    let (server, _dir) =
        Running::start(&toml_for(&servable(), "[limits]\nrequest_timeout_s = 1\n"));
    // On a machine that generates hundreds of tokens in less than a second, the answer is complete.
    let mut long = chat("tuned", false);
    long["max_tokens"] = json!(480);
    long["temperature"] = json!(2);
    let started = std::time::Instant::now();
    let answer = server.post("/v1/chat/completions", &long);
    match answer.status().as_u16() {
        504 => assert_eq!(parse(answer, 504)["error"]["code"], "timeout"),
        _ => assert!(started.elapsed().as_millis() < 1500),
    }
    let mut again = chat("tuned", false);
    again["max_tokens"] = json!(2);
    parse(server.post("/v1/chat/completions", &again), 200);
    server.finish().expect("a clean stop");
}

/// Greedy answers to prompts of several lengths equal the answers that each request gets alone, whatever else runs.
#[test]
fn answers_do_not_depend_on_who_else_is_asking() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let ask = |length: usize, temperature: f64| {
        let mut body = chat("tuned", false);
        body["messages"] = json!([{"role": "user", "content": "abcdefgh"[..length]}]);
        body["temperature"] = json!(temperature);
        body["max_tokens"] = json!(12);
        let answer = parse(server.post("/v1/chat/completions", &body), 200);
        answer["choices"][0]["message"]["content"].to_string()
    };
    let alone: Vec<String> = (1..=8).map(|length| ask(length, 0.0)).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..6).for_each(|i| drop(ask(1 + i, 1.9))));
        }
        for shift in 0..4 {
            let (ask, alone) = (&ask, &alone);
            scope.spawn(move || {
                for i in 0..8 {
                    let at = (i + 2 * shift) % 8;
                    assert_eq!(
                        ask(at + 1, 0.0),
                        alone[at],
                        "a prompt of {} letters",
                        at + 1
                    );
                }
            });
        }
    });
    server.finish().expect("a clean stop");
}

#[test]
fn of_many_changes_at_once_each_sees_the_one_before() {
    let case = servable();
    let extra = "[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    let (server, dir) = Running::start(&toml_for(&case, extra));
    let copy = dir.path().join("adapters/copy");
    case.copy_adapter(&copy);
    let race = |body: &Value| -> Vec<u16> {
        std::thread::scope(|scope| {
            let racers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let answer = server.post("/v1/load_lora_adapter", body);
                        answer.status().as_u16()
                    })
                })
                .collect();
            let mut statuses: Vec<u16> = racers
                .into_iter()
                .map(|racer| racer.join().expect("no panic"))
                .collect();
            statuses.sort_unstable();
            statuses
        })
    };
    let plain = json!({"lora_name": "plain", "lora_path": "copy"});
    assert_eq!(race(&plain), [200, 409, 409, 409]);
    let first = json!({"lora_name": "first", "lora_path": "copy", "expected_generation": "none"});
    assert_eq!(race(&first), [200, 409, 409, 409]);
    let in_place = json!({"lora_name": "plain", "lora_path": "copy", "load_inplace": true});
    assert_eq!(race(&in_place), [200, 200, 200, 200]);

    // A load that has begun is finished even if nobody waits for the answer.
    let body = json!({"lora_name": "left", "lora_path": "copy"}).to_string();
    let request = format!(
        "POST /v1/load_lora_adapter HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut leaving = TcpStream::connect(server.address).expect("accepted");
    leaving.write_all(request.as_bytes()).expect("sent");
    std::thread::sleep(std::time::Duration::from_millis(5));
    drop(leaving);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while server.get("/v1/models/left").status() != 200 {
        assert!(
            std::time::Instant::now() < deadline,
            "the load was abandoned"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    server.finish().expect("a clean stop");
}
