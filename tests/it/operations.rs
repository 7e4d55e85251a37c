//! A server in production: swaps under load, bad adapters and bad clients, panics, kills and restarts.

mod deployment;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::blocking::{Client, Response};
use serde_json::{Value, json};

use crate::fixtures::own;
use crate::runtime::{Server, serve, serve_with};

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
            client: crate::fixtures::client(),
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
    let client = crate::fixtures::client();
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

/// A load in which mistral.rs panics, as it does for a token whose id is no number, is an error of that load alone.
#[test]
fn a_panic_inside_a_load_leaves_nothing_behind() {
    let site = Site::new();
    site.configure(&[("triage", ONE)]);
    let base = site.dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    for entry in std::fs::read_dir(own().join("models/tiny-llama")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, base.join(path.file_name().unwrap())).unwrap();
    }
    let toml = std::fs::read_to_string(site.path("serve.toml")).unwrap();
    let original = own().join("models/tiny-llama").display().to_string();
    write(
        &site.dir.path().join("serve.toml"),
        &toml.replace(&original, "base"),
    );
    let staging = site.dir.path().join("staging");
    std::fs::create_dir(&staging).unwrap();
    let server = serve_with(
        &["-c", &site.path("serve.toml")],
        &[("TMPDIR", staging.to_str().unwrap())],
    );
    let (served, answer) = (site.served(&server), whole_answer(&site, &server, "triage"));
    let resident = || {
        [
            "monteclora_resident_generations",
            "monteclora_resident_weight_bytes",
        ]
        .map(|name| site.metric(&server, name).unwrap())
    };
    let before = resident();

    let tokenizer = base.join("tokenizer.json");
    let sound = std::fs::read_to_string(&tokenizer).unwrap();
    let mut broken: Value = serde_json::from_str(&sound).unwrap();
    broken["model"]["vocab"]["no number"] = json!("x");
    write(&tokenizer, &broken.to_string());
    let body = json!({"lora_name": "triage", "lora_path": TWO, "load_inplace": true});
    let refused = site.post(&server, "/v1/load_lora_adapter", &body);
    assert_eq!(refused.status(), 500);
    let refused: Value = refused.json().unwrap();
    assert_eq!(refused["error"]["code"], "internal_error");
    assert_eq!(site.served(&server), served);
    assert_eq!(whole_answer(&site, &server, "triage"), answer);
    assert_eq!(resident(), before);
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0);

    write(&tokenizer, &sound);
    assert_eq!(site.load(&server, "triage", TWO).0, 200);
    assert_ne!(whole_answer(&site, &server, "triage"), answer);
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0);
}

/// Killed while it loads, a server comes back with what it served before the load or after it.
#[test]
fn killed_within_a_load_it_comes_back_whole() {
    let site = Site::new();
    site.configure(&[("triage", ONE)]);
    let server = site.start();
    let before = site.served(&server);
    let started = Instant::now();
    assert_eq!(site.load(&server, "triage", TWO).0, 200);
    let duration = started.elapsed();
    let after = site.served(&server);
    assert_eq!(site.load(&server, "triage", ONE).0, 200);
    drop(server);
    for eighth in [1, 3, 5, 7, 9] {
        let mut server = site.start();
        let found = site.served(&server);
        assert!([&before, &after].contains(&&found), "{found:?}");
        let body = json!({"lora_name": "triage", "lora_path": TWO, "load_inplace": true});
        let request = site
            .client
            .post(format!("{}/v1/load_lora_adapter", server.url));
        let loading =
            std::thread::spawn(move || request.bearer_auth("admin-key").json(&body).send().is_ok());
        std::thread::sleep(duration * eighth / 8);
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        loading.join().unwrap();
    }
    let server = site.start();
    let found = site.served(&server);
    assert!([&before, &after].contains(&&found), "{found:?}");
    assert!(whole_answer(&site, &server, "triage").1 == found[1].2);
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

/// Who reads the log may go away: the server goes on answering, and ends as it should.
#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let site = Site::new();
    site.configure(&[("triage", ONE)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_monteclora"))
        .args(["serve", "--port", "0", "-c", &site.path("serve.toml")])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let url = log.find_map(|line| {
        let line = line.unwrap();
        let start = line.find("http://127.0.0.1:")?;
        Some(line[start..].split(';').next().unwrap().to_owned())
    });
    let mut server = Server {
        child,
        url: url.unwrap(),
    };
    drop(log);
    for _ in 0..3 {
        let (_, generation) = whole_answer(&site, &server, "triage");
        assert!(!generation.is_empty());
    }
    terminate(&server);
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}
