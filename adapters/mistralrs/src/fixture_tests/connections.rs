//! Tests of the transport: wrong addresses, pages of other sites, compressed bodies, unread bodies, idle connections.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use reqwest::Method;
use serde_json::{Value, json};

use super::servable;
use super::serving::{Running, chat, events, parse, toml_for};

const CHAT: &str = "/v1/chat/completions";

#[test]
fn a_wrong_address_is_answered_with_the_right_one() {
    let (server, _dir) = Running::start(&toml_for(&servable(), ""));
    for (path, meant) in [
        ("/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        (
            "/embeddings",
            "POST /v1/responses, POST /v1/monteclora/score, GET /v1/models",
        ),
    ] {
        let refused = parse(server.post(path, &chat("tuned", false)), 404);
        let message = refused["error"]["message"].as_str().expect("a text");
        assert!(message.contains(meant), "{message}");
        let administers = message.contains("lora_adapter");
        assert!(!administers, "only what this server offers");
    }
    let wrong = server.get(CHAT);
    assert_eq!(wrong.headers()["allow"], "POST");
    let refused = parse(wrong, 405);
    assert_eq!(
        refused["error"]["message"],
        "`/v1/chat/completions` takes POST, not GET"
    );
    server.finish().expect("a clean stop");
}

#[test]
fn a_page_may_send_the_headers_of_its_sdk() {
    let origin = "https://app.example";
    let own = format!("[server]\nallowed_origins = ['{origin}']");
    let toml = toml_for(&servable(), "").replace("[server]", &own);
    let (server, _dir) = Running::start(&toml);
    let wanted = "authorization,content-type,x-stainless-os,x-stainless-retry-count,openai-organization,http-referer,x-title";
    let preflight = |origin: &str| {
        let request = server
            .client
            .request(Method::OPTIONS, server.url(CHAT))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", wanted);
        request.send().expect("answered")
    };
    let allowed = preflight(origin);
    assert_eq!(allowed.status(), 200);
    let header = |name: &str| allowed.headers()[name].to_str().expect("text");
    assert_eq!(header("access-control-allow-origin"), origin);
    assert_eq!(header("access-control-allow-headers"), wanted);
    assert_eq!(header("access-control-max-age"), "600");
    assert!(header("access-control-allow-methods").contains("POST"));
    let refused = preflight("https://evil.example");
    let granted = refused.headers().get("access-control-allow-origin");
    assert!(granted.is_none(), "{granted:?}");
    let request = server
        .client
        .post(server.url(CHAT))
        .header("origin", origin);
    let answer = request
        .json(&chat("tuned", false))
        .send()
        .expect("answered");
    let exposed = &answer.headers()["access-control-expose-headers"];
    assert_eq!(exposed, "x-request-id,retry-after");
    server.finish().expect("a clean stop");
}

fn zipped(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).expect("compressed");
    encoder.finish().expect("compressed")
}

#[test]
fn compressed_bodies_are_read_within_the_limit() {
    let limit = "[limits]\nmax_body_bytes = 100000\n";
    let (server, _dir) = Running::start(&toml_for(&servable(), limit));
    let ask = |encoding: &str, body: Vec<u8>, status: u16| {
        let request = server
            .client
            .post(server.url(CHAT))
            .header("content-encoding", encoding)
            .body(body);
        parse(request.send().expect("answered"), status)
    };
    let body = chat("tuned", false);
    let plain = parse(server.post(CHAT, &body), 200);
    let answer = ask("gzip", zipped(body.to_string().as_bytes()), 200);
    assert_eq!(answer["choices"], plain["choices"]);
    let bomb = zipped(&vec![b' '; 50 << 20]);
    assert!(bomb.len() < 100_000);
    assert_eq!(ask("gzip", bomb, 413)["error"]["code"], "body_too_large");
    let refused = ask("br", b"x".to_vec(), 415);
    let message = refused["error"]["message"].as_str().expect("a text");
    assert!(message.contains("`br`"), "{message}");
    ask("gzip", b"no gzip at all".to_vec(), 400);
    server.finish().expect("a clean stop");
}

/// Reads one answer: its head, and as many bytes of body as the head says.
fn read_answer(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).expect("readable"), 1, "closed");
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).expect("text").to_lowercase();
    let length = head
        .split("content-length: ")
        .nth(1)
        .and_then(|rest| rest.lines().next());
    let length = length.expect("a length").parse().expect("a number");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("whole");
    head + &String::from_utf8(body).expect("text")
}

#[test]
fn a_body_that_is_not_read_closes_the_connection_after_the_answer() {
    let extra = "[auth]\napi_keys_file = 'keys.txt'\n[limits]\nmax_body_bytes = 1000000\n";
    let (server, _dir) = Running::start(&toml_for(&servable(), extra));
    let send = |path: &str, length: usize| {
        let mut stream = TcpStream::connect(server.address).expect("accepted");
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("sent");
        // Sends the whole body, as most clients do before they read an answer.
        stream.write_all(&vec![b' '; length]).expect("sent");
        std::thread::sleep(Duration::from_millis(50));
        stream
    };
    for (path, status) in [(CHAT, "401"), ("/nothing", "404"), ("/v1/models", "405")] {
        let mut stream = send(path, 4 << 20);
        let answer = read_answer(&mut stream);
        assert!(
            answer.starts_with(&format!("http/1.1 {status}")),
            "{answer}"
        );
        assert!(answer.contains("connection: close"), "{answer}");
        assert_eq!(stream.read(&mut [0]).expect("closed in order"), 0);
        // A small body is read, and the connection stays open.
        let mut stream = send(path, 1000);
        let answer = read_answer(&mut stream);
        assert!(!answer.contains("connection: close"), "{answer}");
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            .expect("sent");
        assert!(read_answer(&mut stream).starts_with("http/1.1 200"));
    }
    server.finish().expect("a clean stop");
}

#[test]
fn a_pause_between_requests_may_be_longer_than_a_head() {
    let limits = "[limits]\nheader_timeout_s = 1\nkeep_alive_timeout_s = 3\n";
    let (server, _dir) = Running::start(&toml_for(&servable(), limits));
    let mut stream = TcpStream::connect(server.address).expect("accepted");
    for pause in [0, 2000] {
        std::thread::sleep(Duration::from_millis(pause));
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            .expect("sent");
        assert!(read_answer(&mut stream).starts_with("http/1.1 200"));
    }
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("set");
    assert_eq!(stream.read(&mut [0]).expect("closed in order"), 0);
    server.finish().expect("a clean stop");
}

/// If the token limit cuts a character, the answer omits it, whole or streamed.
#[test]
fn answers_end_with_a_whole_character() {
    let case = servable();
    let tokenizer = tokenizers::Tokenizer::from_file(case.base.join("tokenizer.json"));
    let tokenizer = tokenizer.expect("a tokenizer");
    // The three bytes of a character, one byte per token.
    let [first, second, third] = ["â", "Ĥ", "¬"].map(|token| {
        let id = tokenizer.token_to_id(token);
        id.expect("a vocabulary of bytes").to_string()
    });
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    let mut n_cut = 0;
    for seed in 0..12 {
        for max_tokens in 1..=6 {
            let mut body = chat("tuned", false);
            body["temperature"] = json!(2);
            body["seed"] = json!(seed);
            body["max_tokens"] = json!(max_tokens);
            body["logit_bias"] = json!({&first: 100, &second: 100, &third: 100});
            let answer = parse(server.post(CHAT, &body), 200);
            let whole = answer["choices"][0]["message"]["content"].as_str();
            let whole = whole.expect("a text").to_owned();
            assert!(!whole.ends_with('\u{fffd}'), "{whole:?}");
            n_cut += usize::from(whole.chars().count() < max_tokens);
            body["stream"] = json!(true);
            let chunks = events(server.post(CHAT, &body));
            let pieces = chunks.iter().filter_map(|data| {
                let chunk: Value = serde_json::from_str(data).ok()?;
                Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())
            });
            assert_eq!(pieces.collect::<String>(), whole);
        }
    }
    assert!(n_cut > 20, "{n_cut}");
    server.finish().expect("a clean stop");
}
