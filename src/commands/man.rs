//! `man`: writes the man pages.

use std::path::Path;

use anyhow::{Context, Result};

use super::print;
use crate::cli;

pub(super) fn run(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
    let mut written = 0;
    write(
        cli::command().disable_help_subcommand(true),
        "",
        dir,
        &mut written,
    )?;
    print(&format!("wrote {written} pages into {}", dir.display()))
}

/// Writes the page of a command and the pages of its subcommands.
fn write(command: clap::Command, above: &str, dir: &Path, written: &mut usize) -> Result<()> {
    let name = match above {
        "" => command.get_name().to_owned(),
        above => format!("{above}-{}", command.get_name()),
    };
    let command = command.display_name(name.clone());
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    let path = dir.join(format!("{name}.1"));
    std::fs::write(&path, page).with_context(|| format!("cannot write `{}`", path.display()))?;
    *written += 1;
    for below in command
        .get_subcommands()
        .filter(|below| !below.is_hide_set())
    {
        write(below.clone(), &name, dir, written)?;
    }
    Ok(())
}
