//! A writer of small GGUF files for the tests.

use std::path::{Path, PathBuf};

/// A metadata value with its GGUF type.
#[derive(Debug, Clone)]
pub(super) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i32>),
    Floats(Vec<f32>),
}

/// Builds a GGUF file. Tensors are float32 with row-major shapes.
#[derive(Debug, Clone, Default)]
pub(super) struct GgufBuilder {
    pub(super) metadata: Vec<(String, Meta)>,
    pub(super) tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
}

impl GgufBuilder {
    pub(super) fn set(&mut self, key: &str, value: Meta) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.to_owned(), value));
    }

    pub(super) fn tensor(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        self.tensors.retain(|(other, _, _)| other != name);
        self.tensors.push((name.to_owned(), shape.to_vec(), values));
    }

    pub(super) fn values(&self, name: &str) -> &[f32] {
        let found = self.tensors.iter().find(|(other, _, _)| other == name);
        &found.unwrap_or_else(|| panic!("no tensor {name}")).2
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut bytes, key);
            let array = |bytes: &mut Vec<u8>, kind: u32, length: usize| {
                bytes.extend(9u32.to_le_bytes());
                bytes.extend(kind.to_le_bytes());
                bytes.extend((length as u64).to_le_bytes());
            };
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
                    values
                        .iter()
                        .for_each(|value| bytes.extend(value.to_le_bytes()));
                }
                Meta::Floats(values) => {
                    array(&mut bytes, 6, values.len());
                    values
                        .iter()
                        .for_each(|value| bytes.extend(value.to_le_bytes()));
                }
            }
        }
        let mut offset = 0usize;
        for (name, shape, values) in &self.tensors {
            text(&mut bytes, name);
            bytes.extend((shape.len() as u32).to_le_bytes());
            shape
                .iter()
                .rev()
                .for_each(|size| bytes.extend((*size as u64).to_le_bytes()));
            bytes.extend(0u32.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset = (offset + 4 * values.len()).next_multiple_of(32);
        }
        for (_, _, values) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            values
                .iter()
                .for_each(|value| bytes.extend(value.to_le_bytes()));
        }
        bytes
    }

    pub(super) fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        std::fs::write(&path, self.bytes()).expect("temporary directory is writable");
        path
    }

    /// A model of two layers with random-looking weights: hidden 8, 2 heads of 4, 1 key-value head, intermediate 12.
    pub(super) fn model(architecture: &str) -> Self {
        let mut file = Self::default();
        file.set("general.architecture", Meta::Text(architecture.into()));
        for (key, value) in [
            ("embedding_length", 8),
            ("feed_forward_length", 12),
            ("block_count", 2),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("context_length", 64),
        ] {
            file.set(&format!("{architecture}.{key}"), Meta::U32(value));
        }
        file.set(
            &format!("{architecture}.attention.layer_norm_rms_epsilon"),
            Meta::F32(1e-5),
        );
        file.set(
            &format!("{architecture}.rope.freq_base"),
            Meta::F32(100_000.0),
        );
        file.byte_level_vocabulary();
        let n_tokens = 260;
        let mut add = |name: &str, shape: &[usize]| {
            let n_values: usize = shape.iter().product();
            let seed = name.bytes().map(f32::from).sum::<f32>();
            file.tensor(
                name,
                shape,
                (0..n_values)
                    .map(|idx| (seed + idx as f32 * 1.7).sin())
                    .collect(),
            );
        };
        add("token_embd.weight", &[n_tokens, 8]);
        add("output_norm.weight", &[8]);
        for layer in 0..2 {
            for (name, shape) in [
                ("attn_norm", &[8][..]),
                ("ffn_norm", &[8]),
                ("attn_q", &[8, 8]),
                ("attn_k", &[4, 8]),
                ("attn_v", &[4, 8]),
                ("attn_output", &[8, 8]),
                ("ffn_gate", &[12, 8]),
                ("ffn_up", &[12, 8]),
                ("ffn_down", &[8, 12]),
            ] {
                add(&format!("blk.{layer}.{name}.weight"), shape);
            }
            if architecture == "qwen2" {
                for (name, size) in [("attn_q", 8), ("attn_k", 4), ("attn_v", 4)] {
                    add(&format!("blk.{layer}.{name}.bias"), &[size]);
                }
            }
            if architecture == "qwen3" {
                add(&format!("blk.{layer}.attn_q_norm.weight"), &[4]);
                add(&format!("blk.{layer}.attn_k_norm.weight"), &[4]);
            }
        }
        file
    }

    /// Sets a vocabulary of 256 bytes, two control tokens and two merged tokens.
    fn byte_level_vocabulary(&mut self) {
        let mut tokens = vec!["<|start|>".to_owned(), "<|im_end|>".to_owned()];
        // GPT-2's alphabet: printable bytes stand for themselves, the others follow from U+0100.
        let mut next = 0x100;
        for byte in 0u8..=255 {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if printable { u32::from(byte) } else { next };
            next += u32::from(!printable);
            tokens.extend(char::from_u32(code).map(String::from));
        }
        tokens.extend(["he".to_owned(), "\u{120}he".to_owned()]);
        let mut kinds = vec![1; tokens.len()];
        kinds[..2].fill(3);
        self.set("tokenizer.ggml.model", Meta::Text("gpt2".into()));
        self.set("tokenizer.ggml.pre", Meta::Text("smollm".into()));
        self.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
        self.set("tokenizer.ggml.token_type", Meta::Integers(kinds));
        self.set(
            "tokenizer.ggml.merges",
            Meta::Texts(vec!["h e".into(), "\u{120} he".into()]),
        );
        self.set("tokenizer.ggml.bos_token_id", Meta::U32(0));
        self.set("tokenizer.ggml.eos_token_id", Meta::U32(0));
        self.set("tokenizer.ggml.padding_token_id", Meta::U32(1));
        self.set("tokenizer.ggml.add_bos_token", Meta::Bool(false));
        self.set(
            "tokenizer.chat_template",
            Meta::Text("{{ messages }}<|im_end|>".into()),
        );
    }

    /// Sets a vocabulary like SentencePiece's: bytes, an unknown token and a few scored pieces.
    pub(super) fn sentencepiece_vocabulary(&mut self) {
        let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned()];
        tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(["\u{2581}".to_owned(), "a".to_owned()]);
        let mut kinds = vec![6; tokens.len()];
        kinds[..2].copy_from_slice(&[2, 3]);
        kinds[258..].fill(1);
        self.set("tokenizer.ggml.model", Meta::Text("llama".into()));
        self.set(
            "tokenizer.ggml.scores",
            Meta::Floats(vec![0.0; tokens.len()]),
        );
        self.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
        self.set("tokenizer.ggml.token_type", Meta::Integers(kinds));
        self.set("tokenizer.ggml.bos_token_id", Meta::U32(1));
        self.set("tokenizer.ggml.add_bos_token", Meta::Bool(true));
    }
}
