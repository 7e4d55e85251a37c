//! Releases on a server that scores: posterior and calibration go into service with the mean, and come back with it.

use serde_json::{Value, json};

use super::{PLAIN, POSTERIOR, QUESTION, Site, agree, chat, with};
use crate::cli::{copy, json as output, own_adapter, text};
use crate::runtime::Server;

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
