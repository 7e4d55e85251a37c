//! The programs that adapters are made for, by their names on the command line.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The mistral.rs that serves adapters here, as messages name it.
pub const MISTRALRS: &str = "mistral.rs 0.8.1";

/// A program that reads adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Runtime {
    /// [`MISTRALRS`], its own LoRA path. Serving through this project merges instead and has none of its limits.
    Mistralrs,
    /// mistral.rs 0.9.1 and later.
    Mistralrs09,
    /// vLLM.
    Vllm,
    /// llama.cpp: a GGUF LoRA as it is, a PEFT directory by way of its `convert_lora_to_gguf.py`.
    LlamaCpp,
    /// PEFT 0.20 and later.
    Peft,
    /// mlx-lm, which reads directories of its own form alone.
    Mlx,
}

/// Names on the command line, in the order of [`Runtime::ALL`].
const NAMES: [&str; 6] = [
    "mistralrs",
    "mistralrs-0.9",
    "vllm",
    "llamacpp",
    "peft",
    "mlx",
];

/// Other spellings, in lower case.
const ALIASES: [(&str, &str); 5] = [
    ("mistral.rs", "mistralrs"),
    ("llama.cpp", "llamacpp"),
    ("llama-cpp", "llamacpp"),
    ("mlx-lm", "mlx"),
    ("mlx_lm", "mlx"),
];

impl Runtime {
    /// Every runtime that is known.
    pub const ALL: [Self; 6] = [
        Self::Mistralrs,
        Self::Mistralrs09,
        Self::Vllm,
        Self::LlamaCpp,
        Self::Peft,
        Self::Mlx,
    ];

    /// Those that read PEFT directories.
    pub const OF_PEFT: [Self; 5] = [
        Self::Mistralrs,
        Self::Mistralrs09,
        Self::Vllm,
        Self::LlamaCpp,
        Self::Peft,
    ];
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES[*self as usize])
    }
}

impl FromStr for Runtime {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let lower = text.to_ascii_lowercase();
        let name = ALIASES.iter().find(|(alias, _)| *alias == lower);
        let name = name.map_or(lower.as_str(), |(_, name)| name);
        let at = NAMES.iter().position(|known| *known == name);
        at.map(|at| Self::ALL[at]).ok_or_else(|| {
            let known = NAMES.join(", ");
            let message = format!("unknown runtime `{text}`; expected {known}");
            Error::setting("runtime", message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for runtime in Runtime::ALL {
            let name = runtime.to_string();
            assert_eq!(name.parse::<Runtime>().expect("its own name"), runtime);
        }
        for (alias, name) in ALIASES {
            let runtime = alias.parse::<Runtime>().expect("another spelling");
            assert_eq!(runtime.to_string(), name);
        }
        assert!("llama".parse::<Runtime>().is_err());
    }
}
