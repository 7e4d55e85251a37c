//! Rotary frequency scaling: what the file says, read as llama.cpp reads it, and Llama 3's parameters recovered from its frequency
//! factors.

use super::Findings;
use crate::architecture::{Llama3Scaling, RopeKind};
use crate::tensors::gguf::GgufFile;

const FACTORS: &str = "rope_freqs.weight";

/// Reads the scaling of a model.
pub(super) fn read(
    source: &GgufFile,
    prefix: &str,
    head_dim: usize,
    rope_theta: f64,
    findings: &mut Findings,
) -> RopeKind {
    let linear = linear(source, prefix, findings);
    let llama3 = llama3(source, head_dim, rope_theta, findings);
    match (linear, llama3) {
        (None, None) => RopeKind::Default,
        (Some(factor), None) => RopeKind::Linear { factor },
        (None, Some(scaling)) => RopeKind::Llama3(scaling),
        (Some(factor), Some(_)) => {
            let message = format!("frequency factors together with a factor of {factor} for all");
            findings.problem("rope_scaling", FACTORS, message, "");
            RopeKind::Default
        }
    }
}

/// The factor for all frequencies. As in llama.cpp, a file that gives no type means `linear`, a file without a factor is asked for the
/// one of older files, and 0 is none.
fn linear(source: &GgufFile, prefix: &str, findings: &mut Findings) -> Option<f64> {
    let type_key = format!("{prefix}.rope.scaling.type");
    match source.text(&type_key) {
        Some("none") => return None,
        Some("linear") => {}
        None if !source.has(&type_key) => {}
        kind => {
            let message = format!(
                "rotary scaling `{}` is not supported",
                kind.unwrap_or("that is no text")
            );
            let fix = "supported: none, linear, and Llama 3's frequency factors";
            findings.problem("rope_scaling", type_key, message, fix);
            return None;
        }
    }
    let keys = ["rope.scaling.factor", "rope.scale_linear"].map(|key| format!("{prefix}.{key}"));
    let key = keys.into_iter().find(|key| source.has(key))?;
    match source.number(&key) {
        Some(factor) if factor > 0.0 && factor.is_finite() => {
            if factor != 1.0 && !source.has(&type_key) {
                findings.note(format!(
                    "{key} is {factor} without a type: read as linear, as llama.cpp does"
                ));
            }
            (factor != 1.0).then_some(factor)
        }
        Some(0.0) => None,
        _ => {
            findings.problem("rope_scaling", key, "is not a positive number", "");
            None
        }
    }
}

/// llama.cpp stores Llama 3's scaling as the factors alone. Every published model has low 1, high 4 and an original
/// length of 8192; the factor is the last entry. That guess is accepted only if it reproduces all entries.
fn llama3(
    source: &GgufFile,
    head_dim: usize,
    rope_theta: f64,
    findings: &mut Findings,
) -> Option<Llama3Scaling> {
    let tensor = source.tensor(FACTORS)?;
    let factors = match tensor.floats() {
        Some(factors) if factors.len() == head_dim / 2 => factors,
        _ => {
            let message = format!("expected {} float32 frequency factors", head_dim / 2);
            findings.problem("rope_scaling", FACTORS, message, "");
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
        findings.problem("rope_scaling", FACTORS, message, "");
        return None;
    }
    findings.note(format!(
        "{FACTORS} is Llama 3's scaling with factor {}: written as rope_scaling",
        scaling.factor
    ));
    Some(scaling)
}
