//! Workarounds for mistral.rs 0.8.1. Each file works around one behaviour; with a version that needs none, this folder
//! can be deleted.

pub(crate) mod abandoned_requests;
pub(crate) mod batches_on_a_cpu;
pub(crate) mod conversations;
pub(crate) mod first_white_space;
pub(crate) mod forced_tools;
pub(crate) mod late_step;
pub(crate) mod logger_threads;
pub(crate) mod lost_last_chunk;
pub(crate) mod model_config;
pub(crate) mod narrow_sampling;
pub(crate) mod own_text;
pub(crate) mod past_calls;
pub(crate) mod prefix_cache;
pub(crate) mod special_tokens;
pub(crate) mod split_models;
pub(crate) mod stacked_experts;
pub(crate) mod stop_texts;
pub(crate) mod template_variables;
pub(crate) mod thread_locals;
pub(crate) mod tokenizer_panics;
pub(crate) mod unreadable_calls;
pub(crate) mod windows;
