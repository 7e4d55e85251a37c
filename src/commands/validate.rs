//! `validate`: reports all problems of an adapter together.

use anyhow::Result;
use monteclora_converters::{Findings, Problem, Runtime, examine};
use serde_json::json;

use super::export::count;
use super::inspect::listing;
use super::{print, print_json};
use crate::cli::ValidateArgs;
use crate::hub::{self, HubOptions};
use crate::model::open_base;

pub(super) fn run(args: &ValidateArgs) -> Result<()> {
    let runtimes = args
        .runtimes
        .iter()
        .map(|name| name.parse::<Runtime>())
        .collect::<Result<Vec<_>, _>>()?;
    let base = match &args.model_id {
        Some(id) => Some(open_base(&hub::locate(id, &HubOptions::default())?.dir)?),
        None => None,
    };
    let Findings {
        problems,
        warnings,
        beside,
    } = examine(&args.adapter, base.as_ref(), &runtimes)?;
    if args.json {
        print_json(
            &json!({ "ok": problems.is_empty(), "problems": problems, "warnings": warnings, "beside": beside }),
        )?;
    } else if problems.is_empty() {
        let listing = listing(&beside);
        print(&format!(
            "{}: {}{listing}",
            args.adapter.display(),
            good(args, !warnings.is_empty())
        ))?;
        for warning in &warnings {
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

/// Largest number of problems that are listed; `--json` has all.
const LISTED: usize = 20;

/// The first [`LISTED`] problems, one per line and grouped by remedy, and the number of the others.
fn by_remedy(problems: &[Problem]) -> String {
    let n_more = problems.len().saturating_sub(LISTED);
    let problems = &problems[..problems.len() - n_more];
    let mut fixes: Vec<&str> = Vec::new();
    for problem in problems {
        if !fixes.contains(&problem.fix.as_str()) {
            fixes.push(&problem.fix);
        }
    }
    let mut text = String::new();
    for fix in fixes {
        for problem in problems.iter().filter(|problem| problem.fix == fix) {
            let place = if problem.at.is_empty() { "" } else { ": " };
            text.push_str(&format!("{}{place}{}\n", problem.at, problem.message));
        }
        if !fix.is_empty() {
            text.push_str(&format!("  fix: {fix}\n"));
        }
    }
    if n_more > 0 {
        text.push_str(&format!("and {n_more} more (--json lists all)\n"));
    }
    text
}

/// The text for an adapter without problems.
fn good(args: &ValidateArgs, has_warnings: bool) -> String {
    let mut text = "no problem found".to_owned();
    if let Some(base) = &args.model_id {
        text.push_str(&format!("; it fits {base}"));
    }
    if !args.runtimes.is_empty() {
        let condition = if has_warnings {
            ", on the conditions below"
        } else {
            ""
        };
        text.push_str(&format!(
            "; {} can load it{condition}",
            args.runtimes.join(", ")
        ));
    }
    if args.model_id.is_none() {
        text.push_str("; names and shapes were not compared with a base (give one with -m)");
    }
    text
}
