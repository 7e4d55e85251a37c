//! One pass over all rows: finds their problems, their formats and the lengths of their examples.

use std::collections::{BTreeMap, BTreeSet};

use monteclora_converters::{Error, Problem};
use rayon::prelude::*;

use super::{
    error::{RowProblem, bad_data, fault_of_row},
    example::Encoder,
    findings::{self, Finding, Findings},
    rows::{FieldNames, Row, RowFormat, parse_named_row},
    source::Source,
    stats::Stats,
};

/// Number of rows read and encoded at a time: enough to keep every core busy, few enough to fit in memory.
const CHUNK: usize = 512;

/// Number of lines named per format if formats are mixed.
const EXAMPLES: usize = 3;

/// How the rows of a source are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowSchema {
    /// Format of the rows; if `None`, the keys decide.
    pub format: Option<RowFormat>,
    /// The names that the source gives to fields.
    pub fields: FieldNames,
}

impl From<Option<RowFormat>> for RowSchema {
    fn from(format: Option<RowFormat>) -> Self {
        Self {
            format,
            ..Self::default()
        }
    }
}

impl RowSchema {
    /// Reads and checks one row.
    ///
    /// # Errors
    /// Returns every problem of the row, with the source's names.
    pub fn parse(&self, bytes: &[u8]) -> Result<(RowFormat, Row), Vec<Problem>> {
        parse_named_row(bytes, self.format, &self.fields)
    }

    /// The problem of the row, with the source's names, if the row caused this encoding error.
    ///
    /// # Errors
    /// Returns `error` unchanged if the model or the tokenizer is at fault.
    pub fn fault_of_row(&self, error: Error) -> Result<Problem, Error> {
        Ok(self.fields.in_file_words(fault_of_row(error)?))
    }
}

/// The row of an example, its index within the row, and its length.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) row: u32,
    pub(super) part: u32,
    pub(super) n_tokens: u32,
    pub(super) n_trained: u32,
}

/// The result of a pass over all rows.
#[derive(Debug, Default)]
pub struct Survey {
    /// Statistics of the examples. Without an encoder there are no examples.
    pub stats: Stats,
    /// Number of bad rows.
    pub n_bad_rows: usize,
    /// Findings that are no error.
    pub findings: Findings,
    /// The fields that at least one row has under the name that the source gives them.
    named: BTreeSet<String>,
    formats: BTreeMap<RowFormat, (usize, Vec<String>)>,
    pub(super) entries: Vec<Entry>,
}

/// A row, read and encoded.
#[derive(Default)]
struct Surveyed {
    format: Option<RowFormat>,
    problems: Vec<Problem>,
    /// Per example, the number of tokens and of trained tokens.
    lengths: Vec<(u32, u32)>,
    n_dropped: usize,
    n_truncated: usize,
    n_without_end: usize,
    findings: Vec<(Finding, String)>,
    named: Vec<String>,
}

impl Survey {
    /// Reads every row in order, encodes it if there is an encoder, and passes every problem to `on_problem`.
    ///
    /// # Errors
    /// As [`Source::row_bytes`], or if the model's template or tokenizer fails.
    pub fn take(
        source: &Source,
        schema: &RowSchema,
        encoder: Option<&Encoder>,
        mut on_problem: impl FnMut(RowProblem),
    ) -> Result<Self, Error> {
        let mut survey = Self::default();
        let n_rows = source.n_rows();
        for start in (0..n_rows).step_by(CHUNK) {
            let chunk = start..n_rows.min(start + CHUNK);
            let rows: Vec<_> = chunk
                .clone()
                .into_par_iter()
                .map(|idx| survey_row(&source.row_bytes(idx)?, schema, encoder))
                .collect();
            for (row_idx, row) in chunk.zip(rows) {
                survey.add(source, row_idx, row?, &mut on_problem);
            }
        }
        if survey.n_bad_rows == 0 {
            let missing = schema
                .fields
                .names()
                .filter(|(field, _)| !survey.named.contains(*field));
            for (_, name) in missing {
                let finding = Finding::NameWithoutColumn(name.to_owned());
                survey.findings.add_of_source(finding);
            }
        }
        for name in source.unread_files() {
            let finding = Finding::UnreadFile(name.clone());
            survey.findings.add_of_source(finding);
        }
        let stats = &mut survey.stats;
        stats.n_rows = n_rows;
        stats.n_examples = survey.entries.len();
        stats.set_lengths(
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
        self.findings.add(line, row.findings);
        self.named.extend(row.named);
        self.stats.n_dropped += row.n_dropped;
        self.stats.n_truncated += row.n_truncated;
        self.stats.n_without_end += row.n_without_end;
        self.stats.n_split_rows += usize::from(row.lengths.len() + row.n_dropped > 1);
        let parts = row.lengths.into_iter().enumerate();
        self.entries
            .extend(parts.map(|(part, (n_tokens, n_trained))| Entry {
                row: small(row_idx),
                part: small(part),
                n_tokens,
                n_trained,
            }));
    }

    /// The format of all valid rows; `None` if no row is valid.
    ///
    /// # Errors
    /// Returns an error if the rows have several formats.
    pub fn format(&self, source: &Source) -> Result<Option<RowFormat>, Error> {
        if self.formats.len() < 2 {
            return Ok(self.formats.keys().next().copied());
        }
        let formats = self.formats.iter().map(|(format, (n_rows, lines))| {
            let plural = if *n_rows == 1 { "row" } else { "rows" };
            let more = if *n_rows > lines.len() { ", ..." } else { "" };
            let (name, lines) = (format.name(), lines.join(", "));
            format!("{name} in {n_rows} {plural} (line {lines}{more})")
        });
        let found = formats.collect::<Vec<_>>().join("; ");
        let path = source.name().display();
        Err(bad_data(
            "mixed-formats",
            format!("`{path}` mixes formats: {found}; split the file into one per format"),
        ))
    }

    /// The number of tokens of every example, in the order of the rows.
    pub fn lengths(&self) -> Vec<usize> {
        let lengths = self.entries.iter().map(|entry| entry.n_tokens as usize);
        lengths.collect()
    }

    /// The number of trained tokens of every example, in the order of the rows.
    pub fn trained_lengths(&self) -> Vec<usize> {
        let lengths = self.entries.iter().map(|entry| entry.n_trained as usize);
        lengths.collect()
    }
}

/// Reads and encodes one row. Returns an error only for a fault of the model; problems of the row are in the result.
fn survey_row(
    bytes: &[u8],
    schema: &RowSchema,
    encoder: Option<&Encoder>,
) -> Result<Surveyed, Error> {
    let mut surveyed = Surveyed::default();
    let row = match schema.parse(bytes) {
        Ok((format, row)) => {
            surveyed.format = Some(format);
            surveyed.findings = findings::of_row(&row, encoder);
            surveyed.named.clone_from(&row.notes.named);
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
            let examples = encoded.examples.iter();
            let found: BTreeSet<_> = examples
                .flat_map(|example| findings::of_example(example, encoder))
                .collect();
            let found = found.into_iter().map(|finding| (finding, String::new()));
            surveyed.findings.extend(found);
            for example in &encoded.examples {
                surveyed.n_without_end += usize::from(!encoder.ends(example));
                let n_tokens = small(example.input_ids.len());
                surveyed
                    .lengths
                    .push((n_tokens, small(example.n_trained())));
            }
        }
        Err(error) => surveyed.problems.push(schema.fault_of_row(error)?),
    }
    Ok(surveyed)
}

/// Converts a count to 32 bits. Row and token counts fit: a row is at most 4 GiB, and its line number has 32 bits.
fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
