//! mistral.rs in this process and as a server, through the command.

use std::io::BufRead;
use std::process::{Child, Command, Stdio};

use crate::cli::run;
use crate::fixtures::{adapters, own, supported_architectures, usable, with_own};

fn parity(arguments: &[&str]) -> (i32, String, String) {
    let run = run(&[&["parity"], arguments].concat());
    (run.code, run.stdout, run.stderr)
}

/// Both decoders give PEFT's logits for every recorded adapter, or the case is refused; mistral.rs may also refuse a base that
/// it would compute wrongly, and then says so with exit code 4.
#[test]
fn every_adapter_case_is_served_right_or_refused() {
    let mut compared = 0;
    let cases = with_own(adapters(), &["all-linear", "must-refuse-modules-to-save"]);
    for case in cases.into_iter().chain(supported_architectures()) {
        let (model, adapter) = (
            case.model.display().to_string(),
            case.dir.display().to_string(),
        );
        let reference = case.expected.display().to_string();
        let (code, stdout, stderr) = parity(&[
            "-m",
            &model,
            "-a",
            &adapter,
            "--reference",
            &reference,
            "--json",
        ]);
        if case.must_be_refused() {
            assert_eq!(code, 4, "{}: {stdout}{stderr}", case.name);
            continue;
        }
        let ours_alone = [
            "-m",
            &model,
            "-a",
            &adapter,
            "--reference",
            &reference,
            "--engine",
            "ours",
            "--json",
        ];
        let (ours_code, ours, _) = parity(&ours_alone);
        assert_eq!(ours_code, 0, "{}", case.name);
        let ours: serde_json::Value = serde_json::from_str(&ours).unwrap();
        assert!(
            ours["ours"]["max_abs_diff"].as_f64().unwrap() <= case.tolerance(),
            "{}: {ours}",
            case.name
        );
        if code == 4 {
            assert!(stderr.contains("mistral.rs"), "{}: {stderr}", case.name);
            continue;
        }
        if code == 2 {
            // The text is longer than the window, in which mistral.rs computes something else.
            assert!(
                stderr.contains("this model takes 1 to"),
                "{}: {stderr}",
                case.name
            );
            continue;
        }
        assert_eq!(code, 0, "{}: {stderr}", case.name);
        let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        for key in ["mistralrs", "mistralrs_base"] {
            let difference = report[key]["max_abs_diff"].as_f64().unwrap();
            assert!(
                difference <= 10.0 * case.tolerance(),
                "{}: {key} {difference}",
                case.name
            );
        }
        assert_eq!(
            report["ours_vs_mistralrs"]["top1_agreement"], 1.0,
            "{}",
            case.name
        );
        compared += 1;
    }
    assert!(compared > 0, "mistral.rs served none of the cases");
}

/// With the adapter merged in, a model needs nothing else: both decoders give the adapter's logits on it.
#[test]
fn merged_models_give_the_adapters_logits() {
    use monteclora_converters::{SafetensorsFile, write_safetensors};
    let mut compared = 0;
    for case in with_own(usable(), &["all-linear"]) {
        let dir = tempfile::tempdir().unwrap();
        let merged = dir.path().join(&case.name);
        let status = Command::new(env!("CARGO_BIN_EXE_monteclora"))
            .args(["merge", "--dtype", "f32", "-m"])
            .arg(&case.model)
            .arg("-a")
            .arg(&case.dir)
            .arg("-o")
            .arg(&merged)
            .status()
            .unwrap();
        assert!(status.success(), "{}", case.name);
        let expected = SafetensorsFile::open(&case.expected).unwrap();
        let reference = dir.path().join(format!("{}.safetensors", case.name));
        let kept =
            ["input_ids", "logits"].map(|name| (name.to_owned(), expected.get(name).unwrap()));
        write_safetensors(&reference, kept, &Default::default()).unwrap();
        let (code, stdout, stderr) = parity(&[
            "-m",
            merged.to_str().unwrap(),
            "--reference",
            reference.to_str().unwrap(),
            "--json",
        ]);
        if code == 4 {
            assert!(stderr.contains("mistral.rs"), "{}: {stderr}", case.name);
            continue;
        }
        assert_eq!(code, 0, "{}: {stderr}", case.name);
        let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        for key in ["ours", "mistralrs"] {
            let difference = report[key]["max_abs_diff"].as_f64().unwrap();
            assert!(
                difference <= 10.0 * case.tolerance(),
                "{}: {key} {difference}",
                case.name
            );
        }
        compared += 1;
    }
    assert!(compared > 0, "mistral.rs loaded none of the merged models");
}

/// Conversations in both ways: a plain template is written alike, but for parts, of which mistral.rs takes the first.
#[test]
fn conversations_are_compared_with_those_of_mistralrs_alone() {
    let case = usable().into_iter().next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(&case.model).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
    }
    let compare = |template: &str, more: &[&str]| {
        std::fs::write(model.join("chat_template.jinja"), template).unwrap();
        let model = model.display().to_string();
        let (code, stdout, stderr) = parity(&[&["-m", &model, "--chat", "--json"], more].concat());
        assert_eq!(code, 0, "{stdout}{stderr}");
        serde_json::from_str::<serde_json::Value>(&stdout).unwrap()
    };
    let plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let report = compare(plain, &[]);
    assert_eq!(
        (&report["conversations"], &report["equal"]),
        (&8.into(), &7.into()),
        "{report}"
    );
    assert_eq!(
        report["differences"][0]["ours"]["text"],
        "[user]one two[assistant]"
    );
    let thinking =
        format!("{{% if enable_thinking %}}T{{% endif %}}{plain}{{{{ tools | tojson if tools }}}}");
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, r#"{"prompt": "Why?", "completion": "So."}"#).unwrap();
    let report = compare(&thinking, &["--data", &rows.display().to_string()]);
    assert_eq!(report["differences"][0]["at"], 0, "{report}");
    assert_eq!(
        report["differences"][0]["mistralrs"]["text"],
        "T[user]Why?[assistant]"
    );
    assert_eq!(report["known"].as_array().unwrap().len(), 2, "{report}");
}

/// Quantised while loading, base and adapter give the logits of the merged base, to the bit, and no longer ours.
#[test]
fn quantised_parity_is_with_the_merged_base() {
    let mut compared = 0;
    for case in with_own(usable(), &["all-linear"]) {
        let (model, adapter) = (
            case.model.display().to_string(),
            case.dir.display().to_string(),
        );
        let arguments = ["-m", &model, "-a", &adapter, "--prompt", "ab", "--json"];
        let exact = ["--isq", "q8_0", "--tolerance", "0"];
        let (code, stdout, stderr) = parity(&[&arguments[..], &exact].concat());
        if code == 4 {
            assert!(stderr.contains("mistral.rs"), "{}: {stderr}", case.name);
            continue;
        }
        assert_eq!(code, 0, "{}: {stderr}", case.name);
        let report: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        let difference = |key: &str| report[key]["max_abs_diff"].as_f64().unwrap();
        assert_eq!(difference("merged_vs_mistralrs"), 0.0, "{}", case.name);
        assert!(difference("ours_vs_mistralrs") > 1e-4, "{}", case.name);
        compared += 1;
        for (wrong, reason) in [
            (["--isq", "q9", "--engine", "both"], "q9"),
            (["--isq", "8", "--engine", "ours"], "--engine ours"),
        ] {
            let (code, _, stderr) = parity(&[&arguments[..], &wrong].concat());
            assert_eq!(code, 2, "{stderr}");
            assert!(stderr.contains(reason), "{stderr}");
        }
        if compared == 2 {
            break;
        }
    }
    assert!(compared > 0, "mistral.rs loaded none of the cases");
}

pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        // The test is over; a child that is gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn serve(arguments: &[&str]) -> Server {
    serve_with(arguments, &[])
}

pub(crate) fn serve_with(arguments: &[&str], variables: &[(&str, &str)]) -> Server {
    let mut child = Command::new(env!("CARGO_BIN_EXE_monteclora"))
        .args(["serve", "--port", "0"])
        .args(arguments)
        .envs(variables.iter().copied())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let url = lines.find_map(|line| {
        let line = line.unwrap();
        let start = line.find("http://127.0.0.1:")?;
        Some(line[start..].split(';').next().unwrap().trim().to_owned())
    });
    // Standard error must stay open and drained, or the server's next log line would fail.
    std::thread::spawn(move || lines.for_each(drop));
    Server {
        child,
        url: url.expect("the server tells its address"),
    }
}

/// A GGUF file is imported once, in the type that the engine holds, and answers as its import does.
#[test]
fn a_gguf_file_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = root.join("tests/data/gguf/llama-every-type.gguf");
    let file = file.to_str().unwrap();
    let cache = dir.path().join("cache").display().to_string();
    let client = crate::fixtures::client();
    let answer = |arguments: &[&str], model: &str| -> String {
        let server = serve_with(arguments, &[("MONTECLORA_CACHE", &cache)]);
        let body =
            serde_json::json!({"model": model, "prompt": "the", "max_tokens": 8, "temperature": 0});
        let request = client.post(format!("{}/v1/completions", server.url));
        let answer: serde_json::Value = request.json(&body).send().unwrap().json().unwrap();
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let imports = || {
        let models = std::fs::read_dir(dir.path().join("cache/models")).unwrap();
        let mut sizes: Vec<u64> = models
            .map(|model| model.unwrap().path().join("model.safetensors"))
            .map(|weights| weights.metadata().unwrap().len())
            .collect();
        sizes.sort();
        sizes
    };
    let found = answer(&["-m", file, "--cpu"], "llama-every-type.gguf");
    let sizes = imports();
    assert_eq!(sizes.len(), 1);
    assert_eq!(
        answer(&["-m", file, "--cpu"], "llama-every-type.gguf"),
        found
    );
    assert_eq!(imports(), sizes, "imported once");
    let imported = dir.path().join("imported").display().to_string();
    crate::cli::ok(&["import-gguf", file, "-o", &imported, "--dtype", "f32"]);
    let weights = std::path::Path::new(&imported).join("model.safetensors");
    let in_full = weights.metadata().unwrap().len();
    assert_eq!(sizes, [in_full], "float32 on a CPU");
    assert_eq!(answer(&["-m", &imported, "--cpu"], "imported"), found);
}

#[test]
fn a_server_answers_from_base_and_alias() {
    let model = own().join("models/tiny-llama").display().to_string();
    let adapter = format!("triage={}", own().join("adapters/all-linear").display());
    let mut server = serve(&["-m", &model, "--adapter", &adapter, "--cpu"]);
    let client = crate::fixtures::client();
    let models: serde_json::Value = client
        .get(format!("{}/v1/models", server.url))
        .send()
        .unwrap()
        .json()
        .unwrap();
    let ids: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["tiny-llama", "triage"]);
    assert_eq!(models["data"][1]["parent"], "tiny-llama");

    let ask = |model: &str, stream: bool| {
        let body = serde_json::json!({
            "model": model, "stream": stream, "max_tokens": 12, "temperature": 0,
            "messages": [{"role": "user", "content": "Tell me something."}],
        });
        client
            .post(format!("{}/v1/chat/completions", server.url))
            .json(&body)
            .send()
            .unwrap()
    };
    let text = |model: &str| -> String {
        let answer: serde_json::Value = ask(model, false).json().unwrap();
        assert_eq!(answer["model"], model, "{answer}");
        answer["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let (base, adapted) = (text("tiny-llama"), text("triage"));
    assert_ne!(base, adapted);
    assert_eq!(adapted, text("triage"));

    let stream = ask("triage", true).text().unwrap();
    assert!(stream.trim_end().ends_with("data: [DONE]"), "{stream}");
    assert!(
        stream.contains("finish_reason\":\"length\"")
            || stream.contains("finish_reason\":\"stop\""),
        "{stream}"
    );

    let unknown = ask("nobody", false);
    assert_eq!(unknown.status(), 404);
    let error: serde_json::Value = unknown.json().unwrap();
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("nobody")
    );
    let hidden = client
        .post(format!("{}/re_isq", server.url))
        .json(&serde_json::json!({"ggml_type": "Q8_0"}))
        .send()
        .unwrap();
    assert_eq!(hidden.status(), 404);
    let malformed = client
        .post(format!("{}/v1/chat/completions", server.url))
        .body("{")
        .send()
        .unwrap();
    assert!(malformed.status().is_client_error());

    assert!(
        Command::new("kill")
            .args(["-TERM", &server.child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}
