//! One JSON object of a data file -> a checked row, in any of the formats people keep such data in.

mod fields;
mod json;
mod read;
mod row;
#[cfg(test)]
mod tests;

pub use fields::FieldNames;
pub use read::{parse_named_row, parse_question, parse_row};
pub use row::{Choices, Message, Role, Row, RowContent, RowFormat};
