//! One function a reader: bytes that may be hostile go through it, and what it accepts must hold together.
//!
//! The fuzz targets and the ordinary tests call the same functions.

use std::path::{Path, PathBuf};

use monteclora_converters::{
    Adapter, DType, Format, GgufFile, LoraOptions, ModelFiles, ReadOptions, SafetensorsFile,
    Tensor, format_named, merge_dir,
};
use serde_json::{Map, Value, json};

/// A format by its name on the command line.
pub(crate) fn format_called(name: &str) -> &'static dyn Format {
    format_named(name).expect("a format that is listed")
}

/// Takes bytes that may be hostile.
pub(crate) type Reader = fn(&[u8]);

/// Every reader with its name.
pub(crate) const READERS: [(&str, Reader); 7] = [
    ("safetensors", safetensors),
    ("peft", peft),
    ("mlx", mlx),
    ("gguf", gguf),
    ("gguf_lora", gguf_lora),
    ("index_json", index_json),
    ("model_config", model_config),
];

/// A directory in memory if the machine has one: fuzzing is bound by files.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    tempfile::tempdir_in(parent).expect("a temporary directory")
}

fn put(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).expect("a writable directory");
    path
}

/// The first part of `input`, of the length that its first two bytes give, and the rest.
fn split(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = input.split_first_chunk::<2>() else {
        return (input, &[]);
    };
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    rest.split_at(length)
}

/// Two parts as [`split`] takes them apart.
pub(crate) fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    let length = u16::try_from(first.len()).expect("a short first part");
    [&length.to_le_bytes(), first, second].concat()
}

fn check_tensor(tensor: &Tensor) {
    assert_eq!(
        tensor.bytes().len(),
        tensor.n_elements() * tensor.dtype().size()
    );
    assert_eq!(tensor.to_f32().is_ok(), tensor.dtype().is_float());
}

/// What was accepted can be described and written, and is read back as the same update.
fn check_adapter(adapter: &Adapter, dir: &Path) {
    for site in &adapter.sites {
        check_tensor(&site.lora_a);
        check_tensor(&site.lora_b);
        assert!(site.rank > 0 && site.in_features() > 0 && site.out_features() > 0);
    }
    let _ = adapter.summary().expect("finite factors of real types");
    assert_eq!(adapter.fingerprint().len(), 64);
    let out = dir.join("out");
    let mean = adapter.collapse();
    if adapter.write_lora(&out, &LoraOptions::default()).is_ok() {
        let read = Adapter::read_dir(&out).expect("our own output");
        assert_eq!(read.sites.len(), mean.sites.len());
        for (left, right) in read.sites.iter().zip(&mean.sites) {
            assert_eq!(left.name, right.name);
        }
    } else {
        assert!(!out.exists(), "a failed write leaves nothing");
    }
    let peft = dir.join("peft");
    if adapter.write_peft(&peft, false).is_err() {
        assert!(!peft.exists(), "a failed write leaves nothing");
    }
    let small = LoraOptions {
        dtype: Some(DType::F16),
        ..LoraOptions::default()
    };
    let mlx = dir.join("mlx");
    if format_called("mlx")
        .write(adapter, &mlx, &small, None)
        .is_err()
    {
        assert!(!mlx.exists(), "a failed write leaves nothing");
    }
}

/// A safetensors file.
pub(crate) fn safetensors(input: &[u8]) {
    let dir = scratch();
    let path = put(dir.path(), "x.safetensors", input);
    if let Ok(file) = SafetensorsFile::open(&path) {
        for name in file.names() {
            check_tensor(&file.get(name).expect("a listed tensor"));
        }
    }
}

/// `adapter_config.json`, then `adapter_model.safetensors`.
pub(crate) fn peft(input: &[u8]) {
    let dir = scratch();
    let (config, weights) = split(input);
    put(dir.path(), "adapter_config.json", config);
    put(dir.path(), "adapter_model.safetensors", weights);
    let _ = Adapter::read(dir.path());
    if let Ok(adapter) = Adapter::read_dir(dir.path()) {
        check_adapter(&adapter, dir.path());
    }
    if let Ok(adapter) = Adapter::read_dir_as_lora(dir.path()) {
        assert!(adapter.config.monteclora.is_none());
    }
}

/// mlx-lm's `adapter_config.json`, then `adapters.safetensors`.
pub(crate) fn mlx(input: &[u8]) {
    let dir = scratch();
    let (config, weights) = split(input);
    put(dir.path(), "adapter_config.json", config);
    put(dir.path(), "adapters.safetensors", weights);
    if let Ok(adapter) = format_called("mlx").read(dir.path(), &ReadOptions::default()) {
        check_adapter(&adapter, dir.path());
    }
}

/// A GGUF file.
pub(crate) fn gguf(input: &[u8]) {
    let dir = scratch();
    let path = put(dir.path(), "x.gguf", input);
    if let Ok(file) = GgufFile::open(&path) {
        for name in file.names() {
            let tensor = file.tensor(name).expect("a listed tensor");
            assert!(tensor.shape.len() <= 4 && tensor.bytes.len() <= input.len());
        }
    }
}

/// The base configuration that GGUF adapters are read with.
pub(crate) fn llama_config() -> Map<String, Value> {
    let config = json!({"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1});
    config.as_object().cloned().unwrap_or_default()
}

/// A GGUF LoRA for a small Llama.
pub(crate) fn gguf_lora(input: &[u8]) {
    let dir = scratch();
    let path = put(dir.path(), "x.gguf", input);
    if let Ok(adapter) = Adapter::read_for(&path, &llama_config()) {
        check_adapter(&adapter, dir.path());
        let again = dir.path().join("y.gguf");
        let written = format_called("gguf").write(
            &adapter,
            &again,
            &LoraOptions::default(),
            Some(&llama_config()),
        );
        assert_eq!(written.is_ok(), again.exists());
    }
}

/// `model.safetensors.index.json` over two shards.
pub(crate) fn index_json(input: &[u8]) {
    let dir = scratch();
    put(dir.path(), "config.json", b"{}");
    put(dir.path(), "model.safetensors.index.json", input);
    for (n, name) in ["a", "b"].iter().enumerate() {
        let tensor = Tensor::from_f32(&[1], vec![1.0]).expect("one value");
        let path = dir
            .path()
            .join(format!("model-0000{}-of-00002.safetensors", n + 1));
        let tensors = [((*name).to_owned(), tensor)];
        monteclora_converters::write_safetensors(&path, tensors, &Default::default())
            .expect("a writable directory");
    }
    if let Ok(model) = ModelFiles::open(dir.path()) {
        for file in model.files() {
            assert_eq!(file.parent(), Some(dir.path()), "a shard lies elsewhere");
        }
        for name in model.names() {
            check_tensor(&model.get(name).expect("a listed tensor"));
        }
    }
}

/// A base model's `config.json`, then its `model.safetensors`, with an adapter of one site merged into it.
pub(crate) fn model_config(input: &[u8]) {
    let dir = scratch();
    let (config, weights) = split(input);
    put(dir.path(), "config.json", config);
    put(dir.path(), "model.safetensors", weights);
    let Ok(model) = ModelFiles::open(dir.path()) else {
        return;
    };
    let _ = (model.quantization(), model.ties_embeddings());
    let modules = model.linear_modules();
    let adapter = small_adapter(&scratch());
    let _ = adapter.check_against(&model).expect("plain names");
    let _ = adapter.config.resolve_targets(&modules);
    let gguf = dir.path().join("x.gguf");
    let written = format_called("gguf").write(
        &adapter,
        &gguf,
        &LoraOptions::default(),
        Some(model.config()),
    );
    assert_eq!(written.is_ok(), gguf.exists());
    let out = dir.path().join("merged");
    match merge_dir(
        &model,
        &adapter,
        &out,
        Some(DType::BF16),
        &Default::default(),
    ) {
        Ok(report) => assert_eq!(report.n_merged, 1),
        Err(_) => assert!(!out.exists(), "a failed merge leaves nothing"),
    }
}

/// A plain LoRA on the first layer's q, rank 1, 2 in and 4 out.
fn small_adapter(dir: &tempfile::TempDir) -> Adapter {
    let input = seed("peft");
    let (config, weights) = split(&input);
    put(dir.path(), "adapter_config.json", config);
    put(dir.path(), "adapter_model.safetensors", weights);
    let adapter = Adapter::read_dir(dir.path()).expect("a good adapter");
    // What is written from it must not depend on files that are gone.
    let mut adapter = adapter.collapse();
    for site in &mut adapter.sites {
        for tensor in [&mut site.lora_a, &mut site.lora_b] {
            let values = tensor.to_f32().expect("real");
            *tensor = Tensor::from_f32(tensor.shape(), values).expect("sized");
        }
    }
    adapter
}

/// A valid input of the reader called `name`, small enough for every bit of it to matter.
pub(crate) fn seed(name: &str) -> Vec<u8> {
    match name {
        "safetensors" => file_of(&[("a", &[1, 2]), ("b", &[2])], Some(("format", "pt"))),
        "peft" => join(
            br#"{"peft_type":"LORA","r":1,"lora_alpha":2,"target_modules":["q_proj"],"task_type":"CAUSAL_LM","monteclora_config":{"num_samples":2}}"#,
            &file_of(
                &[
                    (&format!("{PEFT}.lora_A.weight"), &[1, 2]),
                    (&format!("{PEFT}.lora_B.weight"), &[4, 1]),
                    (&format!("{PEFT}.lora_monteclora_sampler.std_prior"), &[1]),
                    (&format!("{PEFT}.lora_monteclora_sampler.expert_weights_prior"), &[2]),
                ],
                None,
            ),
        ),
        "mlx" => join(
            br#"{"fine_tune_type":"lora","num_layers":1,"lora_parameters":{"rank":1,"scale":2.5,"dropout":0.0,"keys":["self_attn.q_proj"]}}"#,
            &file_of(
                &[(&format!("{SITE}.lora_a"), &[2, 1]), (&format!("{SITE}.lora_b"), &[1, 4])],
                None,
            ),
        ),
        "gguf" => gguf_model(),
        "gguf_lora" => gguf_adapter(),
        "index_json" => br#"{"metadata":{"total_size":8},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#.to_vec(),
        _ => join(
            br#"{"model_type":"llama","num_attention_heads":2,"num_key_value_heads":1,"tie_word_embeddings":true}"#,
            &file_of(
                &[("model.embed_tokens.weight", &[3, 2]), (&format!("{SITE}.weight"), &[4, 2])],
                None,
            ),
        ),
    }
}

const SITE: &str = "model.layers.0.self_attn.q_proj";
const PEFT: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A safetensors file of F32 tensors.
pub(crate) fn file_of(tensors: &[(&str, &[usize])], note: Option<(&str, &str)>) -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("x.safetensors");
    let tensors = tensors.iter().map(|(name, shape)| {
        let values = (0..shape.iter().product::<usize>()).map(|n| 0.5 + n as f32);
        let tensor = Tensor::from_f32(shape, values.collect()).expect("sized");
        ((*name).to_owned(), tensor)
    });
    let metadata = note
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    monteclora_converters::write_safetensors(&path, tensors, &metadata)
        .expect("a writable directory");
    std::fs::read(&path).expect("our own output")
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A GGUF file with a value of every kind, an array of strings, a plain and a quantised tensor.
fn gguf_model() -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(4u64.to_le_bytes());
    text(&mut bytes, "general.architecture");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, "llama");
    text(&mut bytes, "general.alignment");
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(32u32.to_le_bytes());
    text(&mut bytes, "tokens");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(8u32.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    text(&mut bytes, "a");
    text(&mut bytes, "b");
    text(&mut bytes, "flag");
    bytes.extend(7u32.to_le_bytes());
    bytes.push(1);
    for (name, shape, kind, offset) in [("x", [2u64, 3], 0u32, 0u64), ("y", [32, 1], 8, 32)] {
        text(&mut bytes, name);
        bytes.extend(2u32.to_le_bytes());
        for dim in shape {
            bytes.extend(dim.to_le_bytes());
        }
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend([1; 66]);
    bytes
}

/// A GGUF LoRA on q, written by the crate itself.
fn gguf_adapter() -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("x.gguf");
    let (adapter, options) = (small_adapter(&dir), LoraOptions::default());
    format_called("gguf")
        .write(&adapter, &path, &options, Some(&llama_config()))
        .expect("a writable directory");
    std::fs::read(&path).expect("our own output")
}
