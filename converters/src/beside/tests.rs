use std::collections::BTreeMap;
use std::fs;

use super::*;
use crate::adapter::Adapter;
use crate::cases::case;
use crate::fixtures;
use crate::formats::lora::LoraOptions;
use crate::merge::merge_dir;
use crate::model_files::ModelFiles;
use crate::tensors::safetensors_write::write_safetensors;
use crate::tensors::tensor::Tensor;
use crate::validate::validate_path;

fn write(path: &Path, tensors: &[(&str, &[usize])]) {
    let tensors = tensors.iter().map(|(name, shape)| {
        let values = vec![0.5; shape.iter().product()];
        (
            (*name).to_owned(),
            Tensor::from_f32(shape, values).expect("sized"),
        )
    });
    write_safetensors(path, tensors, &BTreeMap::new()).expect("written");
}

/// A plain LoRA in a directory of its own.
fn adapter() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    let adapter = fixtures::small_adapter(31, false);
    adapter.write_peft(dir.path(), true).expect("written");
    dir
}

/// The refusal to read `path`, by file and message.
fn refused(path: &Path) -> Vec<(String, String)> {
    let error = Adapter::read(path).expect_err("weights beside it");
    let problems = error.problems().iter();
    let lost = problems.filter(|problem| problem.code == "trained-weights");
    lost.map(|problem| (problem.at.clone(), problem.message.clone()))
        .collect()
}

fn what_of<'a>(beside: &'a Beside, name: &str) -> &'a str {
    let left = beside.left_out.iter().find(|left| left.name == name);
    left.map_or("", |left| left.what)
}

#[test]
fn trained_weights_of_the_cases_are_refused_by_file() {
    for (name, file, expected) in [
        (
            "formats/new-embeddings",
            "new_embeddings.safetensors",
            "embeddings of new tokens",
        ),
        (
            "formats/value-head",
            "value_head.safetensors",
            "a head that values answers",
        ),
    ] {
        let path = case(name);
        let found = refused(&path);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, file);
        assert!(found[0].1.contains(expected), "{}", found[0].1);
        let problems = validate_path(&path, None, &[]).expect("problems");
        assert_eq!(problems[0].at, file);
        // Looking at it is not using it.
        let summary = crate::inspect::summarise(&path).expect("readable");
        assert!(summary.problems.iter().any(|problem| problem.at == file));
    }
}

#[test]
fn the_tensors_say_whether_weights_would_be_lost() {
    let dir = adapter();
    let at = |name: &str| dir.path().join(name);
    let module = "base_model.model.model.layers.0.self_attn.q_proj";
    let (a, b) = (
        format!("{module}.lora_A.weight"),
        format!("{module}.lora_B.weight"),
    );
    // Not lost: the same modules again, a whole model with each weight that is adapted, outputs, nothing.
    fs::copy(at("adapter_model.safetensors"), at("step-100.safetensors")).expect("copied");
    let names: Vec<String> = fixtures::small_adapter(31, false)
        .sites
        .iter()
        .map(|site| format!("{}.weight", site.name))
        .collect();
    let (one, two) = names.split_at(1);
    write(
        &at("whole-00001-of-00002.safetensors"),
        &[(&one[0], &[2, 2])],
    );
    let rest: Vec<(&str, &[usize])> = two
        .iter()
        .map(|name| (name.as_str(), &[2usize, 2][..]))
        .collect();
    write(&at("whole-00002-of-00002.safetensors"), &rest);
    write(
        &at("recorded.safetensors"),
        &[("input_ids", &[2]), ("logits", &[2, 2])],
    );
    write(&at("nothing.safetensors"), &[]);
    fs::write(at("adapter_model.bin"), b"\x80\x02}q\0.").expect("written");
    let beside = Beside::of(dir.path()).expect("listed");
    assert_eq!(beside.problems, []);
    for (name, what) in [
        ("step-100.safetensors", "other checkpoints"),
        ("whole-00001-of-00002.safetensors", "whole models"),
        ("whole-00002-of-00002.safetensors", "whole models"),
        ("recorded.safetensors", "recorded outputs"),
        ("nothing.safetensors", "files without a tensor"),
        (
            "adapter_model.bin",
            "copies of the adapter in other formats",
        ),
    ] {
        assert_eq!(what_of(&beside, name), what, "{name}");
    }
    assert!(Adapter::read(dir.path()).is_ok());

    // Lost: other modules, part of a model, a pickle, what cannot be opened, a directory of weights.
    write(
        &at("second.safetensors"),
        &[
            (&a.replace("q_proj", "o_proj"), &[1, 2]),
            (&b.replace("q_proj", "o_proj"), &[2, 1]),
        ],
    );
    write(&at("score.safetensors"), &[("score.weight", &[1, 2])]);
    write(&at("head.safetensors"), &[("lm_head.weight", &[4, 2])]);
    fs::write(
        at("non_lora_trainables.bin"),
        b"PK\x03\x04 non_lora/data.pkl",
    )
    .expect("written");
    fs::write(at("torn.safetensors"), b"\x09\0\0\0\0\0\0\0{").expect("written");
    fs::create_dir(at("2_Dense")).expect("made");
    write(
        &at("2_Dense/model.safetensors"),
        &[("linear.weight", &[2, 2])],
    );
    let found = refused(dir.path());
    let files: Vec<&str> = found.iter().map(|(file, _)| file.as_str()).collect();
    let expected = [
        "2_Dense/model.safetensors",
        "head.safetensors",
        "non_lora_trainables.bin",
        "score.safetensors",
        "second.safetensors",
        "torn.safetensors",
    ];
    assert_eq!(files, expected);
    assert!(
        found[0].1.contains("linear.weight [2, 2]"),
        "{}",
        found[0].1
    );
    assert!(found[2].1.contains("PyTorch"), "{}", found[2].1);
    assert!(found[4].1.contains("o_proj"), "{}", found[4].1);
    // Naming a file says which of two adapters is meant, and no more.
    fs::remove_file(at("torn.safetensors")).expect("there");
    let named = refused(&at("adapter_model.safetensors"));
    assert!(
        !named.iter().any(|(file, _)| file == "second.safetensors"),
        "{named:?}"
    );
    assert_eq!(named.len(), 4);
}

#[test]
fn a_merged_model_keeps_the_templates_of_a_base_where_the_adapter_has_none() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| dir.path().join(name);
    let case = fixtures::named("plain-lora");
    fs::create_dir_all(at("base/additional_chat_templates")).expect("made");
    for entry in fs::read_dir(&case.model_dir).expect("listed") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), at("base").join(entry.file_name())).expect("copied");
    }
    fs::remove_file(at("base/chat_template.jinja")).expect("there");
    fs::write(
        at("base/tokenizer_config.json"),
        r#"{"chat_template": "the base's"}"#,
    )
    .expect("written");
    fs::write(at("base/additional_chat_templates/tool.jinja"), "tools").expect("written");
    fs::write(at("base/pytorch_model.bin"), "").expect("written");
    fs::create_dir(at("base/original")).expect("made");
    let base = ModelFiles::open(at("base")).expect("a model");
    let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
    adapter.write_peft(&at("own"), false).expect("written");
    let read = |path: &str| fs::read_to_string(at(path)).expect(path);

    fs::write(at("own/tokenizer_config.json"), "{}").expect("written");
    let carried = Beside::of(&at("own")).expect("listed").carried;
    let report = merge_dir(&base, &adapter, &at("kept"), None, &carried).expect("it fits");
    assert_eq!(read("kept/chat_template.jinja"), "the base's");
    assert_eq!(read("kept/tokenizer_config.json"), "{}");
    assert_eq!(read("kept/additional_chat_templates/tool.jinja"), "tools");
    assert_eq!(report.replaced, ["tokenizer_config.json"]);
    assert_eq!(report.not_copied, ["original/", "pytorch_model.bin"]);

    fs::write(
        at("own/tokenizer_config.json"),
        r#"{"chat_template": "mine"}"#,
    )
    .expect("written");
    let carried = Beside::of(&at("own")).expect("listed").carried;
    let report = merge_dir(&base, &adapter, &at("own-template"), None, &carried).expect("it fits");
    assert!(!at("own-template/chat_template.jinja").exists());
    assert!(!at("own-template/additional_chat_templates").exists());
    assert_eq!(
        report.replaced,
        ["additional_chat_templates", "tokenizer_config.json"]
    );
}

#[cfg(unix)]
#[test]
fn pipes_and_links_to_nothing_are_not_opened() {
    let dir = adapter();
    let at = |name: &str| dir.path().join(name);
    let mut command = std::process::Command::new("mkfifo");
    let made = command
        .args([at("pipe.safetensors"), at("pipe.bin")])
        .status();
    assert!(made.expect("mkfifo is there").success());
    std::os::unix::fs::symlink("/nonexistent", at("dangling.safetensors")).expect("linked");
    std::os::unix::fs::symlink(".", at("loop")).expect("linked");
    let beside = Beside::of(dir.path()).expect("listed");
    let problems: Vec<_> = beside.problems.iter().map(|found| &*found.at).collect();
    assert_eq!(problems, ["dangling.safetensors"]);
    assert_eq!(
        beside.left_out_line().expect("a line"),
        "not known (pipe.bin, pipe.safetensors), other adapters (loop/)"
    );
    assert!(Adapter::read(&at("pipe.bin")).is_err());
}

#[test]
fn what_git_did_not_fetch_is_known_by_its_name() {
    let dir = adapter();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("config.json"), r#"{"model_type": "llama"}"#).expect("written");
    let pointer = "version https://git-lfs.github.com/spec/v1\nsize 9\n";
    for name in [
        "adapter_model.bin",
        "0000100_adapters.safetensors",
        "model-00001-of-00002.safetensors",
        "optimizer.pt",
    ] {
        fs::write(at(name), pointer).expect("written");
    }
    assert_eq!(Beside::of(dir.path()).expect("listed").problems, []);
    fs::write(at("value_head.safetensors"), pointer).expect("written");
    let found = refused(dir.path());
    assert_eq!(found[0].0, "value_head.safetensors");
    assert!(found[0].1.contains("a Git LFS pointer"), "{}", found[0].1);
}

#[test]
fn a_named_file_is_the_file_that_is_read() {
    let dir = case("formats/mlx-two-checkpoints");
    let last = Adapter::read(&dir).expect("the last");
    let earlier = Adapter::read(&dir.join("0000100_adapters.safetensors")).expect("the earlier");
    assert_ne!(last.fingerprint(), earlier.fingerprint());
    assert_eq!(
        Adapter::read(&dir.join("adapters.safetensors"))
            .expect("by its name")
            .fingerprint(),
        last.fingerprint()
    );
    assert_eq!(
        Adapter::read(&dir.join("adapter_config.json"))
            .expect("the directory")
            .fingerprint(),
        last.fingerprint()
    );
    let beside = Beside::of(&dir).expect("listed");
    assert_eq!(
        what_of(&beside, "0000100_adapters.safetensors"),
        "other checkpoints"
    );
    let beside = Beside::of(&dir.join("0000100_adapters.safetensors")).expect("listed");
    assert_eq!(
        what_of(&beside, "adapters.safetensors"),
        "other checkpoints"
    );
    let summary = crate::inspect::summarise(&dir.join("0000100_adapters.safetensors"));
    assert_ne!(
        summary.expect("readable").sites[0].norm_a,
        crate::inspect::summarise(&dir).expect("readable").sites[0].norm_a
    );

    // PEFT's under another name, a shard, and what is no adapter.
    let dir = adapter();
    let other = fixtures::small_adapter(32, false);
    let made = tempfile::tempdir().expect("temporary directory");
    other.write_peft(made.path(), true).expect("written");
    let named = dir.path().join("best_model.safetensors");
    fs::copy(made.path().join("adapter_model.safetensors"), &named).expect("copied");
    assert_eq!(
        Adapter::read(&named).expect("by name").fingerprint(),
        other.fingerprint()
    );
    let problems = validate_path(&named, None, &[crate::Runtime::Vllm]).expect("readable");
    assert_eq!(problems[0].code, "file-name");
    let shard = dir.path().join("adapter_model-00001-of-00002.safetensors");
    fs::copy(&named, &shard).expect("copied");
    let error = Adapter::read(&shard).expect_err("a part");
    assert_eq!(error.code(), "shard");
    let notes = dir.path().join("notes.txt");
    fs::write(&notes, "learning rate 1e-4").expect("written");
    let error = Adapter::read(&notes).expect_err("no adapter").to_string();
    assert!(error.contains("text, not a safetensors file"), "{error}");
    let missing = Adapter::read(&dir.path().join("step-2.safetensors")).expect_err("not there");
    assert!(missing.is_not_found());
}

#[test]
fn tokenizer_and_template_go_where_the_adapter_goes() {
    let source = case("formats/own-chat-template");
    let mut beside = Beside::of(&source).expect("listed");
    let names = [
        "added_tokens.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(beside.carried.names(), names);
    assert_eq!(beside.problems, []);
    let adapter = Adapter::read(&source).expect("readable");
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| dir.path().join(name);
    adapter
        .write_lora(&at("plain"), &LoraOptions::default())
        .expect("written");
    let options = LoraOptions {
        carried: beside.carried.clone(),
        ..LoraOptions::default()
    };
    adapter
        .write_lora(&at("carried"), &options)
        .expect("written");
    for name in names {
        let bytes = |dir: &Path| fs::read(dir.join(name)).expect(name);
        assert_eq!(bytes(&at("carried")), bytes(&source), "{name}");
    }
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let bytes = |dir: &str| fs::read(at(dir).join(name)).expect(name);
        assert_eq!(bytes("carried"), bytes("plain"), "{name}");
    }
    // Merged, they replace the base's. A token that stands beside tokenizer.json alone is no token to what reads that file.
    let model = fixtures::named("plain-lora").model_dir;
    let base = ModelFiles::open(&model).expect("a model");
    assert_eq!(beside.carried.vocabulary_size(), Some(259));
    let warning = beside.carried.unread_tokens().expect("one token more");
    assert!(
        warning.message.contains("(added_tokens.json 259)"),
        "{warning}"
    );
    merge_dir(&base, &adapter, &at("as-it-is"), None, &beside.carried).expect("it fits");
    let copy = at("copy");
    fs::create_dir(&copy).expect("made");
    for entry in fs::read_dir(&source).expect("listed") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), copy.join(entry.file_name())).expect("copied");
    }
    // A token of its own that the base has no embedding for is refused.
    let place = copy.join("tokenizer.json");
    let text = fs::read_to_string(&place).expect("readable");
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let token = serde_json::json!({"id": 259, "content": "<extra>"});
    tokenizer["added_tokens"]
        .as_array_mut()
        .expect("a list")
        .push(token);
    fs::write(&place, tokenizer.to_string()).expect("written");
    beside = Beside::of(&copy).expect("listed");
    assert_eq!(beside.carried.unread_tokens(), None);
    let refusal = merge_dir(&base, &adapter, &at("merged"), None, &beside.carried);
    let refusal = refusal.expect_err("one token too many");
    assert_eq!(refusal.code(), "vocabulary");
    assert!(refusal.to_string().contains("260 tokens"), "{refusal}");
    fs::write(&place, &text).expect("written");
    fs::write(copy.join("added_tokens.json"), "{}").expect("written");
    beside = Beside::of(&copy).expect("listed");
    let report = merge_dir(&base, &adapter, &at("merged"), None, &beside.carried).expect("it fits");
    let bytes = |dir: &Path, name| fs::read(dir.join(name)).expect(name);
    for name in ["chat_template.jinja", "tokenizer_config.json"] {
        assert_eq!(bytes(&at("merged"), name), bytes(&source, name));
        assert!(
            report.replaced.iter().any(|replaced| replaced == name),
            "{:?}",
            report.replaced
        );
    }
    assert_eq!(
        bytes(&at("merged"), "config.json"),
        bytes(&model, "config.json")
    );
}

#[test]
fn a_template_of_the_adapter_is_not_hidden_by_one_of_the_base() {
    let dir = adapter();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("tokenizer_config.json"), r#"{"chat_template": "mine"}"#).expect("written");
    let beside = Beside::of(dir.path()).expect("listed");
    // transformers reads chat_template.jinja first.
    assert!(beside.carried.replaces("chat_template.jinja"));
    assert!(beside.carried.replaces("additional_chat_templates"));
    assert!(!beside.carried.replaces("tokenizer.model"));
    fs::write(at("tokenizer_config.json"), "{}").expect("written");
    fs::write(
        at("tokenizer.json"),
        r#"{"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}"#,
    )
    .expect("written");
    fs::create_dir(at("additional_chat_templates")).expect("made");
    let beside = Beside::of(dir.path()).expect("listed");
    assert!(!beside.carried.replaces("chat_template.jinja"));
    assert!(beside.carried.replaces("tokenizer.model"));
    assert_eq!(beside.carried.vocabulary_size(), Some(2));
    fs::write(at("additional_chat_templates/tool.jinja"), "tools").expect("written");
    let beside = Beside::of(dir.path()).expect("listed");
    assert!(
        beside
            .carried
            .names()
            .contains(&"additional_chat_templates/tool.jinja".to_owned())
    );
    // A tokenizer that git did not fetch is none.
    fs::write(
        at("tokenizer.json"),
        "version https://git-lfs.github.com/spec/v1\nsize 9\n",
    )
    .expect("written");
    let beside = Beside::of(dir.path()).expect("listed");
    assert_eq!(
        (beside.problems[0].code, beside.problems[0].at.as_str()),
        ("lfs-pointer", "tokenizer.json")
    );
}

#[test]
fn what_is_left_out_stands_in_one_line() {
    let dir = adapter();
    let at = |name: &str| dir.path().join(name);
    for name in [
        "optimizer.pt",
        "training_args.bin",
        "run.json",
        "LICENSE",
        "notes.txt",
        "README.md",
        "calibration.json",
    ] {
        fs::write(at(name), "{}").expect("written");
    }
    for name in [
        "checkpoint-5",
        "best",
        "other",
        "tb",
        "global_step5",
        "model",
        "images",
    ] {
        fs::create_dir(at(name)).expect("made");
    }
    for name in ["checkpoint-5", "best", "other"] {
        fs::copy(
            at("adapter_config.json"),
            at(name).join("adapter_config.json"),
        )
        .expect("copied");
    }
    fs::write(at("model/config.json"), r#"{"model_type": "llama"}"#).expect("written");
    let beside = Beside::of(dir.path()).expect("listed");
    assert_eq!(beside.carried.names(), ["README.md", "calibration.json"]);
    assert_eq!(
        beside.left_out_line().expect("a line"),
        "by-products of training (global_step5/, optimizer.pt, tb/, training_args.bin), files of the repository (LICENSE), \
         not known (images/, notes.txt), other adapters (other/), other checkpoints (best/, checkpoint-5/), the record of the training (run.json), whole models (model/)"
    );
    let beside = beside.nothing_measured();
    assert_eq!(beside.carried.names(), ["README.md"]);
    assert_eq!(
        what_of(&beside, "calibration.json"),
        "measured with the adapter as it was"
    );
    for idx in 0..30 {
        fs::write(at(&format!("row-{idx:02}.txt")), "").expect("written");
    }
    let line = Beside::of(dir.path())
        .expect("listed")
        .left_out_line()
        .expect("a line");
    assert!(line.contains("row-17.txt and 12 more)"), "{line}");
    // Many files of weights are not all opened.
    for idx in 0..=MAX_WEIGHTS {
        fs::write(at(&format!("{idx:07}_adapters.safetensors")), "").expect("written");
    }
    let beside = Beside::of(dir.path()).expect("listed");
    assert_eq!(beside.problems.len(), 1);
    assert!(beside.problems[0].message.contains("1025 files"));
}

#[test]
fn a_gguf_lora_in_a_directory_is_read_and_what_an_old_converter_left_is_named() {
    let dir = case("formats/gguf-dir");
    let whole = crate::inspect::summarise(&dir).expect("the one adapter");
    assert_eq!(whole.format, "gguf-lora");
    let control = case("formats/glora-ok").join("adapter.gguf");
    let named = crate::inspect::summarise(&control).expect("by its file");
    assert_eq!(named.n_sites, whole.n_sites);
    assert_eq!(named.beside, Some(Beside::default()));
    let old = case("formats/glora-rope-freqs").join("adapter.gguf");
    let old = crate::inspect::summarise(&old).expect("without the factors");
    assert_eq!(old.n_sites, whole.n_sites);
    let line = old.beside.expect("listed").left_out_line().expect("named");
    assert!(line.contains("adapter.gguf: rope_freqs.weight"), "{line}");
}
