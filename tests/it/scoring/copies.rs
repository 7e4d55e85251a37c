//! The copies of bases that scores come from: their element types, their place in memory, and what becomes of them in a reload and
//! at the end.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{POSTERIOR, QUESTION, Site, agree, chat, with};
use crate::cli::{copy, monteclora, outcome, own_adapter, run, run_toml, text, tiny};
use crate::fixtures::own;
use crate::runtime::{Server, serve, serve_with};

const ASKED: [&str; 5] = ["--prompt", QUESTION, "--choices", "yes", "no"];

fn choices(model: &str) -> Value {
    with(chat(model), json!({"choices": ["yes", "no"]}))
}

fn signal(server: &Server, name: &str) {
    let process = server.child.id().to_string();
    let sent = Command::new("kill").args([name, &process]).status();
    assert!(sent.unwrap().success());
}

/// The copy is in the blocks of the file, and gives what `predict` gives on that file.
#[test]
fn a_copy_in_blocks_scores_as_predict_does_on_the_file() {
    let site = Site::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = root.join("tests/data/gguf/llama-every-type.gguf");
    let cache = site.at("cache");
    let in_cache = |arguments: &[&str]| -> String {
        let done = outcome(monteclora().env("MONTECLORA_CACHE", &cache).args(arguments));
        assert_eq!(done.code, 0, "{arguments:?}: {}", done.stderr);
        done.stdout
    };
    let config = run_toml(site.dir.path(), "", "", "learning_rate = 1e-2");
    let model = format!("model.model_id={:?}", text(&file));
    in_cache(&["train", "-c", text(&config), "--set", &model]);
    let serve_as = |dtype: &str| -> Server {
        let toml = format!(
            "[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\nuncertainty.enabled = true\nuncertainty.dtype = '{dtype}'\n[[models.adapters]]\nalias = 'a'\nsource = 'out'\n",
            text(&file)
        );
        std::fs::write(site.at("serve.toml"), toml).unwrap();
        serve_with(
            &["-c", &site.at("serve.toml")],
            &[("MONTECLORA_CACHE", &cache)],
        )
    };
    let body = json!({"model": "a", "prompt": QUESTION, "choices": ["yes", "no"], "draws": 3});
    let out = site.at("out");
    let first = [
        "predict",
        "-m",
        text(&file),
        "-a",
        &out,
        "--json",
        "--no-chat-template",
    ];
    let predict = |more: &[&str]| -> Value {
        let draws = ["--posterior-samples", "3"];
        let said = in_cache(&[&first[..], &ASKED, &draws, more].concat());
        serde_json::from_str::<Value>(&said).unwrap()["answers"][0].clone()
    };
    let server = serve_as("blocks");
    let in_blocks = site.score(&server, &body);
    agree(&in_blocks, &predict(&[]));
    let bytes = |server: &Server| {
        site.metric(server, "monteclora_resident_weight_bytes")
            .unwrap()
    };
    let of_blocks = bytes(&server);
    drop(server);
    let server = serve_as("f32");
    agree(&site.score(&server, &body), &predict(&["--dtype", "f32"]));
    assert!(of_blocks < bytes(&server));
}

/// Each base has a copy of its own, which its own adapters are on.
#[test]
fn two_bases_are_scored_by_a_copy_each() {
    let site = Site::new();
    let other = own().join("models/tiny-qwen2");
    copy(
        Path::new(&own_adapter("qwen2-monteclora")),
        &site.adapter("qwen2"),
    );
    let model = |name: &str, base: &str, adapter: &str, dtype: &str| {
        format!(
            "[[models]]\nmodel_id = '{base}'\nname = '{name}'\ndevice.cpu = true\nuncertainty.enabled = true\nuncertainty.dtype = '{dtype}'\n[[models.adapters]]\nalias = 'of-{name}'\nsource = 'adapters/{adapter}'\n"
        )
    };
    let toml =
        model("llama", &tiny(), POSTERIOR, "f32") + &model("qwen2", text(&other), "qwen2", "bf16");
    std::fs::write(site.at("serve.toml"), toml).unwrap();
    let server = serve(&["-c", &site.at("serve.toml")]);
    for (name, base, adapter, dtype) in [
        ("of-llama", tiny(), POSTERIOR, "f32"),
        ("of-qwen2", text(&other).to_owned(), "qwen2", "bf16"),
    ] {
        let body = json!({"model": name, "prompt": QUESTION, "choices": ["yes", "no"], "draws": 2});
        let adapter = site.adapter(adapter);
        let of = [
            "predict",
            "-m",
            &base,
            "-a",
            text(&adapter),
            "--dtype",
            dtype,
            "--no-chat-template",
        ];
        let predicted =
            crate::cli::json(&[&of[..], &ASKED, &["--posterior-samples", "2"]].concat());
        agree(&site.score(&server, &body), &predicted["answers"][0]);
    }
}

/// A base that a reload replaces takes its adapters with it: none is scored by the copy that was.
#[test]
fn a_reload_that_replaces_a_base_replaces_what_scores_its_adapters() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'bf16'\ndraws = 2");
    let rounded = site.score(&server, &choices(POSTERIOR));
    let predict = |dtype: &str| {
        let draws = ["--posterior-samples", "2", "--dtype", dtype];
        site.predict(POSTERIOR, &[&ASKED[..], &draws].concat())
    };
    agree(&rounded, &predict("bf16"));
    let reload = |uncertainty: &str| {
        site.configure("", uncertainty, 0);
        let counted =
            |server: &Server| site.metric(server, "monteclora_reloads_total{outcome=\"success\"}");
        let before = counted(&server);
        signal(&server, "-HUP");
        let begun = Instant::now();
        while counted(&server) == before {
            assert!(begun.elapsed() < Duration::from_secs(60), "not read again");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    reload("enabled = true\ndtype = 'f32'\ndraws = 2");
    let full = site.score(&server, &choices(POSTERIOR));
    agree(&full, &predict("f32"));
    assert_ne!(full["choices"], rounded["choices"]);
    reload("enabled = false");
    let (key, _) = site.refused(&server, &choices(POSTERIOR));
    assert_eq!(key, "model");
    let said = site.post(
        &server,
        "/v1/chat/completions",
        &with(chat(POSTERIOR), json!({"max_tokens": 2})),
    );
    assert_eq!(said.status(), 200);
    reload("enabled = true\ndtype = 'f32'\ndraws = 2");
    assert_eq!(
        site.score(&server, &choices(POSTERIOR))["choices"],
        full["choices"]
    );
}

/// Many long choices for many draws: seconds of work.
fn long() -> Value {
    let choices: Vec<String> = (0..60)
        .map(|at| format!("{at} {}", "and so on ".repeat(12)))
        .collect();
    with(chat(POSTERIOR), json!({"choices": choices, "draws": 200}))
}

/// A score that takes longer than requests may is ended with an error; the next one has its place.
#[test]
fn a_score_ends_with_its_time() {
    let site = Site::new();
    let server = site.serve(
        "[limits]\nrequest_timeout_s = 1",
        "enabled = true\ndtype = 'f32'\ndraws = 200",
    );
    let response = site.post(&server, "/v1/monteclora/score", &long());
    assert_eq!(response.status(), 504);
    let error: Value = response.json().unwrap();
    assert_eq!(error["error"]["code"], "timeout", "{error}");
    assert_eq!(
        site.metric(&server, "monteclora_scores_total{outcome=\"timeout\"}"),
        Some(1)
    );
    let next = with(choices(POSTERIOR), json!({"draws": 1}));
    assert_eq!(site.score(&server, &next)["uncertainty"]["draws"], 1);
}

/// A server that is told to end gives the scores that it has begun.
#[test]
fn a_score_in_flight_is_given_before_the_end() {
    let site = Site::new();
    let mut server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 200");
    let body = long();
    let score = std::thread::scope(|scope| {
        let asked = scope.spawn(|| site.score(&server, &body));
        let begun = Instant::now();
        while site.metric(&server, "monteclora_requests_in_flight") == Some(0) {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        // What cannot be answered is refused before its turn.
        let most = with(choices(POSTERIOR), json!({"draws": 201}));
        assert_eq!(site.refused(&server, &most).0, "draws");
        assert!(!asked.is_finished(), "the score in flight was to be longer");
        signal(&server, "-TERM");
        asked.join().unwrap()
    });
    assert_eq!(score["choices"].as_array().unwrap().len(), 60);
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

/// The copy of the base counts in the budget, once for all adapters, and so do draws; what does not fit is refused by name.
#[test]
fn the_copy_and_the_draws_count_in_the_budget() {
    let site = Site::new();
    let bytes = |server: &Server| {
        site.metric(server, "monteclora_resident_weight_bytes")
            .unwrap()
    };
    let without = bytes(&site.serve("", ""));
    let few = bytes(&site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 1"));
    let many = bytes(&site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 101"));
    let half = bytes(&site.serve("", "enabled = true\ndtype = 'bf16'\ndraws = 1"));
    let weights = std::fs::metadata(Path::new(&tiny()).join("model.safetensors"))
        .unwrap()
        .len();
    assert!(
        few - without > weights && few - without < 2 * weights,
        "{without} {few} {weights}"
    );
    assert!(many > few + 100 * 1000, "{few} {many}");
    assert!(half < few && half > without);
    // What does not fit is refused by name, before anything is loaded.
    let tight = |draws: usize| {
        std::fs::write(
            site.at("serve.toml"),
            format!(
                "[server]\nport = 0\n[runtime]\nmax_memory_mb = 8\n[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\nuncertainty.enabled = true\nuncertainty.draws = {draws}\n[[models.adapters]]\nalias = 'a'\nsource = 'adapters/{POSTERIOR}'\n",
                tiny()
            ),
        )
        .unwrap();
    };
    tight(1000);
    let done = run(&["serve", "-c", &site.at("serve.toml")]);
    assert_eq!(done.code, 2, "{}", done.stderr);
    assert!(done.stderr.contains("max_memory_mb"), "{}", done.stderr);
    tight(1);
    drop(serve(&["-c", &site.at("serve.toml")]));
}
