//! `completions`: writes shell completions.

use anyhow::{Context, Result};

use crate::cli;

pub(super) fn run(shell: clap_complete::Shell) -> Result<()> {
    // clap_complete panics if its writer fails, for example on a closed pipe. A buffer cannot fail.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), "monteclora", &mut script);
    std::io::Write::write_all(&mut std::io::stdout().lock(), &script)
        .context("cannot write to standard output")
}
