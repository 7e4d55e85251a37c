//! `validate`: every problem at once.

use anyhow::{Context, Result};
use monteclora_converters::{Beside, ModelFiles, Problem, Runtime, other_base, validate_path};
use serde_json::json;

use super::export::count;
use super::inspect::listing;
use super::{print, print_json};
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
    let problems = validate_path(&args.adapter, base.as_ref(), &runtimes)?;
    // Only an adapter that fits is worth asking which base it belongs to.
    let warning = match &base {
        Some(base) if problems.is_empty() => other_base(&args.adapter, base)
            .with_context(|| format!("cannot read `{}`", base.dir().display()))?,
        _ => None,
    };
    let beside = Beside::of(&args.adapter).unwrap_or_default();
    if args.json {
        let warnings: Vec<_> = warning.iter().collect();
        print_json(
            &json!({ "ok": problems.is_empty(), "problems": problems, "warnings": warnings, "beside": beside }),
        )?;
    } else if problems.is_empty() {
        let listing = listing(&beside);
        print(&format!(
            "{}: {}{listing}",
            args.adapter.display(),
            good(args)
        ))?;
        if let Some(warning) = &warning {
            print(&format!("warning: {warning}"))?;
        }
    } else {
        print(&by_remedy(&problems))?;
    }
    match problems.len() {
        0 => Ok(()),
        n => Err(Problem::sentence(
            "problems",
            format!("`{}` has {}", args.adapter.display(), count(n, "problem")),
        )
        .into()),
    }
}

/// One problem a line, those with the same remedy together.
fn by_remedy(problems: &[Problem]) -> String {
    let mut fixes: Vec<&str> = Vec::new();
    for problem in problems {
        if !fixes.contains(&problem.fix.as_str()) {
            fixes.push(&problem.fix);
        }
    }
    let mut text = String::new();
    for fix in fixes {
        for problem in problems.iter().filter(|problem| problem.fix == fix) {
            text.push_str(&format!("{}: {}\n", problem.at, problem.message));
        }
        if !fix.is_empty() {
            text.push_str(&format!("  fix: {fix}\n"));
        }
    }
    text
}

/// What was checked, and found good.
fn good(args: &ValidateArgs) -> String {
    let mut text = "no problem found".to_owned();
    if let Some(base) = &args.model_id {
        text.push_str(&format!("; it fits {base}"));
    }
    if !args.runtimes.is_empty() {
        text.push_str(&format!("; {} can load it", args.runtimes.join(", ")));
    }
    if args.model_id.is_none() {
        text.push_str("; names and shapes were not compared with a base (give one with -m)");
    }
    text
}
