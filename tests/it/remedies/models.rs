//! Remedies around models, templates, lengths and training.

use std::path::{Path, PathBuf};

use monteclora_converters::Adapter;
use serde_json::{Value, json};

use super::{By, Remedy, Run, data, told};
use crate::cli::{copy, json as answer, ok, own_adapter, run, run_toml, text, tiny};

pub(super) const REMEDIES: [Remedy; 17] = [
    (
        "import it with `monteclora import-gguf {file} -o DIR` and merge into DIR",
        By(
            "tests/it/blocks.rs",
            "commands_take_the_file_as_they_take_its_import",
        ),
    ),
    (
        "write the adapter for mlx-lm with `monteclora convert ADAPTER --to mlx",
        By(
            "tests/it/blocks/mlx.rs",
            "a_base_of_mlx_is_not_merged_into_and_not_served",
        ),
    ),
    (
        "give the .gguf file itself to `monteclora serve`",
        By("tests/it/runtime.rs", "a_gguf_file_is_served"),
    ),
    (
        "or no `template`; give a template with --chat-template",
        Run(another_template_is_given),
    ),
    (
        "nor a list of named templates; give one with --chat-template",
        Run(another_template_is_given),
    ),
    (
        "correct the template, or give another one with --chat-template",
        Run(another_template_is_given),
    ),
    (
        "without generation markers with --chat-template",
        Run(last_answers_need_markers_that_stay),
    ),
    (
        "give a template that prints {it} with --chat-template",
        Run(tools_need_a_template_that_prints_them),
    ),
    (
        "evaluate with --no-chat-template",
        Run(prompts_are_given_as_they_were_trained),
    ),
    (
        "give a template that does with --chat-template",
        Run(another_template_is_given),
    ),
    (
        "`monteclora import-gguf FILE -o DIR` makes a full-precision",
        Run(a_gguf_model_is_imported),
    ),
    (
        "lower --max-tokens, or change the row",
        Run(lengths_are_changed),
    ),
    (
        "--prompt: {problem}; lower --max-tokens",
        Run(lengths_are_changed),
    ),
    ("raise --max-seq-length", Run(lengths_are_changed)),
    (
        "give another template with --chat-template",
        Run(another_template_is_given),
    ),
    (
        "give a corrected one with --chat-template",
        Run(another_template_is_given),
    ),
    (
        "the model has no chat template; give one with --chat-template",
        Run(another_template_is_given),
    ),
];

fn rows(dir: &Path, text: &str) -> String {
    let path = dir.join("rows.jsonl");
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

const CONVERSATION: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"yes\"}]}\n";

fn a_gguf_model_is_imported() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    let file = inside.join("qwen2.gguf");
    std::fs::copy(data("gguf/qwen2.gguf"), &file).unwrap();
    let refused = run(&["serve", "-m", text(&inside)]);
    for expected in ["holds GGUF files only", "monteclora import-gguf"] {
        assert!(
            refused.code != 0 && refused.stderr.contains(expected),
            "{}",
            refused.stderr
        );
    }
    let out = dir.path().join("model");
    ok(&["import-gguf", text(&file), "-o", text(&out)]);
    ok(&[
        "predict",
        "-m",
        text(&out),
        "--prompt",
        "x",
        "--max-tokens",
        "1",
    ]);
}

fn lengths_are_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (base, prompts) = (
        tiny(),
        rows(dir.path(), "{\"prompt\": \"a\", \"completion\": \"b\"}\n"),
    );
    for question in [["--prompt", "x"], ["--data", &prompts]] {
        let ask =
            |n: &str| run(&[&["predict", "-m", &base, "--max-tokens", n], &question[..]].concat());
        let refused = ask("100000");
        assert!(
            refused.stderr.contains("lower --max-tokens"),
            "{}",
            refused.stderr
        );
        let done = ask("1");
        assert_eq!(done.code, 0, "{}", done.stderr);
    }
    let conversation = rows(dir.path(), CONVERSATION);
    let score = |n: &str| {
        run(&[
            "eval",
            "-m",
            &base,
            "--data",
            &conversation,
            "--max-seq-length",
            n,
        ])
    };
    let refused = score("4");
    assert!(
        refused.stderr.contains("raise --max-seq-length"),
        "{}",
        refused.stderr
    );
    let done = score("64");
    assert_eq!(done.code, 0, "{}", done.stderr);
}

fn another_template_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let given = format!("{}/chat_template.jinja", tiny());
    let conversation = rows(dir.path(), CONVERSATION);
    for (idx, (template, expected)) in [
        (Some("{% if"), "give a corrected one with --chat-template"),
        (
            Some("{{ raise_exception('no') }}"),
            "give another template with --chat-template",
        ),
        (
            None,
            "the model has no chat template; give one with --chat-template",
        ),
        (
            Some("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"),
            "give a template that does with --chat-template",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let base = base_with(dir.path(), idx, template, |_| ());
        advised(&base, &conversation, expected, &given);
    }
    for (idx, (template, expected)) in [
        (
            json!([{"name": "tool_use", "template": "x"}]),
            "give another template with --chat-template",
        ),
        (
            json!([{"name": "default"}]),
            "or no `template`; give a template with --chat-template",
        ),
        (
            json!(5),
            "nor a list of named templates; give one with --chat-template",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let base = base_with(dir.path(), 10 + idx, None, |config| {
            config["chat_template"] = template
        });
        advised(&base, &conversation, expected, &given);
    }
}

/// A template that shows tools, and one whose generation markers of an answer go with the answers after it.
const WITH_TOOLS: &str = "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const LAST_MARKED: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{% if messages|length < 3 %}{% generation %}{{ m.content }}{% endgeneration %}{% generation %}.{% endgeneration %}{% elif loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% else %}{{ m.content }}{% endif %}{% endfor %}";

fn tools_need_a_template_that_prints_them() {
    let dir = tempfile::tempdir().unwrap();
    let row = json!({
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    });
    let conversation = rows(dir.path(), &format!("{row}\n"));
    let template = dir.path().join("tools.jinja");
    std::fs::write(&template, WITH_TOOLS).unwrap();
    let expected = "with --chat-template, or remove it from the row";
    advised(Path::new(&tiny()), &conversation, expected, text(&template));
}

fn last_answers_need_markers_that_stay() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_with(dir.path(), 0, Some(LAST_MARKED), |_| ());
    let row = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]});
    let conversation = rows(dir.path(), &format!("{row}\n"));
    let preview = |more: &[&str]| {
        run(&[&["data", "preview", &conversation, "-m", text(&base)], more].concat())
    };
    let refused = preview(&["--train-on", "last_assistant"]);
    let said = refused.stdout + &refused.stderr;
    assert!(
        said.contains("without generation markers with --chat-template"),
        "{said}"
    );
    let template = format!("{}/chat_template.jinja", tiny());
    for remedy in [
        &["--train-on", "assistant"][..],
        &["--train-on", "last_assistant", "--chat-template", &template],
    ] {
        let done = preview(remedy);
        assert_eq!(done.code, 0, "{}", done.stderr);
    }
}

fn prompts_are_given_as_they_were_trained() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(
        dir.path(),
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n",
        "",
        "",
    );
    ok(&[
        "train",
        "-c",
        text(&config),
        "--set",
        "data.apply_chat_template=false",
    ]);
    let (base, out) = (tiny(), dir.path().join("out"));
    let asked = [
        "predict",
        "-m",
        &base,
        "-a",
        text(&out),
        "--prompt",
        "a",
        "--max-tokens",
        "1",
    ];
    let told = ok(&asked);
    assert!(
        told.stderr.contains("evaluate with --no-chat-template"),
        "{}",
        told.stderr
    );
    let told = ok(&[&asked[..], &["--no-chat-template"]].concat());
    assert!(
        !told.stderr.contains("--no-chat-template"),
        "{}",
        told.stderr
    );
}

/// The tiny base with another chat template, or none, and its tokenizer's settings as `change` makes them.
fn base_with(
    dir: &Path,
    idx: usize,
    template: Option<&str>,
    change: impl FnOnce(&mut Value),
) -> PathBuf {
    let base = dir.join(format!("base-{idx}"));
    copy(Path::new(&tiny()), &base);
    let file = base.join("chat_template.jinja");
    match template {
        Some(template) => std::fs::write(file, template).unwrap(),
        None => std::fs::remove_file(file).unwrap(),
    }
    let path = base.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    if let Some(keys) = config.as_object_mut() {
        keys.remove("chat_template");
    }
    change(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
    base
}

fn advised(base: &Path, rows: &str, expected: &str, template: &str) {
    let arguments = ["eval", "-m", text(base), "--data", rows];
    let refused = run(&arguments);
    assert!(
        refused.code != 0 && refused.stderr.contains(expected),
        "{expected}: {}",
        refused.stderr
    );
    ok(&[&arguments[..], &["--chat-template", template]].concat());
}

pub(super) fn data_that_needs_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let (base, conversation) = (tiny(), rows(dir.path(), CONVERSATION));
    let refused = run(&["data", "stats", &conversation]);
    assert!(
        refused.code != 0 && refused.stderr.contains("give one with -m"),
        "{}",
        refused.stderr
    );
    ok(&["data", "stats", &conversation, "-m", &base]);
    let told = ok(&["data", "check", &conversation]);
    assert!((told.stdout + &told.stderr).contains("give one with -m"));
    ok(&["data", "check", &conversation, "-m", &base]);
}

pub(super) fn a_checkpoint_of_another_trainer() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "");
    let theirs = dir.path().join("theirs/checkpoint-5");
    copy(Path::new(&own_adapter("monteclora")), &theirs);
    std::fs::write(theirs.join("optimizer.pt"), "").unwrap();
    let train = |more: &[&str]| run(&[&["train", "-c", text(&config)], more].concat());
    let above = theirs.parent().unwrap();
    let refused = train(&["--resume", text(above)]);
    let newest = theirs.display().to_string();
    assert!(
        refused.code == 2 && refused.stderr.contains(&newest),
        "{}",
        refused.stderr
    );
    let refused = train(&["--resume", &newest]);
    let advice = format!("start from its adapter with --set lora.init_from={newest:?}");
    assert!(
        refused.code == 2 && refused.stderr.contains(&advice),
        "{}",
        refused.stderr
    );
    let rank = Adapter::read(&theirs).unwrap().config.r;
    let done = train(&[
        "--set",
        &format!("lora.init_from={newest:?}"),
        "--set",
        &format!("lora.r={rank}"),
        "--force",
    ]);
    assert_eq!(done.code, 0, "{}", done.stderr);
}

pub(super) fn draws_are_evaluated_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_toml(dir.path(), "", "", "");
    let train = |more: &[&str]| run(&[&["train", "-c", text(&config)], more].concat());
    let refused = train(&["--set", "eval.posterior_samples=2"]);
    let advice = "use `monteclora eval --posterior-samples` afterwards";
    assert!(
        refused.code == 2 && refused.stderr.contains(advice),
        "{}",
        refused.stderr
    );
    let done = train(&[]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let (out, conversation) = (dir.path().join("out"), dir.path().join("asked.jsonl"));
    std::fs::write(&conversation, CONVERSATION).unwrap();
    let scores = answer(&[
        "eval",
        "-m",
        &tiny(),
        "-a",
        text(&out),
        "--data",
        text(&conversation),
        "--posterior-samples",
        "2",
    ]);
    assert!(scores["posterior"]["loss"].is_number(), "{scores}");
}

pub(super) fn parity_in_single_precision() {
    let reference = format!("{}/expected.safetensors", own_adapter("plain-lora"));
    let (base, adapter) = (tiny(), own_adapter("plain-lora"));
    let arguments = [
        "parity",
        "-m",
        &base,
        "-a",
        &adapter,
        "--engine",
        "ours",
        "--reference",
        &reference,
    ];
    told(
        &[&arguments[..], &["--dtype", "bf16"]].concat(),
        "use --dtype auto or f32",
    );
    for dtype in ["auto", "f32"] {
        ok(&[&arguments[..], &["--dtype", dtype]].concat());
    }
}

#[cfg(feature = "mistralrs")]
pub(super) fn an_adapter_without_effect_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zero");
    let mut adapter = Adapter::read(Path::new(&own_adapter("plain-lora"))).unwrap();
    for site in &mut adapter.sites {
        let zeros = vec![0.0; site.lora_b.n_elements()];
        site.lora_b = monteclora_converters::Tensor::from_f32(site.lora_b.shape(), zeros).unwrap();
    }
    adapter.write_peft(&path, false).unwrap();
    let (base, alias) = (tiny(), format!("zero={}", path.display()));
    let arguments = ["-m", &base, "--adapter", &alias, "--cpu"];
    told(
        &[&["serve"], &arguments[..]].concat(),
        "start the server with --force",
    );
    let server = crate::runtime::serve(&[&arguments[..], &["--force"]].concat());
    assert!(server.url.starts_with("http"));
}
