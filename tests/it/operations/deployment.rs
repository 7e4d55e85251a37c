//! `deploy`, `status` and `rollback` against a running server.

use serde_json::Value;

use super::{Site, TWO};
use crate::cli::outcome;
use crate::fixtures::own;

fn monteclora(arguments: &[&str]) -> (i32, String, String) {
    let mut command = crate::cli::monteclora();
    let run = outcome(command.args(arguments).env("MONTECLORA_KEY", "admin-key"));
    (run.code, run.stdout, run.stderr)
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
        &[&adapter("must-refuse-modules-to-save"), "--alias", "triage"],
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
