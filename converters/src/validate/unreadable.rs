//! What runtimes make of adapters that are more than `B A`, and that are therefore refused here.

use crate::problem::Problem;
use crate::validate::runtime::Runtime;

/// What becomes of one feature in one runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Applied as it was trained.
    Applied,
    /// The adapter is not loaded.
    Refused,
    /// Left unread: the adapter loads and computes something else.
    Ignored,
    /// Refused by newer versions, left unread by older ones.
    RefusedOrIgnored,
}

use Fate::{Applied, Ignored, Refused, RefusedOrIgnored};

/// Code of the problem, then the fate in each of [`Runtime::ALL`]. From the sources of mistral.rs (`lora/mod.rs`, and 0.9's
/// `validate_dynamic`), of vLLM (`peft_helper.py`) and of llama.cpp
/// (`convert_lora_to_gguf.py`, which stops at tensors that are neither A nor B, and reads no key but `lora_alpha`).
const FATES: [(&str, [Fate; 5]); 11] = [
    ("dora", [Ignored, Refused, Refused, Refused, Applied]),
    ("bias", [Ignored, Refused, Refused, Refused, Applied]),
    (
        "modules-to-save",
        [Ignored, Refused, Refused, Refused, Applied],
    ),
    ("embedding", [Ignored, Refused, Applied, Applied, Applied]),
    (
        "trainable-tokens",
        [Ignored, Refused, Refused, Refused, Applied],
    ),
    (
        "layer-replication",
        [Ignored, Refused, RefusedOrIgnored, Ignored, Applied],
    ),
    (
        "alora",
        [Ignored, Refused, RefusedOrIgnored, Applied, Applied],
    ),
    ("arrow", [Ignored, Refused, Ignored, Ignored, Applied]),
    (
        "qalora",
        [Ignored, Refused, RefusedOrIgnored, Ignored, Applied],
    ),
    (
        "bdlora",
        [Ignored, Refused, RefusedOrIgnored, Ignored, Applied],
    ),
    (
        "init",
        [Ignored, Refused, RefusedOrIgnored, Ignored, Applied],
    ),
];

/// For problems that were found while reading: what `runtime` does about each kind of them, at the first place.
pub(super) fn fates(found: &[Problem], runtime: Runtime) -> Vec<Problem> {
    let column = Runtime::ALL.iter().position(|other| *other == runtime);
    let mut problems: Vec<Problem> = Vec::new();
    for problem in found {
        let row = FATES.iter().find(|(code, _)| *code == problem.code);
        let Some(fate) = row.and_then(|(_, fates)| fates.get(column?)) else {
            continue;
        };
        let message = match fate {
            Applied => continue,
            Refused => "refuses the adapter",
            Ignored => "leaves it unread, so the result would silently be wrong",
            RefusedOrIgnored => {
                "refuses the adapter in newer versions; older ones leave it unread and are silently wrong"
            }
        };
        if problems.iter().any(|other| other.code == problem.code) {
            continue;
        }
        problems.push(Problem::new(
            problem.code,
            &problem.at,
            format!("{runtime} {message}"),
            &problem.fix,
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_runtime_says_what_it_does_about_what_is_found() {
        let found = [
            Problem::new("dora", "use_dora", "scales rows", "merge it"),
            Problem::new("alora", "alora_invocation_tokens", "activated", "train"),
            Problem::new("shape", "x", "of no runtime's concern", ""),
            Problem::new("dora", "magnitudes", "once is enough", "merge it"),
        ];
        let of = |runtime| {
            fates(&found, runtime)
                .iter()
                .map(|problem| problem.code)
                .collect::<Vec<_>>()
        };
        assert_eq!(of(Runtime::Peft), [""; 0]);
        assert_eq!(of(Runtime::LlamaCpp), ["dora"]);
        assert_eq!(of(Runtime::Vllm), ["dora", "alora"]);
        let silent = fates(&found, Runtime::Mistralrs);
        assert!(
            silent[0].message.starts_with("mistralrs ") && silent[0].message.contains("silently")
        );
    }
}
