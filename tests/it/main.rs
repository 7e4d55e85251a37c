//! Tests that cross crates, as one binary.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod architectures;
mod bases;
mod bench;
mod beside;
mod blocks;
mod certainty;
mod cli;
mod data;
mod decoder;
mod documentation;
mod doors;
mod evaluation;
mod fixtures;
mod formats;
mod hashes;
mod hub;
mod journey;
mod methods;
mod nested;
#[cfg(feature = "mistralrs")]
mod operations;
mod planning;
mod posterior;
#[cfg(feature = "mpi")]
mod ranks;
#[cfg(feature = "mistralrs")]
mod remedies;
mod report;
mod resume;
#[cfg(feature = "mistralrs")]
mod runtime;
#[cfg(feature = "mistralrs")]
mod scoring;
mod training;
mod trajectory;
mod tune;
