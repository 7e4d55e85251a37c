//! Data files as a user meets them: the three verbs, and packing that changes no number.

use std::path::Path;

use candle_core::Device;
use monteclora::data::{
    BatchOptions, Batches, Cursor, Dataset, EncodeOptions, Encoder, Overlong, Remedies, TrainOn,
};
use monteclora::model::{
    ActiveAdapter, AdapterGradients, Decoder, ModuleId, PassOptions, Segment, Sequences,
};
use monteclora_converters::Adapter;

use crate::cli::{monteclora, run, tiny};
use crate::fixtures::own;

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

const GOOD: &str =
    r#"{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}]}"#;
const BAD: &str =
    r#"{"messages":[{"role":"user","content":"hi"},{"role":"asistant","content":"hello"}]}"#;

#[test]
fn check_lists_every_bad_row() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("{GOOD}\n{}{GOOD}\n", format!("{BAD}\n").repeat(30));
    let file = write(dir.path(), "train.jsonl", &text);
    let found = run(&["data", "check", "-m", &tiny(), &file]);
    assert_eq!(found.code, 3, "{}", found.stderr);
    let lines: Vec<&str> = found.stdout.lines().collect();
    assert_eq!(lines.len(), 31, "{}", found.stdout);
    assert_eq!(
        lines[15],
        format!(
            "{file}:17: messages[1].role: unknown role \"asistant\"; expected system, user, assistant or tool"
        )
    );
    assert!(
        lines[30].contains("32 rows, messages, 30 bad"),
        "{}",
        lines[30]
    );
    assert!(found.stderr.contains("30 of 32 rows cannot be used"));

    let found = run(&["data", "check", "--json", &file]);
    let report: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(report["ok"], false);
    assert_eq!(report["problems"].as_array().unwrap().len(), 30);
    assert_eq!(report["problems"][0]["line"], 2);
}

#[test]
fn a_mix_of_formats_is_reported_with_lines() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(
        dir.path(),
        "train.jsonl",
        &format!("{GOOD}\n{{\"text\":\"a\"}}\n{GOOD}\n"),
    );
    let found = run(&["data", "check", "-m", &tiny(), &file]);
    assert_eq!(found.code, 3);
    assert!(
        found
            .stdout
            .contains("messages in 2 rows (line 1, 3); text in 1 row (line 2)"),
        "{}",
        found.stdout
    );
}

#[test]
fn preview_marks_what_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "train.json", &format!("[\n{GOOD},\n{GOOD}\n]"));
    let found = run(&["data", "preview", "-m", &tiny(), &file, "-n", "1"]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    assert!(found.stdout.starts_with(&format!("{file}:2: messages,")));
    assert!(
        found
            .stdout
            .contains("<|im_start|>assistant\n⟦hello<|im_end|>⟧"),
        "{}",
        found.stdout
    );
    let colored = monteclora()
        .args(["data", "preview", "-m", &tiny(), &file, "--color", "always"])
        .output()
        .unwrap();
    let colored = String::from_utf8(colored.stdout).unwrap();
    assert!(colored.contains("\u{1b}[1;30;42mhello<|im_end|>\u{1b}[0m"));

    let found = run(&[
        "data",
        "preview",
        "-m",
        &tiny(),
        &file,
        "--line",
        "3",
        "--json",
    ]);
    let report: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]["line"]), (1, &3.into()));
    let trained: Vec<&str> = rows[0]["segments"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|segment| segment["trained"] == true)
        .map(|segment| segment["text"].as_str().unwrap())
        .collect();
    assert_eq!(trained, ["hello<|im_end|>"]);
}

#[test]
fn stats_measure_rows_of_any_length() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{{\"text\":\"{}\"}}\n", "x".repeat(99));
    let file = write(
        dir.path(),
        "train.jsonl",
        &(long.repeat(3) + "{\"text\":\"xxx\"}\n"),
    );
    let found = run(&[
        "data",
        "stats",
        "-m",
        &tiny(),
        &file,
        "--max-seq-length",
        "50",
        "--json",
    ]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let report: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    let file_report = &report["files"][0];
    assert_eq!(file_report["overlong"], 3);
    // 99 bytes and the end token.
    assert_eq!(file_report["tokens"]["max"], 100);
    assert_eq!(file_report["tokens"]["min"], 4);
    let text = run(&["data", "stats", "-m", &tiny(), &file]).stdout;
    assert!(text.contains("0 of 4 examples are longer"), "{text}");
}

#[test]
fn a_directory_gives_its_splits_and_fields_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let row = r#"{"question":"q","answer":"a"}"#;
    write(dir.path(), "train.jsonl", row);
    write(dir.path(), "validation.json", &format!("[{row},{row}]"));
    let config = write(
        dir.path(),
        "run.toml",
        &format!(
            "[model]\nmodel_id = {:?}\n[data]\ntrain = {:?}\nfields = {{ prompt = \"question\", completion = \"answer\" }}\n[train]\noutput_dir = {:?}\nmax_steps = 1\n",
            tiny(),
            dir.path(),
            dir.path().join("out")
        ),
    );
    let found = run(&["data", "check", "-c", &config, "--json"]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let report: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    let rows: Vec<_> = report["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| (file["split"].clone(), file["rows"].clone()))
        .collect();
    assert_eq!(
        rows,
        [("train".into(), 1.into()), ("valid".into(), 2.into())]
    );
    let found = run(&["train", "-c", &config]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let metrics = std::fs::read_to_string(dir.path().join("out/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"type\":\"eval\""), "{metrics}");
}

/// Loss and gradients of one epoch's batches, summed, and the number of batches.
fn loss_and_gradients(
    decoder: &Decoder,
    adapter: &ActiveAdapter,
    data: &Dataset,
    options: BatchOptions,
) -> (f64, AdapterGradients, usize) {
    let mut batches = Batches::new(data, options, Cursor::default());
    let (mut loss, mut gradients) = (0.0, AdapterGradients::default());
    let n_batches = batches.n_batches();
    for _ in 0..n_batches {
        let batch = batches.next_batch().unwrap();
        let sequences = Sequences {
            tokens: batch.tokens.clone(),
            positions: batch.positions.clone(),
            segments: batch
                .segments
                .iter()
                .map(|(start, length)| Segment {
                    query_start: *start,
                    query_len: *length,
                    key_start: *start,
                    key_len: *length,
                })
                .collect(),
        };
        let pass = PassOptions::default();
        let found = decoder
            .loss_and_gradients(&sequences, &batch.targets, adapter, 1.0, pass)
            .unwrap();
        loss += found.total();
        gradients.add_all(found.gradients.unwrap()).unwrap();
    }
    (loss, gradients, n_batches)
}

#[test]
fn packed_rows_have_the_loss_and_gradients_of_single_rows() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (1..14)
        .map(|idx| {
            format!(
                "{{\"prompt\":\"{}\",\"completion\":\"{}\"}}\n",
                "ask ".repeat(idx % 5 + 1),
                "answer ".repeat(idx % 3 + 1)
            )
        })
        .collect();
    let file = write(dir.path(), "train.jsonl", &rows);
    let model = own().join("models/tiny-llama");
    let encoder = Encoder::from_dir(
        &model,
        None,
        EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template: true,
            max_seq_length: 256,
            overlong: Overlong::Error,
            remedies: Remedies::Keys,
        },
    )
    .unwrap();
    let data = Dataset::open(Path::new(&file), None, encoder).unwrap();
    let decoder = Decoder::load(&model, &Device::Cpu).unwrap();
    let adapter = Adapter::read(&own().join("adapters/plain-lora")).unwrap();
    let active = ActiveAdapter::from_adapter(&adapter, decoder.config(), &Device::Cpu).unwrap();
    let options = |pack_tokens| BatchOptions {
        batch_size: 1,
        pack_tokens,
        shuffle_seed: Some(1),
    };
    let (single, single_gradients, n_single) =
        loss_and_gradients(&decoder, &active, &data, options(None));
    let (packed, packed_gradients, n_packed) =
        loss_and_gradients(&decoder, &active, &data, options(Some(256)));
    assert!(n_single == 13 && n_packed < 6, "{n_packed} packs");
    assert!((single / packed - 1.0).abs() < 1e-6, "{single} {packed}");
    let mut n_compared = 0;
    for (id, module) in ModuleId::all(decoder.config()) {
        let (Some(one), Some(many)) = (single_gradients.get(id), packed_gradients.get(id)) else {
            continue;
        };
        for (one, many) in one.iter().zip(many) {
            let norm = |tensor: &candle_core::Tensor| {
                let square = tensor.sqr().unwrap().sum_all().unwrap();
                square.to_scalar::<f32>().unwrap().sqrt()
            };
            let difference = norm(&(one - many).unwrap());
            assert!(norm(one) > 0.0, "{} receives no gradient", module.name);
            assert!(
                difference <= 1e-5 * norm(one),
                "{}: {difference}",
                module.name
            );
            n_compared += 1;
        }
    }
    assert!(n_compared > 0);
}

/// A line of 5 MB without a break, and one of a million words, are dropped, cut or refused by their line, in bounded memory.
#[cfg(target_os = "linux")]
#[test]
fn a_line_of_any_length_is_handled() {
    let dir = tempfile::tempdir().unwrap();
    let normal = "{\"prompt\":\"a\",\"completion\":\"b\"}\n";
    for text in ["x".repeat(5_000_000), "red ".repeat(1_000_000)] {
        let row = serde_json::json!({"prompt": "p", "completion": text});
        let config = crate::cli::run_toml(dir.path(), &format!("{normal}{row}\n{normal}"), "", "");
        for (overlong, code, says) in [
            (
                "drop",
                0,
                "2 examples of 3 rows, 1 dropped for their length",
            ),
            ("truncate", 0, "3 examples of 3 rows, 1 truncated"),
            ("error", 3, "rows.jsonl:2: row: "),
        ] {
            let script = "ulimit -v 4000000; exec \"$0\" train -c \"$1\" --dry-run --set \"$2\" --set data.max_seq_length=64";
            let output = std::process::Command::new("bash")
                .args(["-c", script, env!("CARGO_BIN_EXE_monteclora")])
                .arg(&config)
                .arg(format!("data.overlong={overlong:?}"))
                .env("RAYON_NUM_THREADS", "2")
                .output()
                .unwrap();
            let said = [&output.stdout[..], &output.stderr[..]].concat();
            let said = String::from_utf8_lossy(&said);
            assert_eq!(output.status.code(), Some(code), "{overlong}: {said}");
            assert!(said.contains(says), "{overlong}: {said}");
        }
    }
}

#[test]
fn columns_that_nothing_reads_are_counted_and_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let row = |id: usize| {
        format!(
            "{{\"prompt\":\"p\",\"completion\":\"a\",\"id\":{id},\"note\":null,\"chat_template_kwargs\":{{\"tone\":\"x\"}}}}\n"
        )
    };
    let file = write(
        dir.path(),
        "train.jsonl",
        &format!("\n{}{}", row(1), row(2)),
    );
    let found = run(&["data", "check", "-m", &tiny(), &file, "--json"]);
    assert_eq!(found.code, 0, "{}", found.stderr);
    let report: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(
        report["files"][0]["unread_columns"],
        serde_json::json!([
            {"column": "chat_template_kwargs.tone", "rows": 2, "line": 2},
            {"column": "id", "rows": 2, "line": 2},
        ])
    );
    assert_eq!(report["files"][0]["counts"]["control_tokens"], 0);
    let text = run(&["data", "check", &file]).stdout;
    assert!(
        text.contains("nothing reads `id`, in 2 rows (first in line 2)"),
        "{text}"
    );
    let out = dir.path().join("out").display().to_string();
    let config = write(
        dir.path(),
        "run.toml",
        &format!(
            "[model]\nmodel_id = {:?}\n[data]\ntrain = {file:?}\n[train]\noutput_dir = {out:?}\nmax_steps = 1\n",
            tiny()
        ),
    );
    for command in [
        &["train", "-c", &config, "--dry-run"][..],
        &["eval", "-m", &tiny(), "--data", &file],
        &[
            "predict",
            "-m",
            &tiny(),
            "--data",
            &file,
            "--max-tokens",
            "1",
        ],
    ] {
        let found = run(command);
        assert_eq!(found.code, 0, "{}", found.stderr);
        let said = found
            .stderr
            .matches("nothing reads `id`, in 2 rows")
            .count();
        assert_eq!(said, 1, "{command:?}: {}", found.stderr);
    }
}

#[test]
fn names_that_no_row_has_and_files_that_nothing_reads_are_said() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train.jsonl", r#"{"q":"p","completion":"a"}"#);
    write(dir.path(), "more.csv", "q,completion\np,a\n");
    let folder = dir.path().display().to_string();
    let found = run(&[
        "data",
        "check",
        &folder,
        "--field",
        "prompt=q",
        "--field",
        "system=rules",
        "--json",
    ]);
    assert_eq!(found.code, 0, "{}{}", found.stdout, found.stderr);
    let report: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
    let file = &report["files"][0];
    assert_eq!(file["names_without_column"], serde_json::json!(["rules"]));
    assert_eq!(file["unread_files"], serde_json::json!(["more.csv"]));
}

/// What a refusal advises for the data commands makes the row one that is read.
#[test]
fn advised_names_of_fields_do_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let case = "tests/data/cases/training/conversations-role-content/rows.jsonl";
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join(case);
    let own = |name: &str, row: &str| write(dir.path(), name, row);
    let turns = r#"[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]"#;
    for file in [
        case.display().to_string(),
        own("qa.jsonl", r#"{"question":"q","answer":"a"}"#),
        own("dolly.jsonl", r#"{"instruction":"q","response":"a"}"#),
        own("dialog.jsonl", &format!("{{\"dialog\":{turns}}}")),
        own(
            "system.jsonl",
            r#"{"prompt":"q","completion":"a","system_prompt":"s"}"#,
        ),
        own(
            "tools.jsonl",
            &format!("{{\"messages\":{turns},\"tool_defs\":[{{\"name\":\"f\"}}]}}"),
        ),
        own("document.jsonl", r#"{"content":"a document"}"#),
    ] {
        let refused = run(&["data", "check", &file]);
        assert_eq!(refused.code, 3, "{file}: {}", refused.stdout);
        let advised: Vec<&str> = refused
            .stdout
            .split('`')
            .find(|part| part.starts_with("--field "))
            .unwrap_or_else(|| panic!("no flag is advised: {}", refused.stdout))
            .split(' ')
            .collect();
        let done = run(&[&["data", "check", &file][..], &advised].concat());
        assert_eq!(done.code, 0, "{advised:?}: {}{}", done.stdout, done.stderr);
        assert!(!done.stdout.contains("nothing reads"), "{}", done.stdout);
    }
}
