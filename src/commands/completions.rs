//! `completions`: shell completions.

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::cli::Cli;

pub(super) fn run(shell: clap_complete::Shell) -> Result<()> {
    // clap_complete panics when its writer fails, as on a closed pipe; a buffer cannot.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "monteclora", &mut script);
    std::io::Write::write_all(&mut std::io::stdout().lock(), &script)
        .context("cannot write to standard output")
}
