//! Chat templates, read and rendered as transformers does: Jinja2 with Python's values, in minijinja.
//!
//! Training and serving both write conversations out with it, so that a model is served with the text it was trained on.

mod code;
mod engine;
mod filters;
mod methods;
mod python;
mod rewrite;
mod source;
mod time;
mod tojson;
mod values;
mod variables;

pub use engine::{Rendered, Templates};
pub use source::{DEFAULT, Sources, TOOL_USE, find};
pub use time::strftime;
pub use variables::{Conversation, FIXED, recorded_variables, special_tokens};

#[cfg(test)]
mod tests;
