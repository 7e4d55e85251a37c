//! Tests that cross crates, as one binary.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod cli;
mod decoder;
mod evaluation;
mod fixtures;
<<<<<<< HEAD
mod formats;
=======
mod planning;
mod report;
>>>>>>> a1936dd (report, init, and a dry run with memory by purpose and advice)
#[cfg(feature = "mistralrs")]
mod runtime;
mod training;
mod trajectory;
