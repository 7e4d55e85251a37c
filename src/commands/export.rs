//! The report of an export, as text and JSON: what it kept, baked in and dropped.

use std::path::Path;

use anyhow::{Result, bail};
use monteclora_converters::{Adapter, Beside, LoraReport, Problem};
use serde::Serialize;

use super::show;
use crate::card;

/// Number of names of a list that are shown.
const SHOWN: usize = 3;

const AUTHORS_NOTE: &str = "the source comes from the authors' own code, which stores no posterior: A and B are all there is, and they are the mean";

/// The result of `collapse` or `convert`.
#[derive(Debug, Serialize)]
pub(super) struct Export<'a> {
    output: &'a Path,
    format: &'a str,
    n_sites: usize,
    /// Number of sites whose A and B have the bytes of the source.
    n_unchanged: usize,
    #[serde(flatten)]
    report: &'a LoraReport,
    notes: Vec<&'a str>,
    #[serde(flatten)]
    beside: &'a Beside,
    /// Files that were in the directory before and that readers take for the adapter's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kept: Vec<String>,
}

impl<'a> Export<'a> {
    /// The report about `adapter`, written to `output` as `format`. `rearranged` describes what the format changes at
    /// every site; `beside` lists the other files of the source's directory.
    pub(super) fn new(
        output: &'a Path,
        format: &'a str,
        adapter: &'a Adapter,
        report: &'a LoraReport,
        rearranged: Option<&'a str>,
        beside: &'a Beside,
    ) -> Self {
        let is_changed = |name: &String| {
            [&report.baked, &report.padded, &report.converted]
                .iter()
                .any(|names| names.contains(name))
        };
        let n_changed = adapter
            .sites
            .iter()
            .filter(|site| is_changed(&site.name))
            .count();
        let mut notes: Vec<&str> = rearranged.into_iter().collect();
        notes.extend(adapter.notes.iter().map(String::as_str));
        if adapter.is_authors_dialect() {
            notes.push(AUTHORS_NOTE);
        }
        Self {
            output,
            format,
            n_sites: adapter.sites.len(),
            n_unchanged: adapter.sites.len() - n_changed,
            report,
            notes,
            kept: kept(output, beside),
            beside,
        }
    }

    /// Prints the report as one JSON object or as text.
    pub(super) fn print(&self, json: bool) -> Result<()> {
        show(json, self, || self.text())
    }

    fn text(&self) -> String {
        let report = self.report;
        let mut text = format!(
            "wrote {}: {}, {}, r {}, lora_alpha {}",
            self.output.display(),
            self.format,
            count(self.n_sites, "site"),
            report.r,
            report.lora_alpha
        );
        let mut line =
            |what: &str, message: String| text.push_str(&format!("\n  {what:<9} {message}"));
        if self.n_unchanged > 0 {
            line(
                "kept",
                format!(
                    "the values of A and B exactly at {}",
                    count(self.n_unchanged, "site")
                ),
            );
        }
        for (what, message, names) in [
            ("baked in", "the scaling, multiplied into B", &report.baked),
            ("padded", "with zeros to the largest rank", &report.padded),
            ("converted", "to another element type", &report.converted),
        ] {
            if !names.is_empty() {
                line(what, format!("{message}, at {}", some_of(names)));
            }
        }
        if !report.resolved_keys.is_empty() {
            line(
                "resolved",
                format!(
                    "{}: what they mean is in r, lora_alpha, B and the list of modules now",
                    report.resolved_keys.join(", ")
                ),
            );
        }
        if report.dropped_posterior {
            line(
                "dropped",
                "the posterior's spread (monteclora_config and the sampler's tensors); A and B are its mean".into(),
            );
        }
        if !report.dropped_keys.is_empty() {
            line(
                "dropped",
                format!(
                    "{}: no effect on the weights",
                    report.dropped_keys.join(", ")
                ),
            );
        }
        for note in &self.notes {
            line("note", (*note).to_owned());
        }
        if !self.kept.is_empty() {
            let names = self.kept.join(", ");
            line(
                "kept",
                format!(
                    "{names}: there before, and taken for this adapter's by what reads the directory; remove what is not"
                ),
            );
        }
        text + &beside_lines(self.beside, "with the adapter")
    }
}

/// Files that were in the directory `output` before and that readers take for the adapter's: tokenizers, templates,
/// weights.
fn kept(output: &Path, beside: &Beside) -> Vec<String> {
    let Ok(found) = Beside::of(output) else {
        return Vec::new();
    };
    let ours = beside.carried.names();
    let names = found.carried.names().iter();
    let is_replaced = |name: &String| *name == card::FILE && card::is_ours(output);
    let names = names.filter(|name| !ours.contains(name) && !is_replaced(name));
    let mut kept: Vec<String> = names.cloned().collect();
    kept.extend(found.problems.into_iter().map(|problem| problem.at));
    kept
}

/// The lines of a report about the other files of an adapter's directory. `carried` tells where the carried files went.
pub(super) fn beside_lines(beside: &Beside, carried: &str) -> String {
    let mut text = String::new();
    let names = beside.carried.names();
    if !names.is_empty() {
        text.push_str(&format!("\n  carried   {}, {carried}", names.join(", ")));
    }
    if let Some(line) = beside.left_out_line() {
        text.push_str(&format!("\n  left out  {line}"));
    }
    text
}

pub(super) fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

fn some_of(names: &[String]) -> String {
    let shown = names[..names.len().min(SHOWN)].join(", ");
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    format!("{} ({shown}{more})", count(names.len(), "site"))
}

/// Returns an error if the destination is the source or inside it.
pub(super) fn require_apart(source: &Path, output: &Path) -> Result<()> {
    let (Ok(source_path), Ok(output_path)) = (source.canonicalize(), output.canonicalize()) else {
        return Ok(());
    };
    let source_dir = match source_path.parent() {
        Some(parent) if source_path.is_file() && output_path.is_dir() => parent.to_owned(),
        _ => source_path,
    };
    if source_dir == output_path {
        bail!(Problem::usage(format!(
            "`{}` is the source; give another destination with -o",
            output.display()
        )));
    }
    Ok(())
}
