//! The placeholder model of an engine without a model: a Llama of one layer and a few thousand parameters, over bytes.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use mistralrs_core::{
    AdapterPaths, DeviceMapSetting, LocalModelPaths, ModelPaths, NormalLoaderBuilder,
    NormalSpecificConfig,
};
use serde_json::{Map, Value, json};

use super::NormalModel;
use crate::error::{Error, Result};
use crate::loader::{SharedPipeline, panic_text};
use crate::quirks_0_8::thread_locals::on_fresh_thread;

/// Width of the model and of its single head.
const WIDTH: usize = 16;
/// One token per byte, and one end token.
const VOCABULARY: usize = 257;

/// Loads a placeholder for an engine on `device`. It takes some kilobytes and milliseconds. It blocks.
///
/// # Errors
/// Returns [`Error::Engine`] if its files cannot be written or loaded, and [`Error::no_threads`] if no thread can be
/// started.
pub(crate) fn placeholder(device: &Device) -> Result<NormalModel> {
    let device = device.clone();
    let load = move || tiny_model(&device, json!({}));
    let failed = |cause: &str| Error::Engine(format!("an engine cannot be made ready: {cause}"));
    let pipeline = on_fresh_thread(load)
        .map_err(|error| Error::no_threads(&error))?
        .map_err(|panic| failed(&panic_text(panic.as_ref())))?
        .map_err(|error| failed(&format!("{error:#}")))?;
    // SAFETY: `NormalLoaderBuilder::build` makes a `NormalLoader`, which has just returned it.
    Ok(unsafe { NormalModel::new(pipeline) })
}

/// Loads the placeholder model on `device`, on this thread, with `changes` to its config.json.
pub(crate) fn tiny_model(device: &Device, changes: Value) -> anyhow::Result<SharedPipeline> {
    let dir = tempfile::Builder::new().prefix("monteclora-").tempdir()?;
    let paths: Box<dyn ModelPaths> = Box::new(files(dir.path(), changes)?);
    let loader = NormalLoaderBuilder::new(
        NormalSpecificConfig::default(),
        None,
        None,
        Some("placeholder".to_owned()),
        false,
        None,
    )
    .build(None)?;
    let mapper = DeviceMapSetting::dummy();
    loader.load_model_from_path(&paths, &DType::F32, device, true, mapper, None, None)
}

/// Writes the files of the model to `dir`.
fn files(dir: &Path, changes: Value) -> anyhow::Result<LocalModelPaths<std::path::PathBuf>> {
    let (config, tokenizer) = (dir.join("config.json"), dir.join("tokenizer.json"));
    let (template, weights) = (
        dir.join("tokenizer_config.json"),
        dir.join("model.safetensors"),
    );
    let mut json = config_json();
    for (key, value) in changes.as_object().into_iter().flatten() {
        json[key] = value.clone();
    }
    fs::write(&config, json.to_string())?;
    fs::write(&tokenizer, tokenizer_json().to_string())?;
    fs::write(
        &template,
        json!({"eos_token": "<end>", "chat_template": "{{ messages }}"}).to_string(),
    )?;
    candle_core::safetensors::save(&tensors()?, &weights)?;
    Ok(LocalModelPaths {
        tokenizer_filename: tokenizer,
        config_filename: config,
        template_filename: Some(template),
        filenames: vec![weights],
        adapter_paths: AdapterPaths::None,
        gen_conf: None,
        preprocessor_config: None,
        processor_config: None,
        chat_template_json_filename: None,
    })
}

fn config_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "max_position_embeddings": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "vocab_size": VOCABULARY,
    })
}

/// A byte-level tokenizer without merges; as in GPT-2, each byte has a character.
fn tokenizer_json() -> Value {
    let is_shown = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..256).filter(|byte| !is_shown(*byte));
    let named = (0..256)
        .filter(|byte| is_shown(*byte))
        .chain(hidden.enumerate().map(|(idx, _)| 256 + idx as u32));
    let mut vocabulary: Map<String, Value> = named
        .filter_map(char::from_u32)
        .enumerate()
        .map(|(id, byte)| (byte.to_string(), json!(id)))
        .collect();
    let end = VOCABULARY - 1;
    vocabulary.insert("<end>".to_owned(), json!(end));
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": end, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

fn tensors() -> candle_core::Result<HashMap<String, Tensor>> {
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let square = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("self_attn.{name}"));
    let mlp = ["gate_proj", "up_proj", "down_proj"].map(|name| format!("mlp.{name}"));
    let mut tensors = HashMap::new();
    for name in square.iter().chain(&mlp) {
        let weight = Tensor::zeros((WIDTH, WIDTH), DType::F32, &Device::Cpu)?;
        tensors.insert(layer(name), weight);
    }
    let norms = ["input_layernorm", "post_attention_layernorm"].map(layer);
    for name in norms.into_iter().chain(["model.norm.weight".to_owned()]) {
        tensors.insert(name, Tensor::ones(WIDTH, DType::F32, &Device::Cpu)?);
    }
    let embedding = Tensor::zeros((VOCABULARY, WIDTH), DType::F32, &Device::Cpu)?;
    tensors.insert("model.embed_tokens.weight".to_owned(), embedding);
    Ok(tensors)
}
