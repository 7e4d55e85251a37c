//! One self-contained HTML page about a run: what it measured, what it learnt, how it was made.

mod chart;
mod evaluation;
mod history;
mod page;
mod sites;

use std::path::{Path, PathBuf};

use minijinja::{Environment, Value as Text};
use monteclora_converters::{Adapter, AdapterSummary, Error, Problem, Result};
use serde_json::Value;

use crate::output::name_of;

pub use evaluation::{EvaluationPage, Score, Shown};
pub use history::{EventPoint, History, Point};

/// Name of the file of what a run measured.
pub const METRICS: &str = "metrics.jsonl";

/// Everything that an output directory tells about a run.
#[derive(Debug)]
pub struct RunFiles {
    /// run.json; null where it is missing.
    pub record: Value,
    /// metrics.jsonl.
    pub history: History,
    /// The trained adapter with the directory it was read from: the finished one, else that of the newest checkpoint.
    pub adapter: Option<(PathBuf, AdapterSummary)>,
    /// Why there is no adapter, where there should be one.
    pub adapter_problem: Option<String>,
    /// The run's name: that of its directory.
    pub name: String,
    /// When its files were written last, as a date in UTC.
    pub date: Option<String>,
    /// What `eval --json` said; null if nobody asked.
    pub scores: Value,
    /// What `predict --data --json` said.
    pub answers: Value,
}

impl RunFiles {
    /// Reads what is in `dir`.
    ///
    /// # Errors
    /// If `dir` is not that of a run, or a file cannot be read. A missing or unreadable adapter is noted, not an error.
    pub fn read(dir: &Path) -> Result<Self> {
        let (record_path, metrics_path) = (dir.join("run.json"), dir.join(METRICS));
        let record = if_there(&record_path, std::fs::read_to_string(&record_path))?
            .map(|text| serde_json::from_str(&text))
            .transpose()
            .map_err(|e| Error::json(&record_path, &e))?;
        let history = std::fs::File::open(&metrics_path)
            .and_then(|file| History::read(std::io::BufReader::new(file)));
        let history = if_there(&metrics_path, history)?;
        if record.is_none() && history.is_none() {
            return Err(Problem::usage(format!(
                "`{}` holds neither run.json nor metrics.jsonl; give the output_dir of a training run",
                dir.display()
            ))
            .into());
        }
        let (mut adapter, mut adapter_problem) = (None, None);
        let checkpoint = crate::train::checkpoints(dir)
            .ok()
            .and_then(|mut all| all.pop())
            .map(|(_, path)| path);
        let finished = dir.join("adapter_config.json").is_file();
        if let Some(place) = finished.then(|| dir.to_owned()).or(checkpoint) {
            match Adapter::read(&place).and_then(|adapter| adapter.summary()) {
                Ok(summary) => adapter = Some((place, summary)),
                Err(error) => adapter_problem = Some(error.to_string()),
            }
        }
        Ok(Self {
            record: record.unwrap_or_default(),
            history: history.unwrap_or_default(),
            adapter,
            adapter_problem,
            // Of `.`, too.
            name: name_of(&dir.canonicalize().unwrap_or_else(|_| dir.to_owned())),
            date: [&metrics_path, &record_path]
                .iter()
                .find_map(|path| date_of(path)),
            scores: Value::Null,
            answers: Value::Null,
        })
    }

    /// The page.
    ///
    /// # Errors
    /// If the page's template does not fit its values.
    pub fn html(&self) -> Result<String> {
        lay_out(include_str!("page.html"), page::values(self))
    }
}

fn date_of(path: &Path) -> Option<String> {
    let written = std::fs::metadata(path).ok()?.modified().ok()?;
    let written = chrono::DateTime::<chrono::Utc>::from(written);
    Some(written.format("%Y-%m-%d").to_string())
}

/// A page: `template` with `values`, and the style that every page shares.
fn lay_out(template: &str, values: Text) -> Result<String> {
    let mut environment = Environment::new();
    let style = include_str!("style.css").to_owned();
    environment.add_global("style", Text::from_safe_string(style));
    environment.add_global("version", env!("CARGO_PKG_VERSION"));
    // The name's ending turns escaping on.
    let page = environment.render_named_str("page.html", template, values);
    page.map_err(|e| {
        let message = format!("cannot lay out the page: {e}");
        Problem::sentence("page", message).exit(1).into()
    })
}

/// What was read of `path`, unless it is not there.
fn if_there<T>(path: &Path, read: std::io::Result<T>) -> Result<Option<T>> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match read {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.kind(), NotFound | NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}
