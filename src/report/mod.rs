//! One self-contained HTML page about a run: what it measured, what it learnt, how it was made.

mod chart;
mod history;
mod page;
mod sites;

use std::path::{Path, PathBuf};

use monteclora_converters::{Adapter, AdapterSummary};
use serde_json::Value;

pub use history::{EvalPoint, EventPoint, History, TrainPoint};

/// What keeps a page from being made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not the output directory of a run.
    #[error("`{}` holds neither run.json nor metrics.jsonl; give the output_dir of a training run", .0.display())]
    NotARun(PathBuf),
    /// A file cannot be read.
    #[error("cannot read `{}`", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// run.json is not what training writes.
    #[error("`{}` is not valid JSON: {source}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The page's template does not fit its values.
    #[error("cannot lay out the page: {0}")]
    Page(#[from] minijinja::Error),
}

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
}

impl RunFiles {
    /// Reads what is in `dir`.
    ///
    /// # Errors
    /// [`Error::NotARun`], [`Error::Io`], [`Error::Record`]. A missing or unreadable adapter is noted, not an error.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let (record_path, metrics_path) = (dir.join("run.json"), dir.join("metrics.jsonl"));
        let record = match std::fs::read_to_string(&record_path) {
            Ok(text) => Some(serde_json::from_str(&text).map_err(|source| Error::Record {
                path: record_path,
                source,
            })?),
            Err(e) if missing(&e) => None,
            Err(source) => {
                return Err(Error::Io {
                    path: record_path,
                    source,
                });
            }
        };
        let history = match std::fs::File::open(&metrics_path) {
            Ok(file) => Some(
                History::read(std::io::BufReader::new(file)).map_err(|source| Error::Io {
                    path: metrics_path,
                    source,
                })?,
            ),
            Err(e) if missing(&e) => None,
            Err(source) => {
                return Err(Error::Io {
                    path: metrics_path,
                    source,
                });
            }
        };
        if record.is_none() && history.is_none() {
            return Err(Error::NotARun(dir.to_owned()));
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
        })
    }

    /// The page.
    ///
    /// # Errors
    /// [`Error::Page`].
    pub fn html(&self) -> Result<String, Error> {
        page::html(self)
    }
}

fn missing(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
    )
}
