//! `rollback`: the generation that an alias had before.

use anyhow::Result;
use monteclora_converters::Problem;

use super::deploy::{check, server};
use super::{print, print_json};
use crate::cli::RollbackArgs;
use crate::deploy::{self, Releases};

pub(super) fn run(args: &RollbackArgs) -> Result<()> {
    if args.to.as_deref() == Some("") {
        return Err(Problem::usage("--to is empty; give a generation").into());
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
