//! Tests that logits equal the references, that answers follow from the logits, and that unsupported models are
//! refused.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use monteclora_converters::Tensor;
use monteclora_converters::architecture::FAMILIES;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::{Case, cases, named, servable, walk};
use crate::{ChatMessage, Engine, Error, MonteCloraLoader};

/// `input_ids` as rows, and the named logits as one row-major vector per sequence.
pub(super) struct Expected {
    pub(super) sequences: Vec<Vec<u32>>,
    pub(super) logits: HashMap<String, Vec<Vec<f32>>>,
}

pub(super) fn expected(case: &Case) -> Expected {
    let bytes = fs::read(&case.expected).expect("readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let ids = tensors.tensor("input_ids").expect("input_ids");
    let length = ids.shape()[1];
    let ids: Vec<u32> = ids
        .data()
        .chunks_exact(8)
        .map(|word| {
            let word = i64::from_le_bytes(word.try_into().expect("8 bytes"));
            u32::try_from(word).expect("an id")
        })
        .collect();
    let sequences: Vec<Vec<u32>> = ids.chunks(length).map(<[u32]>::to_vec).collect();
    let logits = ["base_logits", "logits"]
        .into_iter()
        .map(|name| {
            let values: Vec<f32> = tensors
                .tensor(name)
                .expect("recorded")
                .data()
                .chunks_exact(4)
                .map(|word| f32::from_le_bytes(word.try_into().expect("4 bytes")))
                .collect();
            let per_sequence = values.len() / sequences.len();
            (
                name.to_owned(),
                values.chunks(per_sequence).map(<[f32]>::to_vec).collect(),
            )
        })
        .collect();
    Expected { sequences, logits }
}

/// References computed in bfloat16, which has 8 bits of mantissa, get a larger tolerance.
pub(super) fn tolerance(reference: &[f32]) -> f32 {
    let is_half = reference.iter().all(|value| value.to_bits() & 0xffff == 0);
    if is_half { 0.06 } else { 1e-3 }
}

fn max_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// An unsupported model must be refused by name before it is loaded; every other model must equal transformers and
/// PEFT.
#[test]
fn logits_equal_the_references() {
    let walked = cases().into_iter().filter(|case| !case.must_refuse());
    let n_compared: usize = walked.chain([servable()]).map(|case| compare(&case)).sum();
    assert!(n_compared > 0);
}

/// Compares all sequences, cut to the model's limit. Returns the number of compared sequences.
fn compare(case: &Case) -> usize {
    let expected = expected(case);
    let mut n_compared = 0;
    for (loader, name) in [
        (case.base_loader(), "base_logits"),
        (case.loader(), "logits"),
    ] {
        let Some(limit) = limit(&loader, &case.name) else {
            continue;
        };
        let shape = loader.check().expect("it has a limit").shape;
        let depends_on_length = shape.ropes.iter().any(|rope| rope.threshold().is_some());
        if depends_on_length && expected.sequences[0].len() > limit {
            continue;
        }
        let cut = |sequence: &Vec<u32>| sequence[..limit.min(sequence.len())].to_vec();
        let sequences: Vec<Vec<u32>> = expected.sequences.iter().map(cut).collect();
        let found = crate::prompt_logits(&loader, &sequences).expect("computed");
        for (found, wanted) in found.iter().zip(&expected.logits[name]) {
            let difference = max_difference(found, &wanted[..found.len()]);
            assert!(
                difference <= tolerance(wanted),
                "{} {name}: {difference}",
                case.name
            );
            n_compared += 1;
        }
    }
    n_compared
}

/// The maximum sequence length of a model; none if it cannot be served.
fn limit(loader: &MonteCloraLoader, case: &str) -> Option<usize> {
    match loader.check() {
        Ok(config) => Some(config.max_sequence_length),
        Err(error) => {
            assert!(
                matches!(error, Error::Unsupported { .. }),
                "{case}: {error}"
            );
            assert!(!error.problems().is_empty());
            None
        }
    }
}

/// Every family that the registry lists as served is compared, with a fixture per family.
#[test]
fn every_family_that_is_served_is_compared() {
    let dirs = fs::read_dir(walk::own().join("architectures")).expect("readable");
    let mut compared = BTreeSet::new();
    for dir in dirs {
        let case = Case::of_architecture(&dir.expect("an entry").path());
        if compare(&case) > 0 {
            let config = case.loader().check().expect("it has been compared");
            compared.insert(config.shape.family.model_type);
        }
    }
    compared.insert("llama");
    let served = FAMILIES
        .iter()
        .filter(|family| family.runtime_keys.is_some());
    let served: BTreeSet<&str> = served.map(|family| family.model_type).collect();
    assert_eq!(compared, served);
}

/// Decoding step by step equals computing the whole text at each step, across windows.
#[test]
fn decoding_is_the_whole_pass() {
    const MOST: usize = 12;
    let mut n_steps = 0;
    for case in cases().into_iter().filter(|case| !case.must_refuse()) {
        let loader = case.loader();
        let Some(limit) = limit(&loader, &case.name) else {
            continue;
        };
        let engine = Engine::start(&loader).expect("started");
        for (sequence, length) in expected(&case).sequences.iter().zip([4, 25]) {
            let length = length.min(limit / 2).max(1);
            let n_new = MOST.min(limit - length);
            let mut text = sequence[..length].to_vec();
            for token in engine.continue_tokens(&text, n_new).expect("answered") {
                let logits = engine.prompt_logits(&text).expect("computed");
                let last = &logits.values[logits.values.len() - logits.vocab_size..];
                let largest = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let behind = largest - last[token as usize];
                assert!(behind <= 1e-4, "{}: {behind} at {}", case.name, text.len());
                text.push(token);
                n_steps += 1;
            }
        }
        engine.shut_down().expect("memory is given back");
    }
    assert!(n_steps > 0);
}

#[test]
fn adapters_that_would_be_served_wrongly_are_refused_before_loading() {
    let own = ["must-refuse-modules-to-save"].map(named);
    let walked = cases().into_iter().filter(Case::must_refuse);
    for case in own.into_iter().chain(walked) {
        let error = case.loader().check().expect_err("must be refused");
        assert_eq!(error.exit_code(), 4, "{}: {error}", case.name);
    }
}

#[test]
fn a_greedy_answer_is_the_argmax_of_the_logits_at_each_step() {
    let case = servable();
    let engine = Engine::start(&case.loader()).expect("started");
    let chat = [ChatMessage::new("user", "Why?")];
    let answer = engine.ask(&chat, 6).expect("answered");
    let mut tokens = engine.tokenize_chat(&chat).expect("tokenised");
    assert_eq!(answer.prompt_tokens, tokens.len());
    for &chosen in &answer.token_ids {
        let logits = engine.prompt_logits(&tokens).expect("computed");
        let last = &logits.values[logits.values.len() - logits.vocab_size..];
        let best = (0..last.len())
            .max_by(|&a, &b| last[a].total_cmp(&last[b]))
            .expect("not empty");
        assert_eq!(chosen as usize, best);
        tokens.push(chosen);
    }
    assert!(answer.token_ids.len() == 6 || answer.finish_reason == "stop");
    let too_long = vec![3; engine.max_sequence_length() + 1];
    assert_eq!(
        engine
            .prompt_logits(&too_long)
            .expect_err("too long")
            .exit_code(),
        2
    );
    engine.shut_down().expect("memory is given back");
}

/// A copy of a model directory with one JSON file changed.
fn changed(base: &Path, file: &str, change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for entry in fs::read_dir(base).expect("readable") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("copied");
    }
    let path = dir.path().join(file);
    let mut value: Value =
        serde_json::from_str(&fs::read_to_string(&path).expect("readable")).expect("valid");
    change(&mut value);
    fs::write(path, value.to_string()).expect("written");
    dir
}

#[test]
fn a_tokenizer_that_adds_bos_does_not_add_a_second_one() {
    let case = servable();
    let post_processor = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    });
    let base = changed(&case.base, "tokenizer.json", |tokenizer| {
        tokenizer["post_processor"] = post_processor;
    });
    let template = base.path().join("chat_template.jinja");
    let body = fs::read_to_string(&template).expect("readable");
    let bos = "{{ bos_token }}";
    fs::write(&template, format!("{bos}{body}")).expect("written");
    let settings = json!({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"});
    fs::write(
        base.path().join("tokenizer_config.json"),
        settings.to_string(),
    )
    .expect("written");

    let ids = |base: &Path| {
        let loader = MonteCloraLoader::builder(base, "base")
            .build()
            .expect("sound");
        let engine = Engine::start(&loader).expect("started");
        let ids = engine
            .tokenize_chat(&[ChatMessage::new("user", "a b\né")])
            .expect("tokenised");
        engine.shut_down().expect("stopped");
        ids
    };
    let mut plain = ids(&case.base);
    plain.insert(0, 0);
    assert_eq!(ids(base.path()), plain);
}

#[test]
fn bases_that_cannot_be_served_are_refused_with_the_remedy() {
    let case = servable();
    let refusal = |base: &Path| {
        let loader = MonteCloraLoader::builder(base, "base")
            .build()
            .expect("sound");
        let error = loader.check().expect_err("must be refused");
        (error.exit_code(), error.to_string())
    };
    let quantised = changed(&case.base, "config.json", |config| {
        config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    });
    let (code, text) = refusal(quantised.path());
    assert!(
        code == 4 && text.contains("gptq") && text.contains("full-precision"),
        "{text}"
    );
    let other = changed(&case.base, "config.json", |config| {
        config["architectures"] = json!(["Gemma3ForCausalLM"]);
    });
    let (code, text) = refusal(other.path());
    assert!(code == 4 && text.contains("Gemma3ForCausalLM"), "{text}");

    let dir = tempfile::tempdir().expect("a temporary directory");
    let gguf = dir.path().join("model.gguf");
    fs::write(&gguf, b"GGUF").expect("written");
    for path in [gguf.as_path(), dir.path()] {
        let (code, text) = refusal(path);
        assert!(code == 4 && text.contains("import-gguf"), "{text}");
    }
    let (code, _) = refusal(&dir.path().join("nothing"));
    assert_eq!(code, 2);
}

#[test]
fn staging_leaves_nothing_behind() {
    let case = servable();
    let staging = tempfile::tempdir().expect("a temporary directory");
    let loader = MonteCloraLoader::builder(&case.base, "adapted")
        .adapter(&case.adapter)
        .staging_dir(staging.path())
        .build()
        .expect("sound");
    drop(loader.load().expect("loaded"));
    assert_eq!(fs::read_dir(staging.path()).expect("readable").count(), 0);
}

/// An adapter that is quantised after the merge gives exactly the answers of a base into which it was merged
/// beforehand.
#[test]
fn a_quantised_adapter_equals_the_quantised_merged_model() {
    let case = servable();
    let files = monteclora_converters::ModelFiles::open(&case.base).expect("readable");
    let adapter = monteclora_converters::Adapter::read(&case.adapter).expect("readable");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let merged = dir.path().join("merged");
    monteclora_converters::merge_dir(
        &files,
        &adapter,
        &merged,
        Some(monteclora_converters::DType::F32),
        &monteclora_converters::Carried::default(),
    )
    .expect("merged");
    let tokens = expected(&case).sequences;
    let logits = |builder: crate::MonteCloraLoaderBuilder| {
        let isq = Some(mistralrs_core::IsqType::Q8_0);
        let loader = builder.in_situ_quant(isq).build().expect("sound");
        crate::prompt_logits(&loader, &tokens).expect("computed")
    };
    let served = logits(MonteCloraLoader::builder(&case.base, "adapted").adapter(&case.adapter));
    let reference = logits(MonteCloraLoader::builder(&merged, "merged"));
    let base = logits(MonteCloraLoader::builder(&case.base, "base"));
    assert_eq!(served, reference);
    assert!(
        max_difference(&served[0], &base[0]) > 0.01,
        "the adapter does something"
    );
    let exact = &expected(&case).logits["logits"];
    let rounding = max_difference(&served[0], &exact[0]);
    assert!(rounding > 0.0, "nothing was quantised");
}

/// The head of a tied base becomes a separate weight, in memory as in a merged model; the embedding stays unchanged.
#[test]
fn an_adapted_head_of_a_tied_base_is_served_as_it_is_merged() {
    let case = servable();
    let tied = changed(&case.base, "config.json", |config| {
        config["tie_word_embeddings"] = json!(true);
    });
    let untied = monteclora_converters::ModelFiles::open(&case.base).expect("readable");
    let embedding = untied.get("model.embed_tokens.weight").expect("there");
    let tensors: Vec<(String, Tensor)> = untied
        .names()
        .filter(|name| *name != "lm_head.weight")
        .map(|name| (name.to_owned(), untied.get(name).expect("listed")))
        .collect();
    let [rows, columns] = *embedding.shape() else {
        panic!("a matrix");
    };
    let weights = tied.path().join("model.safetensors");
    monteclora_converters::write_safetensors(&weights, tensors, &Default::default())
        .expect("written");
    let files = monteclora_converters::ModelFiles::open(tied.path()).expect("readable");

    let mut adapter = monteclora_converters::Adapter::read(&case.adapter)
        .expect("readable")
        .to_lora(None)
        .expect("float")
        .0;
    let mut head = adapter.sites[0].clone();
    let values = |n: usize| (0..n).map(|idx| (idx % 7) as f32 / 7.0 - 0.5).collect();
    head.name = "lm_head".to_owned();
    head.lora_a =
        Tensor::from_f32(&[head.rank, columns], values(head.rank * columns)).expect("sized");
    head.lora_b = Tensor::from_f32(&[rows, head.rank], values(rows * head.rank)).expect("sized");
    adapter.sites.push(head);
    adapter
        .sites
        .sort_by(|left, right| left.name.cmp(&right.name));
    let names = adapter.sites.iter().map(|site| site.name.clone());
    adapter.config.target_modules = monteclora_converters::TargetModules::List(names.collect());
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (source, merged) = (dir.path().join("adapter"), dir.path().join("merged"));
    adapter.write_peft(&source, false).expect("written");
    let carried = monteclora_converters::Carried::default();
    let report = monteclora_converters::merge_dir(&files, &adapter, &merged, None, &carried);
    assert!(report.expect("merged").untied);

    let tokens = expected(&case).sequences;
    let logits = |builder: crate::MonteCloraLoaderBuilder| {
        crate::prompt_logits(&builder.build().expect("sound"), &tokens).expect("computed")
    };
    let served = logits(MonteCloraLoader::builder(tied.path(), "adapted").adapter(&source));
    assert_eq!(served, logits(MonteCloraLoader::builder(&merged, "merged")));
    let base = logits(MonteCloraLoader::builder(tied.path(), "base"));
    assert!(max_difference(&served[0], &base[0]) > 0.01);
}

#[test]
fn a_load_that_fails_in_mistralrs_leaves_nothing_behind_either() {
    let case = servable();
    // The weights match config.json; only mistral.rs finds that the pre-tokenizer has no known type.
    let base = changed(&case.base, "tokenizer.json", |tokenizer| {
        tokenizer["pre_tokenizer"] = json!({"type": "none"});
    });
    let staging = tempfile::tempdir().expect("a temporary directory");
    let loader = MonteCloraLoader::builder(base.path(), "adapted")
        .adapter(&case.adapter)
        .staging_dir(staging.path())
        .build()
        .expect("sound");
    let error = loader.load().map(drop).expect_err("no tokenizer");
    assert!(error.code() == "load", "{error}");
    assert_eq!(fs::read_dir(staging.path()).expect("readable").count(), 0);
}
