//! Deploys adapters and rolls them back: an immutable directory, a canary, and a swap that can be undone.

mod client;
mod error;
mod history;
mod release;
mod rollout;

#[cfg(test)]
mod tests;

pub use client::{AdapterServer, Form, Loaded, ServedAdapter, ServedModel};
pub use error::Error;
pub use history::{Action, Record, Releases};
pub use release::{RECORD, Release};
pub use rollout::{Answered, Check, Deployed, RolledBack, deploy, roll_back};
