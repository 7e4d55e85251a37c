//! Tests of the server over HTTP, as clients and operators use it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

use super::{Case, servable, servable_too};
use crate::config::ServeConfig;
use crate::server::Server;
use crate::{ServeFile, local_only};

/// A running server, stopped when dropped.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<crate::Result<()>>>,
    pub(crate) client: Client,
}

impl Running {
    pub(crate) fn start(toml: &str) -> (Self, tempfile::TempDir) {
        Self::start_changed(toml, |_| {})
    }

    /// Starts a server with the configuration in `toml`, modified by `change`.
    pub(crate) fn start_changed(
        toml: &str,
        change: impl FnOnce(&mut ServeConfig),
    ) -> (Self, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("serve.toml");
        fs::write(&path, toml).expect("written");
        fs::create_dir(dir.path().join("adapters")).expect("created");
        fs::write(dir.path().join("keys.txt"), "user-key\n").expect("written");
        fs::write(dir.path().join("admin.txt"), "admin-key\n").expect("written");
        let source = move || ServeFile::read(&path).and_then(|file| file.resolve(&local_only));
        let mut config: ServeConfig = source().expect("a sound configuration");
        change(&mut config);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (ready, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(async {
                let server = Server::start(&config).await?.with_source(Arc::new(source));
                ready.send(server.address()).expect("the test waits");
                server
                    .run_until(async {
                        let _ = stopped.await;
                    })
                    .await;
                Ok(())
            })
        });
        let running = Self {
            address: address.recv().expect("the server starts"),
            stop: Some(stop),
            thread: Some(thread),
            client: Client::new(),
        };
        (running, dir)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().expect("answered")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.client
            .post(self.url(path))
            .json(body)
            .send()
            .expect("answered")
    }

    /// Waits until the metrics contain the line `line`, and returns them.
    pub(crate) fn metrics_with(&self, line: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let text = self.get("/metrics").text().expect("readable");
            if text.lines().any(|found| found == line) {
                return text;
            }
            assert!(Instant::now() < deadline, "no `{line}` in:\n{text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn finish(mut self) -> crate::Result<()> {
        drop(self.stop.take());
        self.thread
            .take()
            .expect("running")
            .join()
            .expect("no panic")
    }
}

pub(crate) fn toml_for(case: &Case, extra: &str) -> String {
    format!(
        "{extra}\n[server]\nport = 0\n[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\n[[models.adapters]]\nalias = 'tuned'\nsource = '{}'\n",
        case.base.display(),
        case.adapter.display()
    )
}

pub(crate) fn chat(model: &str, stream: bool) -> Value {
    json!({"model": model, "stream": stream, "temperature": 0, "max_tokens": 12,
        "messages": [{"role": "user", "content": "Why?"}]})
}

/// A request with a long answer: at temperature 2 the tiny model generates up to the limit.
pub(crate) fn long_chat(model: &str, stream: bool) -> Value {
    let mut long = chat(model, stream);
    long["max_tokens"] = json!(400);
    long["temperature"] = json!(2);
    long
}

/// The data of all events of a stream.
pub(crate) fn events(response: Response) -> Vec<String> {
    BufReader::new(response)
        .lines()
        .map(|line| line.expect("readable"))
        .filter_map(|line| line.strip_prefix("data: ").map(str::to_owned))
        .collect()
}

pub(crate) fn parse(response: Response, status: u16) -> Value {
    let found = response.status().as_u16();
    let text = response.text().expect("readable");
    assert_eq!(found, status, "{text}");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn the_server_answers_as_openai_clients_expect() {
    let case = servable();
    let (server, _dir) = Running::start(&toml_for(&case, ""));

    assert_eq!(parse(server.get("/healthz"), 200)["status"], "ok");
    assert_eq!(parse(server.get("/health"), 200)["status"], "ok");
    assert_eq!(parse(server.get("/readyz"), 200)["status"], "ready");
    let models = parse(server.get("/v1/models"), 200);
    let names: Vec<_> = models["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|m| (&m["id"], &m["parent"]))
        .collect();
    assert_eq!(
        names,
        [
            (&json!("base"), &Value::Null),
            (&json!("tuned"), &json!("base"))
        ]
    );
    assert!(
        !models
            .to_string()
            .contains(case.base.to_str().expect("UTF-8"))
    );
    assert_eq!(parse(server.get("/v1/models/tuned"), 200)["id"], "tuned");
    parse(server.get("/v1/models/else"), 404);

    let mut texts = Vec::new();
    for model in ["base", "tuned"] {
        let whole = parse(
            server.post("/v1/chat/completions", &chat(model, false)),
            200,
        );
        assert_eq!(whole["model"], model);
        assert_eq!(whole["object"], "chat.completion");
        let reason = whole["choices"][0]["finish_reason"]
            .as_str()
            .expect("a reason");
        let text = whole["choices"][0]["message"]["content"]
            .as_str()
            .expect("a text")
            .to_owned();
        assert!(
            whole["usage"]["completion_tokens"]
                .as_u64()
                .expect("counted")
                <= 12
        );

        let stream = events(server.post("/v1/chat/completions", &chat(model, true)));
        assert_eq!(stream.last().map(String::as_str), Some("[DONE]"));
        let chunks: Vec<Value> = stream[..stream.len() - 1]
            .iter()
            .map(|data| serde_json::from_str(data).expect("JSON"))
            .collect();
        let last = chunks.last().expect("a last chunk");
        assert_eq!(last["choices"][0]["finish_reason"], reason);
        assert!(chunks.iter().all(|chunk| chunk["model"] == model));
        let streamed: String = chunks
            .iter()
            .filter_map(|c| c["choices"][0]["delta"]["content"].as_str())
            .collect();
        // An incomplete character at the end is U+FFFD in a whole answer, and is omitted in a stream.
        assert_eq!(streamed, text.trim_end_matches('\u{fffd}'));
        texts.push(text);
    }
    assert_ne!(texts[0], texts[1], "the adapter must change the answer");
    let mut unnamed = chat("default", false);
    let default = parse(server.post("/v1/chat/completions", &unnamed), 200);
    assert_eq!(default["choices"][0]["message"]["content"], texts[0]);
    unnamed.as_object_mut().expect("an object").remove("model");
    assert_eq!(
        parse(server.post("/v1/chat/completions", &unnamed), 200)["model"],
        "base"
    );

    let completion =
        json!({"model": "tuned", "prompt": "Why", "max_tokens": 4, "temperature": 0, "echo": true});
    let whole = parse(server.post("/v1/completions", &completion), 200);
    assert!(
        whole["choices"][0]["text"]
            .as_str()
            .expect("a text")
            .starts_with("Why")
    );
    assert_eq!(whole["usage"]["prompt_tokens"], 3);
    let mut streamed = completion.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let stream = events(server.post("/v1/completions", &streamed));
    assert_eq!(stream.last().map(String::as_str), Some("[DONE]"));
    assert!(stream[stream.len() - 2].contains("\"usage\""));

    // mistral.rs removes leading white space of an answer.
    let mut indented = completion.clone();
    indented["echo"] = json!(false);
    indented["max_tokens"] = json!(8);
    indented["grammar"] = json!({"type": "regex", "value": " \n  a b"});
    let whole = parse(server.post("/v1/completions", &indented), 200);
    assert_eq!(whole["choices"][0]["text"], " \n  a b");
    indented["stream"] = json!(true);
    let stream = events(server.post("/v1/completions", &indented));
    let pieces = stream[..stream.len() - 1].iter().map(|data| {
        let chunk: Value = serde_json::from_str(data).expect("JSON");
        chunk["choices"][0]["text"]
            .as_str()
            .expect("a text")
            .to_owned()
    });
    assert_eq!(pieces.collect::<String>(), " \n  a b");

    wrong_requests(&server);
    server.finish().expect("a clean stop");
}

fn wrong_requests(server: &Running) {
    let path = "/v1/chat/completions";
    let with = |key: &str, value: Value| {
        let mut body = chat("base", false);
        body[key] = value;
        body
    };
    let refused = [
        (with("model", json!("nobody")), 404, "model"),
        (with("model", json!("base@x")), 404, "model"),
        (with("model", json!(3)), 400, "model"),
        (with("messages", json!([])), 400, "messages"),
        (
            with(
                "messages",
                json!([{"role": "user", "content": "x".repeat(5000)}]),
            ),
            400,
            "messages",
        ),
        (with("temperature", json!(-1)), 400, "temperature"),
        (with("max_tokens", json!(0)), 400, "max_tokens"),
        (with("n", json!(0)), 400, "n"),
        (with("n", json!(1000)), 400, "n"),
        (with("stop", json!([""])), 400, "stop"),
        (with("logprobs", json!(3)), 400, "logprobs"),
        (
            with("web_search_options", json!({})),
            400,
            "web_search_options",
        ),
        (with("tools", json!("x")), 400, "tools"),
        (json!([1]), 400, "body"),
    ];
    for (body, status, param) in refused {
        let answer = parse(server.post(path, &body), status);
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert!(answer["error"]["message"].is_string() && answer["error"]["type"].is_string());
    }
    let broken = server
        .client
        .post(server.url(path))
        .body("{\"model\":")
        .send()
        .expect("answered");
    parse(broken, 400);
    // A separate client: the connection is closed with the body unread.
    let large = Client::new()
        .post(server.url(path))
        .body(" ".repeat(9 << 20))
        .send();
    assert!(large.map_or(true, |answer| answer.status() == 413));

    for hidden in [
        "/re_isq",
        "/v1/models/unload",
        "/v1/load_lora_adapter",
        "/docs",
    ] {
        parse(
            server.post(hidden, &json!({})),
            if hidden.starts_with("/v1/models/") {
                405
            } else {
                404
            },
        );
    }
    // The server still answers after all of this.
    parse(server.post(path, &chat("base", false)), 200);
}

#[test]
fn adapters_come_and_go_under_traffic_and_keys_separate_rights() {
    let (case, other) = (servable(), servable_too());
    let extra = "[auth]\napi_keys_file = 'keys.txt'\nadmin_keys_file = 'admin.txt'\n[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    // The sections before [[models]] may be in any order.
    let (mut server, dir) = Running::start(&toml_for(&case, extra));
    let copy = dir.path().join("adapters/second");
    other.copy_adapter(&copy);

    for key in [None, Some("wrong"), Some("")] {
        let mut request = server.client.get(server.url("/v1/models"));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        assert_eq!(request.send().expect("answered").status(), 401);
    }
    assert_eq!(server.get("/healthz").status(), 200);
    let with_key = |key: &str| {
        let value = format!("Bearer {key}").parse().expect("a header");
        let headers = [(reqwest::header::AUTHORIZATION, value)]
            .into_iter()
            .collect();
        Client::builder()
            .default_headers(headers)
            .build()
            .expect("a client")
    };
    server.client = with_key("user-key");
    parse(
        server.post("/v1/chat/completions", &chat("tuned", false)),
        200,
    );
    let load = json!({"lora_name": "second", "lora_path": "second"});
    parse(server.post("/v1/load_lora_adapter", &load), 401);

    server.client = with_key("admin-key");
    for (path, status) in [("../second", 403), ("/etc", 403), ("missing", 400)] {
        let body = json!({"lora_name": "x", "lora_path": path});
        let answer = parse(server.post("/v1/load_lora_adapter", &body), status);
        assert!(
            !answer
                .to_string()
                .contains(dir.path().to_str().expect("UTF-8")),
            "{answer}"
        );
    }
    fs::create_dir(dir.path().join("adapters/empty")).expect("created");
    let empty = json!({"lora_name": "x", "lora_path": "empty"});
    let refused = server.post("/v1/load_lora_adapter", &empty);
    assert!([400, 422].contains(&refused.status().as_u16()));
    assert!(
        !refused
            .text()
            .expect("readable")
            .contains(dir.path().to_str().expect("UTF-8"))
    );

    let loaded = parse(server.post("/v1/load_lora_adapter", &load), 200);
    let generation = loaded["generation"]
        .as_str()
        .expect("a generation")
        .to_owned();
    parse(server.post("/v1/load_lora_adapter", &load), 409);
    let second = parse(
        server.post("/v1/chat/completions", &chat("second", false)),
        200,
    );

    // A stream that has begun outlives the name that it was requested under.
    let mut long = chat("second", true);
    long["max_tokens"] = json!(300);
    let mut stream = server.post("/v1/chat/completions", &long);
    let mut first = [0; 6];
    stream.read_exact(&mut first).expect("it has begun");
    let moved =
        json!({"lora_name": "second", "lora_path": "second", "expected_generation": "other"});
    parse(server.post("/v1/load_lora_adapter", &moved), 409);
    parse(
        server.post("/v1/unload_lora_adapter", &json!({"lora_name": "second"})),
        200,
    );
    parse(
        server.post("/v1/chat/completions", &chat("second", false)),
        404,
    );
    let rest = events(stream);
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"));
    let last: Value = serde_json::from_str(&rest[rest.len() - 2]).expect("JSON");
    assert!(
        ["stop", "length"].contains(
            &last["choices"][0]["finish_reason"]
                .as_str()
                .expect("a reason")
        )
    );

    // The same content gets the same generation again, with the same answers.
    assert_eq!(
        parse(server.post("/v1/load_lora_adapter", &load), 200)["generation"],
        generation
    );
    let again = parse(
        server.post("/v1/chat/completions", &chat("second", false)),
        200,
    );
    assert_eq!(again["choices"], second["choices"]);
    let list = parse(server.get("/v1/lora_adapters"), 200);
    assert_eq!(list["data"].as_array().expect("a list").len(), 2);
    parse(
        server.post("/v1/unload_lora_adapter", &json!({"lora_name": "base"})),
        400,
    );
    parse(
        server.post("/v1/unload_lora_adapter", &json!({"lora_name": "nobody"})),
        404,
    );
    server.finish().expect("a clean stop");
}

#[test]
fn a_port_in_use_is_reported_before_anything_is_loaded() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("bound").port();
    let text = format!(
        "[server]\nport = {port}\n[[models]]\nmodel_id = '{}'\ndevice.cpu = true",
        servable().base.display()
    );
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("serve.toml");
    fs::write(&path, text).expect("written");
    let config = ServeFile::read(&path)
        .and_then(|file| file.resolve(&local_only))
        .expect("sound");
    let error =
        crate::serve(&config, None, |_| panic!("must not become ready")).expect_err("taken");
    assert!(
        error.code() == "listen" && error.to_string().contains("in use"),
        "{error}"
    );
}
