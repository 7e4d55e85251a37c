//! `rollback`: brings back the previous generation of an alias.

use anyhow::{Result, bail};
use monteclora_converters::Problem;

use super::deploy::{asked, check, holds, server};
use super::show;
use crate::cli::RollbackArgs;
use crate::deploy::{self, Releases};

pub(super) fn run(args: &RollbackArgs) -> Result<()> {
    if args.to.as_deref() == Some("") {
        bail!(Problem::usage("--to is empty; give a generation"));
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
    show(args.json, &done, || {
        format!(
            "{} answers from {} (before: {})\n  release {}{}\n{}",
            done.alias,
            done.generation,
            done.previous,
            done.directory.display(),
            holds(done.posterior, done.calibration),
            asked(&done.answers)
        )
    })
}
