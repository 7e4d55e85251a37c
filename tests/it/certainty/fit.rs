//! `fit`: the mean stays, and what is judged is what `eval` finds.

use std::fs;
use std::path::{Path, PathBuf};

use monteclora_converters::Adapter;
use serde_json::{Value, json};

use super::{Place, close, number, rows};
use crate::cli::{json, ok, own_adapter, run, text, tiny};
use crate::fixtures::{AdapterCase, largest_difference, named, usable};

/// The least that a fit can do.
const LEAST: [&str; 6] = ["--draws", "1", "--rows", "4", "--geometry", "rows"];

/// The scale of a fit, few rows and draws, on an adapter and its own base.
fn fit(case: &AdapterCase, rows: &str, output: &Path, more: &[&str]) -> Value {
    let few = ["--draws", "2", "--rows", "12"];
    let to = [
        "fit",
        "-m",
        text(&case.model),
        "-a",
        text(&case.dir),
        "--data",
        rows,
        "-o",
        text(output),
    ];
    json(&[&to[..], &few, more].concat())
}

#[test]
fn a_fit_keeps_the_mean_of_any_adapter() {
    let place = Place::new(&rows(20, |at| at));
    let file = place.at("rows.jsonl");
    for case in usable().into_iter().filter(AdapterCase::is_low_rank) {
        for geometry in ["rows", "svd"] {
            let output = PathBuf::from(place.at(&format!("{}-{geometry}", case.name)));
            let found = fit(&case, &file, &output, &["--geometry", geometry]);
            assert_eq!(found["geometry"], geometry);
            let stored: Value =
                serde_json::from_str(&fs::read_to_string(output.join("fit.json")).unwrap())
                    .unwrap();
            assert_eq!(found, stored);
            assert!(
                found["base_fingerprint"]
                    .as_str()
                    .is_some_and(|print| print.len() == 64)
            );
            assert!(
                found["data_sha256"]
                    .as_str()
                    .is_some_and(|print| print.len() == 64)
            );
            let sigma = number(&found["sigma"]);
            let tried = found["evaluations"].as_array().unwrap();
            assert!(tried.len() > 3 && tried.iter().any(|e| number(&e["sigma"]) == sigma));

            let (before, after) = (
                Adapter::read(&case.dir).unwrap().collapse(),
                Adapter::read(&output).unwrap(),
            );
            let settings = after.config.monteclora.as_ref().expect("a posterior");
            assert_eq!((settings.num_samples, settings.kl_loss_weight), (1, 0.0));
            let mut least = f32::INFINITY;
            for (was, is) in before.sites.iter().zip(&after.sites) {
                assert_eq!(was.name, is.name);
                let (old, new) = (was.delta_f32().unwrap(), is.delta_f32().unwrap());
                let largest = f64::from(old.iter().fold(0f32, |m, v| m.max(v.abs())));
                let away = largest_difference(&new, &old);
                assert!(
                    away <= 2e-6 * largest,
                    "{} {}: {away} {largest}",
                    case.name,
                    is.name
                );
                if geometry == "rows" {
                    assert_eq!((&was.lora_a, &was.lora_b), (&is.lora_a, &is.lora_b));
                }
                let posterior = is.posterior.as_ref().expect("a posterior");
                let s = posterior.log_std.to_f32().unwrap();
                // The width of a row's noise, c e^s sqrt r.
                for s in &s {
                    let width =
                        settings.sample_scaler * f64::from(*s).exp() * (is.rank as f64).sqrt();
                    match geometry {
                        // A module that changes nothing has no noise of that scale.
                        "rows" if largest == 0.0 => {}
                        "rows" => assert!((width / sigma - 1.0).abs() < 1e-5, "{width} {sigma}"),
                        _ => assert!(width > 0.0),
                    }
                    least = least.min(*s);
                }
            }
            assert!(least.abs() < 1e-6, "{least}");
            let rounding = number(&found["rounding"]);
            assert!(
                rounding < 1e-6 && (rounding == 0.0) == (geometry == "rows"),
                "{rounding}"
            );
        }
    }
}

/// What is fitted is what `eval` finds with the draws of the same seed.
#[test]
fn a_fit_is_judged_as_eval_judges() {
    let place = Place::new(&rows(12, |at| at));
    let output = place.at("fitted");
    let case = named("plain-lora");
    let found = fit(
        &case,
        &place.at("rows.jsonl"),
        Path::new(&output),
        &["--seed", "7"],
    );
    let scores = place.json(
        "eval",
        &output,
        &["--posterior-samples", "2", "--seed", "7"],
    );
    close(
        &scores["posterior"]["nll"],
        &found["after"]["nll_untempered"],
        "NLL of the average",
    );
    close(
        &scores["posterior"]["accuracy"],
        &found["after"]["accuracy"],
        "accuracy",
    );
    close(
        &scores["mean"]["nll"],
        &found["before"]["nll_untempered"],
        "NLL of the mean",
    );
    // The least of what was tried, among those that cost no accuracy.
    let allowed = number(&found["before"]["accuracy"]) - 0.01;
    let least = found["evaluations"].as_array().unwrap().iter();
    let least = least.filter(|e| number(&e["accuracy"]) >= allowed - 1e-9);
    let least = least
        .map(|e| number(&e["nll"]))
        .fold(f64::INFINITY, f64::min);
    assert_eq!(number(&found["after"]["nll"]), least);
    // Both geometries are among what was tried, and equal arguments give equal files.
    for geometry in ["rows", "svd"] {
        let tried = found["evaluations"].as_array().unwrap().iter();
        assert!(tried.clone().any(|e| e["geometry"] == geometry));
    }
    let again = place.at("again");
    fit(
        &case,
        &place.at("rows.jsonl"),
        Path::new(&again),
        &["--seed", "7"],
    );
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let bytes = |dir: &str| fs::read(Path::new(dir).join(file)).unwrap();
        assert_eq!(bytes(&output), bytes(&again), "{file}");
    }
    let sampled = place.at("draws");
    ok(&["sample", &output, "-k", "1", "-o", &sampled]);
}

#[test]
fn the_largest_tolerated_scale_is_on_the_tolerated_side() {
    let answers: String = (0..12)
        .map(|at| {
            format!(
                "{}\n",
                json!({"prompt": format!("say {at}"), "completion": "once again"})
            )
        })
        .collect();
    for rows in [rows(12, |at| at), answers] {
        let place = Place::new(&rows);
        let output = place.at("fitted");
        let asked = [
            "--criterion",
            "tolerance",
            "--tolerance",
            "0.01",
            "--geometry",
            "rows",
        ];
        let found = fit(
            &named("plain-lora"),
            &place.at("rows.jsonl"),
            Path::new(&output),
            &asked,
        );
        let most = number(&found["before"]["nll"]) * 1.01;
        assert!(number(&found["after"]["nll"]) <= most, "{found}");
        let wider = found["evaluations"].as_array().unwrap().iter();
        let sigma = number(&found["sigma"]);
        assert!(
            sigma == 0.3
                || wider
                    .clone()
                    .any(|e| number(&e["sigma"]) > sigma && number(&e["nll"]) > most)
        );
        assert_eq!(
            (&found["criterion"], &found["tolerance"]),
            (&json!("tolerance"), &json!(0.01))
        );
        assert_eq!(
            found["before"].get("accuracy").is_some(),
            rows.contains("choices")
        );
    }
}

#[test]
fn what_cannot_be_fitted_is_refused_before_the_search() {
    let place = Place::new(&rows(12, |at| at));
    let plain = own_adapter("plain-lora");
    let output = place.at("fitted");
    let refuse = |more: &[&str], code: i32, what: &str| {
        let found = place.run("fit", &plain, &[&["-o", &output], more].concat());
        assert_eq!(found.code, code, "{}", found.stderr);
        assert!(found.stderr.contains(what), "{what}: {}", found.stderr);
        assert!(!Path::new(&output).exists());
    };
    refuse(&["--draws", "0"], 2, "--draws 0");
    refuse(&["--draws", "1000000000"], 2, "--draws 1000000000");
    refuse(&["--rows", "0"], 2, "--rows 0");
    refuse(&["--tolerance", "0"], 2, "--tolerance 0");
    refuse(&["--geometry", "round"], 2, "geometry");
    // Rows of two kinds would be judged by one of them.
    let mixed = rows(4, |at| at) + &format!("{}\n", json!({"prompt": "a", "completion": "b"}));
    fs::write(place.at("mixed.jsonl"), mixed).unwrap();
    let found = run(&[
        "fit",
        "-m",
        &place.model,
        "-a",
        &plain,
        "--data",
        &place.at("mixed.jsonl"),
        "-o",
        &output,
    ]);
    assert!(
        found.code == 3 && found.stderr.contains("4 of 5 rows have `choices`"),
        "{}",
        found.stderr
    );
    // An adapter that changes nothing has no posterior that could be seen.
    let zero = place.adapter("plain-lora");
    let read = Adapter::read(Path::new(&zero)).unwrap();
    let mut still = read.clone();
    for site in &mut still.sites {
        let n = site.lora_b.n_elements();
        site.lora_b =
            monteclora_converters::Tensor::from_f32(site.lora_b.shape(), vec![0.0; n]).unwrap();
    }
    still.write_peft(Path::new(&zero), true).unwrap();
    let found = place.run("fit", &zero, &["-o", &output]);
    assert_eq!(found.code, 4, "{}", found.stderr);
    assert!(found.stderr.contains("changes nothing"), "{}", found.stderr);
    fs::create_dir(&output).unwrap();
    fs::write(Path::new(&output).join("mine"), "").unwrap();
    let found = place.run("fit", &plain, &["-o", &output]);
    assert_eq!(found.code, 2, "{}", found.stderr);
    assert!(found.stderr.contains("--force"), "{}", found.stderr);
    let forced = [&["-o", &output, "--force"][..], &LEAST].concat();
    let found = place.run("fit", &plain, &forced);
    assert_eq!(found.code, 0, "{}", found.stderr);
    assert!(
        Path::new(&output).join("mine").exists() && Path::new(&output).join("fit.json").exists()
    );
}

/// What was fitted for another adapter does not go along.
#[test]
fn a_fit_carries_the_tokenizer_and_no_calibration() {
    let place = Place::new(&rows(8, |at| at));
    let adapter = place.adapter("plain-lora");
    fs::write(
        Path::new(&adapter).join("chat_template.jinja"),
        fs::read_to_string(template()).unwrap(),
    )
    .unwrap();
    fs::write(Path::new(&adapter).join("calibration.json"), "{}").unwrap();
    // It was trained on bare prompts, which goes along in fit.json.
    let record = json!({"config": {"data": {"apply_chat_template": false}}, "sites": ["a"], "train": {"format": "prompt_completion"}});
    fs::write(Path::new(&adapter).join("run.json"), record.to_string()).unwrap();
    let output = place.at("fitted");
    let found = place.run("fit", &adapter, &[&["-o", &output][..], &LEAST].concat());
    assert_eq!(found.code, 0, "{}", found.stderr);
    assert!(Path::new(&output).join("chat_template.jinja").exists());
    let kept = fs::read_to_string(Path::new(&output).join("fit.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(
        kept["training"],
        json!({"config": {"data": {"apply_chat_template": false}}, "train": {"format": "prompt_completion"}})
    );
    let warned = place.run("eval", &output, &[]);
    assert!(
        warned.code == 0 && warned.stderr.contains("apply_chat_template"),
        "{}",
        warned.stderr
    );
    assert!(!Path::new(&output).join("calibration.json").exists());
    assert!(
        found.stdout.contains("calibration.json"),
        "{}",
        found.stdout
    );
}

/// The template of the tiny model.
fn template() -> PathBuf {
    let dir = PathBuf::from(tiny());
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        return file;
    }
    let config = fs::read_to_string(dir.join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let to = std::env::temp_dir().join(format!("template-{}.jinja", std::process::id()));
    fs::write(&to, config["chat_template"].as_str().unwrap()).unwrap();
    to
}
