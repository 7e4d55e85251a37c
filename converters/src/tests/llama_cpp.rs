//! What llama.cpp's converters write of a checkpoint: names, keys and values after `conversion/*.py` and `convert_lora_to_gguf.py`, from
//! no table of this crate.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::tensors::safetensors_file::SafetensorsFile;

/// A metadata value with its GGUF type.
#[derive(Debug, Clone)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i32>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
}

/// A GGUF file in the making; tensors are float32 with row-major shapes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gguf {
    pub(crate) metadata: BTreeMap<String, Meta>,
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Gguf {
    pub(crate) fn write(&self, path: &Path) {
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        let array = |bytes: &mut Vec<u8>, kind: u32, length: usize| {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend((length as u64).to_le_bytes());
        };
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut bytes, key);
            match value {
                Meta::U32(value) => {
                    bytes.extend(4u32.to_le_bytes());
                    bytes.extend(value.to_le_bytes());
                }
                Meta::F32(value) => {
                    bytes.extend(6u32.to_le_bytes());
                    bytes.extend(value.to_le_bytes());
                }
                Meta::Bool(value) => {
                    bytes.extend(7u32.to_le_bytes());
                    bytes.push(u8::from(*value));
                }
                Meta::Text(value) => {
                    bytes.extend(8u32.to_le_bytes());
                    text(&mut bytes, value);
                }
                Meta::Texts(values) => {
                    array(&mut bytes, 8, values.len());
                    values.iter().for_each(|value| text(&mut bytes, value));
                }
                Meta::Integers(values) => {
                    array(&mut bytes, 5, values.len());
                    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                }
                Meta::Floats(values) => {
                    array(&mut bytes, 6, values.len());
                    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                }
                Meta::Bools(values) => {
                    array(&mut bytes, 7, values.len());
                    bytes.extend(values.iter().map(|value| u8::from(*value)));
                }
            }
        }
        let mut offset = 0usize;
        for (name, (shape, values)) in &self.tensors {
            text(&mut bytes, name);
            bytes.extend((shape.len() as u32).to_le_bytes());
            for size in shape.iter().rev() {
                bytes.extend((*size as u64).to_le_bytes());
            }
            bytes.extend(0u32.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset = (offset + 4 * values.len()).next_multiple_of(32);
        }
        for (_, values) in self.tensors.values() {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        std::fs::write(path, bytes).expect("temporary directory is writable");
    }
}

/// `general.architecture` of a model; `None` for those that llama.cpp's converters do not know.
pub(crate) fn architecture(model_type: &str) -> Option<&'static str> {
    Some(match model_type {
        "llama" | "mistral" | "mixtral" => "llama",
        "ministral3" => "mistral3",
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "qwen3_moe" => "qwen3moe",
        "gemma2" => "gemma2",
        "gemma3_text" => "gemma3",
        "phi3" => "phi3",
        "smollm3" => "smollm3",
        "granite" => "granite",
        "olmo2" | "olmo3" => "olmo2",
        "glm4" => "glm4",
        _ => return None,
    })
}

/// Whether rows of q and k are reordered: `LlamaModel` and its heirs.
pub(crate) fn permutes(model_type: &str) -> bool {
    [
        "llama",
        "mistral",
        "mixtral",
        "ministral3",
        "smollm3",
        "granite",
    ]
    .contains(&model_type)
}

/// llama.cpp's name of a module, and which expert it is.
pub(crate) fn module_name(model_type: &str, module: &str) -> (String, Option<usize>) {
    match module {
        "model.embed_tokens" => return ("token_embd".to_owned(), None),
        "model.norm" => return ("output_norm".to_owned(), None),
        "lm_head" => return ("output".to_owned(), None),
        _ => {}
    }
    let inner = module.strip_prefix("model.layers.").expect("in a block");
    let (layer, inner) = inner.split_once('.').expect("a module");
    let parts: Vec<&str> = inner.split('.').collect();
    let (name, expert) = match parts[..] {
        [_, "experts", expert, projection] => {
            let name = match projection {
                "gate_proj" | "w1" => "ffn_gate_exps",
                "down_proj" | "w2" => "ffn_down_exps",
                "up_proj" | "w3" => "ffn_up_exps",
                other => panic!("no expert has a {other}"),
            };
            (name, Some(expert.parse().expect("a number")))
        }
        ["mlp" | "block_sparse_moe", "gate"] => ("ffn_gate_inp", None),
        [.., leaf] => {
            let behind = ["gemma2", "gemma3_text", "olmo2", "olmo3"].contains(&model_type);
            let name = match leaf {
                "q_proj" => "attn_q",
                "k_proj" => "attn_k",
                "v_proj" => "attn_v",
                "o_proj" => "attn_output",
                "qkv_proj" => "attn_qkv",
                "q_norm" => "attn_q_norm",
                "k_norm" => "attn_k_norm",
                "gate_proj" => "ffn_gate",
                "up_proj" | "gate_up_proj" => "ffn_up",
                "down_proj" => "ffn_down",
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" if behind => "post_attention_norm",
                "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
                "post_self_attn_layernorm" => "post_attention_norm",
                "post_feedforward_layernorm" | "post_mlp_layernorm" => "post_ffw_norm",
                other => panic!("no block has a {other}"),
            };
            (name, None)
        }
        [] => unreachable!("a module has a name"),
    };
    (format!("blk.{layer}.{name}"), expert)
}

/// `LlamaModel.permute`: heads of `[2, d/2]` rows become `[d/2, 2]`.
pub(crate) fn permute(rows: &[f32], n_rows: usize, n_heads: usize) -> Vec<f32> {
    let width = rows.len() / n_rows;
    let half = n_rows / n_heads / 2;
    let mut permuted = Vec::with_capacity(rows.len());
    for head in 0..n_heads {
        for within in 0..half {
            for side in 0..2 {
                let row = (head * 2 + side) * half + within;
                permuted.extend_from_slice(&rows[row * width..(row + 1) * width]);
            }
        }
    }
    permuted
}

/// A config.json with transformers' ways to say one thing taken together.
pub(crate) struct Config<'a> {
    pub(crate) fields: &'a Map<String, Value>,
    pub(crate) model_type: &'a str,
    prefix: &'static str,
}

impl<'a> Config<'a> {
    pub(crate) fn new(fields: &'a Map<String, Value>) -> Option<Self> {
        let model_type = fields.get("model_type")?.as_str()?;
        Some(Self {
            fields,
            model_type,
            prefix: architecture(model_type)?,
        })
    }

    fn integer(&self, key: &str) -> Option<u32> {
        self.fields.get(key)?.as_u64().map(|value| value as u32)
    }

    fn number(&self, key: &str) -> Option<f32> {
        self.fields.get(key)?.as_f64().map(|value| value as f32)
    }

    pub(crate) fn needed(&self, key: &str) -> u32 {
        self.integer(key).unwrap_or_else(|| panic!("no {key}"))
    }

    fn head_dim(&self) -> u32 {
        let heads = self.needed("num_attention_heads");
        let default = self.needed("hidden_size") / heads;
        self.integer("head_dim").unwrap_or(default)
    }

    /// The scaling of layers that see everything, and where it has them, that of layers with a window.
    pub(crate) fn rope(&self) -> [Option<Map<String, Value>>; 2] {
        let object = |key: &str| self.fields.get(key).and_then(Value::as_object);
        let fields = object("rope_scaling").or(object("rope_parameters"));
        let Some(fields) = fields else {
            return [None, None];
        };
        let of = |kind: &str| fields.get(kind).and_then(Value::as_object).cloned();
        match of("full_attention") {
            Some(full) => [Some(full), of("sliding_attention")],
            None => [Some(fields.clone()), None],
        }
    }

    fn theta(&self, of: Option<&Map<String, Value>>) -> Option<f32> {
        let inside = of.and_then(|fields| fields.get("rope_theta")?.as_f64());
        inside.map(|theta| theta as f32)
    }
}

/// The file that llama.cpp's converter makes of a checkpoint.
pub(crate) fn convert(config: &Config<'_>, checkpoint: &SafetensorsFile) -> Gguf {
    let mut file = Gguf::default();
    put_keys(&mut file, config);
    put_vocabulary(&mut file, config);
    put_rope_tensors(&mut file, config);
    let shifts = ["gemma2", "gemma3_text"].contains(&config.model_type);
    let mut stacks: BTreeMap<String, BTreeMap<usize, Vec<f32>>> = BTreeMap::new();
    for name in checkpoint.names() {
        let tensor = checkpoint.get(name).expect("listed");
        let mut shape = tensor.shape().to_vec();
        let mut values = tensor.to_f32().expect("float");
        let (module, suffix) = name.rsplit_once('.').expect("a suffix");
        if shifts && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        let heads = n_heads(config, module);
        if let Some(n_heads) = heads.filter(|_| permutes(config.model_type)) {
            values = permute(&values, shape[0], n_heads);
        }
        let (gguf, expert) = module_name(config.model_type, module);
        let gguf = format!("{gguf}.{suffix}");
        if let Some(expert) = expert {
            let stack = stacks.entry(gguf.clone()).or_default();
            stack.insert(expert, values);
            values = stack.values().flatten().copied().collect();
            shape.insert(0, stack.len());
        }
        file.tensors.insert(gguf, (shape, values));
    }
    file
}

/// Heads of a query or key projection.
pub(crate) fn n_heads(config: &Config<'_>, module: &str) -> Option<usize> {
    let query = config.needed("num_attention_heads");
    let key = config.integer("num_key_value_heads").unwrap_or(query);
    match module.rsplit_once('.')?.1 {
        "q_proj" => Some(query as usize),
        "k_proj" => Some(key as usize),
        _ => None,
    }
}

fn put_keys(file: &mut Gguf, config: &Config<'_>) {
    let text = |text: &str| Meta::Text(text.to_owned());
    let prefix = config.prefix;
    file.metadata
        .insert("general.architecture".to_owned(), text(prefix));
    file.metadata
        .insert("general.type".to_owned(), text("model"));
    file.metadata
        .insert("general.file_type".to_owned(), Meta::U32(0));
    let mut put = |key: &str, value: Option<Meta>| {
        if let Some(value) = value {
            file.metadata.insert(format!("{prefix}.{key}"), value);
        }
    };
    let integer = |key: &str| config.integer(key).map(Meta::U32);
    let number = |key: &str| config.number(key).map(Meta::F32);
    for (key, name) in [
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ] {
        put(key, integer(name));
    }
    put("attention.layer_norm_rms_epsilon", number("rms_norm_eps"));
    let [full, sliding] = config.rope();
    let full = full.unwrap_or_default();
    match config.model_type {
        "gemma2" => {
            for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
                put(key, number(key));
            }
            put("attention.key_length", integer("head_dim"));
            put("attention.value_length", integer("head_dim"));
            put("attention.sliding_window", integer("sliding_window"));
            return;
        }
        "phi3" => {
            let share = full.get("partial_rotary_factor").and_then(Value::as_f64);
            let rotated = share.unwrap_or(1.0) * f64::from(config.needed("hidden_size"));
            let rotated = rotated as u32 / config.needed("num_attention_heads");
            put("rope.dimension_count", Some(Meta::U32(rotated)));
            put("rope.freq_base", config.theta(Some(&full)).map(Meta::F32));
            let original = config.needed("original_max_position_embeddings");
            let key = "rope.scaling.original_context_length";
            put(key, Some(Meta::U32(original)));
            let window = config.integer("sliding_window").unwrap_or(0);
            put("attention.sliding_window", Some(Meta::U32(window)));
            if full.get("rope_type").is_some_and(|kind| kind == "longrope") {
                let original = f64::from(original);
                let scale = f64::from(config.needed("max_position_embeddings")) / original;
                let factor = match scale <= 1.0 {
                    true => 1.0,
                    false => (1.0 + scale.ln() / original.ln()).sqrt(),
                };
                put("rope.scaling.attn_factor", Some(Meta::F32(factor as f32)));
            }
            return;
        }
        _ => {}
    }
    put("rope.freq_base", config.theta(Some(&full)).map(Meta::F32));
    put(
        "rope.freq_base_swa",
        config.theta(sliding.as_ref()).map(Meta::F32),
    );
    put(
        "expert_count",
        integer("num_local_experts").or(integer("num_experts")),
    );
    put("expert_used_count", integer("num_experts_per_tok"));
    let scaling = |key: &str| {
        full.get(key)
            .and_then(Value::as_f64)
            .map(|value| value as f32)
    };
    let kind = full.get("rope_type").and_then(Value::as_str);
    if let Some(kind @ ("linear" | "yarn")) = kind {
        put("rope.scaling.type", Some(text(kind)));
        put("rope.scaling.factor", scaling("factor").map(Meta::F32));
    }
    if kind == Some("yarn") {
        let original = scaling("original_max_position_embeddings").map(|value| value as u32);
        let key = "rope.scaling.original_context_length";
        put(key, original.map(Meta::U32));
        for (key, name) in [
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ] {
            put(&format!("rope.scaling.{key}"), scaling(name).map(Meta::F32));
        }
    }
    // Granite's own class takes the size of heads out before the common part.
    if config.model_type != "granite" {
        put("attention.key_length", integer("head_dim"));
        put("attention.value_length", integer("head_dim"));
    }
    if permutes(config.model_type) {
        put("vocab_size", integer("vocab_size"));
        put("rope.dimension_count", Some(Meta::U32(config.head_dim())));
    }
    match config.model_type {
        "gemma3_text" => {
            put("attention.sliding_window", integer("sliding_window"));
            put("final_logit_softcapping", number("final_logit_softcapping"));
        }
        "granite" => {
            for (key, name) in [
                ("attention.scale", "attention_multiplier"),
                ("embedding_scale", "embedding_multiplier"),
                ("residual_scale", "residual_multiplier"),
                ("logit_scale", "logits_scaling"),
            ] {
                put(key, number(name));
            }
        }
        "olmo3" => {
            put("attention.sliding_window", integer("sliding_window"));
            let kinds = config.fields.get("layer_types").and_then(Value::as_array);
            let slides = kinds.into_iter().flatten();
            let slides = slides.map(|kind| kind == "sliding_attention").collect();
            let key = "attention.sliding_window_pattern";
            put(key, Some(Meta::Bools(slides)));
        }
        "glm4" => {
            let share = full.get("partial_rotary_factor").and_then(Value::as_f64);
            let rotated = share.unwrap_or(0.5) * f64::from(config.head_dim());
            put("rope.dimension_count", Some(Meta::U32(rotated as u32)));
        }
        "qwen3_moe" => put(
            "expert_feed_forward_length",
            integer("moe_intermediate_size"),
        ),
        "ministral3" => {
            put(
                "rope.scaling.yarn_log_multiplier",
                scaling("mscale_all_dim").map(Meta::F32),
            );
            put(
                "attention.temperature_scale",
                scaling("llama_4_scaling_beta").map(Meta::F32),
            );
        }
        _ => {}
    }
}

/// A few tokens of the kind that the family's published models have.
fn put_vocabulary(file: &mut Gguf, config: &Config<'_>) {
    let (model, pre) = match config.model_type {
        "gemma2" | "gemma3_text" | "phi3" | "mixtral" | "mistral" => ("llama", "default"),
        "granite" => ("gpt2", "refact"),
        "olmo2" | "olmo3" => ("gpt2", "dbrx"),
        "smollm3" => ("gpt2", "smaug-bpe"),
        "glm4" => ("gpt2", "glm4"),
        "ministral3" => ("gpt2", "tekken"),
        "llama" => ("gpt2", "llama-bpe"),
        _ => ("gpt2", "qwen2"),
    };
    let texts = |texts: &[&str]| Meta::Texts(texts.iter().map(|text| (*text).to_owned()).collect());
    for (key, value) in [
        ("model", Meta::Text(model.to_owned())),
        ("pre", Meta::Text(pre.to_owned())),
        ("tokens", texts(&["<unk>", "<s>", "</s>", "a", "b", "ab"])),
        ("token_type", Meta::Integers(vec![2, 3, 3, 1, 1, 1])),
        (
            "scores",
            Meta::Floats(vec![0.0, 0.0, 0.0, -1.0, -2.0, -3.0]),
        ),
        ("merges", texts(&["a b"])),
        ("bos_token_id", Meta::U32(1)),
        ("eos_token_id", Meta::U32(2)),
        ("add_bos_token", Meta::Bool(true)),
        ("add_space_prefix", Meta::Bool(false)),
    ] {
        file.metadata.insert(format!("tokenizer.ggml.{key}"), value);
    }
}

/// `generate_extra_tensors`: factors of the rotary frequencies.
fn put_rope_tensors(file: &mut Gguf, config: &Config<'_>) {
    let [Some(full), _] = config.rope() else {
        return;
    };
    let number = |key: &str| full.get(key).and_then(Value::as_f64);
    let factors = |key: &str| -> Vec<f32> {
        let values = full.get(key).and_then(Value::as_array);
        let values = values.into_iter().flatten().filter_map(Value::as_f64);
        values.map(|value| value as f32).collect()
    };
    match full.get("rope_type").and_then(Value::as_str) {
        Some("longrope") => {
            for (name, key) in [("long", "long_factor"), ("short", "short_factor")] {
                let values = factors(key);
                file.tensors.insert(
                    format!("rope_factors_{name}.weight"),
                    (vec![values.len()], values),
                );
            }
        }
        Some("llama3") if permutes(config.model_type) => {
            let needed = |key: &str| number(key).unwrap_or_else(|| panic!("no {key}"));
            let (factor, low, high) = (
                needed("factor"),
                needed("low_freq_factor"),
                needed("high_freq_factor"),
            );
            let original = needed("original_max_position_embeddings");
            let theta = needed("rope_theta");
            let dim = config.head_dim();
            let values: Vec<f32> = (0..dim / 2)
                .map(|i| {
                    let frequency = theta.powf(-f64::from(2 * i) / f64::from(dim));
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    if wavelength < original / high {
                        1.0
                    } else if wavelength > original / low {
                        factor as f32
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                    }
                })
                .collect();
            file.tensors
                .insert("rope_freqs.weight".to_owned(), (vec![values.len()], values));
        }
        _ => {}
    }
}
