//! A checked data file: every row validated and measured, none held; examples are made again when asked for.

use std::{path::Path, sync::Arc};

use monteclora_converters::Problems;

use super::{
    batch::Batch,
    error::{DataError, bad_data, changed},
    example::{EncodedRow, Encoder, Example},
    rows::{Row, RowFormat, parse_named_row},
    source::{Source, Split},
    stats::Stats,
    survey::{Entry, RowSchema, Survey},
};

/// The examples of one source. Memory is 16 bytes an example beside the 24 a row of its files.
#[derive(Debug)]
pub struct Dataset {
    source: Source,
    format: RowFormat,
    schema: RowSchema,
    encoder: Arc<Encoder>,
    entries: Vec<Entry>,
    stats: Stats,
}

impl Dataset {
    /// Reads, checks and measures every row of a file, or of a directory's training files. With `format` absent it is
    /// detected over all rows.
    ///
    /// # Errors
    /// As [`Self::open_split`].
    pub fn open(
        path: &Path,
        format: Option<RowFormat>,
        encoder: Arc<Encoder>,
    ) -> Result<Self, DataError> {
        Self::open_split(path, Split::Train, format.into(), encoder)
    }

    /// Reads, checks and measures every row of a split.
    ///
    /// # Errors
    /// As [`Source::open`]; all bad rows; rows of several formats, or all of them too long; errors of the model's template
    /// or tokenizer.
    pub fn open_split(
        name: &Path,
        split: Split,
        schema: RowSchema,
        encoder: Arc<Encoder>,
    ) -> Result<Self, DataError> {
        let source = Source::open(name, split)?;
        let mut problems = Problems::default();
        let survey = Survey::take(&source, &schema, Some(&encoder), |problem| {
            problems.push(problem.into());
        })?;
        let format = match survey.format(&source)? {
            Some(format) if problems.is_empty() => format,
            _ => return Err(problems.into()),
        };
        let stats = survey.stats.clone();
        let entries = survey.into_entries();
        if entries.is_empty() {
            return Err(bad_data(
                "all-dropped",
                format!(
                    "every row of `{}` is longer than max_seq_length {}; raise data.max_seq_length, or set data.overlong = \"truncate\"",
                    name.display(),
                    encoder.options().max_seq_length
                ),
            ));
        }
        Ok(Self {
            source,
            format,
            schema,
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

    /// The source, as it was named.
    pub fn path(&self) -> &Path {
        self.source.name()
    }

    /// The commit of a data set on the Hub.
    pub fn revision(&self) -> Option<&str> {
        self.source.revision()
    }

    /// SHA-256 of the source's bytes, in hexadecimal; see [`Source::sha256`].
    pub fn sha256(&self) -> String {
        self.source.sha256()
    }

    /// The encoder that the examples are made with.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// The row that an example was made from, with its line number.
    ///
    /// # Errors
    /// A file that cannot be read, or is no longer what was checked.
    pub fn row(&self, example_idx: usize) -> Result<(usize, Row), DataError> {
        let row_idx = self.entries[example_idx].row as usize;
        let (path, line) = self.source.place(row_idx);
        let bytes = self.source.row_bytes(row_idx)?;
        match parse_named_row(&bytes, Some(self.format), &self.schema.fields) {
            Ok((_, row)) => Ok((line, row)),
            Err(_) => Err(changed(path, line)),
        }
    }

    /// An example, read and tokenised again.
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn example(&self, example_idx: usize) -> Result<Example, DataError> {
        let entry = self.entries[example_idx];
        let (_, row) = self.row(example_idx)?;
        let changed = || {
            let (path, line) = self.source.place(entry.row as usize);
            changed(path, line)
        };
        let EncodedRow { mut examples, .. } = match self.encoder.encode_row(&row) {
            Ok(encoded) => encoded,
            Err(error) => return Err(error.of_row().map_or_else(|error| error, |_| changed())),
        };
        let part = entry.part as usize;
        if part >= examples.len() {
            return Err(changed());
        }
        let example = examples.swap_remove(part);
        if example.input_ids.len() != entry.n_tokens as usize
            || example.n_trained() != entry.n_trained as usize
        {
            return Err(changed());
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
}

#[cfg(test)]
mod tests {
    use monteclora_converters::exit_code;

    use super::*;
    use crate::data::{
        example::{EncodeOptions, Overlong, Remedies, TrainOn},
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
            remedies: Remedies::Keys,
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
        assert_eq!(exit_code(&error, |_| None), 3);
    }

    #[test]
    fn every_bad_row_is_reported_and_the_rest_counted() {
        let error = open(&(conversation("assistant") + &"{\n".repeat(25))).expect_err("refused");
        let text = error.to_string();
        assert_eq!(text.lines().count(), 21);
        assert!(text.ends_with("and 5 more"), "{text}");
        assert!(error.problems()[0].at.contains(":2: "), "{text}");
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
            error.to_string().ends_with("mixes formats: messages in 2 rows (line 1, 2); text in 1 row (line 3); split the file, or set data.format"),
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
        assert_eq!(error.code(), "all-dropped", "{error}");
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
        let error = dataset.example(0).expect_err("changed");
        assert!(
            error.to_string().contains(":1: the file changed"),
            "{error}"
        );
    }
}
