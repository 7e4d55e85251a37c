//! `rollback`: the generation that an alias had before.

use anyhow::Result;

use super::deploy::{check, server};
use super::{Usage, print, print_json};
use crate::cli::RollbackArgs;
use crate::deploy::{self, Releases};

pub(super) fn run(args: &RollbackArgs) -> Result<()> {
    if args.to.as_deref() == Some("") {
        return Err(Usage("--to is empty; give a generation".to_owned()).into());
    }
    let server = server(&args.server)?;
    let mut releases = Releases::open(&args.adapter_root, &args.alias)?;
    let done = deploy::roll_back(
        &server,
        &mut releases,
        &args.alias,
        args.to.as_deref(),
        &check(&args.check),
    )?;
    if args.json {
        return print_json(&done);
    }
    print(&format!(
        "{} answers from {} (before: {})\n  release {}",
        done.alias,
        done.generation,
        done.previous,
        done.directory.display()
    ))
}
