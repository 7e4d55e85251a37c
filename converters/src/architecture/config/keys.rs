//! Handles every key of config.json: it is read, has no effect, is refused because it changes the numbers, or is
//! reported as unread.

use serde_json::{Map, Value};

use super::language::{AT, INSIDE, Language, OUTSIDE};
use crate::architecture::{Family, Normalised, RotaryLayers, Windows};
use crate::problem::Problem;

/// Keys that are read for every family.
const READ: &str = "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads \
num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act hidden_activation rope_theta \
rope_parameters rope_scaling partial_rotary_factor original_max_position_embeddings quantization_config compression_config \
quantization";

/// Keys that change no number of a decoder's forward pass: about files, generation or other tasks. Biases are
/// determined by the tensors, all of which must be read.
const HARMLESS: &str = "torch_dtype dtype transformers_version use_cache initializer_range bos_token_id eos_token_id pad_token_id \
unk_token_id sep_token_id cls_token_id decoder_start_token_id name_or_path id2label label2id num_labels problem_type return_dict \
output_attentions output_hidden_states output_scores return_dict_in_generate torchscript use_bfloat16 is_decoder \
is_encoder_decoder chunk_size_feed_forward finetuning_task task_specific_params tokenizer_class prefix pretraining_tp \
attn_implementation use_flash_attn use_flash_attention use_fused_rms_norm model_max_length max_sequence_length seq_length \
language license tags attention_bias mlp_bias qkv_bias is_llama_config transformers.js_config unsloth_version unsloth_fixed \
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p \
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences \
forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens \
begin_suppress_tokens max_new_tokens output_router_logits router_aux_loss_coef";

/// Dropout keys. Dropout is only for training, and this trainer applies it only to the adapter.
const DROPOUT: &str = "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop resid_dropout \
embd_pdrop embed_dropout embedding_dropout attn_pdrop activation_dropout dropout layerdrop router_jitter_noise";

/// Keys that change the numbers in other families, some with a value that has no effect (`=`). Null never has an
/// effect, and false, 0 and empty values have none for keys without such a value.
const CHANGES: &str = "embedding_multiplier=1 residual_multiplier=1 logits_scaling=1 logit_scale=1 scale_emb=1 mup_scale=1 \
attention_multiplier=scale query_pre_attn_scalar=head_dim attn_scale=scale scale_depth dim_model_base attn_logit_softcapping \
final_logit_softcapping clip_qkv attention_clamp_kqv qk_layernorm use_qk_norm qk_norm use_bidirectional_attention \
use_alibi alibi alibi_bias_max rotary_pct=1 rotary_percent=1 rotary_dim=head_dim qk_rope_head_dim=head_dim rope_interleaved \
no_rope_layers=ones no_rope_layer_interval parallel_attn use_parallel_residual num_experts num_local_experts \
n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size kv_lora_rank q_lora_rank attention_chunk_size \
attn_temperature_tuning floor_scale rope_local_base_freq rope_local_theta long_factor short_factor block_configs \
per_layer_config pruned_heads use_layer_norm sandwich_norm post_norm use_post_norm add_cross_attention linear_attn_config mlp_only_layers \
use_mup mup_enabled tie_encoder_decoder is_causal=1 rope_ratio=1 use_dynamic_ntk use_logn_attn \
altup_num_inputs laurel_rank hidden_size_per_layer_input scale_attn_by_inverse_layer_idx num_kv_shared_layers";

fn listed(words: &str, key: &str) -> bool {
    words.split_whitespace().any(|word| word == key)
}

/// Whether the shape of a model of this family depends on `key`.
fn is_read(family: &Family, key: &str) -> bool {
    let windows: &[&str] = match family.windows {
        Windows::No => &[],
        Windows::All => &["sliding_window"],
        Windows::AllIfUsed => &["sliding_window", "use_sliding_window"],
        Windows::From(_) => &[
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
        ],
        Windows::AllBut(..) => &["sliding_window", "layer_types"],
        Windows::Unrotated => &["sliding_window", "use_sliding_window", "layer_types"],
    };
    let rotary: &[&str] = match family.rotary.layers {
        RotaryLayers::Marked { .. } => &["no_rope_layers", "no_rope_layer_interval"],
        RotaryLayers::ByWindow { key: Some(key), .. } => &[key],
        _ => &[],
    };
    let pattern: &[&str] = match family.windows {
        Windows::AllBut(_, keys) => keys,
        _ => &[],
    };
    let mut factors = family.multipliers.iter();
    let mut caps = family.softcaps.iter();
    listed(READ, key)
        || [windows, rotary, pattern]
            .iter()
            .any(|keys| keys.contains(&key))
        || family.bias_keys().contains(&key)
        || factors.any(|(_, factor)| factor.key() == Some(key))
        || caps.any(|cap| cap.key == key)
        || is_of_experts(family, key)
}

/// Whether the mixture of experts of a family depends on `key`.
fn is_of_experts(family: &Family, key: &str) -> bool {
    family.experts.is_some_and(|experts| {
        let dense = ["decoder_sparse_step", "mlp_only_layers"];
        experts.count.0.contains(&key)
            || key == "num_experts_per_tok"
            || key == experts.width.0
            || matches!(experts.normalised, Normalised::Key(name) if name == key)
            || (experts.has_dense_layers && dense.contains(&key))
    })
}

/// Whether a value is null, false, 0 or empty.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Returns a problem for each key that changes the numbers in other families and is not read in this one.
pub(super) fn refused(language: &Language<'_>, head_dim: usize) -> Vec<Problem> {
    let (family, head_dim) = (language.family, head_dim as f64);
    let is_neutral = |neutral: &str, value: &Value| match neutral {
        "" => false,
        "ones" => value
            .as_array()
            .is_some_and(|all| all.iter().all(|v| v == 1)),
        _ => {
            let neutral = match neutral {
                "head_dim" => head_dim,
                "scale" => head_dim.powf(-0.5),
                _ => 1.0,
            };
            let value = value
                .as_f64()
                .or(value.as_bool().map(|v| f64::from(u8::from(v))));
            value.is_some_and(|value| (value - neutral).abs() <= 1e-6 * neutral)
        }
    };
    let changes = language.config.iter().filter(|(key, value)| {
        let mut known = CHANGES
            .split_whitespace()
            .map(|word| word.split_once('=').unwrap_or((word, "")));
        let found = known.find(|(name, _)| name == key);
        // If 1 has no effect, 0 has one.
        let says_nothing = |neutral: &str| match neutral {
            "" => is_empty(value),
            _ => value.is_null() || is_neutral(neutral, value),
        };
        !is_read(family, key) && found.is_some_and(|(_, neutral)| !says_nothing(neutral))
    });
    changes
        .map(|(key, value)| {
            let message = format!(
                "{} changes the model's numbers, and a {} has no such key",
                shortened(value),
                family.class_name
            );
            let fix =
                "remove it if the model was made without it; else the model is of another family";
            Problem::new("model-config", language.at(key), message, fix)
        })
        .collect()
}

/// Returns warnings: keys that are neither read nor known, dropout, and a class other than the one that reads the
/// model.
pub(super) fn unread(language: &Language<'_>, whole: &Map<String, Value>) -> Vec<Problem> {
    let (family, class_name) = (language.family, language.class_name());
    let mut warnings = Vec::new();
    let mut warn = |code, at: String, message: String, fix: &str| {
        warnings.push(Problem::new(code, at, message, fix));
    };
    let class = whole.get("architectures").and_then(|list| list.get(0));
    if let Some(class) = class.and_then(Value::as_str)
        && class != class_name
    {
        let message = format!("`{class}` is read as {class_name}, as model_type says");
        warn("architecture", format!("{AT}architectures"), message, "");
    }
    let config = &language.config;
    for (key, value) in config.iter().filter(|(key, _)| listed(DROPOUT, key)) {
        if !is_empty(value) {
            let message = format!(
                "{value}: transformers drops so much out while it trains; this trainer drops out on the adapter's input alone"
            );
            warn(
                "dropout",
                language.at(key),
                message,
                "see [lora] lora_dropout",
            );
        }
    }
    let names = |word: &str| {
        word.split_once('=')
            .map_or(word.to_owned(), |(name, _)| name.to_owned())
    };
    let changes: Vec<String> = CHANGES.split_whitespace().map(names).collect();
    let unknown = |config: &Map<String, Value>, is_read: &dyn Fn(&str) -> bool| {
        let unknown = config.iter().filter(|(key, value)| {
            let is_known = listed(HARMLESS, key)
                || listed(DROPOUT, key)
                || changes.contains(key)
                || key.starts_with('_');
            !is_known && !is_read(key) && !is_empty(value)
        });
        let unknown: Vec<String> = unknown.map(|(key, _)| key.clone()).collect();
        unknown
    };
    let mut left = unknown(config, &|key| is_read(family, key));
    if let Some(wrapper) = language.wrapper {
        let inside = whole.get(INSIDE).and_then(Value::as_object);
        let unused = wrapper.unused.iter().copied();
        left.extend(
            unused
                .filter(|key| {
                    let found = inside.and_then(|inside| inside.get(*key));
                    found.is_some_and(|value| !is_empty(value))
                })
                .map(str::to_owned),
        );
        for key in &mut left {
            key.insert_str(0, &format!("{INSIDE}."));
        }
        left.extend(unknown(whole, &|key| {
            OUTSIDE.contains(&key)
                || ["model_type", "architectures", INSIDE].contains(&key)
                || wrapper.keys.contains(&key)
        }));
    }
    if !left.is_empty() {
        let message = format!("left unread, as a {class_name} has no such keys");
        let at = format!("{AT}{}", crate::problem::listed(&left));
        warn("unread-key", at, message, "");
    }
    warnings
}

/// Returns a value for a message, shortened.
fn shortened(value: &Value) -> String {
    const MOST: usize = 40;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}
