//! GGUF bases that say more or less than today's converter: older and newer keys, defaults of llama.cpp, and what is refused by name.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::adapter::Adapter;
use crate::architecture::ModelShape;
use crate::error::Result;
use crate::fixtures;
use crate::gguf_base::ImportReport;
use crate::gguf_tests::import;
use crate::llama_cpp::{Config, Gguf, Meta, convert};
use crate::model_files::ModelFiles;
use crate::tensors::gguf_write::{Entry, write_gguf};
use crate::tensors::safetensors_file::SafetensorsFile;
use crate::tensors::tensor::Tensor;

/// What llama.cpp's converter writes of a recorded model.
fn converted(kind: &str) -> Gguf {
    let dir = fixtures::architecture(kind).model_dir;
    let config = ModelFiles::read_config(&dir).expect("a model");
    let checkpoint = SafetensorsFile::open(dir.join("model.safetensors")).expect("weights");
    convert(&Config::new(&config).expect("known"), &checkpoint)
}

impl Gguf {
    fn with(mut self, key: &str, value: Meta) -> Self {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    fn without(mut self, key: &str) -> Self {
        assert!(self.metadata.remove(key).is_some(), "no {key}");
        self
    }

    fn text(self, key: &str, text: &str) -> Self {
        self.with(key, Meta::Text(text.to_owned()))
    }
}

fn in_dir<T>(file: &Gguf, look: impl FnOnce(&Path, Result<ImportReport>) -> T) -> T {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (path, out) = (dir.path().join("x.gguf"), dir.path().join("out"));
    file.write(&path);
    let report = import(&path, &out);
    look(&out, report)
}

fn imported(file: &Gguf) -> (Map<String, Value>, ModelShape, Vec<String>) {
    in_dir(file, |out, report| {
        let notes = report.expect("a good file").notes;
        let config = ModelFiles::read_config(out).expect("written");
        (
            config,
            ModelShape::read(out).expect("our own output"),
            notes,
        )
    })
}

/// Places of the problems that a file is refused with.
fn refused(file: &Gguf) -> Vec<String> {
    in_dir(file, |_, report| {
        let error = report.expect_err("refused");
        let problems = error.problems().iter();
        problems.map(|problem| problem.at.clone()).collect()
    })
}

fn windows(shape: &ModelShape) -> Vec<Option<usize>> {
    shape.layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn windows_are_those_of_the_file_or_of_llama_cpp() {
    const WINDOW: &str = "gemma3.attention.sliding_window";
    const PATTERN: &str = "gemma3.attention.sliding_window_pattern";
    let gemma = || converted("gemma3");
    // Three layers: the sixth would be the first to see everything.
    let (_, shape, notes) = imported(&gemma());
    assert_eq!(windows(&shape), [Some(8); 3]);
    assert!(
        notes.iter().any(|note| note.contains("one in 6")),
        "{notes:?}"
    );
    let (_, shape, _) = imported(&gemma().with(PATTERN, Meta::U32(2)));
    assert_eq!(windows(&shape), [Some(8), None, Some(8)]);
    let flags = Meta::Bools(vec![false, true, false]);
    let (_, shape, notes) = imported(&gemma().with(PATTERN, flags));
    assert_eq!(windows(&shape), [None, Some(8), None]);
    assert!(
        notes.iter().all(|note| !note.contains("one in 6")),
        "{notes:?}"
    );
    let flags = Meta::Bools(vec![true; 2]);
    assert_eq!(refused(&gemma().with(PATTERN, flags)), [PATTERN]);
    for file in [gemma().without(WINDOW), gemma().with(WINDOW, Meta::U32(0))] {
        let (config, shape, _) = imported(&file);
        assert_eq!(windows(&shape), [None; 3]);
        // transformers makes a mask of this number even if no layer uses it.
        assert!(config["sliding_window"].is_u64());
    }

    let mut older = converted("gemma2").without("gemma2.attention.sliding_window");
    older.metadata.remove("gemma2.final_logit_softcapping");
    older = older.with("gemma2.context_length", Meta::U32(8192));
    let (_, shape, _) = imported(&older);
    assert_eq!(windows(&shape), [Some(4096), None, Some(4096)]);
    assert_eq!(shape.logit_cap, Some(30.0));
    assert_eq!(
        refused(&older.with("gemma2.attn_logit_softcapping", Meta::F32(0.0))).len(),
        1
    );

    let window = |kind: &str, prefix: &str| {
        let key = format!("{prefix}.attention.sliding_window");
        (converted(kind).with(&key, Meta::U32(5)), key)
    };
    let (mistral, _) = window("mistral-window", "llama");
    let (config, shape, _) = imported(&mistral);
    assert_eq!(config["model_type"], "mistral");
    assert_eq!(windows(&shape), [Some(5); 3]);
    let (phi, _) = window("phi3", "phi3");
    assert_eq!(windows(&imported(&phi).1), [Some(5); 3]);
    let (mixture, _) = window("qwen3_moe", "qwen3moe");
    assert_eq!(windows(&imported(&mixture).1), [Some(5); 3]);
    let (qwen, key) = window("qwen3", "qwen3");
    assert_eq!(
        refused(&qwen),
        [key.as_str()],
        "it does not say in which layers"
    );
    let flags = Meta::Bools(vec![false, true, true]);
    let pattern = "qwen3.attention.sliding_window_pattern";
    let (_, shape, _) = imported(&qwen.with(pattern, flags));
    assert_eq!(windows(&shape), [None, Some(5), Some(5)]);
    let (granite, key) = window("granite", "granite");
    assert_eq!(refused(&granite), [key]);
    let (olmo, _) = window("olmo2", "olmo2");
    let (config, shape, _) = imported(&olmo);
    assert_eq!(config["model_type"], "olmo3");
    assert_eq!(windows(&shape), [Some(5); 3]);
    assert_eq!(shape.ropes[1].theta, shape.ropes[0].theta);
}

#[test]
fn layers_with_a_window_have_the_base_of_the_file_or_of_llama_cpp() {
    const LOCAL: &str = "gemma3.rope.freq_base_swa";
    let bases = |file: &Gguf| {
        let (_, shape, _) = imported(file);
        let bases: Vec<f64> = shape.ropes.iter().map(|rope| rope.theta).collect();
        bases
    };
    let gemma = converted("gemma3");
    assert_eq!(bases(&gemma.clone().without(LOCAL)), [1e6, 1e4]);
    assert_eq!(bases(&gemma.with(LOCAL, Meta::F32(5e4))), [1e6, 5e4]);
}

#[test]
fn scores_of_the_largest_gemmas_are_scaled_by_the_width_over_the_heads() {
    for (kind, prefix, n_layers) in [("gemma2", "gemma2", 46), ("gemma3", "gemma3", 62)] {
        let mut file = converted(kind);
        // Heads of 16 in a width of 64 would hide it.
        let blocks: Vec<_> = file.tensors.clone().into_iter().collect();
        for (name, tensor) in blocks {
            if let Some(inner) = name.strip_prefix("blk.0.") {
                for layer in 0..n_layers {
                    file.tensors
                        .insert(format!("blk.{layer}.{inner}"), tensor.clone());
                }
            }
        }
        let key = |key: &str| format!("{prefix}.{key}");
        let file = file
            .with(&key("block_count"), Meta::U32(n_layers))
            .with(&key("attention.head_count"), Meta::U32(4));
        let (config, ..) = imported(&file);
        assert_eq!(config["query_pre_attn_scalar"], 64 / 4);
        assert_eq!(config["head_dim"], 16);
    }
}

#[test]
fn rotations_are_read_as_llama_cpp_reads_them() {
    // A switch in this architecture alone.
    const SWITCH: &str = "granite.rope.scaling.finetuned";
    imported(&converted("granite").with(SWITCH, Meta::Bool(true)));
    let off = converted("granite").with(SWITCH, Meta::Bool(false));
    assert_eq!(refused(&off), [SWITCH]);
    imported(&converted("llama-linear").with("llama.rope.scaling.finetuned", Meta::Bool(false)));

    // Without the key all of a head turns.
    let (config, shape, _) = imported(&converted("glm4").without("glm4.rope.dimension_count"));
    assert_eq!(config["partial_rotary_factor"], 1.0);
    assert_eq!(shape.ropes[0].dim, shape.head_dim);

    // The factor that attention is multiplied by is told where it is not the lengths'.
    let phi = converted("phi3-longrope-long");
    let (config, shape, _) = imported(&phi);
    assert_eq!(config["rope_scaling"].get("attention_factor"), None);
    assert_eq!(config["original_max_position_embeddings"], 16);
    let inferred = shape.ropes[0].attention_factor();
    let stated = phi
        .clone()
        .with("phi3.rope.scaling.attn_factor", Meta::F32(1.25));
    let (_, shape, _) = imported(&stated);
    assert!(inferred != 1.25 && shape.ropes[0].attention_factor() == 1.25);
    let mut half = phi.clone();
    half.tensors.remove("rope_factors_short.weight");
    assert_eq!(refused(&half), ["rope_factors_short.weight"]);
    let other = phi.text("phi3.rope.scaling.type", "yarn");
    let unread = "phi3.rope.scaling.attn_factor";
    assert_eq!(refused(&other), ["rope_factors_long.weight", unread]);

    let yarn = || converted("llama-yarn");
    let factor = yarn().with("llama.rope.scaling.yarn_attn_factor", Meta::F32(1.25));
    assert_eq!(imported(&factor).1.ropes[0].attention_factor(), 1.25);
    let turns = yarn()
        .with("llama.rope.scaling.yarn_beta_fast", Meta::F32(24.0))
        .with("llama.rope.scaling.yarn_beta_slow", Meta::F32(2.0));
    let (config, ..) = imported(&turns);
    assert_eq!(config["rope_scaling"]["beta_fast"], 24.0);
    assert_eq!(config["rope_scaling"]["beta_slow"], 2.0);
    let mix = "llama.rope.scaling.yarn_ext_factor";
    assert_eq!(refused(&yarn().with(mix, Meta::F32(0.5))), [mix]);
    let (config, _, notes) =
        imported(&yarn().without("llama.rope.scaling.original_context_length"));
    let length = &config["rope_scaling"]["original_max_position_embeddings"];
    assert_eq!(*length, config["max_position_embeddings"]);
    assert!(
        notes
            .iter()
            .any(|note| note.contains("original_context_length")),
        "{notes:?}"
    );
}

#[test]
fn the_family_of_an_architecture_is_told_by_its_keys() {
    // Mistral Small 3 is kept as Ministral 3 without a temperature and YaRN.
    const TEMPERATURE: &str = "mistral3.attention.temperature_scale";
    let mut file = converted("ministral3").without(TEMPERATURE);
    let (config, shape, notes) = imported(&file);
    assert_eq!(config["model_type"], "mistral");
    assert_eq!(shape.ropes[0].query_scaling, None);
    assert!(
        notes.iter().any(|note| note.contains("`mistral3`")),
        "{notes:?}"
    );
    file.metadata.retain(|key, _| !key.contains("rope.scaling"));
    let (config, ..) = imported(&file);
    assert_eq!(config["rope_scaling"], Value::Null);
    let warm = file.with(TEMPERATURE, Meta::F32(0.1));
    assert_eq!(refused(&warm), [TEMPERATURE]);

    // Adapters of either name are its own.
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.gguf");
    let read = |architecture: &str| {
        let text = |text: &str| Entry::Text(text.into());
        let metadata = [
            ("general.architecture", text(architecture)),
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Entry::F32(8.0)),
        ];
        let tensor = |shape: &[usize; 2]| Tensor::from_f32(shape, vec![0.5; 128]).expect("sized");
        let tensors = [
            ("blk.0.attn_q.weight.lora_a".to_owned(), tensor(&[2, 64])),
            ("blk.0.attn_q.weight.lora_b".to_owned(), tensor(&[64, 2])),
        ];
        write_gguf(&path, &metadata, &tensors).expect("written");
        Adapter::read_for(&path, &config)
    };
    for architecture in ["llama", "mistral3"] {
        assert_eq!(read(architecture).expect(architecture).sites.len(), 1);
    }
    let error = read("qwen2").expect_err("another architecture").to_string();
    assert!(
        error.contains("expected llama or mistral3, found qwen2"),
        "{error}"
    );
}

#[test]
fn mixtures_are_those_that_llama_cpp_computes() {
    let mixtral = || converted("mixtral");
    let norm = "qwen3moe.expert_weights_norm";
    imported(&converted("qwen3_moe").with(norm, Meta::Bool(true)));
    let plain = converted("qwen3_moe").with(norm, Meta::Bool(false));
    assert_eq!(refused(&plain), [norm]);
    let gate = "llama.expert_gating_func";
    imported(&mixtral().with(gate, Meta::U32(1)));
    assert_eq!(refused(&mixtral().with(gate, Meta::U32(2))), [gate]);
    let shared = "llama.expert_shared_count";
    assert_eq!(refused(&mixtral().with(shared, Meta::U32(1))), [shared]);

    // As llama.cpp wrote them before it stacked them.
    let mut older = mixtral();
    let (shape, values) = older
        .tensors
        .remove("blk.1.ffn_up_exps.weight")
        .expect("there");
    let size = values.len() / shape[0];
    for (expert, values) in values.chunks(size).enumerate() {
        let name = format!("blk.1.ffn_up.{expert}.weight");
        older
            .tensors
            .insert(name, (shape[1..].to_vec(), values.to_vec()));
    }
    assert_eq!(refused(&older), ["blk.1.ffn_up.0.weight"]);
    let mut fewer = mixtral();
    fewer.tensors.remove("blk.0.ffn_down_exps.weight");
    assert_eq!(refused(&fewer), ["blk.0.ffn_down_exps.weight"]);
}

#[test]
fn adapters_on_experts_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("x.gguf");
    for (kind, prefix) in [("mixtral", "llama"), ("qwen3_moe", "qwen3moe")] {
        let config = ModelFiles::read_config(fixtures::architecture(kind).model_dir);
        let text = |text: &str| Entry::Text(text.into());
        let metadata = [
            ("general.architecture", text(prefix)),
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Entry::F32(8.0)),
        ];
        let names =
            ["ffn_gate_inp", "ffn_up_exps"].map(|name| format!("blk.0.{name}.weight.lora_a"));
        let tensor = |shape: &[usize; 2]| Tensor::from_f32(shape, vec![0.5; 128]).expect("sized");
        let tensors = [
            (names[0].clone(), tensor(&[2, 64])),
            (names[1].clone(), tensor(&[2, 64])),
            ("blk.0.attn_v.weight.lora_a".to_owned(), tensor(&[2, 64])),
            ("blk.0.attn_v.weight.lora_b".to_owned(), tensor(&[64, 2])),
        ];
        write_gguf(&path, &metadata, &tensors).expect("written");
        let error = Adapter::read_for(&path, &config.expect("a model")).expect_err("experts");
        let found = error.problems().iter();
        let found: Vec<_> = found.map(|problem| (problem.code, &problem.at)).collect();
        assert_eq!(found, [("experts", &names[0]), ("experts", &names[1])]);
    }
}

#[test]
fn white_space_after_special_tokens_goes_where_llama_cpp_drops_it() {
    let stripped = |file: &Gguf| {
        in_dir(file, |out, report| {
            report.expect("a good file");
            let text = std::fs::read_to_string(out.join("tokenizer.json")).expect("written");
            let tokenizer: Value = serde_json::from_str(&text).expect("JSON");
            let tokens = tokenizer["added_tokens"]
                .as_array()
                .expect("a list")
                .clone();
            let tokens = tokens.into_iter().filter(|token| token["rstrip"] == true);
            tokens
                .map(|token| token["content"].clone())
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(stripped(&converted("phi3")), [json!("</s>")]);
    assert_eq!(stripped(&converted("gemma3")), [Value::Null; 0]);
    let with_merges = converted("phi3")
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "dbrx");
    assert_eq!(stripped(&with_merges), [Value::Null; 0]);
}
