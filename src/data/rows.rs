//! Checks one JSON object of a data file and turns it into a row, for each of the common formats.

mod beside;
mod columns;
mod fields;
mod json;
mod json_place;
mod read;
mod row;
#[cfg(test)]
mod tests;
mod tools;
mod turn;
mod unknown;
mod value;

pub use fields::FieldNames;
pub use read::{parse_named_row, parse_question, parse_row};
pub use row::{Choices, Message, Notes, Role, Row, RowContent, RowFormat};
pub(super) use turn::is_for_templates;
