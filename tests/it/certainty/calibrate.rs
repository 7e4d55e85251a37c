//! `calibrate`, and how `eval` and `predict` use what it writes.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Place, close, number, rows};
use crate::cli::{ok, run};

#[test]
fn a_calibration_is_used_where_it_holds() {
    let place = Place::new(&rows(24, |at| at / 2));
    let adapter = place.adapter("monteclora");
    let draws = ["--posterior-samples", "3", "--seed", "5"];
    let found = place.json("calibrate", &adapter, &draws);
    assert_eq!(found["rows"], 24);
    assert!(number(&found["after"]["nll"]) <= number(&found["before"]["nll"]) + 1e-9);
    let scores = place.json("eval", &adapter, &draws);
    let scaling = |key: &str| &found[key];
    for (of, key) in [
        ("base", "base_scaling"),
        ("mean", "mean_scaling"),
        ("posterior", "posterior_scaling"),
    ] {
        let (found, expected) = (&scores[of]["calibrated"], scaling(key));
        close(&found["temperature"], &expected["temperature"], of);
        close(&found["nll"], &expected["after"]["nll"], of);
        close(&found["ece"], &expected["after"]["ece"], of);
        close(&scores[of]["nll"], &expected["before"]["nll"], of);
    }
    close(
        &found["temperature"],
        &scaling("posterior_scaling")["temperature"],
        "the main one",
    );

    // `predict` says what the temperature makes of the choices.
    let answers = place.json("predict", &adapter, &draws)["answers"].clone();
    let raw = {
        let hidden = Path::new(&adapter).join("calibration.json");
        let text = fs::read(&hidden).unwrap();
        fs::remove_file(&hidden).unwrap();
        let raw = place.json("predict", &adapter, &draws)["answers"].clone();
        fs::write(&hidden, text).unwrap();
        raw
    };
    let temperature = number(&found["temperature"]);
    for (answer, raw) in answers
        .as_array()
        .unwrap()
        .iter()
        .zip(raw.as_array().unwrap())
    {
        assert_eq!(
            (&answer["calibrated"], &raw["calibrated"]),
            (&json!(true), &json!(false))
        );
        assert_eq!(answer["text"], raw["text"]);
        let powers: Vec<f64> = (raw["choices"].as_array().unwrap().iter())
            .map(|choice| number(&choice["probability"]).powf(1.0 / temperature))
            .collect();
        let total: f64 = powers.iter().sum();
        for (choice, power) in answer["choices"].as_array().unwrap().iter().zip(&powers) {
            close(&choice["probability"], &json!(power / total), "probability");
        }
        let best = powers.iter().fold(0f64, |m, p| m.max(*p)) / total;
        close(&answer["p_correct"], &json!(best), "p_correct");
    }

    // One question with its choices is what the row is; without them the calibration says nothing about it.
    let ask = |more: &[&str]| {
        let first = [
            "predict",
            "-m",
            &place.model,
            "-a",
            &adapter,
            "--prompt",
            "is thing 1 green",
        ];
        run(&[&first[..], &draws, more].concat())
    };
    let one = ask(&["--choices", "yes", "no", "--json"]);
    assert_eq!(one.code, 0, "{}", one.stderr);
    let one: Value = serde_json::from_str(&one.stdout).unwrap();
    let (one, row) = (&one["answers"][0], &answers[1]);
    assert_eq!((&one["text"], &row["line"]), (&row["text"], &json!(2)));
    close(&one["p_correct"], &row["p_correct"], "the same question");
    let open = ask(&["--max-tokens", "2"]);
    assert!(
        open.code == 0
            && open
                .stderr
                .contains("the calibration is of rows with choices"),
        "{}",
        open.stderr
    );
    assert!(
        open.stdout.contains("cut at the most tokens"),
        "{}",
        open.stdout
    );
    assert_eq!(ask(&["--choices", "yes"]).code, 2);
    assert_eq!(ask(&["--choices", "yes", "yes"]).code, 2);

    // Other draws, another posterior, another adapter: said and not used.
    for (more, still) in [
        (&["--posterior-samples", "2", "--seed", "5"][..], true),
        (&["--posterior-samples", "3", "--seed", "6"], true),
        (
            &[
                "--posterior-samples",
                "3",
                "--seed",
                "5",
                "--length-normalised",
            ],
            false,
        ),
        (
            &[
                "--posterior-samples",
                "3",
                "--seed",
                "5",
                "--no-chat-template",
            ],
            false,
        ),
    ] {
        let run = place.run("eval", &adapter, &[more, &["--json"]].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(
            run.stderr.contains("calibration.json") && run.stderr.contains("monteclora calibrate"),
            "{}",
            run.stderr
        );
        let scores: Value = serde_json::from_str(&run.stdout).unwrap();
        assert!(scores["posterior"].get("calibrated").is_none());
        assert_eq!(
            scores["mean"].get("calibrated").is_some(),
            still,
            "{more:?}"
        );
    }
    // Another template, which other prompts come of.
    let template = place.at("other.jinja");
    fs::write(
        &template,
        "{% for m in messages %}{{ m.content }}|{% endfor %}",
    )
    .unwrap();
    let other = place.run("eval", &adapter, &["--chat-template", &template]);
    assert!(
        other.code == 0 && other.stderr.contains("with another chat template"),
        "{}",
        other.stderr
    );
    // No temperature that a search could have found.
    let kept = fs::read_to_string(Path::new(&adapter).join("calibration.json")).unwrap();
    let mut edited: Value = serde_json::from_str(&kept).unwrap();
    edited["mean_scaling"]["temperature"] = json!(-1.0);
    fs::write(
        Path::new(&adapter).join("calibration.json"),
        edited.to_string(),
    )
    .unwrap();
    let refused = place.run("eval", &adapter, &[]);
    assert!(
        refused.code == 4 && refused.stderr.contains("temperature -1"),
        "{}",
        refused.stderr
    );
    fs::write(Path::new(&adapter).join("calibration.json"), kept).unwrap();
    // A damaged file is refused, and made again as the message says.
    let file = "calibration.json";
    let damaged = place.adapter("all-linear");
    fs::write(Path::new(&damaged).join(file), "{\"version\": 99}").unwrap();
    let refused = place.run("eval", &damaged, &[]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(
        refused
            .stderr
            .contains("make it again with `monteclora calibrate`"),
        "{}",
        refused.stderr
    );
    place.json("calibrate", &damaged, &[]);
    assert!(
        place.json("eval", &damaged, &[])["mean"]
            .get("calibrated")
            .is_some()
    );
    let other = place.adapter("plain-lora");
    fs::copy(Path::new(&adapter).join(file), Path::new(&other).join(file)).unwrap();
    let run = place.run("eval", &other, &[]);
    assert!(
        run.code == 0 && run.stderr.contains("another adapter"),
        "{}",
        run.stderr
    );
    // Its mean, collapsed, is the same model.
    let collapsed = place.at("collapsed");
    ok(&["collapse", &adapter, "-o", &collapsed]);
    fs::copy(
        Path::new(&adapter).join(file),
        Path::new(&collapsed).join(file),
    )
    .unwrap();
    let scores = place.json("eval", &collapsed, &[]);
    assert!(scores["mean"].get("calibrated").is_some(), "{scores}");
}

#[test]
fn answers_in_own_words_are_calibrated_by_whether_they_are_right() {
    let adapter_name = "monteclora";
    // What the adapter answers, so that half of the rows are right.
    let place = Place::new(&rows(1, |at| at));
    let adapter = place.adapter(adapter_name);
    let questions: String = (0..16)
        .map(|at| format!("{}\n", json!({"prompt": format!("say {at}")})))
        .collect();
    fs::write(place.at("rows.jsonl"), questions).unwrap();
    let said = place.json("predict", &adapter, &["--max-tokens", "4"]);
    let lines: String = said["answers"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(at, answer)| {
            let text = answer["text"].as_str().unwrap();
            let completion = if at % 2 == 0 {
                text.to_owned()
            } else {
                format!("not {text}")
            };
            format!(
                "{}\n",
                json!({"prompt": format!("say {at}"), "completion": completion})
            )
        })
        .collect();
    fs::write(place.at("rows.jsonl"), lines).unwrap();
    let asked = ["--max-tokens", "4", "--posterior-samples", "2"];
    let found = place.json("calibrate", &adapter, &asked);
    assert_eq!(
        (&found["judged"], &found["rows"]),
        (&json!("answers"), &json!(16))
    );
    assert!(number(&found["after"]["nll"]) <= number(&found["before"]["nll"]) + 1e-9);
    let answers = place.json("predict", &adapter, &asked)["answers"].clone();
    for answer in answers.as_array().unwrap() {
        // What is cut is not calibrated.
        assert_eq!(answer["calibrated"], json!(answer["truncated"] != true));
        let p = number(&answer["p_correct"]);
        assert!((0.0..=1.0).contains(&p), "{p}");
    }
    // A temperature of answers says nothing about choices.
    fs::write(place.at("rows.jsonl"), rows(4, |at| at)).unwrap();
    let scores = place.json("eval", &adapter, &["--posterior-samples", "2"]);
    assert!(scores["mean"].get("calibrated").is_none());
}

#[test]
fn answers_below_the_threshold_are_not_given() {
    let place = Place::new(&rows(200, |_| 0));
    let adapter = place.adapter("monteclora");
    // Rows whose surer half the model gets right, by its own account.
    let per_row = place.at("per_row.jsonl");
    place.json("eval", &adapter, &["--per-row", &per_row, "--no-base"]);
    let said: Vec<Value> = fs::read_to_string(&per_row)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(said.len(), 200);
    let mut confidences: Vec<f64> = said
        .iter()
        .map(|row| number(&row["mean"]["confidence"]))
        .collect();
    confidences.sort_by(f64::total_cmp);
    let middle = confidences[60];
    let answers: Vec<usize> = said
        .iter()
        .map(|row| {
            let p: Vec<f64> = row["mean"]["probabilities"]
                .as_array()
                .unwrap()
                .iter()
                .map(number)
                .collect();
            let best = (0..p.len()).fold(0, |best, at| if p[at] > p[best] { at } else { best });
            match number(&row["mean"]["confidence"]) > middle {
                true => best,
                false => (best + 1) % p.len(),
            }
        })
        .collect();
    fs::write(place.at("rows.jsonl"), rows(200, |at| answers[at])).unwrap();

    // Without a threshold there is nothing to abstain by.
    let none = place.run("predict", &adapter, &["--abstain"]);
    assert_eq!(none.code, 2, "{}", none.stderr);
    assert!(
        none.stderr.contains("monteclora calibrate") && none.stderr.contains("--target-error"),
        "{}",
        none.stderr
    );
    let found = place.json("calibrate", &adapter, &["--target-error", "0.1"]);
    let threshold = number(&found["threshold"]);
    let (answered, bound) = (number(&found["answered"]), number(&found["error_bound"]));
    assert!(answered > 0.2 && bound <= 0.1, "{found}");
    let given = place.json("predict", &adapter, &["--abstain"])["answers"].clone();
    let mut wrong = 0;
    for (at, answer) in given.as_array().unwrap().iter().enumerate() {
        let abstains = answer["abstain"].as_bool().unwrap();
        assert_eq!(abstains, number(&answer["p_correct"]) < threshold);
        if !abstains {
            wrong += usize::from(
                answer["text"]
                    != answer["choices"][answers[at] % answer["choices"].as_array().unwrap().len()]
                        ["text"],
            );
        }
    }
    let n_given = given
        .as_array()
        .unwrap()
        .iter()
        .filter(|a| a["abstain"] == false)
        .count();
    assert!(
        n_given > 40 && wrong <= n_given / 10,
        "{wrong} of {n_given}"
    );
    let words = place.run("predict", &adapter, &["--abstain"]).stdout;
    assert!(
        words.contains("(no answer)") && words.contains("too unsure to answer"),
        "{words}"
    );

    // The threshold is one on choices.
    let first = ["predict", "-m", &place.model, "-a", &adapter];
    let open = run(&[&first[..], &["--prompt", "say it", "--abstain"]].concat());
    assert_eq!(open.code, 2, "{}", open.stderr);
    assert!(
        open.stderr.contains("leave --abstain out"),
        "{}",
        open.stderr
    );
    let plain = run(&[&first[..], &["--prompt", "say it", "--max-tokens", "2"]].concat());
    assert_eq!(plain.code, 0, "{}", plain.stderr);
    let two = run(&[
        &first[..],
        &[
            "-a",
            &place.adapter("plain-lora"),
            "--prompt",
            "say it",
            "--abstain",
        ],
    ]
    .concat());
    assert!(
        two.code == 2 && two.stderr.contains("one adapter"),
        "{}",
        two.stderr
    );

    // No confidence says anything: every second answer is wrong, wherever it is.
    fs::write(
        place.at("rows.jsonl"),
        rows(200, |at| answers[at] + at / 3 % 2),
    )
    .unwrap();
    let off = place.json("calibrate", &adapter, &["--target-error", "0.1"]);
    assert!(off.get("threshold").is_none(), "{off}");
    let refused = place.run("predict", &adapter, &["--abstain"]);
    assert_eq!(refused.code, 2);
    assert!(
        refused
            .stderr
            .contains("no confidence was found that keeps the error below 0.1"),
        "{}",
        refused.stderr
    );
    // Too few rows say how many it takes.
    fs::write(place.at("rows.jsonl"), rows(20, |at| at)).unwrap();
    let few = place.run("calibrate", &adapter, &["--target-error", "0.05"]);
    assert_eq!(few.code, 3, "{}", few.stderr);
    assert!(few.stderr.contains("at least 180 rows"), "{}", few.stderr);
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let place = Place::new(&rows(6, |at| at));
    let adapter = place.adapter("monteclora");
    let refuse = |more: &[&str], code: i32, what: &str| {
        let found = place.run("calibrate", &adapter, more);
        assert_eq!(found.code, code, "{}", found.stderr);
        assert!(found.stderr.contains(what), "{what}: {}", found.stderr);
        assert!(!Path::new(&adapter).join("calibration.json").exists());
    };
    refuse(&["--target-error", "1.5"], 2, "--target-error 1.5");
    refuse(&["--max-tokens", "0"], 2, "--max-tokens 0");
    let mixed = rows(2, |at| at) + &format!("{}\n", json!({"prompt": "a", "completion": "b"}));
    fs::write(place.at("rows.jsonl"), mixed).unwrap();
    refuse(&[], 3, "2 of 3 rows have `choices`");
    let plain = place.adapter("plain-lora");
    let found = place.run("calibrate", &plain, &["--posterior-samples", "2"]);
    assert_ne!(found.code, 0);
    let gguf = place.at("lora.gguf");
    ok(&[
        "convert",
        &plain,
        "-o",
        &gguf,
        "--to",
        "gguf",
        "-m",
        &place.model,
    ]);
    fs::write(place.at("rows.jsonl"), rows(6, |at| at)).unwrap();
    let found = place.run("calibrate", &gguf, &[]);
    assert_eq!(found.code, 2, "{}", found.stderr);
    assert!(
        found.stderr.contains("monteclora convert --to lora"),
        "{}",
        found.stderr
    );
    let directory = place.at("converted");
    ok(&[
        "convert",
        &gguf,
        "-o",
        &directory,
        "--to",
        "lora",
        "-m",
        &place.model,
    ]);
    place.json("calibrate", &directory, &[]);
}
