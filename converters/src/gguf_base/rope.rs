//! Rotary frequency scaling: what the file says, and Llama 3's parameters recovered from its frequency factors.

use super::Findings;
use crate::architecture::Llama3Scaling;
use crate::tensors::gguf::GgufFile;

/// Reads the scaling of a model, `None` if it has none.
///
/// llama.cpp stores Llama 3's scaling as the factors alone. Every published model has low 1, high 4 and an original
/// length of 8192; the factor is the last entry. That guess is accepted only if it reproduces all entries.
pub(super) fn read(
    source: &GgufFile,
    prefix: &str,
    head_dim: usize,
    rope_theta: f64,
    findings: &mut Findings,
) -> Option<Llama3Scaling> {
    let key = format!("{prefix}.rope.scaling.type");
    match source.text(&key) {
        None | Some("none") => {}
        Some(kind) => {
            let message = format!("rotary scaling `{kind}` is not supported");
            findings.problem("rope_scaling", key, message, "");
        }
    }
    let tensor = source.tensor("rope_freqs.weight")?;
    let factors = match tensor.floats() {
        Some(factors) if factors.len() == head_dim / 2 => factors,
        _ => {
            let message = format!("expected {} float32 frequency factors", head_dim / 2);
            findings.problem("rope_scaling", "rope_freqs.weight", message, "");
            return None;
        }
    };
    if factors.iter().all(|factor| *factor == 1.0) {
        return None;
    }
    let scaling = Llama3Scaling {
        factor: f64::from(factors.last().copied().unwrap_or(1.0)),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let agrees = scaling
        .factors(head_dim, rope_theta)
        .iter()
        .zip(&factors)
        .all(|(expected, found)| (expected - f64::from(*found)).abs() <= 1e-4 * expected);
    if !agrees {
        let message =
            "the frequency factors are not Llama 3's (low 1, high 4, original length 8192)";
        findings.problem("rope_scaling", "rope_freqs.weight", message, "");
        return None;
    }
    findings.note(format!(
        "rope_freqs.weight is Llama 3's scaling with factor {}: written as rope_scaling",
        scaling.factor
    ));
    Some(scaling)
}
