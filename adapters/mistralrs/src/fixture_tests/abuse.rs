//! Requests that are wrong, too many, too large, too slow or abandoned; the server must continue to work.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::servable;
use super::serving::{Running, chat, events, long_chat, parse, toml_for};

/// Sends bytes as they are, and returns everything that comes back until the connection closes.
fn raw(server: &Running, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.address).expect("accepted");
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .expect("set");
    // The server may refuse and close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> u16 {
    let code = answer.split_whitespace().nth(1).unwrap_or_default();
    code.parse().unwrap_or(0)
}

fn post_bytes(server: &Running, path: &str, body: &[u8]) -> (u16, String) {
    let response = server
        .client
        .post(server.url(path))
        .header("content-type", "application/json")
        .body(body.to_vec())
        .send()
        .expect("answered");
    (response.status().as_u16(), response.text().expect("text"))
}

/// A pseudo-random generator for test cases only; it is the same in each run.
struct Cases(u64);

impl Cases {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(self.0 >> 33).expect("31 bits") % below
    }
}

/// Values that are wrong for every key in `malformed_bodies`.
fn wrong_values() -> Vec<Value> {
    vec![
        json!({"a": {"b": [1, 2, {"c": null}]}}),
        json!("\u{0}\u{1}\u{feff}"),
        json!(-1),
        json!(1e308),
        json!([[[[[]]]]]),
        json!(""),
        json!([null]),
    ]
}

/// Bodies that no endpoint accepts.
fn malformed_bodies(valid: &Value) -> Vec<Vec<u8>> {
    let text = valid.to_string();
    let mut bodies: Vec<Vec<u8>> = Vec::new();
    // Cut off anywhere.
    bodies.extend((0..text.len()).map(|end| text.as_bytes()[..end].to_vec()));
    // Not a request at all.
    for other in [
        "null",
        "1",
        "\"x\"",
        "[]",
        "[{}]",
        "{}",
        "{\"model\":\"base\"}",
        "NaN",
        "{'a':1}",
    ] {
        bodies.push(other.as_bytes().to_vec());
    }
    bodies.push([b"[".repeat(20_000), b"]".repeat(20_000)].concat());
    bodies.push(vec![0xff; 300]);
    bodies.push([text.as_bytes(), b"}"].concat());
    bodies.push([text.as_bytes(), text.as_bytes()].concat());
    // A wrong value under each key, and keys that do not exist.
    let keys = [
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "logprobs",
        "tools",
        "response_format",
        "max_token",
        "functions",
        "unknown",
    ];
    for key in keys {
        for value in wrong_values() {
            let harmless = match key {
                // An empty text is a valid content, a stop list is checked text by text, and a seed may be negative.
                "seed" => value == json!(-1),
                "stop" => value == json!("\u{0}\u{1}\u{feff}"),
                "temperature" | "top_p" => false,
                "presence_penalty" | "frequency_penalty" => value == json!(-1),
                "prompt" => value.is_string(),
                _ => false,
            };
            if harmless {
                continue;
            }
            let mut body = valid.clone();
            body[key] = value;
            bodies.push(body.to_string().into_bytes());
        }
    }
    bodies
}

#[test]
fn a_thousand_malformed_requests_are_refused_and_the_server_lives() {
    let (server, dir) = Running::start(&toml_for(
        &servable(),
        "[admin]\nenabled = true\nadapter_root = 'adapters'\n[limits]\nmax_body_bytes = 100000\nheader_timeout_s = 2\n",
    ));
    let before = parse(
        server.post("/v1/chat/completions", &chat("tuned", false)),
        200,
    );
    let n_sent = Cell::new(0);
    let refuse = |status: u16, text: &str, what: &dyn Fn() -> String| {
        n_sent.set(n_sent.get() + 1);
        assert!(
            (400..500).contains(&status),
            "{status} {text} for {}",
            what()
        );
        let answer: Value = serde_json::from_str(text).unwrap_or_default();
        assert!(
            answer["error"]["message"].is_string(),
            "{text} for {}",
            what()
        );
        assert!(answer["error"]["type"].is_string());
        assert!(
            !text.contains(dir.path().to_str().expect("UTF-8")),
            "{text}"
        );
    };

    let completion = json!({"model": "tuned", "prompt": "Why", "max_tokens": 2, "temperature": 0});
    for (path, valid) in [
        ("/v1/chat/completions", chat("tuned", false)),
        ("/v1/completions", completion),
    ] {
        for body in malformed_bodies(&valid) {
            let (status, text) = post_bytes(&server, path, &body);
            refuse(status, &text, &|| {
                format!(
                    "{path} {}",
                    String::from_utf8_lossy(&body[..body.len().min(200)])
                )
            });
        }
        // Randomly changed bytes; a body that is still a valid request may be answered.
        let mut cases = Cases(7);
        let text = valid.to_string();
        for _ in 0..300 {
            let mut body = text.clone().into_bytes();
            for _ in 0..4 {
                let at = cases.next(body.len());
                body[at] = u8::try_from(cases.next(256)).expect("a byte");
            }
            let (status, text) = post_bytes(&server, path, &body);
            n_sent.set(n_sent.get() + 1);
            assert!(
                status == 200 || (400..500).contains(&status),
                "{status} {text} for {}",
                String::from_utf8_lossy(&body)
            );
        }
    }
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        for body in [
            json!({}),
            json!({"lora_name": "x"}),
            json!({"lora_name": 1, "lora_path": "x"}),
            json!({"lora_name": "", "lora_path": "nothing"}),
            json!({"lora_name": "x", "lora_path": "../x"}),
            json!({"lora_name": "x", "lora_path": "/etc/passwd"}),
            json!({"lora_name": "x", "lora_path": "a\u{0}b"}),
            json!({"lora_name": "x", "lora_path": "x".repeat(10_000)}),
            json!({"lora_name": "base", "lora_path": "."}),
            json!([]),
        ] {
            let (status, text) = post_bytes(&server, path, body.to_string().as_bytes());
            refuse(status, &text, &|| format!("{path} {body}"));
        }
    }
    for (method, path) in [
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/models"),
        ("POST", "/re_isq"),
        ("POST", "/v1/models/unload"),
        ("GET", "/v1/models/nobody"),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd"),
        ("GET", "/../../etc/passwd"),
        ("OPTIONS", "/v1/chat/completions"),
        ("PATCH", "/"),
    ] {
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        let answer = raw(&server, head.as_bytes());
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        refuse(status(&answer), body, &|| format!("{method} {path}"));
    }
    // Bytes that are not HTTP get 400 or 431 without a body, or a closed connection.
    let long_header = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(200_000));
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(500));
    for (bytes, expected) in [
        (&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
            400,
        ),
        (b"\r\n\r\n\r\n\0\0\0\0", 400),
        (long_header.as_bytes(), 431),
        (many_headers.as_bytes(), 431),
    ] {
        let answer = raw(&server, bytes);
        n_sent.set(n_sent.get() + 1);
        assert!(
            answer.is_empty() || status(&answer) == expected,
            "{answer} instead of {expected}"
        );
    }
    assert!(n_sent.get() >= 1000, "only {}", n_sent.get());

    let after = parse(
        server.post("/v1/chat/completions", &chat("tuned", false)),
        200,
    );
    assert_eq!(before["choices"], after["choices"]);
    assert_eq!(
        parse(server.get("/v1/models"), 200)["data"]
            .as_array()
            .map(Vec::len),
        Some(2)
    );
    server.finish().expect("a clean stop");
}

#[test]
fn slow_clients_are_cut_off_and_large_bodies_refused() {
    let (server, _dir) = Running::start(&toml_for(
        &servable(),
        "[limits]\nmax_body_bytes = 1000\nheader_timeout_s = 1\nbody_timeout_s = 1\n",
    ));
    let started = Instant::now();
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\nhost: loc"] {
        raw(&server, bytes);
    }
    let body = raw(
        &server,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{\"mo",
    );
    assert_eq!(status(&body), 408, "{body}");
    assert!(body.contains("body_timeout"), "{body}");
    let elapsed = started.elapsed();
    assert!(
        (Duration::from_secs(2)..Duration::from_secs(20)).contains(&elapsed),
        "{elapsed:?}"
    );

    for head in ["content-length: 1001", "transfer-encoding: chunked"] {
        let chunk = format!("3e9\r\n{}\r\n0\r\n\r\n", " ".repeat(1001));
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{head}\r\n\r\n{chunk}"
        );
        let answer = raw(&server, request.as_bytes());
        assert_eq!(status(&answer), 413, "{answer}");
        assert!(answer.contains("body_too_large"));
    }
    server.finish().expect("a clean stop");
}

#[test]
fn a_client_that_leaves_takes_nothing_with_it() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    let long = long_chat("tuned", true);
    let whole = |text: &str| -> u64 {
        text.lines()
            .find_map(|line| line.strip_prefix(r#"monteclora_answers_total{outcome="canceled"} "#))
            .map_or(0, |n| n.parse().expect("a number"))
    };
    for stream in [false, true] {
        // In the same batch as the abandoned requests.
        let companion = server.post("/v1/chat/completions", &long);
        let mut abandoned = long.clone();
        abandoned["stream"] = json!(stream);
        let body = abandoned.to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        for _ in 0..4 {
            let mut leaving = TcpStream::connect(server.address).expect("accepted");
            leaving.write_all(request.as_bytes()).expect("sent");
            std::thread::sleep(Duration::from_millis(30));
            drop(leaving);
        }
        let rest = events(companion);
        assert_eq!(rest.last().map(String::as_str), Some("[DONE]"));
        let last: Value = serde_json::from_str(&rest[rest.len() - 2]).expect("JSON");
        let reason = last["choices"][0]["finish_reason"]
            .as_str()
            .expect("a reason");
        assert!(["stop", "length"].contains(&reason), "{last}");
        parse(
            server.post("/v1/chat/completions", &chat("tuned", false)),
            200,
        );
    }
    let text = server.metrics_with("monteclora_requests_in_flight 0");
    assert!(whole(&text) > 0, "{text}");
    assert!(text.contains("monteclora_requests_waiting 0\n"), "{text}");
    server.finish().expect("a clean stop");
}

#[test]
fn connections_beyond_the_limit_wait_for_one_to_close() {
    let limits = "[limits]\nmax_connections = 2\n";
    let (server, _dir) = Running::start(&toml_for(&servable(), limits));
    let connect = || {
        let mut stream = TcpStream::connect(server.address).expect("accepted");
        let request = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
        stream.write_all(request.as_bytes()).expect("sent");
        stream
    };
    let answers = |stream: &mut TcpStream, limit: Duration| {
        stream.set_read_timeout(Some(limit)).expect("set");
        stream.read(&mut [0; 1024]).is_ok_and(|n| n > 0)
    };
    let patience = Duration::from_secs(20);
    let mut first = connect();
    assert!(answers(&mut first, patience));
    let mut second = connect();
    assert!(answers(&mut second, patience));
    let mut third = connect();
    assert!(!answers(&mut third, Duration::from_millis(300)));
    drop(first);
    assert!(answers(&mut third, patience));
    drop((second, third));
    server.finish().expect("a clean stop");
}

/// A stop lets an answer continue for as long as draining may take. An unfinished answer then ends with an error.
#[test]
fn a_stop_waits_for_answers_up_to_its_limit() {
    let stopped_while = |limits: &str, n: usize| {
        let (server, _dir) = Running::start(&toml_for(&servable(), limits));
        let mut long = long_chat("tuned", true);
        long["n"] = json!(n);
        let mut stream = BufReader::new(server.post("/v1/chat/completions", &long)).lines();
        stream.next().expect("begun").expect("readable");
        let started = Instant::now();
        let reading = std::thread::spawn(move || {
            let lines = stream.map(|line| line.expect("not cut"));
            let data: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
            data
        });
        server.finish().expect("a clean stop");
        (reading.join().expect("no panic"), started.elapsed())
    };
    let (whole, _) = stopped_while("", 1);
    assert_eq!(whole.last().map(String::as_str), Some("data: [DONE]"));
    let last: Value = serde_json::from_str(&whole[whole.len() - 2][6..]).expect("JSON");
    assert!(last["choices"][0]["finish_reason"].is_string(), "{last}");

    let (cut, elapsed) = stopped_while("[limits]\ndrain_timeout_s = 1\n", 16);
    assert_eq!(cut.last().map(String::as_str), Some("data: [DONE]"));
    let last: Value = serde_json::from_str(&cut[cut.len() - 2][6..]).expect("JSON");
    assert_eq!(last["error"]["code"], "overloaded", "{last}");
    assert!(
        (Duration::from_secs(1)..Duration::from_secs(20)).contains(&elapsed),
        "{elapsed:?}"
    );
}

#[test]
fn what_is_too_much_is_turned_away_clearly() {
    let (server, _dir) = Running::start(&toml_for(
        &servable(),
        "[limits]\nmax_concurrent_requests = 1\nmax_completion_tokens = 400\nmax_prompt_tokens = 100\n",
    ));
    let path = "/v1/chat/completions";
    let long = long_chat("tuned", true);
    let mut busy = server.post(path, &long);
    let refused = server.post(path, &chat("base", false));
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(parse(refused, 503)["error"]["code"], "overloaded");
    let mut rest = Vec::new();
    busy.read_to_end(&mut rest).expect("to its end");
    assert!(rest.ends_with(b"data: [DONE]\n\n"));

    let mut greedy = chat("base", false);
    greedy["max_tokens"] = json!(401);
    // The place is free again when the engine is done; the client may know the end earlier.
    let deadline = Instant::now() + Duration::from_secs(10);
    let answer = loop {
        let answer = server.post(path, &greedy);
        if answer.status() != 503 || Instant::now() > deadline {
            break parse(answer, 400);
        }
    };
    assert_eq!(answer["error"]["param"], "max_tokens");
    let mut wordy = chat("base", false);
    wordy["messages"][0]["content"] = json!("x".repeat(200));
    let answer = parse(server.post(path, &wordy), 400);
    assert_eq!(answer["error"]["param"], "messages");
    let wordy = json!({"model": "base", "prompt": "x".repeat(200), "max_tokens": 2});
    let answer = parse(server.post("/v1/completions", &wordy), 400);
    assert_eq!(answer["error"]["param"], "prompt");
    server.finish().expect("a clean stop");
}
