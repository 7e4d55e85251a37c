//! `fit`: finds the width of the posterior around an adapter, judged on held-out rows.

mod record;
mod search;

pub use record::{FILE, FitRecord};
pub use search::{Criterion, Evaluation, Fitted, Search, Stopped};
