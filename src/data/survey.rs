//! One pass over all rows: what is wrong with them, which formats they have, how long their examples are.

use std::{collections::BTreeMap, fmt::Write as _};

use monteclora_converters::Problem;
use rayon::prelude::*;

use super::{
    error::{DataError, RowProblem, bad_data},
    example::Encoder,
    rows::{FieldNames, RowFormat, parse_named_row},
    source::Source,
    stats::Stats,
};

/// Rows read and encoded at a time: enough to keep every core busy, few enough to hold.
const CHUNK: usize = 512;

/// How many lines are named for each format of a mix.
const EXAMPLES: usize = 3;

/// How the rows of a source are to be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowSchema {
    /// Their format; detected by their keys where absent.
    pub format: Option<RowFormat>,
    /// The names that the source gives to fields.
    pub fields: FieldNames,
}

impl From<Option<RowFormat>> for RowSchema {
    fn from(format: Option<RowFormat>) -> Self {
        Self {
            format,
            fields: FieldNames::default(),
        }
    }
}

/// Where an example comes from and how long it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) row: u32,
    pub(super) part: u32,
    pub(super) n_tokens: u32,
    pub(super) n_trained: u32,
}

/// What a pass found.
#[derive(Debug, Default)]
pub struct Survey {
    /// What the rows became; lengths are zero without an encoder.
    pub stats: Stats,
    /// Bad rows.
    pub n_bad_rows: usize,
    formats: BTreeMap<RowFormat, (usize, Vec<String>)>,
    entries: Vec<Entry>,
}

/// A row, read and encoded.
struct Surveyed {
    format: Option<RowFormat>,
    problems: Vec<Problem>,
    lengths: Vec<(u32, u32)>,
    n_dropped: usize,
    n_truncated: usize,
    n_without_end: usize,
}

impl Survey {
    /// Reads every row in order, encodes it where there is an encoder, and hands every problem to `on_problem`.
    ///
    /// # Errors
    /// As [`Source::row_bytes`]; errors of the model's template or tokenizer.
    pub fn take(
        source: &Source,
        schema: &RowSchema,
        encoder: Option<&Encoder>,
        mut on_problem: impl FnMut(RowProblem),
    ) -> Result<Self, DataError> {
        let mut survey = Self::default();
        survey.stats.n_rows = source.n_rows();
        let mut start = 0;
        while start < source.n_rows() {
            let end = source.n_rows().min(start + CHUNK);
            let rows = (start..end)
                .into_par_iter()
                .map(|idx| survey_row(&source.row_bytes(idx)?, schema, encoder))
                .collect::<Vec<_>>();
            for (row_idx, row) in (start..end).zip(rows) {
                survey.add(source, row_idx, row?, &mut on_problem);
            }
            start = end;
        }
        survey.stats.n_examples = survey.entries.len();
        survey.stats.set_lengths(
            survey.entries.iter().map(|entry| entry.n_tokens).collect(),
            survey.entries.iter().map(|entry| entry.n_trained).collect(),
        );
        Ok(survey)
    }

    fn add(
        &mut self,
        source: &Source,
        row_idx: usize,
        row: Surveyed,
        on_problem: &mut impl FnMut(RowProblem),
    ) {
        let (path, line) = source.place(row_idx);
        self.n_bad_rows += usize::from(!row.problems.is_empty());
        for problem in row.problems {
            on_problem(RowProblem::new(path, line, problem));
        }
        if let Some(format) = row.format {
            let (n_rows, lines) = self.formats.entry(format).or_default();
            *n_rows += 1;
            if lines.len() < EXAMPLES {
                lines.push(if path == source.name() {
                    line.to_string()
                } else {
                    format!("{}:{line}", path.display())
                });
            }
        }
        self.stats.n_dropped += row.n_dropped;
        self.stats.n_truncated += row.n_truncated;
        self.stats.n_without_end += row.n_without_end;
        self.stats.n_split_rows += usize::from(row.lengths.len() + row.n_dropped > 1);
        for (part, (n_tokens, n_trained)) in row.lengths.into_iter().enumerate() {
            self.entries.push(Entry {
                row: small(row_idx),
                part: small(part),
                n_tokens,
                n_trained,
            });
        }
    }

    /// The format of all rows that have one; `None` if no row has.
    ///
    /// # Errors
    /// Rows of several formats.
    pub fn format(&self, source: &Source) -> Result<Option<RowFormat>, DataError> {
        if self.formats.len() < 2 {
            return Ok(self.formats.keys().next().copied());
        }
        let mut found = String::new();
        for (format, (n_rows, lines)) in &self.formats {
            let plural = if *n_rows == 1 { "row" } else { "rows" };
            let more = if *n_rows > lines.len() { ", ..." } else { "" };
            let separator = if found.is_empty() { "" } else { "; " };
            // Writing to a string does not fail.
            let _ = write!(
                found,
                "{separator}{} in {n_rows} {plural} (line {}{more})",
                format.name(),
                lines.join(", ")
            );
        }
        Err(bad_data(
            "mixed-formats",
            format!(
                "`{}` mixes formats: {found}; split the file, or set data.format",
                source.name().display()
            ),
        ))
    }

    /// The number of tokens of every example, in the order of the rows.
    pub fn lengths(&self) -> Vec<usize> {
        self.entries
            .iter()
            .map(|entry| entry.n_tokens as usize)
            .collect()
    }

    /// The number of trained tokens of every example, in the order of the rows.
    pub fn trained_lengths(&self) -> Vec<usize> {
        self.entries
            .iter()
            .map(|entry| entry.n_trained as usize)
            .collect()
    }

    pub(super) fn into_entries(self) -> Vec<Entry> {
        self.entries
    }
}

/// Only what is wrong with the model fails; what is wrong with the row is found in the result.
fn survey_row(
    bytes: &[u8],
    schema: &RowSchema,
    encoder: Option<&Encoder>,
) -> Result<Surveyed, DataError> {
    let mut surveyed = Surveyed {
        format: None,
        problems: Vec::new(),
        lengths: Vec::new(),
        n_dropped: 0,
        n_truncated: 0,
        n_without_end: 0,
    };
    let row = match parse_named_row(bytes, schema.format, &schema.fields) {
        Ok((format, row)) => {
            surveyed.format = Some(format);
            row
        }
        Err(problems) => {
            surveyed.problems = problems;
            return Ok(surveyed);
        }
    };
    let Some(encoder) = encoder else {
        return Ok(surveyed);
    };
    match encoder.encode_row(&row) {
        Ok(encoded) => {
            surveyed.n_dropped = encoded.n_dropped;
            surveyed.n_truncated = encoded.n_truncated;
            for example in &encoded.examples {
                surveyed.n_without_end += usize::from(!encoder.ends(example));
                surveyed
                    .lengths
                    .push((small(example.input_ids.len()), small(example.n_trained())));
            }
        }
        Err(error) => {
            let problem = schema.fields.in_file_words(error.of_row()?);
            surveyed.problems.push(problem);
        }
    }
    Ok(surveyed)
}

/// Row and token counts fit 32 bits: a row is at most 4 GiB and its line is kept in 32 bits.
fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
