//! Exact match: answers that must be found again word for word.

use monteclora_converters::Error;

use crate::data::{Dataset, Message, RowContent};
use crate::model::{ActiveAdapter, Decoder, Generation, GenerationSettings};

/// Conversations whose last turn is to be found again, word for word.
#[derive(Debug)]
pub struct Recital<'a> {
    data: &'a Dataset,
    /// The turns before the last.
    pub questions: Vec<Vec<Message>>,
    /// The same as tokens.
    pub prompts: Vec<Vec<u32>>,
    /// How answers are made.
    pub settings: GenerationSettings,
    expected: Vec<String>,
}

impl<'a> Recital<'a> {
    /// The conversations of `data`, answered in at most `max_new_tokens`, `batch_size` at a time.
    ///
    /// # Errors
    /// Rows that cannot be read or rendered.
    pub fn new(data: &'a Dataset, max_new_tokens: usize, batch_size: usize) -> Result<Self, Error> {
        let encoder = data.encoder();
        let mut found = Self {
            prompts: Vec::new(),
            questions: Vec::new(),
            expected: Vec::new(),
            settings: GenerationSettings {
                max_new_tokens,
                stop_tokens: encoder.stop_ids(),
                batch_size,
            },
            data,
        };
        for index in 0..data.len() {
            let (_, row) = data.row(index)?;
            let RowContent::Conversation { messages, .. } = &row.content else {
                continue;
            };
            let Some((answer, prompt)) = messages.split_last() else {
                continue;
            };
            found.prompts.push(encoder.row_prompt(&row)?);
            found.questions.push(prompt.to_vec());
            found.expected.push(answer.content().to_owned());
        }
        Ok(found)
    }

    /// The greedy answers; `done` is told how many there are.
    ///
    /// # Errors
    /// Those of the decoder.
    pub fn answers(
        &self,
        decoder: &Decoder,
        adapter: &ActiveAdapter,
        done: impl FnMut(usize),
    ) -> monteclora_adapters::Result<Vec<Generation>> {
        decoder.generate(&self.prompts, adapter, &self.settings, done)
    }

    /// An answer's text.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn text(&self, answer: &Generation) -> Result<String, Error> {
        self.data.encoder().tokenizer().decode(&answer.tokens, true)
    }

    /// One line of JSON per conversation, to read what two models said.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn lines(&self, base: &[Generation], mean: &[Generation]) -> Result<String, Error> {
        let mut lines = String::new();
        for (index, (base, mean)) in base.iter().zip(mean).enumerate() {
            let line = serde_json::json!({
                "ticket": self.questions[index].last().map(Message::content),
                "expected": self.expected[index],
                "base": self.text(base)?,
                "mean": self.text(mean)?,
            });
            lines.push_str(&format!("{line}\n"));
        }
        Ok(lines)
    }

    /// The share of answers that ended and are the expected text.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn exact_match(&self, answers: &[Generation]) -> Result<f64, Error> {
        let mut exact = 0usize;
        for (answer, expected) in answers.iter().zip(&self.expected) {
            exact += usize::from(answer.stopped && self.text(answer)?.trim() == expected);
        }
        Ok(exact as f64 / answers.len().max(1) as f64)
    }
}
