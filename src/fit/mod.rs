//! `fit`: how wide the posterior around an adapter may be, judged on held-out rows.

mod record;
mod search;

pub use record::{FILE, FitRecord};
pub use search::{Criterion, Evaluation, Fitted, Search, Stopped};
