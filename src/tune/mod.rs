//! Searches for settings. A trial is an ordinary training run in a directory of its own; a study is a directory of trials with a
//! log, `trials.jsonl`, from which the search goes on after any end.

mod halving;
mod importance;
mod log;
mod mads;
mod page;
mod space;
mod strategy;
mod study;
mod trial;

pub use halving::rungs;
pub use log::{Entry, Log, Outcome, Trial};
pub use page::{SPACE, StudyPage};
pub use space::{Parameter, Range, Space};
pub use strategy::Strategy;
pub use study::{Event, Options, Study};
pub use trial::{Commands, Objective, dir_of, name_of};

/// Name of the study's log.
pub const LOG: &str = "trials.jsonl";
/// Name of the study's record: what it searches, and what must not change when it goes on.
pub const RECORD: &str = "study.json";
/// The run.toml with the best settings.
pub const BEST: &str = "best.toml";
