//! Models and data sets from the Hub: the command against an imitation of it on the loopback interface.

mod push;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::cli::monteclora;
use crate::fixtures::own;
use crate::training::write_rows;

const OLD: &str = "1111111111111111111111111111111111111111";
const NEW: &str = "2222222222222222222222222222222222222222";
const TOKEN: &str = "hf_secret";

/// What the imitation serves.
#[derive(Default)]
struct Content {
    /// Files by kind and id (`models/o/n`), commit and name.
    files: BTreeMap<(String, String), BTreeMap<String, Vec<u8>>>,
    /// The commit that `main` is at, by kind and id.
    main: BTreeMap<String, String>,
    /// Repositories that want [`TOKEN`].
    private: Vec<String>,
    /// Every request but those for sizes: the path.
    asked: Vec<String>,
}

/// An imitation of the Hub: `/api/models/ID/revision/REV`, `/ID/resolve/REV/FILE`, and both below `datasets`.
struct Hub {
    endpoint: String,
    content: Arc<Mutex<Content>>,
    home: tempfile::TempDir,
}

impl Hub {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let content = Arc::new(Mutex::new(Content::default()));
        let served = content.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                std::thread::spawn(move || answer(stream, &served));
            }
        });
        Self {
            endpoint,
            content,
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// Adds a file at a commit, and moves `main` there.
    fn put(&self, repo: &str, commit: &str, name: &str, bytes: &[u8]) {
        let mut content = self.content.lock().unwrap();
        let at = (repo.to_owned(), commit.to_owned());
        let files = content.files.entry(at).or_default();
        files.insert(name.to_owned(), bytes.to_owned());
        content.main.insert(repo.to_owned(), commit.to_owned());
    }

    fn put_model(&self, id: &str, commit: &str) {
        for entry in std::fs::read_dir(own().join("models/tiny-llama")).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let bytes = std::fs::read(entry.path()).unwrap();
            self.put(&format!("models/{id}"), commit, &name, &bytes);
        }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.content.lock().unwrap().asked)
    }

    /// The command with this Hub, or with one that does not answer.
    fn run(&self, online: bool, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = monteclora();
        for proxy in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env_remove(proxy).env_remove(proxy.to_uppercase());
        }
        // The discard port of the loopback interface: refused at once.
        let endpoint = if online {
            &self.endpoint
        } else {
            "http://127.0.0.1:9"
        };
        command
            .env("HF_ENDPOINT", endpoint)
            .env("HF_HOME", self.home.path().join("hf"))
            .env("MONTECLORA_CACHE", self.home.path().join("cache"))
            .env_remove("HF_TOKEN")
            .envs(variables.iter().copied())
            .args(arguments)
            .output()
            .unwrap()
    }

    /// run.toml that trains `model` on `data` for two steps.
    fn run_toml(&self, model: &str, data: &str) -> String {
        let path = self.home.path().join("run.toml");
        let text = format!(
            "[model]\nmodel_id = {model:?}\n[data]\ntrain = {data:?}\n[lora]\nr = 2\n[train]\noutput_dir = {:?}\nmax_steps = 2\n",
            self.home.path().join("out")
        );
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn record(&self) -> Value {
        let text = std::fs::read_to_string(self.home.path().join("out/run.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

/// The headers of a request, by their names in lower case.
fn headers(reader: &mut impl BufRead) -> BTreeMap<String, String> {
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            return headers;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
}

fn answer(mut stream: TcpStream, content: &Mutex<Content>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let headers = headers(&mut reader);
        let response = respond(&path, &headers, &mut content.lock().unwrap());
        if stream.write_all(&response).is_err() {
            return;
        }
    }
}

fn respond(path: &str, headers: &BTreeMap<String, String>, content: &mut Content) -> Vec<u8> {
    let plain = |status: &str, more: &str, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{more}\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    };
    let missing = plain("404 Not Found", "", b"");
    let (information, rest) = match path.strip_prefix("/api/") {
        Some(rest) => (true, rest),
        None => (false, &path[1..]),
    };
    let rest = match rest.strip_prefix("models/").filter(|_| information) {
        Some(rest) => format!("models/{rest}"),
        None if rest.starts_with("datasets/") => rest.to_owned(),
        None => format!("models/{rest}"),
    };
    let parts: Vec<&str> = rest.splitn(6, '/').collect();
    let [kind, owner, name, _, revision, ..] = parts[..] else {
        return missing;
    };
    let repo = format!("{kind}/{owner}/{name}");
    let sizes_only = headers
        .get("range")
        .is_some_and(|range| range == "bytes=0-0");
    if !sizes_only {
        content.asked.push(path.to_owned());
    }
    let allowed = headers.get("authorization") == Some(&format!("Bearer {TOKEN}"));
    if content.private.contains(&repo) && !allowed {
        return plain("401 Unauthorized", "", b"");
    }
    let commit = match revision {
        "main" => content.main.get(&repo).cloned().unwrap_or_default(),
        commit => commit.to_owned(),
    };
    let Some(files) = content.files.get(&(repo, commit.clone())) else {
        return missing;
    };
    if information {
        let siblings: Vec<Value> = files
            .keys()
            .map(|name| json!({"rfilename": name}))
            .collect();
        let body = json!({"sha": commit, "siblings": siblings}).to_string();
        return plain(
            "200 OK",
            "Content-Type: application/json\r\n",
            body.as_bytes(),
        );
    }
    let Some(bytes) = parts.get(5).and_then(|file| files.get(*file)) else {
        return missing;
    };
    let about = format!(
        "ETag: \"{:08x}\"\r\nX-Repo-Commit: {commit}\r\n",
        crc(bytes)
    );
    if sizes_only {
        let range = format!("{about}Content-Range: bytes 0-0/{}\r\n", bytes.len());
        return plain("206 Partial Content", &range, &bytes[..1]);
    }
    plain("200 OK", &about, bytes)
}

/// Tells contents apart, as the Hub's entity tags do.
fn crc(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn rows() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    write_rows(&path);
    std::fs::read(path).unwrap()
}

/// Fetched, kept, recorded with its commit, and trained on again without the Hub.
#[test]
fn a_model_and_a_data_set_are_fetched_once_and_recorded() {
    let hub = Hub::new();
    hub.put_model("org/tiny", OLD);
    hub.put("datasets/org/rows", OLD, "data/train.jsonl", &rows());
    hub.put("datasets/org/rows", OLD, "README.md", b"about");
    let config = hub.run_toml("org/tiny", "hf://datasets/org/rows");
    let first = hub.run(true, &[], &["train", "-c", &config]);
    assert_eq!(first.status.code(), Some(0), "{}", said(&first));
    let asked = hub.asked();
    let fetched = |part: &str| asked.iter().filter(|path| path.contains(part)).count();
    assert_eq!(fetched("/resolve/"), fetched(&format!("/resolve/{OLD}/")));
    assert_eq!(fetched("model.safetensors"), 1, "{asked:?}");
    assert_eq!(fetched("data/train.jsonl"), 1);
    assert_eq!(fetched("README.md"), 0);
    let record = hub.record();
    for key in [
        "/config/train/max_steps",
        "/seed",
        "/versions/monteclora",
        "/versions/candle",
        "/versions/platform",
        "/base/fingerprint",
        "/train/sha256",
        "/chat_template_sha256",
        "/tokenizer_sha256",
    ] {
        let value = record.pointer(key);
        assert!(value.is_some_and(|value| !value.is_null()), "{key}");
    }
    assert_eq!(record["base"]["model_id"], "org/tiny");
    assert_eq!(record["base"]["revision"], OLD);
    assert_eq!(record["train"]["path"], "hf://datasets/org/rows");
    assert_eq!(record["train"]["revision"], OLD);
    let adapter = hub.home.path().join("out/adapter_model.safetensors");
    let trained = std::fs::read(&adapter).unwrap();
    let text = std::fs::read_to_string(hub.home.path().join("out/adapter_config.json")).unwrap();
    let saved: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(saved["base_model_name_or_path"], "org/tiny");
    assert_eq!(saved["revision"], OLD);

    let second = hub.run(false, &[], &["train", "-c", &config, "--force"]);
    assert_eq!(second.status.code(), Some(0), "{}", said(&second));
    let looked = hub.run(false, &[], &["inspect", "org/tiny"]);
    assert_eq!(looked.status.code(), Some(0), "{}", said(&looked));
    assert_eq!(hub.asked(), Vec::<String>::new());
    assert_eq!(hub.record(), record);
    assert_eq!(std::fs::read(&adapter).unwrap(), trained);
}

/// A branch that moves: a model stays as it was fetched and says so; a data set is that of the Hub; a commit is that commit.
#[test]
fn a_branch_that_moves_is_noticed() {
    let hub = Hub::new();
    hub.put_model("org/tiny", OLD);
    hub.put("datasets/org/rows", OLD, "train.jsonl", &rows());
    let config = hub.run_toml("org/tiny", "org/rows");
    assert!(
        hub.run(true, &[], &["train", "-c", &config])
            .status
            .success()
    );
    hub.put_model("org/tiny", NEW);
    hub.put("models/org/tiny", NEW, "README.md", b"another");
    let more = [&rows()[..], b"{\"prompt\":\"p\",\"completion\":\"c\"}\n"].concat();
    hub.put("datasets/org/rows", NEW, "train.jsonl", &more);
    let moved = hub.run(true, &[], &["train", "-c", &config, "--force"]);
    assert!(
        said(&moved).contains(&format!("--revision {NEW}")),
        "{}",
        said(&moved)
    );
    let record = hub.record();
    assert_eq!(record["base"]["revision"], OLD);
    assert_eq!(record["train"]["revision"], NEW);
    let pinned = [
        "train",
        "-c",
        &config,
        "--force",
        "--set",
        &format!("model.revision={NEW:?}"),
        "--set",
        &format!("data.train=\"hf://datasets/org/rows@{OLD}\""),
    ];
    let pinned = hub.run(true, &[], &pinned);
    assert!(pinned.status.success(), "{}", said(&pinned));
    let record = hub.record();
    assert_eq!(record["base"]["revision"], NEW);
    assert_eq!(record["train"]["revision"], OLD);
}

#[test]
fn what_the_hub_refuses_is_said_with_the_remedy() {
    let hub = Hub::new();
    hub.put_model("org/tiny", OLD);
    hub.put_model("org/gated", OLD);
    hub.put("datasets/org/rows", OLD, "train.jsonl", &rows());
    hub.put("datasets/org/gated", OLD, "train.jsonl", &rows());
    hub.put("datasets/org/valid-only", OLD, "valid.jsonl", &rows());
    hub.put("models/org/empty", OLD, "README.md", b"no model");
    {
        let mut content = hub.content.lock().unwrap();
        content.private = vec![
            "models/org/gated".to_owned(),
            "datasets/org/gated".to_owned(),
        ];
    }
    let data = "hf://datasets/org/rows";
    for (model, data, code, parts) in [
        ("org/none", data, 2, ["org/none", "(404)", "check the name"]),
        ("org/gated", data, 2, ["org/gated", "(401)", "HF_TOKEN"]),
        ("org/empty", data, 2, ["org/empty", "config.json", "layout"]),
        (
            "org/tiny",
            "org/none",
            3,
            ["org/none", "(404)", "check the name"],
        ),
        (
            "org/tiny",
            "hf://datasets/org/gated",
            3,
            ["org/gated", "(401)", "HF_TOKEN"],
        ),
        (
            "org/tiny",
            "org/valid-only",
            3,
            ["no train rows", "valid.jsonl", "give the path"],
        ),
        (
            "org/tiny",
            "hf://datasets/org/rows@v9",
            3,
            ["org/rows@v9", "(404)", "revision"],
        ),
    ] {
        let config = hub.run_toml(model, data);
        let output = hub.run(true, &[], &["train", "-c", &config]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{model} {data}: {said}");
        for part in parts {
            assert!(
                said.contains(part),
                "{model} {data}: {said} does not say {part}"
            );
        }
        assert!(!said.contains(TOKEN));
    }
    let config = hub.run_toml("org/gated", "hf://datasets/org/gated");
    let output = hub.run(true, &[("HF_TOKEN", TOKEN)], &["train", "-c", &config]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));

    // Nothing cached, nobody there.
    let nobody = Hub::new();
    for (model, data, code) in [("org/tiny", "rows", 2), ("tiny", "org/rows", 3)] {
        let local = own().join("models/tiny-llama").display().to_string();
        let model = if model == "tiny" { &local } else { model };
        let config = nobody.run_toml(model, data);
        let output = nobody.run(false, &[], &["train", "-c", &config]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(
            said.contains("the Hub cannot be reached") && said.contains("connect to the network"),
            "{said}"
        );
    }
    assert!(
        Path::new(&nobody.home.path().join("out/run.json"))
            .metadata()
            .is_err()
    );
}

/// What quickstart fetched is found by its name on the Hub, without asking it; a revision asks.
#[test]
fn the_copy_of_quickstart_is_found_by_its_name() {
    const NAME: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
    let hub = Hub::new();
    let cached = hub.home.path().join("cache/models/SmolLM2-135M-Instruct");
    crate::cli::copy(&own().join("models/tiny-llama"), &cached);
    let asked = ["predict", "-m", NAME, "--prompt", "a", "--max-tokens", "1"];
    let found = hub.run(false, &[], &asked);
    assert_eq!(found.status.code(), Some(0), "{}", said(&found));
    assert!(
        said(&found).contains("the copy that quickstart fetched"),
        "{}",
        said(&found)
    );
    assert!(hub.asked().is_empty());
    let revision = [&asked[..], &["--revision", "main"]].concat();
    assert_ne!(hub.run(false, &[], &revision).status.code(), Some(0));
    hub.put_model(NAME, OLD);
    let fetched = hub.run(true, &[], &revision);
    assert_eq!(fetched.status.code(), Some(0), "{}", said(&fetched));
}
