//! A server in production: swaps under load, bad adapters and bad clients, kills and restarts, deployments.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

use crate::fixtures::own;
use crate::runtime::{Server, serve};

/// A directory with serve.toml, keys, and two adapters of the tiny base below the adapter root.
struct Site {
    dir: tempfile::TempDir,
    client: Client,
}

/// Their greedy answers differ from the first token on.
const ONE: &str = "layers-to-transform";
const TWO: &str = "rslora";
const N_TOKENS: usize = 8;

impl Site {
    fn new() -> Self {
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
            client: Client::new(),
        };
        for name in [ONE, TWO] {
            let to = site.root().join(name);
            std::fs::create_dir_all(&to).unwrap();
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                std::fs::copy(own().join("adapters").join(name).join(file), to.join(file)).unwrap();
            }
        }
        std::fs::write(site.dir.path().join("keys.txt"), "user-key\n").unwrap();
        std::fs::write(site.dir.path().join("admin.txt"), "admin-key\n").unwrap();
        site.configure(&[]);
        site
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("adapters")
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Writes serve.toml with adapters of `(alias, directory)`.
    fn configure(&self, adapters: &[(&str, &str)]) {
        let mut text = format!(
            "[auth]\napi_keys_file = 'keys.txt'\nadmin_keys_file = 'admin.txt'\n[admin]\nenabled = true\nadapter_root = 'adapters'\n[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\n",
            own().join("models/tiny-llama").display()
        );
        for (alias, directory) in adapters {
            text.push_str(&format!(
                "[[models.adapters]]\nalias = '{alias}'\nsource = 'adapters/{directory}'\n"
            ));
        }
        std::fs::write(self.dir.path().join("serve.toml"), text).unwrap();
    }

    fn start(&self) -> Server {
        serve(&["-c", &self.path("serve.toml")])
    }

    fn post(&self, server: &Server, path: &str, body: &Value) -> Response {
        self.client
            .post(format!("{}{path}", server.url))
            .bearer_auth("admin-key")
            .json(body)
            .send()
            .unwrap()
    }

    fn get(&self, server: &Server, path: &str) -> Response {
        let request = self.client.get(format!("{}{path}", server.url));
        request.bearer_auth("admin-key").send().unwrap()
    }

    /// Loads a directory below the root, and returns status and generation.
    fn load(&self, server: &Server, name: &str, directory: &str) -> (u16, String) {
        let body = json!({"lora_name": name, "lora_path": directory, "load_inplace": true});
        let response = self.post(server, "/v1/load_lora_adapter", &body);
        let status = response.status().as_u16();
        let answer: Value = response.json().unwrap();
        (
            status,
            answer["generation"].as_str().unwrap_or_default().to_owned(),
        )
    }

    /// What is served: names, parents and generations.
    fn served(&self, server: &Server) -> Vec<(String, Value, String)> {
        let list: Value = self.get(server, "/v1/models").json().unwrap();
        let entry = |model: &Value| {
            let text = |key: &str| model[key].as_str().unwrap().to_owned();
            (text("id"), model["parent"].clone(), text("generation"))
        };
        list["data"].as_array().unwrap().iter().map(entry).collect()
    }

    fn metric(&self, server: &Server, name: &str) -> Option<u64> {
        let text = self.get(server, "/metrics").text().unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    }
}

fn question(model: &str, max_tokens: usize) -> Value {
    json!({"model": model, "stream": true, "temperature": 0, "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": "Tell me something."}]})
}

/// The text of a whole stream and the generation that gave it, read line by line with `pause` between; any fault is an error.
fn read_stream(response: Response, pause: Duration) -> Result<(String, String), String> {
    if response.status() != 200 {
        return Err(format!("status {}", response.status()));
    }
    let (mut text, mut reason, mut done) = (String::new(), None, false);
    let mut generation = String::new();
    for line in BufReader::new(response).lines() {
        let line = line.map_err(|error| format!("cut: {error}"))?;
        std::thread::sleep(pause);
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
        let found = chunk["system_fingerprint"]
            .as_str()
            .ok_or(chunk.to_string())?;
        if generation.is_empty() {
            found.clone_into(&mut generation);
        } else if found != generation {
            return Err(format!("{generation} went on as {found}"));
        }
        let choice = &chunk["choices"][0];
        text.push_str(
            choice["delta"]["content"]
                .as_str()
                .ok_or(chunk.to_string())?,
        );
        if let Some(found) = choice["finish_reason"].as_str() {
            reason = Some(found.to_owned());
        }
    }
    match (done, reason.as_deref()) {
        (true, Some("stop" | "length")) => Ok((text, generation)),
        other => Err(format!("ended with {other:?}")),
    }
}

fn whole_answer(site: &Site, server: &Server, model: &str) -> (String, String) {
    let response = site.post(server, "/v1/chat/completions", &question(model, N_TOKENS));
    read_stream(response, Duration::ZERO).unwrap()
}

/// The whole stream of a client with a connection of its own.
fn as_user(server: &Server, pause: Duration) -> Result<(String, String), String> {
    let client = Client::new();
    let request = client.post(format!("{}/v1/chat/completions", server.url));
    let request = request
        .bearer_auth("user-key")
        .json(&question("triage", N_TOKENS));
    read_stream(request.send().map_err(|error| error.to_string())?, pause)
}

/// Sixteen clients stream all the time while the alias moves ten times, a corrupt adapter is pushed, slow clients read and rude
/// ones leave: no stream fails, is cut, or says anything but what its generation says when nobody else asks; the memory comes back.
#[test]
fn ten_swaps_under_sixteen_streams_lose_nothing() {
    let site = Site::new();
    site.configure(&[("triage", ONE)]);
    let server = site.start();
    let (status, second) = site.load(&server, "other", TWO);
    assert_eq!(status, 200);
    let answers = [
        whole_answer(&site, &server, "triage"),
        whole_answer(&site, &server, "other"),
    ];
    assert_ne!(answers[0].0, answers[1].0);
    assert_eq!(answers[1].1, second);
    let unload = site.post(
        &server,
        "/v1/unload_lora_adapter",
        &json!({"lora_name": "other"}),
    );
    assert_eq!(unload.status(), 200);
    let corrupt = site.root().join("corrupt");
    std::fs::create_dir(&corrupt).unwrap();
    let good = site.root().join(ONE);
    std::fs::copy(
        good.join("adapter_config.json"),
        corrupt.join("adapter_config.json"),
    )
    .unwrap();
    let bytes = std::fs::read(good.join("adapter_model.safetensors")).unwrap();
    std::fs::write(
        corrupt.join("adapter_model.safetensors"),
        &bytes[..bytes.len() / 2],
    )
    .unwrap();

    let stop = AtomicBool::new(false);
    let complete = AtomicUsize::new(0);
    let swaps = std::thread::scope(|scope| {
        let mut clients = Vec::new();
        for idx in 0..16 {
            let pause = Duration::from_millis(if idx < 2 { 20 } else { 0 });
            let (stop, complete, server, answers) = (&stop, &complete, &server, &answers);
            clients.push(scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let answer = as_user(server, pause)?;
                    if !answers.contains(&answer) {
                        return Err(format!("{answer:?} is none of {answers:?}"));
                    }
                    complete.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<(), String>(())
            }));
        }
        let rude = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let body = question("triage", 200).to_string();
                let address = server.url.strip_prefix("http://").unwrap();
                let mut stream = TcpStream::connect(address).unwrap();
                let head = format!(
                    "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer user-key\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                stream.write_all((head + &body).as_bytes()).unwrap();
                let mut begun = [0; 12];
                stream.read_exact(&mut begun).unwrap();
                drop(stream);
                std::thread::sleep(Duration::from_millis(30));
            }
        });
        let mut swaps = 0;
        let mut generation = String::new();
        for idx in 0..10 {
            let before = complete.load(Ordering::Relaxed);
            let directory = [TWO, ONE][idx % 2];
            let (status, now) = site.load(&server, "triage", directory);
            assert_eq!(status, 200);
            assert_ne!(now, generation);
            assert_eq!(
                now == second,
                directory == TWO,
                "a generation is its content"
            );
            generation = now;
            swaps += 1;
            if idx == 4 {
                let (status, _) = site.load(&server, "triage", "corrupt");
                assert!([400, 422].contains(&status), "{status}");
                let served = site.served(&server);
                assert_eq!(served[1].2, generation, "a refused adapter changes nothing");
            }
            // Each generation serves some traffic before the next comes.
            let start = Instant::now();
            while complete.load(Ordering::Relaxed) < before + 8 {
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "traffic has stopped"
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().unwrap().unwrap();
        }
        rude.join().unwrap();
        swaps
    });
    assert_eq!(swaps, 10);
    assert!(complete.load(Ordering::Relaxed) >= 80);
    let start = Instant::now();
    while site.metric(&server, "monteclora_resident_generations") != Some(2) {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "an old generation stays in memory"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn killed_and_restarted_it_serves_the_same() {
    let site = Site::new();
    site.configure(&[("triage", ONE), ("unwanted", TWO)]);
    let mut server = site.start();
    assert_eq!(site.load(&server, "triage", TWO).0, 200);
    assert_eq!(site.load(&server, "extra", ONE).0, 200);
    let unload = site.post(
        &server,
        "/v1/unload_lora_adapter",
        &json!({"lora_name": "unwanted"}),
    );
    assert_eq!(unload.status(), 200);
    let before = site.served(&server);
    let answer = whole_answer(&site, &server, "triage");
    server.child.kill().unwrap();
    server.child.wait().unwrap();

    let server = site.start();
    assert_eq!(site.served(&server), before);
    assert_eq!(whole_answer(&site, &server, "triage"), answer);
    let names: Vec<&str> = before.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["base", "triage", "extra"]);
}

fn terminate(server: &Server) {
    let process = server.child.id().to_string();
    let sent = Command::new("kill").args(["-TERM", &process]).status();
    assert!(sent.unwrap().success());
}

/// One signal lets the stream in flight finish, a second one does not.
#[test]
fn a_second_signal_ends_at_once() {
    let site = Site::new();
    site.configure(&[("triage", ONE)]);
    for (n_signals, code) in [(1, 0), (2, 130)] {
        let mut server = site.start();
        let mut long = question("triage", 400);
        long["n"] = json!(if n_signals == 1 { 1 } else { 16 });
        long["temperature"] = json!(2);
        let response = site.post(&server, "/v1/chat/completions", &long);
        let mut lines = BufReader::new(response).lines();
        lines.next().unwrap().unwrap();
        terminate(&server);
        if n_signals == 2 {
            let address = server.url.strip_prefix("http://").unwrap();
            while TcpStream::connect(address).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
            terminate(&server);
        }
        let is_whole = lines.any(|line| line.is_ok_and(|line| line == "data: [DONE]"));
        assert_eq!(is_whole, n_signals == 1);
        assert_eq!(server.child.wait().unwrap().code(), Some(code));
    }
}

fn monteclora(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_monteclora"))
        .args(arguments)
        .env("MONTECLORA_KEY", "admin-key")
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn deploy_status_and_rollback_through_the_command() {
    let site = Site::new();
    let server = site.start();
    let root = site.root().display().to_string();
    let adapter = |name: &str| own().join("adapters").join(name).display().to_string();
    let run = |verb: &str, extra: &[&str]| {
        let common = ["--server", &server.url, "--adapter-root", &root, "--json"];
        let arguments: Vec<&str> = [verb].iter().chain(extra).chain(&common).copied().collect();
        monteclora(&arguments)
    };
    let parsed = |(code, stdout, stderr): (i32, String, String)| -> Value {
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    };

    let first = parsed(run(
        "deploy",
        &[&adapter("monteclora"), "--alias", "triage"],
    ));
    let generation = first["generation"].as_str().unwrap();
    let directory = site.root().join(first["directory"].as_str().unwrap());
    assert!(
        directory.ends_with(generation),
        "a release is named as the server names its content"
    );
    let config = std::fs::read_to_string(directory.join("adapter_config.json")).unwrap();
    assert!(
        !config.contains("monteclora_config"),
        "releases are plain LoRA"
    );
    let second = parsed(run("deploy", &[&adapter(TWO), "--alias", "triage"]));
    assert_eq!(second["previous"], first["generation"]);
    assert_ne!(second["generation"], first["generation"]);

    let (code, _, stderr) = run(
        "deploy",
        &[
            &adapter("plain-lora"),
            "--alias",
            "triage",
            "--expect",
            "no model says this",
        ],
    );
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("canary"), "{stderr}");
    let (code, _, stderr) = run(
        "deploy",
        &[&adapter("must-refuse-dora"), "--alias", "triage"],
    );
    assert_eq!(code, 4, "{stderr}");

    let status = parsed(run("status", &[]));
    assert_eq!(status["ready"], true);
    assert_eq!(status["adapters"][0]["generation"], second["generation"]);
    assert_eq!(
        status["adapters"].as_array().unwrap().len(),
        1,
        "no canary remains"
    );
    assert_eq!(status["releases"]["triage"].as_array().unwrap().len(), 2);
    let back = parsed(run("rollback", &["--alias", "triage"]));
    assert_eq!(back["generation"], first["generation"]);
    assert_eq!(site.served(&server)[1].2, first["generation"]);

    let (code, _, stderr) = run("rollback", &["--alias", "nobody"]);
    assert_eq!(code, 2, "{stderr}");
    let wrong = site.path("keys.txt");
    let (code, _, stderr) = run("rollback", &["--alias", "triage", "--key-file", &wrong]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("--key-file") && !stderr.contains("user-key"),
        "{stderr}"
    );
}

/// What serve.toml declares comes back by a rollback if it lies below the adapter root, and is known as the same content whether it
/// holds the posterior or only its mean.
#[test]
fn what_was_served_before_the_first_deployment_can_come_back() {
    let site = Site::new();
    let raw = own().join("adapters/monteclora");
    let declared = site.root().join("declared");
    std::fs::create_dir(&declared).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(raw.join(file), declared.join(file)).unwrap();
    }
    site.configure(&[("triage", "declared")]);
    let server = site.start();
    let generation = site.served(&server)[1].2.clone();
    let root = site.root().display().to_string();
    let common = [
        "--alias",
        "triage",
        "--server",
        &server.url,
        "--adapter-root",
        &root,
    ];
    let run = |verb: &str, extra: &[&str]| {
        let arguments: Vec<&str> = [verb].iter().chain(extra).chain(&common).copied().collect();
        let (code, stdout, stderr) = monteclora(&arguments);
        assert_eq!(code, 0, "{stderr}");
        stdout
    };
    let said = run("deploy", &[&raw.display().to_string()]);
    assert!(said.contains("it was already"), "{said}");
    let said = run("deploy", &[&site.root().join(TWO).display().to_string()]);
    assert!(
        said.contains("`monteclora rollback` brings it back"),
        "{said}"
    );
    assert_ne!(site.served(&server)[1].2, generation);
    run("rollback", &[]);
    assert_eq!(site.served(&server)[1].2, generation);
}

fn refused(arguments: &[&str], variables: &[(&str, &str)]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_monteclora"))
        .arg("serve")
        .args(arguments)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), stderr)
}

#[test]
fn what_cannot_be_served_ends_with_a_reason_and_a_code() {
    let site = Site::new();
    let toml = site.path("serve.toml");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, stderr) = refused(&["-c", &toml], &[("MONTECLORA_SERVER__PORT", &port)]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("in use") && stderr.contains(&port),
        "{stderr}"
    );

    let (code, stderr) = refused(&["-c", &toml], &[("MONTECLORA_SERVER__PROT", "1")]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("did you mean `port`"), "{stderr}");

    // Two broken adapters are two problems of one report.
    for name in ["x", "y"] {
        std::fs::create_dir(site.root().join(name)).unwrap();
        write(&site.root().join(name).join("adapter_config.json"), "{");
    }
    site.configure(&[("x", "x"), ("fine", ONE), ("y", "y")]);
    let (code, stderr) = refused(&["-c", &toml], &[]);
    assert_eq!(code, 4, "{stderr}");
    assert!(stderr.contains("/x/") && stderr.contains("/y/"), "{stderr}");
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}
