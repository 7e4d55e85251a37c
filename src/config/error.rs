//! What can be wrong with a configuration, and how it is said.

use std::{io, path::PathBuf};

/// How many problems one report lists; the rest are counted.
const MAX_SHOWN: usize = 20;

/// Errors of the configuration. All end the process with exit code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file is missing or cannot be read.
    #[error("cannot read `{}`; give the path of a TOML file with -c", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{name}:{line}: not valid TOML: {message}")]
    Syntax {
        /// The file.
        name: String,
        /// Line, from 1.
        line: usize,
        /// The parser's message.
        message: String,
    },
    /// Keys or values that are refused, all of them, each with its place and the remedy.
    #[error("{}", list(.problems))]
    Invalid {
        /// One line a problem.
        problems: Vec<String>,
    },
}

impl ConfigError {
    /// The exit code: 2.
    pub fn exit_code(&self) -> u8 {
        2
    }
}

fn list(problems: &[String]) -> String {
    let mut text = problems[..problems.len().min(MAX_SHOWN)].join("\n");
    if problems.len() > MAX_SHOWN {
        text.push_str(&format!("\nand {} more", problems.len() - MAX_SHOWN));
    }
    text
}
