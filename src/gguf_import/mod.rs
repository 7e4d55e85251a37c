//! GGUF base models imported: candle decodes their blocks, and their tokenizer is tried before anything is written.

use std::borrow::Cow;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use monteclora_converters::Result;
use monteclora_converters::gguf_base::{self, BLOCK_FORMATS, Tools};
use serde_json::Value;
use tokenizers::Tokenizer;

pub use monteclora_converters::gguf_base::{ImportOptions, ImportReport};

/// Text that any tokenizer must give back unchanged. It is in normal form C, for tokenizers that normalise.
const PROBE: &str = "Hello  world,\n\n\tit's 12345 na\u{ef}ve caf\u{e9}s in \u{6771}\u{4eac} \u{1f642}! { \"a\": [1.5] }  \r\n end";

/// Imports the model in `file` into the new directory `out_dir`; `progress` is told the bytes written and their total.
///
/// # Errors
/// As [`gguf_base::import_gguf`].
pub fn import_gguf(
    file: &Path,
    out_dir: &Path,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport> {
    let tools = Tools {
        dequantize: &|ggml_type, bytes| {
            let block_format = block_format(ggml_type).ok_or("not supported")?;
            dequantize(bytes, block_format).map_err(|error| error.to_string())
        },
        check_tokenizer: &check_tokenizer,
    };
    gguf_base::import_gguf(file, out_dir, options, &tools, progress)
}

/// candle's name of a ggml type, which is the one reported.
fn block_format(ggml_type: u32) -> Option<GgmlDType> {
    use GgmlDType::{BF16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let (_, name) = BLOCK_FORMATS
        .iter()
        .find(|(number, _)| *number == ggml_type)?;
    [
        F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K,
    ]
    .into_iter()
    .find(|format| format!("{format:?}") == *name)
}

/// Dequantises whole, aligned blocks.
fn dequantize(bytes: &[u8], block_format: GgmlDType) -> candle_core::Result<Vec<f32>> {
    let n_elements = bytes.len() / block_format.type_size() * block_format.block_size();
    let storage = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, block_format)?;
    QTensor::new(storage, n_elements)?
        .dequantize(&Device::Cpu)?
        .to_vec1()
}

/// Checks that a tokenizer.json loads, keeps the numbers of its added tokens and gives text back as it was.
fn check_tokenizer(json: &Value) -> Vec<String> {
    let tokenizer = match Tokenizer::from_bytes(json.to_string()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return vec![format!("the tokenizer does not load: {error}")],
    };
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let mut problems: Vec<String> = added
        .map(|token| {
            (
                token["content"].as_str().unwrap_or_default(),
                token["id"].as_u64(),
            )
        })
        .filter(|(content, id)| tokenizer.token_to_id(content).map(u64::from) != *id)
        .map(|(content, _)| format!("token `{content}` does not keep its number"))
        .collect();
    let read_back = tokenizer
        .encode(PROBE, false)
        .and_then(|encoding| tokenizer.decode(encoding.get_ids(), false));
    match read_back {
        Ok(text) if text == PROBE => {}
        Ok(text) => problems.push(format!("the tokenizer turns {PROBE:?} into {text:?}")),
        Err(error) => problems.push(format!("the tokenizer fails: {error}")),
    }
    problems
}

#[cfg(test)]
mod tests;
