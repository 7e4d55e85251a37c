//! From data files to batches of tokens: rows, the model's chat template, the loss mask, packing.
//!
//! ```text
//! Source (RowFile, ...) -> Row -> Encoder (ChatTemplate, Tokenizer) -> Example -> Batch
//! ```
//! [`Encoder`] is the only place that turns a conversation into tokens: training, evaluation and generation use it.
//! A data file is never held whole: a [`Dataset`] keeps the place of every row and the length of every example.

mod batch;
#[cfg(test)]
mod cases;
mod dataset;
mod error;
mod example;
mod findings;
mod printed;
mod row_file;
mod rows;
mod source;
mod stats;
mod survey;
mod template;
#[cfg(test)]
pub(crate) mod test_support;
mod tokenizer;

pub use batch::{Batch, BatchOptions, Batches, Cursor, epoch_order, epoch_plan, pack_efficiency};
pub use dataset::Dataset;
pub use error::{RowProblem, fault_of_row, field_problem};
pub use example::{
    Asked, ChoiceSet, ChoiceTokens, EncodeOptions, EncodedRow, Encoder, Example, Overlong,
    Remedies, TrainOn,
};
pub use findings::{Finding, Findings, Tally, of_question as findings_of_question};
pub use row_file::RowFile;
pub use rows::{
    Choices, FieldNames, Message, Notes, Role, Row, RowContent, RowFormat, parse_named_row,
    parse_question, parse_row,
};
pub use source::{Source, Split, directory_has, splits};
pub use stats::{Bin, LengthSummary, Stats, histogram};
pub use survey::{RowSchema, Survey};
pub use template::ChatTemplate;
pub use tokenizer::Tokenizer;
