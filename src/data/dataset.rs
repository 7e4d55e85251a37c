//! A checked data file. Every row is validated and measured, but none is kept in memory; examples are encoded again on
//! demand.

use std::{path::Path, sync::Arc};

use monteclora_converters::{Error, Problems};

use super::{
    error::{bad_data, changed, fault_of_row},
    example::{Encoder, Example},
    rows::{Row, RowFormat},
    source::{Source, Split},
    stats::Stats,
    survey::{Entry, RowSchema, Survey},
};

/// The examples of one source. They take 16 bytes of memory per example, and 24 per row of the source's files.
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
    /// Reads, checks and measures every row of a file, or of a directory's training files. If `format` is `None`, it is
    /// detected from all rows.
    ///
    /// # Errors
    /// As [`Self::open_split`].
    pub fn open(
        path: &Path,
        format: Option<RowFormat>,
        encoder: Arc<Encoder>,
    ) -> Result<Self, Error> {
        Self::open_split(path, Split::Train, format.into(), encoder)
    }

    /// Reads, checks and measures every row of a split.
    ///
    /// # Errors
    /// As [`Source::open`]. Also returns an error that lists all bad rows, if the rows have several formats, if every
    /// row is too long, or if the model's template or tokenizer fails.
    pub fn open_split(
        name: &Path,
        split: Split,
        schema: RowSchema,
        encoder: Arc<Encoder>,
    ) -> Result<Self, Error> {
        let source = Source::open(name, split)?;
        let mut problems = Problems::default();
        let survey = Survey::take(&source, &schema, Some(&encoder), |problem| {
            problems.push(problem.into());
        })?;
        let format = survey.format(&source)?;
        if !problems.is_empty() {
            return Err(problems.into());
        }
        let (Some(format), false) = (format, survey.entries.is_empty()) else {
            let (path, limit) = (name.display(), encoder.options().max_seq_length);
            return Err(bad_data(
                "all-dropped",
                format!(
                    "every row of `{path}` is longer than max_seq_length {limit}; raise data.max_seq_length, or set data.overlong = \"truncate\""
                ),
            ));
        };
        if let Some(found) = survey.findings.warning() {
            tracing::warn!(
                "`{}`: {found}; `monteclora data check` lists all",
                name.display()
            );
        }
        Ok(Self {
            source,
            format,
            schema,
            encoder,
            entries: survey.entries,
            stats: survey.stats,
        })
    }

    /// The number of examples; at least one.
    #[expect(clippy::len_without_is_empty, reason = "a data set is never empty")]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The number of tokens of every example, in file order.
    pub fn lengths(&self) -> Vec<usize> {
        let lengths = self.entries.iter().map(|entry| entry.n_tokens as usize);
        lengths.collect()
    }

    /// The rows' format.
    pub fn format(&self) -> RowFormat {
        self.format
    }

    /// Statistics of the data set.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The name of the source, as given.
    pub fn path(&self) -> &Path {
        self.source.name()
    }

    /// The commit, for a data set on the Hub.
    pub fn revision(&self) -> Option<&str> {
        self.source.revision()
    }

    /// Number of tokens of an example.
    pub fn n_tokens(&self, example_idx: usize) -> usize {
        self.entries[example_idx].n_tokens as usize
    }

    /// Number of tokens of an example that carry loss.
    pub fn n_trained(&self, example_idx: usize) -> usize {
        self.entries[example_idx].n_trained as usize
    }

    /// SHA-256 of the source's bytes, in hexadecimal; see [`Source::sha256`].
    pub fn sha256(&self) -> String {
        self.source.sha256()
    }

    /// The encoder that makes the examples.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// The row that an example was made from, with its line number.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or changed after it was checked.
    pub fn row(&self, example_idx: usize) -> Result<(usize, Row), Error> {
        let row_idx = self.entries[example_idx].row as usize;
        let (path, line) = self.source.place(row_idx);
        let bytes = self.source.row_bytes(row_idx)?;
        match self.schema.parse(&bytes) {
            Ok((_, row)) => Ok((line, row)),
            Err(_) => Err(changed(path, line)),
        }
    }

    /// The line number of the row that an example was made from.
    pub fn line(&self, example_idx: usize) -> usize {
        self.source.place(self.entries[example_idx].row as usize).1
    }

    /// Reads and tokenises an example again.
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn example(&self, example_idx: usize) -> Result<Example, Error> {
        let entry = self.entries[example_idx];
        let (line, row) = self.row(example_idx)?;
        let examples = match self.encoder.encode_row(&row) {
            Ok(encoded) => encoded.examples,
            Err(error) => fault_of_row(error).map(|_| Vec::new())?,
        };
        let example = examples.into_iter().nth(entry.part as usize);
        example
            .filter(|example| {
                example.input_ids.len() == entry.n_tokens as usize
                    && example.n_trained() == entry.n_trained as usize
            })
            .ok_or_else(|| changed(self.source.place(entry.row as usize).0, line))
    }
}

#[cfg(test)]
mod tests {
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

    fn open(text: &str) -> Result<Dataset, Error> {
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
        assert_eq!(monteclora_converters::exit_code(&error, |_| None), 3);
    }

    #[test]
    fn every_bad_row_is_reported_and_the_rest_counted() {
        let error = open(&(conversation("assistant") + &"{\n".repeat(25))).expect_err("refused");
        let text = error.to_string();
        assert_eq!(text.lines().count(), 21);
        assert!(text.ends_with("and 5 more"), "{text}");
        assert!(error.problems()[0].at.ends_with("train.jsonl:2: row"));
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
            error.to_string().ends_with("mixes formats: messages in 2 rows (line 1, 2); text in 1 row (line 3); split the file into one per format"),
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
        assert!(error.to_string().starts_with("every row of `"), "{error}");
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
        let error = dataset.example(0).expect_err("changed").to_string();
        let expected = "train.jsonl:1: the file changed after it was checked; start again";
        assert!(error.ends_with(expected), "{error}");
    }
}
