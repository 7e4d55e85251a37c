//! One self-contained HTML page about a run: its metrics, its adapter, and its configuration.

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

/// Name of the file with a run's metrics.
pub const METRICS: &str = "metrics.jsonl";

/// Everything that is read from the output directory of a run.
#[derive(Debug)]
pub struct RunFiles {
    /// Content of run.json; null if the file is missing.
    pub record: Value,
    /// Content of metrics.jsonl.
    pub history: History,
    /// The trained adapter and its directory: the finished adapter, or else that of the newest checkpoint.
    pub adapter: Option<(PathBuf, AdapterSummary)>,
    /// Why the adapter cannot be read, if it should exist.
    pub adapter_problem: Option<String>,
    /// Name of the run, which is the name of its directory.
    pub name: String,
    /// Date in UTC when its files were last written.
    pub date: Option<String>,
    /// Output of `eval --json`; null if there is none.
    pub scores: Value,
    /// Output of `predict --data --json`; null if there is none.
    pub answers: Value,
}

impl RunFiles {
    /// Reads the files in `dir`.
    ///
    /// # Errors
    /// Returns an error if `dir` is not the directory of a run, or if a file cannot be read. A missing or unreadable
    /// adapter is noted and is not an error.
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
            // This also gives a name if `dir` is `.`.
            name: name_of(&dir.canonicalize().unwrap_or_else(|_| dir.to_owned())),
            date: [&metrics_path, &record_path]
                .iter()
                .find_map(|path| date_of(path)),
            scores: Value::Null,
            answers: Value::Null,
        })
    }

    /// Renders the page.
    ///
    /// # Errors
    /// Returns an error if the page's template cannot be rendered with its values.
    pub fn html(&self) -> Result<String> {
        lay_out(include_str!("page.html"), page::values(self))
    }
}

fn date_of(path: &Path) -> Option<String> {
    let written = std::fs::metadata(path).ok()?.modified().ok()?;
    let written = chrono::DateTime::<chrono::Utc>::from(written);
    Some(written.format("%Y-%m-%d").to_string())
}

/// Renders `template` with `values` and the style that all pages share.
pub(crate) fn lay_out(template: &str, values: Text) -> Result<String> {
    let mut environment = Environment::new();
    let style = include_str!("style.css").to_owned();
    environment.add_global("style", Text::from_safe_string(style));
    environment.add_global("version", env!("CARGO_PKG_VERSION"));
    // The extension `.html` turns escaping on.
    let page = environment.render_named_str("page.html", template, values);
    page.map_err(|e| {
        let message = format!("cannot lay out the page: {e}");
        Problem::sentence("page", message).exit(1).into()
    })
}

/// The value read from `path`; `None` if the file does not exist.
fn if_there<T>(path: &Path, read: std::io::Result<T>) -> Result<Option<T>> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match read {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.kind(), NotFound | NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("read", path)(e)),
    }
}
