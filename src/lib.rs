#![doc = include_str!("../README.md")]

pub mod cli;
pub mod commands;
pub mod config;
pub mod data;
pub mod eval;
pub mod gguf_import;
pub mod hub;
pub mod logging;
pub mod model;
pub mod progress;
pub mod provenance;
pub mod report;
pub mod session;
pub mod smollm2;
pub mod system;
pub mod train;
