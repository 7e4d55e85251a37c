//! Tokenizers, templates and files that several tests of this module use.

use std::path::{Path, PathBuf};

/// A temporary data file with the given text. The directory exists as long as the returned guard.
pub(crate) fn write_temp(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("train.jsonl");
    std::fs::write(&path, text).expect("writes");
    (dir, path)
}

/// The fixtures' model directory, whose tokenizer is bytes plus `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`.
pub(crate) fn tiny_llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fixtures/models/tiny-llama")
}

/// A copy of the tiny model's directory with another template, and with `<s>` added as BOS if `with_bos`.
pub(crate) fn model_with_template(template: &str, with_bos: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    let read = |name: &str| std::fs::read_to_string(tiny_llama().join(name)).expect("fixture");
    let mut tokenizer: serde_json::Value =
        serde_json::from_str(&read("tokenizer.json")).expect("JSON");
    let mut config: serde_json::Value =
        serde_json::from_str(&read("tokenizer_config.json")).expect("JSON");
    if with_bos {
        let id = 259;
        tokenizer["added_tokens"]
            .as_array_mut()
            .expect("list")
            .push(serde_json::json!({
                "id": id, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true
            }));
        tokenizer["post_processor"]["single"] = serde_json::json!([
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ]);
        tokenizer["post_processor"]["special_tokens"] =
            serde_json::json!({"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}});
        config["bos_token"] = "<s>".into();
    }
    let write = |name: &str, text: String| {
        std::fs::write(dir.path().join(name), text).expect("writes");
    };
    write("tokenizer.json", tokenizer.to_string());
    write("tokenizer_config.json", config.to_string());
    write("generation_config.json", read("generation_config.json"));
    write("chat_template.jinja", template.to_owned());
    dir
}

/// A template like Llama-3's: it prints BOS, headers, trimmed content, and one end token.
pub(super) const LLAMA3_LIKE: &str = "{% set loop_messages = messages %}\
{% for message in loop_messages %}{% set content = '<|im_start|>' + message['role'] + '<|endoftext|>\n\n'+ message['content'] | trim + '<|im_end|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}";

/// A template like Qwen3's: an empty thinking block in the last answer, thinking stripped from earlier ones.
pub(super) const THINKING: &str = "{%- for message in messages %}\
{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}\
{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}\
{{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\n' }}\
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// A template like Mistral's and Gemma's: no system role, strict alternation.
pub(super) const NO_SYSTEM: &str = "{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}";
