//! Tests of engines that are kept while their models change.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::serving::{Running, chat, parse, toml_for};
use super::{servable, servable_too, walk};
use crate::engine::Engine;
use crate::quirks_0_8::logger_threads::NormalModel;
use crate::{ChatMessage, MonteCloraLoader};

/// A number from this process's `/proc/self/status`.
#[cfg(target_os = "linux")]
fn status(key: &str) -> i64 {
    let text = fs::read_to_string("/proc/self/status").expect("readable");
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let mut words = line.expect("the key is there").split_whitespace();
    let number = words.find_map(|word| word.parse().ok());
    number.expect("a number")
}

/// After the models of two engines are exchanged, each engine gives the answers of the other, bit for bit, however
/// often.
#[test]
fn engines_answer_with_the_model_they_are_given() {
    let other = walk::own().join("models/tiny-qwen2");
    let other = MonteCloraLoader::builder(other, "other").build();
    let engines = [servable().loader(), other.expect("sound")]
        .map(|loader| Engine::start(&loader).expect("loads"));
    let models = engines.each_ref().map(|engine| {
        let pipeline = engine.pipeline().expect("in memory");
        // SAFETY: `MonteCloraLoader` loads with `NormalLoader`.
        unsafe { NormalModel::new(pipeline) }
    });
    let tokens: Vec<u32> = (3..40).collect();
    let question = [ChatMessage::new("user", "Why?")];
    let answers = || {
        engines.each_ref().map(|engine| {
            let logits = engine.prompt_logits(&tokens).expect("computed").values;
            (logits, engine.ask(&question, 12).expect("answered"))
        })
    };
    let before = answers();
    assert_ne!(before[0].0, before[1].0);
    let crosswise = [before[1].clone(), before[0].clone()];
    for _ in 0..3 {
        for expected in [&crosswise, &before] {
            let patience = std::time::Duration::from_secs(10);
            models[0].exchange(&models[1], patience).expect("exchanged");
            assert_eq!(&answers(), expected);
        }
    }
    drop(models);
    for engine in engines {
        engine.shut_down().expect("stops");
    }
}

/// A model in use is not exchanged, and the exchange waits no longer than its patience.
#[test]
fn a_busy_model_stays_where_it_is() {
    let engine = Engine::start(&servable().loader()).expect("loads");
    let pipeline = engine.pipeline().expect("in memory");
    // SAFETY: as above.
    let model = unsafe { NormalModel::new(pipeline.clone()) };
    let guard = pipeline.blocking_lock();
    let begun = Instant::now();
    let patience = std::time::Duration::from_millis(50);
    let outcome = model.exchange(&model.clone(), patience);
    assert!(outcome.is_err() && begun.elapsed() >= patience);
    drop(guard);
    drop((pipeline, model));
    engine.shut_down().expect("stops");
}

/// A warning tells that an adapter is served on another base than it was trained on.
#[test]
fn an_adapter_of_another_base_is_loaded_with_a_warning() {
    let case = servable();
    let admin = "[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    let (server, dir) = Running::start(&toml_for(&case, admin));
    let base = monteclora_converters::ModelFiles::open(&case.base).expect("opens");
    let own = monteclora_converters::base_fingerprint(&base);
    let root = dir.path().join("adapters");
    let warnings = |name: &str, fingerprint: &str| -> Value {
        let to = root.join(name);
        case.copy_adapter(&to);
        let base = json!({"model_id": "/srv/models/mine", "fingerprint": fingerprint});
        let record = json!({ "base": base }).to_string();
        fs::write(to.join("run.json"), record).expect("written");
        let load = json!({"lora_name": "new", "lora_path": name, "load_inplace": true});
        parse(server.post("/v1/load_lora_adapter", &load), 200)["warnings"].clone()
    };
    assert_eq!(warnings("same", &own), json!([]));
    // Content that is already served, loaded from a directory that names another base.
    let told = warnings("other", "0123456789abcdef");
    assert_eq!(told[0]["code"], "other-base", "{told}");
    let message = told[0]["message"].as_str().expect("text");
    assert!(
        message.contains("trained on `mine` with fingerprint 0123456789ab"),
        "{told}"
    );
    let paths = ["/srv", case.base.to_str().expect("UTF-8")];
    assert!(
        !paths.iter().any(|path| told.to_string().contains(path)),
        "{told}"
    );
    server.finish().expect("a clean stop");
}

const INNER: &str = "fixture_tests::engines::swaps_in_a_process_of_their_own";

/// Threads and memory are counted per process, so other tests must not run in the same process.
#[test]
#[cfg(target_os = "linux")]
fn swaps_leave_no_thread_and_no_memory() {
    let program = std::env::current_exe().expect("this program");
    let output = Command::new(program)
        .args(["--exact", INNER, "--ignored", "--nocapture"])
        .output()
        .expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
#[ignore = "counts the threads of its process; `swaps_leave_no_thread_and_no_memory` runs it in one of its own"]
fn swaps_in_a_process_of_their_own() {
    const SWAPS: usize = 200;
    const CLIENTS: usize = 16;
    let (one, two) = (servable(), servable_too());
    let admin = "[admin]\nenabled = true\nadapter_root = 'adapters'\n";
    let (server, dir) = Running::start(&toml_for(&one, admin));
    for (name, case) in [("one", &one), ("two", &two)] {
        let to = dir.path().join("adapters").join(name);
        case.copy_adapter(&to);
    }
    let swap = |to: &str| {
        let body = json!({"lora_name": "tuned", "lora_path": to, "load_inplace": true});
        parse(server.post("/v1/load_lora_adapter", &body), 200);
    };
    let ask = |model: &str| -> Value {
        let answer = parse(
            server.post("/v1/chat/completions", &chat(model, false)),
            200,
        );
        answer["choices"][0]["message"]["content"].clone()
    };
    let expected = ["one", "two"].map(|name| {
        swap(name);
        ask("tuned")
    });
    let base = ask("base");
    assert_ne!(expected[0], expected[1]);
    // Everything that the first requests start is running after these swaps.
    for idx in 0..8 {
        swap(["one", "two"][idx % 2]);
        assert_eq!(ask("tuned"), expected[idx % 2]);
    }
    let before = (status("Threads:"), status("VmRSS:"));

    for idx in 0..SWAPS {
        swap(["one", "two"][idx % 2]);
        assert_eq!(ask("tuned"), expected[idx % 2], "after swap {idx}");
    }
    let after = (status("Threads:"), status("VmRSS:"));
    assert!(
        after.0 <= before.0 + 6,
        "threads {} -> {}",
        before.0,
        after.0
    );
    // In kilobytes. Each model is below a megabyte; 200 models would take many times this.
    assert!(
        after.1 <= before.1 + 32_000,
        "kB {} -> {}",
        before.1,
        after.1
    );

    std::thread::scope(|scope| {
        let (ask, expected, base) = (&ask, &expected, &base);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                scope.spawn(move || {
                    for _ in 0..10 {
                        match client % 4 {
                            0 => assert_eq!(ask("base"), *base),
                            _ => assert!(expected.contains(&ask("tuned"))),
                        }
                    }
                })
            })
            .collect();
        let mut idx = 0;
        while clients.iter().any(|client| !client.is_finished()) {
            swap(["one", "two"][idx % 2]);
            idx += 1;
        }
        assert!(idx > 0);
    });
    let deadline = Instant::now() + std::time::Duration::from_secs(20);
    while status("Threads:") > before.0 + 6 {
        let threads = status("Threads:");
        assert!(
            Instant::now() < deadline,
            "threads {} -> {threads}",
            before.0
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    server.finish().expect("a clean stop");
}
