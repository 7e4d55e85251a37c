//! Releases on a server that scores: posterior and calibration go into service with the mean, and come back with it.

use serde_json::{Value, json};

use super::{PLAIN, POSTERIOR, QUESTION, Site, agree, chat, with};
use crate::cli::{copy, json as output, own_adapter, run as command, text, tiny};
use crate::fixtures::own;
use crate::runtime::{Server, serve};

fn run(site: &Site, server: &Server, verb: &str, alias: &str, more: &[&str]) -> Value {
    let root = site.at("adapters");
    let common = [
        "--alias",
        alias,
        "--server",
        &server.url,
        "--adapter-root",
        &root,
    ];
    output(&[&[verb], more, &common].concat())
}

#[test]
fn what_is_deployed_keeps_its_posterior_and_its_calibration() {
    let site = Site::new();
    let scored = "enabled = true\ndtype = 'f32'\ndraws = 2";
    let calibrated = site.dir.path().join("calibrated");
    copy(own_adapter(POSTERIOR).as_ref(), &calibrated);
    site.calibrate("../calibrated", &["--posterior-samples", "2"]);
    let server = site.serve("", scored);
    let score = |alias: &str| {
        site.score(
            &server,
            &with(chat(alias), json!({"choices": ["yes", "no"]})),
        )
    };
    let deployed = run(
        &site,
        &server,
        "deploy",
        "triage",
        &[text(&calibrated), "--base", "base"],
    );
    assert_eq!(
        (&deployed["posterior"], &deployed["calibration"]),
        (&json!(true), &json!(true))
    );
    let first = score("triage");
    assert_eq!(
        (&first["calibrated"], &first["generation"]),
        (&json!(true), &deployed["generation"])
    );
    let asked = [
        "--prompt",
        QUESTION,
        "--choices",
        "yes",
        "no",
        "--posterior-samples",
        "2",
    ];
    agree(&first, &site.predict("../calibrated", &asked));

    let again = run(&site, &server, "deploy", "triage", &[text(&calibrated)]);
    assert_eq!(again["unchanged"], true);
    let plain = run(
        &site,
        &server,
        "deploy",
        "triage",
        &[text(&site.adapter(PLAIN))],
    );
    assert_eq!(
        (&plain["posterior"], &plain["previous"]),
        (&json!(false), &deployed["generation"])
    );
    assert_eq!(score("triage")["uncertainty"], Value::Null);
    run(&site, &server, "rollback", "triage", &[]);
    assert_eq!(score("triage"), first);

    // The calibration alone makes another release of the same mean.
    site.calibrate(
        "../calibrated",
        &["--posterior-samples", "2", "--seed", "3"],
    );
    let other = run(&site, &server, "deploy", "triage", &[text(&calibrated)]);
    assert_eq!(other["unchanged"], false);
    assert_ne!(other["directory"], deployed["directory"]);
    assert_eq!(score("triage")["uncertainty"]["seed"], 3);
    run(&site, &server, "rollback", "triage", &[]);
    assert_eq!(score("triage"), first);

    // What serve.toml declared comes back as it was.
    let before = score(POSTERIOR);
    let plain = run(
        &site,
        &server,
        "deploy",
        POSTERIOR,
        &[text(&site.adapter(PLAIN))],
    );
    assert_eq!(plain["can_roll_back"], true, "{plain}");
    run(&site, &server, "rollback", POSTERIOR, &[]);
    assert_eq!(score(POSTERIOR), before);
    drop(server);

    // A server that does not score gets what every server takes.
    let server = site.serve("", "enabled = false");
    let deployed = run(&site, &server, "deploy", "mean", &[text(&calibrated)]);
    assert_eq!(
        (&deployed["posterior"], &deployed["calibration"]),
        (&json!(false), &json!(false))
    );
    let release = site
        .dir
        .path()
        .join("adapters")
        .join(deployed["directory"].as_str().unwrap());
    let config = std::fs::read_to_string(release.join("adapter_config.json")).unwrap();
    assert!(!config.contains("monteclora_config"));
}

/// What was changed where it lies since it was loaded is not taken for what is served.
#[test]
fn what_is_no_longer_served_is_no_way_back() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 2");
    site.calibrate(POSTERIOR, &["--posterior-samples", "2"]);
    let plain = run(
        &site,
        &server,
        "deploy",
        POSTERIOR,
        &[text(&site.adapter(PLAIN))],
    );
    assert_eq!(plain["can_roll_back"], false, "{plain}");
    // A damaged calibration of the adapter that is served keeps no other from being deployed.
    let damaged = site.adapter("damaged");
    copy(own_adapter(POSTERIOR).as_ref(), &damaged);
    let load = json!({"lora_name": "d", "lora_path": "damaged", "model": "base"});
    assert_eq!(
        site.post(&server, "/v1/load_lora_adapter", &load).status(),
        200
    );
    std::fs::write(damaged.join("calibration.json"), "{").unwrap();
    let deployed = run(&site, &server, "deploy", "d", &[text(&site.adapter(PLAIN))]);
    assert_eq!(deployed["can_roll_back"], false);
}

/// A release has one generation with scores and another without; the way back is to another release all the same. What the server
/// warns of is told.
#[test]
fn rollbacks_are_to_another_release_whatever_is_scored() {
    let site = Site::new();
    let calibrated = site.dir.path().join("calibrated");
    copy(own_adapter(POSTERIOR).as_ref(), &calibrated);
    site.calibrate("../calibrated", &["--posterior-samples", "4"]);
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 2");
    let first = run(
        &site,
        &server,
        "deploy",
        "triage",
        &[text(&site.adapter(PLAIN)), "--base", "base"],
    );
    assert_eq!(first["warnings"], json!([]));
    let second = run(&site, &server, "deploy", "triage", &[text(&calibrated)]);
    let warnings = second["warnings"].to_string();
    assert!(
        warnings.contains("draws") && warnings.contains("monteclora calibrate"),
        "{warnings}"
    );
    drop(server);
    let server = site.serve("", "enabled = false");
    let back = run(&site, &server, "rollback", "triage", &[]);
    assert_eq!(back["directory"], first["directory"]);
    assert_ne!(back["generation"], second["generation"]);
    drop(server);
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 4");
    // What is served is no way back.
    let root = site.at("adapters");
    let to = back["generation"].as_str().unwrap();
    let refused = command(&[
        "rollback",
        "--alias",
        "triage",
        "--server",
        &server.url,
        "--adapter-root",
        &root,
        "--to",
        to,
    ]);
    assert!(
        refused.code == 2 && refused.stderr.contains("--to"),
        "{}",
        refused.stderr
    );
    let forth = run(
        &site,
        &server,
        "rollback",
        "triage",
        &["--to", second["generation"].as_str().unwrap()],
    );
    assert_eq!(
        (&forth["posterior"], &forth["calibration"]),
        (&json!(true), &json!(true))
    );
    let back = run(&site, &server, "rollback", "triage", &[]);
    assert!(
        back["warnings"]
            .to_string()
            .contains("no answer is held back"),
        "{back}"
    );
    let status = output(&[
        "status",
        "--server",
        &server.url,
        "--adapter-root",
        &site.at("adapters"),
    ]);
    assert_eq!(
        status["releases"]["triage"].as_array().unwrap().len(),
        5,
        "{status}"
    );
}

#[test]
fn the_base_is_to_be_named_where_only_some_are_scored() {
    let site = Site::new();
    let qwen2 = own().join("models/tiny-qwen2");
    let toml = format!(
        "[admin]\nenabled = true\nadapter_root = 'adapters'\n[[models]]\nmodel_id = '{}'\nname = 'other'\ndevice.cpu = true\n[[models]]\nmodel_id = '{}'\nname = 'base'\ndevice.cpu = true\nuncertainty.enabled = true\n",
        text(&qwen2),
        tiny()
    );
    std::fs::write(site.at("serve.toml"), toml).unwrap();
    let server = serve(&["-c", &site.at("serve.toml")]);
    let (root, adapter) = (site.at("adapters"), own_adapter(POSTERIOR));
    let arguments = [
        "deploy",
        &adapter,
        "--alias",
        "a",
        "--server",
        &server.url,
        "--adapter-root",
        &root,
    ];
    let refused = command(&arguments);
    assert!(
        refused.code == 2 && refused.stderr.contains("--base"),
        "{}",
        refused.stderr
    );
    // The remedy that was named.
    let deployed = run(&site, &server, "deploy", "a", &[&adapter, "--base", "base"]);
    assert_eq!(deployed["posterior"], true);
    let again = run(&site, &server, "deploy", "a", &[&adapter]);
    assert_eq!(
        again["unchanged"], true,
        "the alias says which base is meant"
    );
}

/// The canary takes nobody's name, and what was edited by hand is not brought back.
#[test]
fn canaries_and_rollbacks_leave_other_things_alone() {
    let site = Site::new();
    let server = site.serve("", "enabled = true\ndtype = 'f32'\ndraws = 2");
    let (root, plain) = (site.at("adapters"), site.adapter(PLAIN));
    let common = ["--server", &server.url, "--adapter-root", &root];
    let refused = |arguments: &[&str]| {
        let done = command(&[arguments, &common].concat());
        assert_eq!(done.code, 2, "{arguments:?}: {}", done.stderr);
        done.stderr
    };
    run(
        &site,
        &server,
        "deploy",
        "x-canary",
        &[text(&plain), "--base", "base"],
    );
    let said = refused(&["deploy", text(&plain), "--alias", "x"]);
    assert!(
        said.contains("`x-canary`") && said.contains("--alias"),
        "{said}"
    );
    assert_eq!(
        site.post(
            &server,
            "/v1/chat/completions",
            &with(chat("x-canary"), json!({"max_tokens": 1}))
        )
        .status(),
        200
    );
    for alias in ["", "..", "/abs", "a b", "default"] {
        let said = refused(&["deploy", text(&plain), "--alias", alias]);
        assert!(
            said.contains("--alias") && !said.contains("canary"),
            "{said}"
        );
        assert!(!site.dir.path().join("adapters/.lock").exists());
    }
    let first = run(
        &site,
        &server,
        "deploy",
        "y",
        &[&own_adapter(POSTERIOR), "--base", "base"],
    );
    run(&site, &server, "deploy", "y", &[text(&plain)]);
    let release = site
        .dir
        .path()
        .join("adapters")
        .join(first["directory"].as_str().unwrap());
    let config = release.join("run.json");
    std::fs::remove_file(&config).unwrap();
    std::fs::write(
        &config,
        r#"{"config": {"data": {"template_variables": {"day": "Monday"}}}}"#,
    )
    .unwrap();
    let said = refused(&["rollback", "--alias", "y"]);
    assert!(said.contains("was changed since it was released"), "{said}");
    // A record that cannot be read would write other prompts, and is refused.
    let damaged = site.adapter("damaged");
    copy(own_adapter(POSTERIOR).as_ref(), &damaged);
    for content in [
        "",
        "[]",
        r#"{"config": {"data": {"template_variables": 5}}}"#,
    ] {
        std::fs::write(damaged.join("run.json"), content).unwrap();
        let load = json!({"lora_name": "d", "lora_path": "damaged", "model": "base"});
        let answer = site.post(&server, "/v1/load_lora_adapter", &load);
        assert_eq!(
            answer.status(),
            422,
            "{content}: {}",
            answer.text().unwrap()
        );
        let done = command(&[
            "predict",
            "-m",
            &tiny(),
            "-a",
            text(&damaged),
            "--prompt",
            "a",
        ]);
        assert!(
            done.code == 4 && done.stderr.contains("run.json"),
            "{content}: {}",
            done.stderr
        );
    }
}
