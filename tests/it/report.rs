//! `report` on runs of every kind: the page is well formed, needs nothing else, and holds the run's numbers.

use std::path::Path;

use serde_json::{Value, json};

use crate::cli::{run, run_toml};

/// The page as a tree; every tag closed, every attribute quoted.
fn page(dir: &Path) -> String {
    let dir = dir.display().to_string();
    let made = run(&["report", &dir]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let text = std::fs::read_to_string(Path::new(&dir).join("report.html")).unwrap();
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..roxmltree::ParsingOptions::default()
    };
    let document = roxmltree::Document::parse_with_options(&text, options).unwrap();
    for node in document.descendants().filter(roxmltree::Node::is_element) {
        let name = node.tag_name().name();
        assert!(
            ![
                "script", "link", "img", "iframe", "object", "embed", "use", "image", "base"
            ]
            .contains(&name),
            "<{name}> may fetch something"
        );
        for attribute in node.attributes() {
            assert!(
                !["src", "href", "srcset", "data"].contains(&attribute.name()),
                "{attribute:?}"
            );
            assert!(!attribute.name().starts_with("on"), "{attribute:?}");
        }
        if name == "style" {
            let style = node.text().unwrap();
            assert!(
                !style.contains("url(") && !style.contains("@import"),
                "{style}"
            );
        }
    }
    assert!(!text.contains("NaN") && !text.contains("None") && !text.contains("undefined"));
    text
}

fn write_lines(dir: &Path, lines: impl Iterator<Item = Value>) {
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    std::fs::write(dir.join("metrics.jsonl"), text).unwrap();
}

fn train_line(step: u64, loss: f64) -> Value {
    json!({"type": "train", "step": step, "epoch": 0.5, "loss": loss + 0.25, "task_loss": loss, "kl_loss": 0.003, "kl_dirichlet": 0.4,
           "kl_wishart": 12.5, "kl_gaussian": 99.5, "entropy_loss": 0.25, "grad_norm": 1.5, "learning_rate": 5e-4, "tokens": step * 100,
           "trained_tokens": step * 40, "tokens_per_second": 321.0, "peak_memory_bytes": 123_456_789, "wall_s": step as f64})
}

#[test]
fn a_real_run_is_reported_with_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(
        dir.path(),
        "",
        "",
        "logging_steps = 1\nreport_to = [\"jsonl\", \"tensorboard\"]",
    );
    let text = std::fs::read_to_string(&config).unwrap();
    let rows = dir.path().join("rows.jsonl");
    let text = text.replace("[lora]", &format!("valid = {rows:?}\n[lora]"));
    std::fs::write(&config, text).unwrap();
    let trained = run(&["train", "-c", config.to_str().unwrap()]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    let out = dir.path().join("out");
    assert_eq!(std::fs::read_dir(out.join("tb")).unwrap().count(), 1);
    let page = page(&out);
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let mut n_train = 0;
    for line in metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
    {
        let number = |key: &str| line[key].as_f64().unwrap();
        match line["type"].as_str().unwrap() {
            "train" => {
                n_train += 1;
                assert!(page.contains(&format!(">step {}<", line["step"])));
                let digits = |value: f64| (3 - value.log10().floor() as i32).max(0) as usize;
                let loss = number("task_loss");
                let text = format!("{loss:.*}", digits(loss));
                let text = text.trim_end_matches('0').trim_end_matches('.');
                assert!(page.contains(&format!(">training {text}<")), "{text}");
            }
            "eval" => {
                for key in ["loss", "token_accuracy"] {
                    assert!(
                        page.contains(&format!("<td>{:.4}</td>", number(key))),
                        "{key}"
                    );
                }
            }
            _ => {}
        }
    }
    assert_eq!(n_train, 3);
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join("run.json")).unwrap()).unwrap();
    for text in [
        record["base"]["fingerprint"].as_str().unwrap(),
        record["train"]["sha256"].as_str().unwrap(),
        "finished at step 3",
        "Posterior spread",
        "All 21 sites",
        "[lora.monteclora]",
        "monteclora ",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert_eq!(page.matches("class=\"cell\"").count(), 21);
    // Another run's page is not in the way.
    assert_eq!(run(&["report", out.to_str().unwrap()]).code, 0);
    let elsewhere = dir.path().join("page.html");
    assert_eq!(
        run(&[
            "report",
            out.to_str().unwrap(),
            "-o",
            elsewhere.to_str().unwrap()
        ])
        .code,
        0
    );
    assert!(elsewhere.is_file());
}

#[test]
fn interrupted_resumed_and_non_finite_metrics_are_one_curve() {
    let dir = tempfile::tempdir().unwrap();
    let event = |name: &str, step: u64| json!({"type": "event", "event": name, "step": step, "wall_s": 1.0});
    let mut lines = vec![event("started", 0)];
    lines.extend((1..=30).map(|i| train_line(i * 10, 3.0 - i as f64 * 0.05)));
    lines.push(event("resumed", 200));
    lines.extend((21..=25).map(|i| train_line(i * 10, 1.25)));
    lines[12]["task_loss"] = Value::Null;
    lines.push(event("interrupted", 255));
    write_lines(dir.path(), lines.into_iter());
    let mut text = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    text.push_str("{\"type\": \"train\", \"ste");
    std::fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
    let page = page(dir.path());
    assert!(page.contains("interrupted at step 255"));
    assert!(page.contains("1 line of metrics.jsonl could not be read"));
    assert!(page.contains(">step 250<") && !page.contains(">step 300<"));
    assert!(page.contains(">training 1.25<"));
    // The point that was not finite breaks the line of the loss in two.
    let loss = page.split("aria-label=\"Loss\"").nth(1).unwrap();
    let path = loss
        .split("<path class=\"s1\" d=\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    assert_eq!(path.matches('M').count(), 2, "{path}");
}

#[test]
fn empty_and_huge_metrics_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("metrics.jsonl"), "").unwrap();
    let empty = page(dir.path());
    assert!(
        empty.contains("No training step was reported yet")
            && empty.contains("nothing reported yet")
    );
    let lines = (1..=100_000u64).map(|step| {
        let spike = if step == 65_432 { 777.0 } else { 0.0 };
        train_line(step, 2.0 + (step as f64 / 5e3).cos() + spike)
    });
    let evaluations = (1..=1000).map(|i| json!({"type": "eval", "step": i * 100, "epoch": 1.0, "loss": 1000.5 - i as f64, "perplexity": 2.0, "token_accuracy": 0.5}));
    write_lines(dir.path(), lines.chain(evaluations));
    let began = std::time::Instant::now();
    let huge = page(dir.path());
    assert!(huge.len() < 1_500_000, "{} bytes", huge.len());
    assert!(huge.contains(">step 100000<") && huge.contains("<td>0.5000</td>"));
    assert!(huge.contains("more in metrics.jsonl"));
    assert!(began.elapsed().as_secs() < 60);
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = run(&["report", dir.path().join("nowhere").to_str().unwrap()]);
    assert_eq!(missing.code, 2, "{}", missing.stderr);
    let empty = run(&["report", dir.path().to_str().unwrap()]);
    assert_eq!(empty.code, 2, "{}", empty.stderr);
    assert!(empty.stderr.contains("output_dir"), "{}", empty.stderr);
    std::fs::write(dir.path().join("run.json"), "{").unwrap();
    assert_eq!(run(&["report", dir.path().to_str().unwrap()]).code, 4);
    // A name that is markup stays text.
    std::fs::write(
        dir.path().join("run.json"),
        r#"{"base": {"model_id": "a<b>&\"c"}}"#,
    )
    .unwrap();
    assert!(page(dir.path()).contains("a&lt;b&gt;&amp;&quot;c"));
}

/// A command reads what metrics.jsonl holds; one that fails does not end the run; what is no sink is refused with what there is.
#[test]
fn a_command_reads_the_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let (read, out) = (dir.path().join("read.jsonl"), dir.path().join("out"));
    let sinks = format!(
        "logging_steps = 1\nreport_to = [\"jsonl\", \"command:cat > '{}'; echo $MONTECLORA_OUTPUT_DIR >> '{}'\", \"command:exit 3\"]",
        read.display(),
        read.display()
    );
    let config = crate::cli::run_toml(dir.path(), "", "", &sinks);
    let done = crate::cli::run(&["train", "-c", config.to_str().unwrap()]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(done.stderr.contains("`exit 3`"), "{}", done.stderr);
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let expected = format!("{metrics}{}\n", out.display());
    assert_eq!(std::fs::read_to_string(read).unwrap(), expected);
    let refused = crate::cli::run(&[
        "train",
        "-c",
        config.to_str().unwrap(),
        "--set",
        "train.report_to=\"wandb\"",
    ]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.stderr.contains("examples/wandb_sink.py"),
        "{}",
        refused.stderr
    );
}

/// Scores and answers that lie beside a run are on its page, with how sure each answer is.
#[test]
fn scores_and_answers_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("my-run");
    std::fs::create_dir(&out).unwrap();
    // The first loss is far above the others.
    let losses = [9.0, 1.0, 0.6, 0.5];
    write_lines(
        &out,
        losses
            .iter()
            .enumerate()
            .map(|(at, loss)| train_line(at as u64 + 1, *loss)),
    );
    std::fs::write(out.join("eval.json"), r#"{"data": "test.jsonl", "rows": 40, "base": {"accuracy": 0.5, "ece": 0.25}, "mean": {"accuracy": 0.875, "ece": 0.0625}}"#).unwrap();
    let answers = dir.path().join("said.json");
    let answer = |at: usize| json!({"question": format!("question {at}"), "text": format!(" answer {at}"), "p_correct": 0.75, "calibrated": at == 0, "truncated": at == 1});
    std::fs::write(
        &answers,
        json!({"answers": (0..7).map(answer).collect::<Vec<_>>()}).to_string(),
    )
    .unwrap();
    let made = run(&[
        "report",
        out.to_str().unwrap(),
        "--answers",
        answers.to_str().unwrap(),
    ]);
    assert_eq!(made.code, 0, "{}", made.stderr);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    for expected in [
        "<h1>my-run</h1>",
        "<td>accuracy</td><td>0.5</td><td>0.875</td>",
        "<td>ECE</td><td>0.25</td><td>0.0625</td>",
        "40 rows of test.jsonl",
        "question 4",
        "answer 4",
        "75.0 % likely to be right",
        "not calibrated",
        "is not known",
        "overfits. Logarithmic axis.",
    ] {
        assert!(page.contains(expected), "{expected}");
    }
    assert!(!page.contains("answer 5"));
    let refused = run(&["report", out.to_str().unwrap(), "--eval", "nowhere.json"]);
    assert!(
        refused.code == 2 && refused.stderr.contains("nowhere.json"),
        "{}",
        refused.stderr
    );
}
