//! The table of docs/memory.md is what the estimate says.

use std::fmt::Write;

use monteclora::data::BatchOptions;
use monteclora::train::memory::{MemoryEstimate, MemoryInputs, PROGRAM};
use monteclora_adapters::methods::{self, Module};
use monteclora_converters::architecture::ModelShape;
use serde_json::{Value, json};

/// Sizes as the models' config.json has them.
fn models() -> Vec<(&'static str, Value)> {
    let llama = |sizes: [usize; 6], tied: bool| {
        let [hidden, inner, layers, heads, groups, vocabulary] = sizes;
        json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
            "tie_word_embeddings": tied, "rms_norm_eps": 1e-5})
    };
    let qwen3 = |sizes: [usize; 5], tied: bool| {
        let [hidden, inner, layers, heads, vocabulary] = sizes;
        json!({"model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": vocabulary,
            "tie_word_embeddings": tied, "rms_norm_eps": 1e-6})
    };
    vec![
        ("SmolLM2 135M", llama([576, 1536, 30, 9, 3, 49152], true)),
        (
            "Llama 3.2 1B",
            llama([2048, 8192, 16, 32, 8, 128_256], true),
        ),
        ("Qwen3 4B", qwen3([2560, 9728, 36, 32, 151_936], true)),
        (
            "Llama 3.1 8B",
            llama([4096, 14336, 32, 32, 8, 128_256], false),
        ),
        ("Qwen3 14B", qwen3([5120, 17408, 40, 40, 151_936], false)),
        ("Qwen3 32B", qwen3([5120, 25600, 64, 64, 151_936], false)),
        (
            "Llama 3.1 70B",
            llama([8192, 28672, 80, 64, 8, 128_256], false),
        ),
    ]
}

/// How a base is held: bytes of so many values of a matrix, and whether they stay in its file.
const BASES: [(&str, f64, bool); 4] = [
    ("f32", 4.0, false),
    ("bf16", 2.0, false),
    ("Q8_0", 34.0 / 32.0, true),
    ("Q4_K", 144.0 / 256.0, true),
];

const LENGTHS: [usize; 3] = [512, 2048, 8192];

/// Peak of a step, GB.
fn estimate(shape: &ModelShape, (per_value, stays): (f64, bool), length: usize) -> f64 {
    let (mut weights, mut files) = (0f64, 0f64);
    for tensor in shape.tensors() {
        let n_values = tensor.shape.iter().product::<usize>() as f64;
        let is_matrix = tensor.shape.len() == 2;
        weights += n_values * if is_matrix { per_value } else { 4.0 };
        // A checkpoint in bfloat16, which is mapped while it is read.
        files += if stays { 0.0 } else { 2.0 * n_values };
    }
    let modules = shape.linear_modules().into_iter();
    let sites: Vec<Module> = modules
        .filter(|module| module.name != "lm_head")
        .map(|module| Module {
            name: module.name,
            in_features: module.in_features,
            out_features: module.out_features,
            rank: 16,
            alpha: 32.0,
            scaling: 2.0,
            has_bias: false,
            attention: None,
            frozen: None,
        })
        .collect();
    let method = (methods::find("monteclora").unwrap().new)(&json!({})).unwrap();
    let estimate = MemoryEstimate::of(&MemoryInputs {
        model: shape,
        weights: weights as u64,
        base_bytes: files as u64,
        sites: &sites,
        method: method.as_ref(),
        lengths: &[length],
        trained_share: 1.0,
        batches: BatchOptions {
            batch_size: 1,
            pack_tokens: None,
            shuffle_seed: None,
        },
        dropout: false,
        on_cpu: true,
        gradient_checkpointing: true,
        program: PROGRAM,
    });
    estimate.peak as f64 / 1e9
}

/// `UPDATE_DOCS=1` writes what is expected.
#[test]
fn the_table_of_memory_is_what_the_estimate_says() {
    let mut table = String::from("| model |");
    for (name, ..) in BASES {
        write!(table, " {name} |").unwrap();
    }
    write!(table, "\n|---|{}\n", "---|".repeat(BASES.len())).unwrap();
    for (name, config) in models() {
        let shape = ModelShape::from_config(config.as_object().unwrap()).unwrap();
        write!(table, "| {name} |").unwrap();
        for (_, per_value, stays) in BASES {
            let cells = LENGTHS.map(|length| {
                let gb = estimate(&shape, (per_value, stays), length);
                match gb < 10.0 {
                    true => format!("{gb:.1}"),
                    false => format!("{gb:.0}"),
                }
            });
            write!(table, " {} |", cells.join(" / ")).unwrap();
        }
        table.push('\n');
    }
    let path = super::docs().join("memory.md");
    let page = std::fs::read_to_string(&path).unwrap();
    if page.contains(&table) {
        return;
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let (before, rest) = page.split_once("| model |").unwrap();
        let (_, after) = rest.split_once("\n\n").unwrap();
        std::fs::write(&path, format!("{before}{table}\n{after}")).unwrap();
        return;
    }
    panic!("docs/memory.md has another table; UPDATE_DOCS=1 writes this one:\n{table}");
}
