//! `push`: against an imitation of the endpoints by which `huggingface_hub` uploads.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cli::{Run, copy, monteclora, outcome, own_adapter, text};

const TOKEN: &str = "hf_writes";

/// What the imitation holds.
#[derive(Default)]
struct State {
    endpoint: String,
    /// Repositories, and whether they are private.
    repos: BTreeMap<String, bool>,
    /// Large files by their hash.
    objects: BTreeMap<String, Vec<u8>>,
    /// The file at each path of the last commit: its bytes, or the hash of a large one.
    files: BTreeMap<String, Result<Vec<u8>, String>>,
    n_commits: usize,
    n_put: usize,
    verified: Vec<String>,
}

fn start() -> (String, Arc<Mutex<State>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::new(Mutex::new(State {
        endpoint: endpoint.clone(),
        ..State::default()
    }));
    let shared = state.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = shared.clone();
            std::thread::spawn(move || serve(stream, &shared));
        }
    });
    (endpoint, state)
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let headers = super::headers(&mut reader);
    let length = headers
        .get("content-length")
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let (status, answer) = respond(&method, &path, &headers, &body, &mut state.lock().unwrap());
    let answer = answer.to_string();
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        answer.len()
    );
    stream.write_all((head + &answer).as_bytes()).unwrap();
}

fn respond(
    method: &str,
    path: &str,
    headers: &BTreeMap<String, String>,
    body: &[u8],
    state: &mut State,
) -> (u16, Value) {
    if let ("PUT", Some(oid)) = (method, path.strip_prefix("/objects/")) {
        assert_eq!(headers["x-signed"], "yes");
        assert_eq!(format!("{:x}", Sha256::digest(body)), oid);
        state.n_put += 1;
        state.objects.insert(oid.to_owned(), body.to_vec());
        return (200, json!({}));
    }
    if headers.get("authorization") != Some(&format!("Bearer {TOKEN}")) {
        return (401, json!({"error": "who are you"}));
    }
    let asked = || -> Value { serde_json::from_slice(body).unwrap() };
    let endpoint = &state.endpoint;
    match path {
        path if SILENT.iter().any(|(_, silent)| path.contains(silent)) => (200, json!({})),
        "/api/repos/create" => {
            let asked = asked();
            let owner = asked["organization"].as_str().unwrap_or("me");
            let repo = format!("{owner}/{}", asked["name"].as_str().unwrap());
            let url = json!({"url": format!("{endpoint}/{repo}")});
            match state.repos.contains_key(&repo) {
                true => (409, url),
                false => {
                    state.repos.insert(repo, asked["private"] == true);
                    (200, url)
                }
            }
        }
        "/verify" => {
            state
                .verified
                .push(asked()["oid"].as_str().unwrap().to_owned());
            (200, json!({}))
        }
        path if path.ends_with("/info/lfs/objects/batch") => {
            let asked = asked();
            let object = &asked["objects"][0];
            let oid = object["oid"].as_str().unwrap();
            let actions = match state.objects.contains_key(oid) {
                true => Value::Null,
                false => {
                    json!({"upload": {"href": format!("{endpoint}/objects/{oid}"), "header": {"x-signed": "yes"}}, "verify": {"href": format!("{endpoint}/verify")}})
                }
            };
            (
                200,
                json!({"objects": [{"oid": oid, "size": object["size"], "actions": actions}]}),
            )
        }
        path if path.contains("/preupload/main") => {
            let asked = asked();
            let files = asked["files"].as_array().unwrap().iter().map(|file| {
                let is_large = file["path"].as_str().unwrap().ends_with(".safetensors");
                json!({"path": file["path"], "uploadMode": if is_large { "lfs" } else { "regular" }})
            });
            (200, json!({"files": files.collect::<Vec<_>>()}))
        }
        path if path.contains("/commit/main") => {
            assert_eq!(headers["content-type"], "application/x-ndjson");
            let lines = body
                .split(|byte| *byte == b'\n')
                .filter(|line| !line.is_empty());
            state.files.clear();
            for line in lines {
                let line: Value = serde_json::from_slice(line).unwrap();
                let value = &line["value"];
                let name = || value["path"].as_str().unwrap().to_owned();
                match line["key"].as_str().unwrap() {
                    "header" => assert!(!value["summary"].as_str().unwrap().is_empty()),
                    "file" => {
                        let content = decoded(value["content"].as_str().unwrap());
                        state.files.insert(name(), Ok(content));
                    }
                    "lfsFile" => {
                        let oid = value["oid"].as_str().unwrap().to_owned();
                        assert!(
                            state.objects.contains_key(&oid),
                            "committed before it was sent"
                        );
                        state.files.insert(name(), Err(oid));
                    }
                    other => panic!("{other}"),
                }
            }
            state.n_commits += 1;
            (
                200,
                json!({"commitOid": "abc", "commitUrl": format!("{endpoint}/commit/abc")}),
            )
        }
        _ => (404, json!({"error": path})),
    }
}

/// Base64 (RFC 4648), for the imitation alone.
fn decoded(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut n, mut bytes) = (0u32, 0, Vec::new());
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let at = ALPHABET.iter().position(|known| *known == byte).unwrap();
        bits = bits << 6 | at as u32;
        n += 6;
        if n >= 8 {
            n -= 8;
            bytes.push((bits >> n) as u8);
        }
    }
    bytes
}

/// Repositories for which the imitation leaves something out of an answer, and the path of that answer.
const SILENT: [(&str, &str); 3] = [
    ("org/without-files", "/org/without-files/preupload/"),
    ("org/without-objects", "/org/without-objects.git/"),
    ("org/without-commit", "/org/without-commit/commit/"),
];

fn push(endpoint: &str, token: &str, arguments: &[&str]) -> Run {
    let mut command = monteclora();
    for proxy in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(proxy).env_remove(proxy.to_uppercase());
    }
    let home = tempfile::tempdir().unwrap();
    command
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", home.path());
    outcome(command.env("HF_TOKEN", token).arg("push").args(arguments))
}

/// The adapter, its card and its calibration arrive as they are, large files by Git LFS and only once.
#[test]
fn an_adapter_is_published_with_its_card() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = dir.path().join("out");
    copy(own_adapter("monteclora").as_ref(), &adapter);
    std::fs::write(adapter.join("optimizer.pt"), "not to be published").unwrap();
    let eval = dir.path().join("eval.json");
    std::fs::write(
        &eval,
        r#"{"rows": 9, "mean": {"loss": 0.5, "accuracy": 0.75}}"#,
    )
    .unwrap();
    let (endpoint, state) = start();
    let arguments = [
        text(&adapter),
        "org/triage",
        "--private",
        "--eval",
        text(&eval),
    ];
    let done = push(&endpoint, TOKEN, &arguments);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stdout.contains("/commit/abc") && done.stdout.contains("optimizer.pt"),
        "{}",
        done.stdout
    );
    {
        let state = state.lock().unwrap();
        assert_eq!(state.repos.get("org/triage"), Some(&true));
        let names: Vec<&str> = state.files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "README.md",
                "adapter_config.json",
                "adapter_model.safetensors"
            ]
        );
        for (name, found) in &state.files {
            let bytes = match found {
                Ok(bytes) => bytes,
                Err(oid) => &state.objects[oid],
            };
            assert!(
                *bytes == std::fs::read(adapter.join(name)).unwrap(),
                "{name}"
            );
        }
        let card = std::fs::read_to_string(adapter.join("README.md")).unwrap();
        assert!(
            card.contains("library_name: peft") && card.contains("value: 0.75"),
            "{card}"
        );
        assert_eq!((state.n_put, state.verified.len()), (1, 1));
    }
    // A second time the large file is there, and a name of one's own is completed.
    std::fs::write(adapter.join("README.md"), "# Mine\n").unwrap();
    let again = push(&endpoint, TOKEN, &[text(&adapter), "mine", "--json"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    let said: Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!(
        (&said["repo"], &said["sent"]),
        (&json!("me/mine"), &json!(2))
    );
    let state = state.lock().unwrap();
    assert_eq!((state.n_put, state.n_commits), (1, 2));
    assert_eq!(state.files["README.md"], Ok(b"# Mine\n".to_vec()));
}

#[test]
fn what_cannot_be_published_says_why() {
    let (endpoint, state) = start();
    let adapter = own_adapter("plain-lora");
    let dir = tempfile::tempdir().unwrap();
    copy(adapter.as_ref(), dir.path());
    let adapter = text(dir.path());
    let refused = push(&endpoint, "hf_reads", &[adapter, "org/a"]);
    assert!(
        refused.code == 1 && refused.stderr.contains("HF_TOKEN"),
        "{}",
        refused.stderr
    );
    assert!(!refused.stderr.contains("hf_reads"));
    let none = push(&endpoint, "", &[adapter, "org/a", "--token-source", "none"]);
    assert!(
        none.code == 2 && none.stderr.contains("no token"),
        "{}",
        none.stderr
    );
    for repo in ["a/b/c", "a b", "../x"] {
        assert_eq!(push(&endpoint, TOKEN, &[adapter, repo]).code, 2, "{repo}");
    }
    let gone = push("http://127.0.0.1:9", TOKEN, &[adapter, "org/a"]);
    assert!(
        gone.code == 1 && gone.stderr.contains("cannot be reached"),
        "{}",
        gone.stderr
    );
    assert_eq!(push(&endpoint, TOKEN, &["nowhere", "org/a"]).code, 2);
    assert_eq!(state.lock().unwrap().n_commits, 0);
}

/// An answer in which something is missing is no success.
#[test]
fn an_incomplete_answer_is_an_error() {
    let (endpoint, state) = start();
    let dir = tempfile::tempdir().unwrap();
    copy(own_adapter("plain-lora").as_ref(), dir.path());
    for (repo, _) in SILENT {
        let refused = push(&endpoint, TOKEN, &[text(dir.path()), repo]);
        let said = format!("{}{}", refused.stdout, refused.stderr);
        assert!(
            refused.code == 1 && said.contains("the Hub's answer"),
            "{said}"
        );
        assert!(!said.contains(TOKEN), "{said}");
    }
    assert_eq!(state.lock().unwrap().n_commits, 0);
}
