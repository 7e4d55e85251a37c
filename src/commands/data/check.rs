//! `data check`: reports every bad row of every file.

use anyhow::Result;
use serde_json::{Value, json};

use super::{Request, title};
use crate::cli::DataCheckArgs;
use crate::commands::{bad_data, print, print_json};
use crate::data::{Finding, Findings, RowProblem, Source, Survey};

pub(in crate::commands) fn run(args: &DataCheckArgs) -> Result<()> {
    let request = Request::new(&args.source)?;
    let encoder = request.encoder()?;
    let mut files = Vec::new();
    let mut problems: Vec<RowProblem> = Vec::new();
    let mut broken: Vec<String> = Vec::new();
    let (mut n_rows, mut n_bad) = (0, 0);
    for (path, split) in &request.sources {
        let source = Source::open(path, *split)?;
        let mut failed = None;
        let survey = Survey::take(&source, &request.schema, encoder.as_deref(), |problem| {
            if args.json {
                problems.push(problem);
            } else if failed.is_none() {
                failed = print(&problem.to_string()).err();
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let format = match survey.format(&source) {
            Ok(format) => format,
            Err(error) => {
                if !args.json {
                    print(&error.to_string())?;
                }
                broken.push(error.to_string());
                None
            }
        };
        let stats = &survey.stats;
        n_rows += stats.n_rows;
        n_bad += survey.n_bad_rows;
        if args.json {
            files.push(json!({
                "path": path,
                "split": split.name(),
                "format": format,
                "sha256": source.sha256(),
                "rows": stats.n_rows,
                "bad_rows": survey.n_bad_rows,
                "examples": encoder.is_some().then_some(stats.n_examples),
                "dropped": encoder.is_some().then_some(stats.n_dropped),
                "truncated": encoder.is_some().then_some(stats.n_truncated),
                "split_rows": encoder.is_some().then_some(stats.n_split_rows),
                "without_end": encoder.is_some().then_some(stats.n_without_end),
                "tokens": encoder.is_some().then_some(stats.tokens.total),
                "trained_tokens": encoder.is_some().then_some(stats.trained_tokens.total),
                "unread_columns": unread_columns(&survey.findings),
                "names_without_column": names_without_column(&survey.findings),
                "unread_files": source.unread_files(),
                "counts": counts(&survey.findings),
            }));
            continue;
        }
        let format = format.map_or("no format", |format| format.name());
        let mut line = format!(
            "{}: {} rows, {format}, {} bad",
            title(path, *split),
            stats.n_rows,
            survey.n_bad_rows
        );
        if encoder.is_some() {
            line.push_str(&format!(
                "; {} examples, {} tokens, {} trained ({:.1} %)",
                stats.n_examples,
                stats.tokens.total,
                stats.trained_tokens.total,
                100.0 * stats.trained_tokens.total as f64 / stats.tokens.total.max(1) as f64
            ));
            for (n, what) in [
                (stats.n_dropped, "dropped as overlong"),
                (stats.n_truncated, "truncated"),
                (
                    stats.n_split_rows,
                    "rows split into one example per turn, since the chat template rewrites earlier turns",
                ),
                (
                    stats.n_without_end,
                    "examples without a trained end token: the model would not learn to stop",
                ),
            ] {
                if n > 0 {
                    line.push_str(&format!("; {n} {what}"));
                }
            }
        }
        print(&line)?;
        for found in survey.findings.lines() {
            print(&format!("  {found}"))?;
        }
    }
    if !args.json && encoder.is_none() {
        print(
            "checked without a model: give one with -m to check template, tokens and lengths too",
        )?;
    }
    let ok = n_bad == 0 && broken.is_empty();
    if args.json {
        print_json(&json!({"ok": ok, "files": files, "problems": problems, "mixed": broken}))?;
    }
    if ok {
        return Ok(());
    }
    let files = |n: usize| match n {
        1 => "1 file mixes row formats".to_owned(),
        n => format!("{n} files mix row formats"),
    };
    let mixed = match (n_bad, broken.len()) {
        (_, 0) => format!("{n_bad} of {n_rows} rows cannot be used"),
        (0, n) => files(n),
        (_, n) => format!("{n_bad} of {n_rows} rows cannot be used, and {}", files(n)),
    };
    Err(bad_data(mixed))
}

/// Columns, keys of turns and template variables that are not read: `{column, rows, line}`.
fn unread_columns(findings: &Findings) -> Vec<Value> {
    let unread = findings
        .iter()
        .filter_map(|(finding, tally)| match finding {
            Finding::Unread(name) => {
                Some(json!({"column": name, "rows": tally.n_rows, "line": tally.line}))
            }
            _ => None,
        });
    unread.collect()
}

/// Configured column names that no row has.
fn names_without_column(findings: &Findings) -> Vec<&str> {
    let names = findings.iter().filter_map(|(finding, _)| match finding {
        Finding::NameWithoutColumn(name) => Some(name.as_str()),
        _ => None,
    });
    names.collect()
}

/// Number of rows per other kind of finding.
fn counts(findings: &Findings) -> Value {
    let counts = Finding::COUNTS
        .iter()
        .map(|(finding, name)| ((*name).to_owned(), findings.n_rows(finding).into()));
    Value::Object(counts.collect())
}
