//! `validate`: every problem at once.

use anyhow::Result;
use monteclora_converters::{Adapter, ModelFiles, Runtime, validate};
use serde_json::json;

use super::{Incompatible, print, print_json};
use crate::cli::ValidateArgs;
use crate::hub::{self, HubOptions};

pub(super) fn run(args: &ValidateArgs) -> Result<()> {
    let runtimes = args
        .runtimes
        .iter()
        .map(|name| name.parse::<Runtime>())
        .collect::<Result<Vec<_>, _>>()?;
    let base = match &args.model_id {
        Some(id) => Some(ModelFiles::open(
            hub::locate(id, &HubOptions::default())?.dir,
        )?),
        None => None,
    };
    let problems = match Adapter::read(&args.adapter) {
        Ok(adapter) => validate(&adapter, base.as_ref(), &runtimes)?,
        Err(error) if !error.problems().is_empty() => error.problems().to_vec(),
        Err(error) => return Err(error.into()),
    };
    if args.json {
        print_json(&json!({ "ok": problems.is_empty(), "problems": problems }))?;
    } else if problems.is_empty() {
        print(&format!("{}: no problem found", args.adapter.display()))?;
    } else {
        let lines = problems.iter().map(ToString::to_string).collect::<Vec<_>>();
        print(&lines.join("\n"))?;
    }
    match problems.len() {
        0 => Ok(()),
        n => Err(Incompatible(format!(
            "`{}` has {n} problem{}",
            args.adapter.display(),
            if n == 1 { "" } else { "s" }
        ))
        .into()),
    }
}
