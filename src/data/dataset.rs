//! A checked data file: every row validated and measured, none held; examples are made again when asked for.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    batch::Batch,
    error::{DataError, Problems, RowProblem},
    example::{EncodedRow, Encoder, Example, RowError},
    jsonl::JsonlFile,
    rows::{FieldProblem, Row, RowFormat, parse_row},
    stats::{LengthSummary, Stats},
};

/// Where an example comes from and how long it is.
#[derive(Debug, Clone, Copy)]
struct Entry {
    row: u32,
    part: u32,
    n_tokens: u32,
    n_trained: u32,
}

/// The examples of one data file. Memory is 32 bytes an example.
#[derive(Debug)]
pub struct Dataset {
    file: JsonlFile,
    format: RowFormat,
    encoder: Arc<Encoder>,
    entries: Vec<Entry>,
    stats: Stats,
}

impl Dataset {
    /// Reads, checks and measures every row. With `format` absent it is detected over all rows.
    ///
    /// # Errors
    /// As [`JsonlFile::open`]; [`DataError::Rows`] with all bad rows; [`DataError::MixedFormats`];
    /// [`DataError::AllDropped`]; errors of the model's template or tokenizer.
    pub fn open(
        path: &Path,
        format: Option<RowFormat>,
        encoder: Arc<Encoder>,
    ) -> Result<Self, DataError> {
        let file = JsonlFile::open(path)?;
        let mut problems = Problems::default();
        let mut formats: BTreeMap<RowFormat, (usize, usize)> = BTreeMap::new();
        let mut entries = Vec::new();
        let mut stats = Stats {
            n_rows: file.n_rows(),
            ..Stats::default()
        };
        for row_idx in 0..file.n_rows() {
            let line = file.line_number(row_idx);
            let mut refuse = |problem: FieldProblem| {
                problems.push(RowProblem {
                    path: path.to_owned(),
                    line,
                    field: problem.field,
                    problem: problem.problem,
                    fix: problem.fix,
                });
            };
            let row = match parse_row(&file.row_bytes(row_idx)?, format) {
                Ok((format, row)) => {
                    formats.entry(format).or_insert((0, line)).0 += 1;
                    row
                }
                Err(found) => {
                    found.into_iter().for_each(&mut refuse);
                    continue;
                }
            };
            match encoder.encode_row(&row) {
                Ok(encoded) => {
                    stats.n_dropped += encoded.n_dropped;
                    stats.n_truncated += encoded.n_truncated;
                    stats.n_split_rows +=
                        usize::from(encoded.examples.len() + encoded.n_dropped > 1);
                    for (part, example) in encoded.examples.iter().enumerate() {
                        stats.n_without_end += usize::from(!ends(&encoder, example));
                        entries.push(Entry {
                            row: small(row_idx),
                            part: small(part),
                            n_tokens: small(example.input_ids.len()),
                            n_trained: small(example.n_trained()),
                        });
                    }
                }
                Err(RowError::Problem(problem)) => refuse(problem),
                Err(RowError::Other(error)) => return Err(error),
            }
        }
        if formats.len() > 1 {
            let found: Vec<_> = formats
                .iter()
                .map(|(format, (n_rows, line))| {
                    format!("{} in {n_rows} rows (first at line {line})", format.name())
                })
                .collect();
            return Err(DataError::MixedFormats {
                path: path.to_owned(),
                found: found.join(", "),
            });
        }
        let format = match formats.into_keys().next() {
            Some(format) if problems.is_empty() => format,
            _ => return Err(DataError::Rows(problems)),
        };
        if entries.is_empty() {
            return Err(DataError::AllDropped {
                path: path.to_owned(),
                max_seq_length: encoder.options().max_seq_length,
            });
        }
        stats.n_examples = entries.len();
        stats.tokens = LengthSummary::of(entries.iter().map(|entry| entry.n_tokens).collect());
        stats.trained_tokens =
            LengthSummary::of(entries.iter().map(|entry| entry.n_trained).collect());
        Ok(Self {
            file,
            format,
            encoder,
            entries,
            stats,
        })
    }

    /// The number of examples; at least one.
    #[expect(clippy::len_without_is_empty, reason = "a data set is never empty")]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The number of tokens of every example, in file order.
    pub fn lengths(&self) -> Vec<usize> {
        self.entries
            .iter()
            .map(|entry| entry.n_tokens as usize)
            .collect()
    }

    /// The rows' format.
    pub fn format(&self) -> RowFormat {
        self.format
    }

    /// What the data set holds.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The file, as it was named.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// SHA-256 of the file's bytes, in hexadecimal.
    pub fn sha256(&self) -> &str {
        self.file.sha256()
    }

    /// The encoder that the examples are made with.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// The row that an example was made from, with its line number.
    ///
    /// # Errors
    /// [`DataError::Read`]; [`DataError::Changed`] if the file is no longer what was checked.
    pub fn row(&self, example_idx: usize) -> Result<(usize, Row), DataError> {
        let row_idx = self.entries[example_idx].row as usize;
        let line = self.file.line_number(row_idx);
        match parse_row(&self.file.row_bytes(row_idx)?, Some(self.format)) {
            Ok((_, row)) => Ok((line, row)),
            Err(_) => Err(self.changed(line)),
        }
    }

    /// An example, read and tokenised again.
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn example(&self, example_idx: usize) -> Result<Example, DataError> {
        let entry = self.entries[example_idx];
        let (line, row) = self.row(example_idx)?;
        let EncodedRow { mut examples, .. } = match self.encoder.encode_row(&row) {
            Ok(encoded) => encoded,
            Err(RowError::Problem(_)) => return Err(self.changed(line)),
            Err(RowError::Other(error)) => return Err(error),
        };
        let part = entry.part as usize;
        if part >= examples.len() {
            return Err(self.changed(line));
        }
        let example = examples.swap_remove(part);
        if example.input_ids.len() != entry.n_tokens as usize
            || example.n_trained() != entry.n_trained as usize
        {
            return Err(self.changed(line));
        }
        Ok(example)
    }

    /// Several examples as one batch.
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn batch(&self, example_indices: &[usize]) -> Result<Batch, DataError> {
        let mut batch = Batch::default();
        for &idx in example_indices {
            batch.push(idx, &self.example(idx)?);
        }
        Ok(batch)
    }

    fn changed(&self, line: usize) -> DataError {
        DataError::Changed {
            path: self.file.path().to_owned(),
            line,
        }
    }
}

/// Whether the last trained token is an end.
fn ends(encoder: &Encoder, example: &Example) -> bool {
    example
        .loss_mask
        .iter()
        .rposition(|trained| *trained)
        .is_some_and(|idx| encoder.tokenizer().is_special(example.input_ids[idx]))
}

/// Row and token counts fit 32 bits: a line is at most 4 GiB and its number is kept in 32 bits.
fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{
        error::MAX_SHOWN,
        example::{EncodeOptions, Overlong, TrainOn},
        template::ChatTemplate,
        test_support::{THINKING, model_with_template, tiny_llama, write_temp},
        tokenizer::Tokenizer,
    };

    fn encoder(dir: &Path, max_seq_length: usize, overlong: Overlong) -> Arc<Encoder> {
        let options = EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template: true,
            max_seq_length,
            overlong,
        };
        let tokenizer = Tokenizer::from_dir(dir).expect("tokenizer");
        let template = ChatTemplate::from_dir(dir, None, std::time::UNIX_EPOCH).expect("template");
        Arc::new(Encoder::new(tokenizer, template, options))
    }

    fn open(text: &str) -> Result<Dataset, DataError> {
        let (_dir, path) = write_temp(text);
        Dataset::open(&path, None, encoder(&tiny_llama(), 200, Overlong::Error))
    }

    fn conversation(role: &str) -> String {
        format!(
            "{{\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}},{{\"role\":\"{role}\",\"content\":\"hello\"}}]}}\n"
        )
    }

    #[test]
    fn a_bad_role_is_named_by_file_line_and_field() {
        let (_dir, path) =
            write_temp(&(conversation("assistant").repeat(16) + &conversation("asistant")));
        let error = Dataset::open(&path, None, encoder(&tiny_llama(), 200, Overlong::Error))
            .expect_err("refused");
        assert_eq!(
            error.to_string(),
            format!(
                "{}:17: messages[1].role: unknown role \"asistant\"; expected system, user, assistant or tool",
                path.display()
            )
        );
        assert_eq!(error.exit_code(), 3);
    }

    #[test]
    fn every_bad_row_is_reported_and_the_rest_counted() {
        let error = open(&(conversation("assistant") + &"{\n".repeat(25))).expect_err("refused");
        let text = error.to_string();
        assert_eq!(text.lines().count(), MAX_SHOWN + 1);
        assert!(text.ends_with("and 5 more"), "{text}");
        let DataError::Rows(problems) = error else {
            panic!("{error}");
        };
        assert_eq!((problems.total(), problems.shown()[0].line), (25, 2));
    }

    #[test]
    fn a_row_without_a_trained_token_is_refused_by_line() {
        let error =
            open(&(conversation("assistant") + "\n" + &conversation("user"))).expect_err("refused");
        assert!(
            error
                .to_string()
                .contains("train.jsonl:3: messages: no assistant turn to train on"),
            "{error}"
        );
    }

    #[test]
    fn mixed_formats_are_reported() {
        let error = open(&(conversation("assistant").repeat(2) + "{\"text\":\"a\"}\n"))
            .expect_err("refused");
        assert!(
            error.to_string().ends_with("mixes formats: messages in 2 rows (first at line 1), text in 1 rows (first at line 3); split the file, or set data.format"),
            "{error}"
        );
    }

    #[test]
    fn stats_and_examples_agree() {
        let long = format!(
            "{{\"prompt\":\"{}\",\"completion\":\"a\"}}\n",
            "x".repeat(300)
        );
        let (_dir, path) =
            write_temp(&("{\"prompt\":\"p\",\"completion\":\"abc\"}\n".to_owned() + &long));
        let dataset =
            Dataset::open(&path, None, encoder(&tiny_llama(), 200, Overlong::Drop)).expect("opens");
        let stats = dataset.stats();
        assert_eq!((stats.n_rows, stats.n_examples, stats.n_dropped), (2, 1, 1));
        assert_eq!((stats.n_without_end, stats.n_split_rows), (0, 0));
        let example = dataset.example(0).expect("reads");
        assert_eq!(stats.tokens.max, example.input_ids.len());
        assert_eq!(stats.trained_tokens.total, example.n_trained() as u64);
        assert_eq!(dataset.format(), RowFormat::PromptCompletion);
        assert_eq!(dataset.sha256().len(), 64);
        let (_dir, path) = write_temp(&long);
        let error = Dataset::open(&path, None, encoder(&tiny_llama(), 200, Overlong::Drop))
            .expect_err("nothing left");
        assert!(matches!(error, DataError::AllDropped { .. }), "{error}");
    }

    #[test]
    fn split_rows_are_counted_and_read_back() {
        let model = model_with_template(THINKING, false);
        let turn = r#"{"role":"user","content":"u"},{"role":"assistant","content":"a"}"#;
        let (_dir, path) = write_temp(&format!("{{\"messages\":[{turn},{turn}]}}\n"));
        let dataset =
            Dataset::open(&path, None, encoder(model.path(), 200, Overlong::Error)).expect("opens");
        assert_eq!((dataset.len(), dataset.stats().n_split_rows), (2, 1));
        assert_ne!(
            dataset.example(0).expect("reads"),
            dataset.example(1).expect("reads")
        );
        let batch = dataset.batch(&[1, 0]).expect("reads");
        assert_eq!(batch.examples, [1, 0]);
        assert_eq!(batch.segments.len(), 2);
    }

    #[test]
    fn a_file_changed_underneath_is_noticed() {
        let (_dir, path) = write_temp(&conversation("assistant"));
        let dataset = Dataset::open(&path, None, encoder(&tiny_llama(), 200, Overlong::Error))
            .expect("opens");
        let changed = std::fs::read_to_string(&path)
            .expect("reads")
            .replace("hello", "h\u{e9}lo");
        std::fs::write(&path, changed.replace("\"hi\"", "\"h\"")).expect("writes");
        assert!(matches!(
            dataset.example(0),
            Err(DataError::Changed { line: 1, .. })
        ));
    }
}
