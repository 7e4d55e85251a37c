//! Estimates the memory of a model's weights from the headers of its files, before anything is loaded.

use mistralrs_core::{IsqType, ModelDType};
use monteclora_converters::{DType, ModelFiles};

/// Estimates the bytes of the weights of `files`, loaded as `dtype` and quantised to `isq`.
///
/// Merging an adapter changes no size. Key-value caches and activations need additional memory, which depends on the
/// requests.
pub(crate) fn weight_bytes(
    files: &ModelFiles,
    dtype: ModelDType,
    on_cpu: bool,
    isq: Option<IsqType>,
) -> u64 {
    let plain_bits = |stored: DType| match dtype {
        ModelDType::F32 => 32.0,
        ModelDType::F16 | ModelDType::BF16 => 16.0,
        ModelDType::Auto if on_cpu => 32.0,
        ModelDType::Auto => f64::from(u32::try_from(stored.size()).unwrap_or(u32::MAX)) * 8.0,
    };
    let mut bits = 0.0;
    for name in files.names() {
        let Some((stored, shape)) = files.info(name) else {
            continue;
        };
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let elements = shape.iter().product::<usize>() as f64;
        let is_embedding = name.contains("embed_tokens");
        let is_matrix = shape.len() >= 2;
        bits += match isq {
            Some(isq) if is_matrix && !is_embedding => elements * quantised_bits(isq),
            _ => elements * plain_bits(stored),
        };
        // Tied embeddings are held twice: as they are for lookup, and quantised for the output layer.
        if let Some(isq) = isq.filter(|_| is_embedding && files.ties_embeddings()) {
            bits += elements * quantised_bits(isq);
        }
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a non-negative estimate far below 2^53"
    )]
    let bytes = (bits / 8.0) as u64;
    bytes
}

/// Number of bits per weight, scales included.
fn quantised_bits(isq: IsqType) -> f64 {
    match isq {
        IsqType::Q2K | IsqType::AFQ2 => 2.625,
        IsqType::Q3K | IsqType::AFQ3 => 3.4375,
        IsqType::Q4_0 | IsqType::Q4K | IsqType::HQQ4 | IsqType::AFQ4 | IsqType::MXFP4 => 4.5,
        IsqType::Q4_1 => 5.0,
        IsqType::Q5_0 | IsqType::Q5K => 5.5,
        IsqType::Q5_1 => 6.0,
        IsqType::Q6K | IsqType::AFQ6 => 6.5625,
        _ => 8.5,
    }
}
