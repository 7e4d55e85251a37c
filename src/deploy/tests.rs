//! Tests of the deployment commands against a fake server with the endpoints, answers and refusals of mistral.rs 0.9.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use monteclora_converters::Adapter;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use monteclora_converters::exit_code;

use super::*;

/// State of the fake server, and the faults that it imitates.
#[derive(Default)]
struct State {
    root: PathBuf,
    /// Alias to generation and source.
    adapters: BTreeMap<String, (String, String)>,
    busy: usize,
    /// Base that the adapter list reports; mistral.rs 0.9 reports none.
    parent: Option<String>,
    /// Model names whose questions fail.
    mute: Vec<String>,
    /// Whether all answers are empty.
    silent: bool,
    log: Vec<String>,
}

struct Imitation {
    url: String,
    state: Arc<Mutex<State>>,
}

const KEY: &str = "secret-key";

impl Imitation {
    fn start(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let state = Arc::new(Mutex::new(State {
            root: root.to_owned(),
            ..State::default()
        }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.expect("a connection"), &shared);
            }
        });
        Self { url, state }
    }

    fn client(&self) -> AdapterServer {
        AdapterServer::new(&self.url, Some(KEY.to_owned()), Duration::from_secs(20)).expect("sound")
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().expect("not poisoned"))
    }

    fn generation(&self, alias: &str) -> Option<String> {
        self.with(|state| Some(state.adapters.get(alias)?.0.clone()))
    }
}

/// Answers one request and closes the connection.
fn serve(stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("readable");
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        head.iter().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    };
    let length = header("content-length").map_or(0, |length| length.parse().expect("a number"));
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("readable");
    let target: Vec<&str> = head[0].split(' ').collect();
    let (status, answer) = if header("authorization") == Some(format!("Bearer {KEY}")) {
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        answer(
            target[0],
            target[1],
            &body,
            &mut state.lock().expect("not poisoned"),
        )
    } else {
        (401, failure("invalid_api_key", "who are you"))
    };
    let answer = answer.to_string();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        answer.len()
    );
    let mut stream = reader.into_inner();
    stream.write_all((head + &answer).as_bytes()).expect("sent");
}

fn failure(code: &str, message: &str) -> Value {
    let kind = match code {
        "internal_error" => "server_error",
        _ => "invalid_request_error",
    };
    json!({"error": {"message": message, "type": kind, "code": code}})
}

/// The refusal of a body with a field that mistral.rs does not know, or with a generation that is not a SHA-256.
fn refuse_body(body: &Value, known: &[&str]) -> Option<(u16, Value)> {
    let fields = body.as_object().expect("an object");
    let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let is_known = fields.keys().all(|key| known.contains(&key.as_str()));
    let is_sound = body["expected_generation"].as_str().is_none_or(is_hash);
    (!is_known || !is_sound).then(|| (422, failure("invalid_request_body", "not as declared")))
}

fn answer(method: &str, path: &str, body: &Value, state: &mut State) -> (u16, Value) {
    state.log.push(format!(
        "{method} {path} {} {}",
        body["lora_name"].as_str().unwrap_or_default(),
        body["model"].as_str().unwrap_or_default()
    ));
    let parent = state.parent.clone();
    let object = |alias: &str, entry: &(String, String)| json!({"id": alias, "object": "lora_adapter", "source": entry.1, "parent": parent, "generation": entry.0, "rank": 4, "bytes": 1});
    match (method, path) {
        ("GET", "/health") => (200, json!({})),
        ("GET", "/v1/models") => {
            let adapters = state.adapters.keys().map(|alias| {
                json!({"id": format!("base::{alias}"), "object": "model", "parent": "base"})
            });
            let data: Vec<Value> = [json!({"id": "base", "object": "model"})]
                .into_iter()
                .chain(adapters)
                .collect();
            (200, json!({"object": "list", "data": data}))
        }
        ("GET", "/v1/lora_adapters") => {
            let data: Vec<Value> = state.adapters.iter().map(|(a, e)| object(a, e)).collect();
            (
                200,
                json!({"object": "list", "data": data, "generations": [], "resident_generations": 0,
                    "retired_generations": 0, "resident_bytes": 0, "max_adapters": 16, "max_rank": 256,
                    "max_bytes": 8_u64 << 30}),
            )
        }
        ("POST", "/v1/load_lora_adapter") => {
            let known = [
                "lora_name",
                "lora_path",
                "load_inplace",
                "replace",
                "expected_generation",
                "is_3d_lora_weight",
                "model",
            ];
            if let Some(refused) = refuse_body(body, &known) {
                return refused;
            }
            let in_place = body["load_inplace"] == true;
            let expected = body["expected_generation"].as_str();
            if expected.is_some() && !in_place {
                return (
                    400,
                    failure(
                        "invalid_lora_load_policy",
                        "expected_generation requires load_inplace=true",
                    ),
                );
            }
            if state.busy > 0 {
                state.busy -= 1;
                return (429, failure("lora_load_busy", "another load"));
            }
            let alias = body["lora_name"].as_str().expect("a name").to_owned();
            let current = state
                .adapters
                .get(&alias)
                .map(|(generation, _)| generation.clone());
            if current.is_some() && !in_place {
                return (
                    409,
                    failure("lora_adapter_already_loaded", "already loaded"),
                );
            }
            if expected.is_some() && expected != current.as_deref() {
                return (409, failure("lora_generation_mismatch", "it moved"));
            }
            let source = state.root.join(body["lora_path"].as_str().expect("a path"));
            let Ok(bytes) = std::fs::read(source.join("adapter_model.safetensors")) else {
                return (404, failure("adapter_path_not_found", "no such adapter"));
            };
            let config =
                std::fs::read_to_string(source.join("adapter_config.json")).expect("there");
            if config.contains("monteclora_config") {
                return (422, failure("invalid_lora_adapter", "monteclora_config"));
            }
            let digest = Sha256::digest(&bytes);
            let generation: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let entry = (generation, source.display().to_string());
            let answer = object(&alias, &entry);
            state.adapters.insert(alias, entry);
            (200, answer)
        }
        ("POST", "/v1/unload_lora_adapter") => {
            let known = ["lora_name", "expected_generation", "lora_int_id", "model"];
            if let Some(refused) = refuse_body(body, &known) {
                return refused;
            }
            let alias = body["lora_name"].as_str().expect("a name");
            let current = state.adapters.get(alias).map(|entry| entry.0.as_str());
            let expected = body["expected_generation"].as_str();
            if current.is_some() && expected.is_some() && expected != current {
                return (409, failure("lora_generation_mismatch", "it moved"));
            }
            match state.adapters.remove(alias) {
                Some(entry) => (200, object(alias, &entry)),
                None => (404, failure("lora_adapter_not_found", "not loaded")),
            }
        }
        ("POST", "/v1/chat/completions") => {
            let model = body["model"].as_str().expect("a name");
            match state.adapters.get(model) {
                None => (404, failure("model_not_found", "no such model")),
                Some(_) if state.mute.iter().any(|mute| mute == model) => {
                    (500, failure("internal_error", "it fell over"))
                }
                Some((generation, _)) => (
                    200,
                    json!({"model": "base", "choices": [{"index": 0, "finish_reason": "stop",
                        "message": {"role": "assistant", "content": if state.silent { String::new() } else { format!("I am {}", &generation[..6]) }}}]}),
                ),
            }
        }
        _ => (404, Value::Null),
    }
}

/// Two recorded adapters with different content.
fn adapters() -> [Adapter; 2] {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fixtures/adapters");
    ["all-linear", "bf16"].map(|name| Adapter::read(&root.join(name)).expect("a recorded adapter"))
}

/// A release of the posterior mean, without further files.
fn release(adapter: &Adapter) -> Release {
    Release::mean(adapter, Path::new("nowhere")).expect("plain")
}

fn check(expected: &[&str]) -> Check {
    Check {
        prompts: vec!["Well?".to_owned()],
        system: None,
        expected: expected.iter().map(|text| (*text).to_owned()).collect(),
    }
}

#[test]
fn deploy_swap_roll_back_and_the_history_of_it() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let server = Imitation::start(root.path());
    let client = server.client();
    assert_eq!(client.is_ready().expect("answered"), Some(true));
    let [first, second] = adapters();
    let mut releases = Releases::open(root.path(), "team/triage").expect("opened");
    let busy = Releases::open(root.path(), "team/triage");
    assert_eq!(busy.expect_err("locked").code(), "release");
    server.with(|state| state.busy = 1);

    let mut go = |adapter: &Adapter| {
        deploy(
            &client,
            &mut releases,
            &release(adapter),
            "team/triage",
            None,
            &check(&["I am"]),
        )
    };
    let one = go(&first).expect("deployed");
    assert_eq!(
        (one.previous.clone(), one.unchanged, one.same_answers),
        (None, false, true)
    );
    let again = go(&first).expect("deployed");
    assert!(again.unchanged && again.generation == one.generation);
    let two = go(&second).expect("deployed");
    assert_eq!(two.previous.as_ref(), Some(&one.generation));
    assert_eq!(
        server.generation("team/triage").as_ref(),
        Some(&two.generation)
    );
    assert_ne!(one.directory, two.directory);
    assert_eq!(
        server.with(|state| state.adapters.len()),
        1,
        "no canary remains"
    );

    let back = roll_back(&client, &mut releases, "team/triage", None, &check(&[])).expect("back");
    assert_eq!(
        (&back.generation, &back.previous),
        (&one.generation, &two.generation)
    );
    assert_eq!(
        server.generation("team/triage").as_ref(),
        Some(&one.generation)
    );
    let forth = roll_back(
        &client,
        &mut releases,
        "team/triage",
        Some(&two.generation[..8]),
        &check(&[]),
    );
    assert_eq!(forth.expect("forth").generation, two.generation);
    let error = roll_back(
        &client,
        &mut releases,
        "team/triage",
        Some("ffff"),
        &check(&[]),
    );
    assert_eq!(error.expect_err("nothing").code(), "nothing-to-restore");
    drop(releases);
    let history = Releases::history_of(root.path(), "team/triage").expect("readable");
    let generations: Vec<&str> = history
        .iter()
        .map(|record| record.generation.as_str())
        .collect();
    let (one, two) = (one.generation.as_str(), two.generation.as_str());
    assert_eq!(generations, [one, two, one, two]);
    assert_eq!(history[2].action, Action::Rollback);
}

/// A rollback finds what a release replaced in its record, whatever was served in between.
#[test]
fn a_rollback_is_to_what_was_served_before() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let server = Imitation::start(root.path());
    let client = server.client();
    let [first, second] = adapters();
    let mut third = second.clone();
    third.sites.truncate(1);
    let mut releases = Releases::open(root.path(), "a").expect("opened");
    let go = |releases: &mut Releases, adapter: &Adapter| {
        let done = deploy(&client, releases, &release(adapter), "a", None, &check(&[]));
        done.expect("deployed")
    };
    let one = go(&mut releases, &first).generation;
    let two = go(&mut releases, &second).generation;
    assert_ne!(one, two);
    server.with(|state| state.mute.push("a".to_owned()));
    let failed = roll_back(&client, &mut releases, "a", None, &check(&[]));
    let failed = failed.expect_err("mute").to_string();
    assert!(
        failed.contains(&format!("was rolled back to {two}")),
        "{failed}"
    );
    assert_eq!(server.generation("a"), Some(two.clone()));
    assert_eq!(releases.history().len(), 2, "nothing else was served");
    server.with(|state| state.mute.clear());
    // An empty answer is valid, but it does not contain the expected text.
    server.with(|state| state.silent = true);
    let refused = roll_back(&client, &mut releases, "a", None, &check(&["I am"]));
    assert!(refused.expect_err("silent").to_string().contains("I am"));
    let back = roll_back(&client, &mut releases, "a", None, &check(&[])).expect("back");
    assert_eq!(
        (back.generation, back.answers[0].answer.as_str()),
        (one.clone(), "")
    );
    server.with(|state| state.silent = false);
    assert_eq!(go(&mut releases, &third).previous.as_ref(), Some(&one));
    let back = roll_back(&client, &mut releases, "a", None, &check(&[])).expect("back");
    assert_eq!(back.generation, one);
}

/// Undoing a swap restores the former base, and says what is served if the former adapter was overwritten.
#[test]
fn an_undone_swap_says_what_is_served() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let server = Imitation::start(root.path());
    let client = server.client();
    let [first, second] = adapters();
    let options = monteclora_converters::LoraOptions::default();
    let by_hand = root.path().join("by-hand");
    first.write_lora(&by_hand, &options).expect("written");
    let former = client.load_over("a", "by-hand", None);
    let former = former.expect("loaded").generation;
    server.with(|state| {
        state.parent = Some("other".to_owned());
        state.mute.push("a".to_owned());
    });
    std::fs::remove_dir_all(&by_hand).expect("removed");
    let mut third = second.clone();
    third.sites.truncate(1);
    third.write_lora(&by_hand, &options).expect("written");
    let mut releases = Releases::open(root.path(), "a").expect("opened");
    let error = deploy(
        &client,
        &mut releases,
        &release(&second),
        "a",
        None,
        &check(&[]),
    );
    let error = error.expect_err("mute").to_string();
    let now = server.generation("a").expect("served");
    assert_ne!(now, former);
    assert!(
        error.contains(&now) && !error.contains("was rolled back"),
        "{error}"
    );
    let loads = server.with(|state| state.log.clone());
    let loads = loads.iter().filter(|line| line.contains("/v1/load"));
    assert!(
        loads.skip(1).all(|line| line.ends_with(" other")),
        "the canary, the swap and the way back are on the same base"
    );
}

#[test]
fn the_name_of_a_base_is_refused_before_anything_is_written() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let server = Imitation::start(root.path());
    let [first, _] = adapters();
    let mut releases = Releases::open(root.path(), "base").expect("opened");
    let refused = deploy(
        &server.client(),
        &mut releases,
        &release(&first),
        "base",
        None,
        &check(&[]),
    );
    let error = refused.expect_err("refused");
    assert!(
        error.to_string().contains("is a base model of the server"),
        "{error}"
    );
    assert_eq!(exit_code(&error, |_| None), 2);
    let written = std::fs::read_dir(root.path().join("base")).expect("there");
    assert!(written.count() <= 1, "the lock at most");
}

#[test]
fn a_bad_canary_changes_nothing_and_a_bad_swap_is_undone() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let server = Imitation::start(root.path());
    let client = server.client();
    let [first, second] = adapters();
    let mut releases = Releases::open(root.path(), "a").expect("opened");
    let mut go = |adapter: &Adapter, expected: &[&str]| {
        deploy(
            &client,
            &mut releases,
            &release(adapter),
            "a",
            None,
            &check(expected),
        )
    };
    let one = go(&first, &[]).expect("deployed").generation;

    let error = go(&second, &["what it never says"])
        .expect_err("refused")
        .to_string();
    assert!(error.contains("canary") && error.contains(&one), "{error}");
    assert_eq!(server.generation("a"), Some(one.clone()));
    assert_eq!(server.with(|state| state.adapters.len()), 1);

    // The canary answers, and the alias does not.
    server.with(|state| state.mute.push("a".to_owned()));
    let error = go(&second, &[]).expect_err("refused").to_string();
    assert!(
        error.contains("verification") && error.contains("rolled back"),
        "{error}"
    );
    assert_eq!(server.generation("a"), Some(one.clone()));

    // A first deployment has nothing to go back to.
    server.with(|state| state.mute.push("new".to_owned()));
    let mut fresh = Releases::open(root.path(), "new").expect("opened");
    let error = deploy(
        &client,
        &mut fresh,
        &release(&second),
        "new",
        None,
        &check(&[]),
    )
    .expect_err("refused");
    assert!(error.to_string().contains("unloaded"), "{error}");
    assert_eq!(server.generation("new"), None);
    assert!(
        Releases::history_of(root.path(), "new")
            .expect("readable")
            .is_empty()
    );

    // A release that was changed on disk is not served under its name.
    let mut changed = Releases::open(root.path(), "b").expect("opened");
    let path = root
        .path()
        .join(changed.store(&release(&first)).expect("stored"));
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    assert!(files.iter().all(|file| {
        path.join(file)
            .metadata()
            .expect("there")
            .permissions()
            .readonly()
    }));
    std::fs::remove_dir_all(&path).expect("removed");
    second
        .write_lora(&path, &monteclora_converters::LoraOptions::default())
        .expect("written");
    let error = deploy(
        &client,
        &mut changed,
        &release(&first),
        "b",
        None,
        &check(&[]),
    )
    .expect_err("changed");
    assert_eq!(exit_code(&error, |_| None), 2, "{error}");
}

#[test]
fn wrong_keys_addresses_and_silent_ports_are_told_apart() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let server = Imitation::start(root.path());
    let second = Duration::from_secs(5);
    let client = AdapterServer::new(&server.url, Some("guess".to_owned()), second).expect("sound");
    let error = client.adapters().expect_err("refused");
    assert!(error.code() == "unauthorized" && !error.to_string().contains("guess"));
    for url in ["localhost:1", "ftp://x", "http://user:pw@x", "nonsense"] {
        let error = AdapterServer::new(url, None, second)
            .err()
            .expect("refused");
        assert!(!error.to_string().contains("pw@"), "{error}");
        assert_eq!(exit_code(&error, |_| None), 2);
    }
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("bound")
        .port();
    let gone =
        AdapterServer::new(&format!("http://127.0.0.1:{port}"), None, second).expect("sound");
    assert_eq!(gone.models().expect_err("gone").code(), "unreachable");
    let client = server.client();
    let refused = client
        .load("x", "nowhere", None, None)
        .expect_err("missing");
    assert_eq!(
        (
            exit_code(&refused, |_| None),
            refused.to_string().contains("no such adapter")
        ),
        (4, true)
    );
}

/// A release contains the recorded variables of the chat template, and its content hash depends on them.
#[test]
fn a_release_has_the_template_variables_of_its_training() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let [adapter, _] = adapters();
    let trained = root.path().join("trained");
    let options = monteclora_converters::LoraOptions::default();
    adapter.write_lora(&trained, &options).expect("written");
    let releases = Releases::open(root.path(), "a").expect("opened");
    let store = |record: &str| {
        std::fs::write(trained.join("run.json"), record).expect("written");
        let release = Release::mean(&adapter, &trained).expect("plain");
        let directory = releases.store(&release).expect("stored");
        assert_eq!(releases.store(&release).expect("stored"), directory);
        directory
    };
    let without = store(r#"{"config": {"data": {}}}"#);
    assert_eq!(without, releases.store(&release(&adapter)).expect("stored"));
    let with = store(r#"{"config": {"data": {"template_variables": {"enable_thinking": false}}}}"#);
    assert_ne!(with, without);
    let recorded =
        |path: &Path| monteclora_converters::jinja::recorded_variables(path).expect("readable");
    assert_eq!(recorded(&root.path().join(with))["enable_thinking"], false);
    // A release without its own record does not take the record in the directory above.
    let above = r#"{"config": {"data": {"template_variables": {"day": "Monday"}}}}"#;
    std::fs::write(root.path().join("a/run.json"), above).expect("written");
    let release = release(&adapters()[1]);
    let directory = releases.store(&release).expect("stored");
    assert!(recorded(&root.path().join(&directory)).is_empty());
    assert_eq!(releases.store(&release).expect("stored"), directory);
}
