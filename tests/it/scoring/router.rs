//! The example that uses scores.

use std::path::Path;

use serde_json::json;

use super::{POSTERIOR, Site};
use crate::runtime::Server;

/// `examples/router.py` answers what the model is sure of and hands over the rest; with the openai client where Python has it, else
/// with a stand-in of the same form.
#[test]
fn the_router_hands_over_what_is_below_the_threshold() {
    let site = Site::new();
    let questions: Vec<String> = (0..12).map(|at| format!("is thing {at} green")).collect();
    site.calibrate(POSTERIOR, &["--posterior-samples", "2"]);
    let route = |server: &Server| {
        let has_client = std::process::Command::new("python3")
            .args(["-c", "import openai"])
            .output()
            .unwrap();
        let mut command = assert_cmd::Command::new("python3");
        command.env("BASE_URL", format!("{}/v1", server.url));
        if !has_client.status.success() {
            let stand_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/openai_stand_in");
            command.env("PYTHONPATH", stand_in);
        }
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/router.py"));
        command
            .args([POSTERIOR, "--choices", "yes", "no"])
            .write_stdin(questions.join("\n"));
        command.output().unwrap()
    };
    let uncertainty = "enabled = true\ndtype = 'f32'\ndraws = 2";
    let server = site.serve("", uncertainty);
    let without = route(&server);
    assert!(!without.status.success());
    assert!(String::from_utf8_lossy(&without.stderr).contains("calibrate"));

    // A threshold between the surest and the others.
    let score = |server: &Server, question: &str| {
        let messages = json!([{"role": "user", "content": question}]);
        site.score(
            server,
            &json!({"model": POSTERIOR, "messages": messages, "choices": ["yes", "no"]}),
        )
    };
    let mut sure: Vec<f64> = questions
        .iter()
        .map(|question| score(&server, question)["p_correct"].as_f64().unwrap())
        .collect();
    sure.sort_by(f64::total_cmp);
    assert!(sure[0] < sure[11]);
    let threshold = (sure[0] + sure[11]) / 2.0;
    site.set_threshold(POSTERIOR, threshold);
    drop(server);
    let server = site.serve("", uncertainty);
    let routed = route(&server);
    assert!(
        routed.status.success(),
        "{}",
        String::from_utf8_lossy(&routed.stderr)
    );
    let stdout = String::from_utf8(routed.stdout).unwrap();
    assert_eq!(stdout.lines().count(), questions.len());
    let mut n_handed_over = 0;
    for (line, question) in stdout.lines().zip(&questions) {
        let score = score(&server, question);
        let expected = match score["abstain"].as_bool().unwrap() {
            true => "a person",
            false => score["answer"].as_str().unwrap().trim(),
        };
        n_handed_over += usize::from(expected == "a person");
        assert!(
            line.starts_with(&format!("{expected}\t")) && line.ends_with(question),
            "{line}"
        );
    }
    assert!(
        (1..questions.len()).contains(&n_handed_over),
        "{n_handed_over}"
    );
}
