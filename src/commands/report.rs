//! `report`: writes one self-contained HTML page about a run.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use monteclora_converters::json::read_object;
use monteclora_converters::{Error, Problem};

use crate::output::write_named;
use serde_json::Value;

use super::print;
use crate::cli::ReportArgs;
use crate::report::{self, RunFiles};
use crate::tune::StudyPage;

pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let dir = &args.output_dir;
    if !dir.is_dir() {
        bail!(Problem::usage(format!(
            "`{}`: no such directory; give the output_dir of a training run",
            dir.display()
        )));
    }
    if StudyPage::is_study(dir) {
        let page = StudyPage::read(dir)?.html()?;
        return write(args, dir, &page);
    }
    let dir = &run_in(dir);
    let mut run = RunFiles::read(dir)?;
    run.scores = beside(args.eval.as_deref(), &dir.join("eval.json"))?;
    run.answers = beside(args.answers.as_deref(), &dir.join("answers.json"))?;
    let page = run.html()?;
    write(args, dir, &page)
}

fn write(args: &ReportArgs, dir: &Path, page: &str) -> Result<()> {
    let target = args
        .output
        .clone()
        .unwrap_or_else(|| dir.join("report.html"));
    let is_page = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|e| {
            ["html", "htm"]
                .iter()
                .any(|known| e.eq_ignore_ascii_case(known))
        })
    };
    if target.is_file() && !is_page(&target) {
        bail!(Problem::usage(format!(
            "-o `{}` is there, and is no page; give a name that ends in .html",
            target.display()
        )));
    }
    write_named(&target, |writer| {
        let written = writer.write_all(page.as_bytes());
        written.map_err(Error::io("write", &target))
    })?;
    print(&format!("wrote {}; open it in a browser", target.display()))
}

/// The directory itself if it contains a run, otherwise its only subdirectory with a run, such as
/// `quickstart-out/adapter`.
fn run_in(dir: &Path) -> PathBuf {
    let is_run = |dir: &Path| dir.join(report::METRICS).is_file();
    if is_run(dir) {
        return dir.to_path_buf();
    }
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut runs = entries
        .map(|entry| entry.path())
        .filter(|path| is_run(path));
    match (runs.next(), runs.next()) {
        (Some(run), None) => run,
        _ => dir.to_path_buf(),
    }
}

/// The content of the JSON file `named`, or of `usual` if none is named. Null if `usual` does not exist.
fn beside(named: Option<&Path>, usual: &Path) -> Result<Value> {
    let path = match named {
        Some(path) => path,
        None if usual.is_file() => usual,
        None => return Ok(Value::Null),
    };
    Ok(Value::Object(read_object(path)?))
}
