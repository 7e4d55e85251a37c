//! From JSON Lines files to batches of tokens: rows, the model's chat template, the loss mask, packing.
//!
//! ```text
//! file -> JsonlFile -> Row -> Encoder (ChatTemplate, Tokenizer) -> Example -> Batch
//! ```
//! [`Encoder`] is the only place that turns a conversation into tokens: training, evaluation and generation use it.
//! A data file is never held whole: a [`Dataset`] keeps the offset of every line and the length of every example.

mod batch;
mod dataset;
mod error;
mod example;
mod jsonl;
mod rows;
mod stats;
mod template;
#[cfg(test)]
pub(crate) mod test_support;
mod tokenizer;

pub use batch::{Batch, BatchOptions, Batches, Cursor, epoch_order, epoch_plan};
pub use dataset::Dataset;
pub use error::{DataError, MAX_SHOWN, Problems, RowProblem};
pub use example::{
    ChoiceSet, ChoiceTokens, EncodeOptions, EncodedRow, Encoder, Example, Overlong, RowError,
    TrainOn,
};
pub use jsonl::JsonlFile;
pub use rows::{Choices, FieldProblem, Message, Role, Row, RowContent, RowFormat, parse_row};
pub use stats::{LengthSummary, Stats};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
