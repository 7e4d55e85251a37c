//! What runtimes make of adapters that are more than `B A`, and that are therefore refused here.

use crate::problem::Problem;
use crate::validate::runtime::Runtime;

/// Code of the problem, then what becomes of the feature in each of [`Runtime::ALL`]: a, applied as it was trained; r,
/// refused; i, left unread, so the adapter loads and computes something else; n, refused by newer versions and left
/// unread by older ones. From the sources of mistral.rs (`lora/mod.rs`, later `validate_dynamic`), of vLLM
/// (`peft_helper.py`) and of llama.cpp (`convert_lora_to_gguf.py`, which stops at tensors that are neither A nor B, and
/// reads no key but `lora_alpha`). mlx-lm reads nothing of PEFT's, and its own DoRA as it was trained.
const FATES: [(&str, &str); 12] = [
    ("dora", "irrraa"),
    ("bias", "irrraa"),
    ("modules-to-save", "irrraa"),
    ("stored-weight", "irrraa"),
    ("embedding", "iraaaa"),
    ("trainable-tokens", "irrraa"),
    ("layer-replication", "irniaa"),
    ("alora", "irnaaa"),
    ("arrow", "iriiaa"),
    ("qalora", "irniaa"),
    ("bdlora", "irniaa"),
    ("init", "irniaa"),
];

/// Whether `runtime` refuses every adapter with a feature of this code.
pub(super) fn refuses(code: &str, runtime: Runtime) -> bool {
    fate(code, runtime) == Some('r')
}

fn fate(code: &str, runtime: Runtime) -> Option<char> {
    let column = Runtime::ALL.iter().position(|other| *other == runtime)?;
    let (_, fates) = FATES.iter().find(|(known, _)| *known == code)?;
    fates.chars().nth(column)
}

/// For problems that were found while reading: what `runtime` does about each kind of them, at the first place.
pub(super) fn fates(found: &[Problem], runtime: Runtime) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::new();
    for problem in found {
        let message = match fate(problem.code, runtime) {
            Some('r') => "refuses the adapter",
            Some('i') => "leaves it unread, so the result would silently be wrong",
            Some('n') => {
                "refuses the adapter in newer versions; older ones leave it unread and are silently wrong"
            }
            _ => continue,
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
