//! Exact match: the model must give the expected answers word for word.

use monteclora_converters::Error;

use super::{Prediction, certainties, not_finite};
use crate::data::{Dataset, Message, Role, RowContent};
use crate::model::{ActiveAdapter, Decoder, Generation, GenerationSettings};

/// The input before an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Opening {
    /// The turns of a conversation.
    Turns(Vec<Message>),
    /// A text that the answer continues.
    Text(String),
}

impl Opening {
    /// The text, or the text of the last turn.
    pub fn text(&self) -> &str {
        match self {
            Self::Turns(turns) => turns.last().map_or("", Message::content),
            Self::Text(text) => text,
        }
    }
}

/// Rows whose answer, the last turn or the completion, the model must give word for word.
#[derive(Debug)]
pub struct Recital<'a> {
    data: &'a Dataset,
    /// The inputs before the answers.
    pub questions: Vec<Opening>,
    /// The same inputs as tokens.
    pub prompts: Vec<Vec<u32>>,
    /// Settings of the generated answers.
    pub settings: GenerationSettings,
    expected: Vec<String>,
}

impl<'a> Recital<'a> {
    /// Takes all conversations and prompts of `data`. Answers have at most `max_new_tokens`; `batch_size` of them are
    /// generated at a time.
    ///
    /// # Errors
    /// Returns an error if a row cannot be read or rendered.
    pub fn new(data: &'a Dataset, max_new_tokens: usize, batch_size: usize) -> Result<Self, Error> {
        let all: Vec<usize> = (0..data.len()).collect();
        Self::of(data, &all, max_new_tokens, batch_size)
    }

    /// As [`Self::new`], with only the given `rows` of `data`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of(
        data: &'a Dataset,
        rows: &[usize],
        max_new_tokens: usize,
        batch_size: usize,
    ) -> Result<Self, Error> {
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
        for index in rows {
            let (_, row) = data.row(*index)?;
            let (opening, answer) = match &row.content {
                RowContent::Conversation { messages, .. } => match messages.split_last() {
                    Some((answer, turns)) => (Opening::Turns(turns.to_vec()), answer.content()),
                    None => continue,
                },
                RowContent::Prompt {
                    system,
                    prompt,
                    completion,
                    ..
                } if encoder.options().apply_chat_template => {
                    let system = system.iter().map(|text| Message::new(Role::System, text));
                    let turns = system.chain([Message::new(Role::User, prompt)]);
                    (Opening::Turns(turns.collect()), completion.as_str())
                }
                RowContent::Prompt {
                    prompt, completion, ..
                } => (Opening::Text(prompt.clone()), completion.as_str()),
                RowContent::Text(_) => continue,
            };
            found.prompts.push(encoder.row_prompt(&row)?);
            found.questions.push(opening);
            found.expected.push(answer.trim().to_owned());
        }
        Ok(found)
    }

    /// Generates the greedy answers. `done` receives the number of finished answers.
    ///
    /// # Errors
    /// As [`Decoder::generate`].
    pub fn answers(
        &self,
        decoder: &Decoder,
        adapter: &ActiveAdapter,
        done: impl FnMut(usize),
    ) -> monteclora_adapters::Result<Vec<Generation>> {
        decoder.generate(&self.prompts, adapter, &self.settings, done)
    }

    /// The text of an answer.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails.
    pub fn text(&self, answer: &Generation) -> Result<String, Error> {
        self.data.encoder().tokenizer().decode(&answer.tokens, true)
    }

    /// One line of JSON per row with the answers of two models, for people to read.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails.
    pub fn lines(&self, base: &[Generation], mean: &[Generation]) -> Result<String, Error> {
        let mut lines = String::new();
        for (index, (base, mean)) in base.iter().zip(mean).enumerate() {
            let line = serde_json::json!({
                "ticket": self.questions[index].text(),
                "expected": self.expected[index],
                "base": self.text(base)?,
                "mean": self.text(mean)?,
            });
            lines.push_str(&format!("{line}\n"));
        }
        Ok(lines)
    }

    /// Whether each answer ended and equals the expected text. White space around it is ignored.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails.
    pub fn right(&self, answers: &[Generation]) -> Result<Vec<bool>, Error> {
        let pairs = answers.iter().zip(&self.expected);
        let is_right = |(answer, expected): (&Generation, &String)| {
            Ok(answer.end.is_some() && self.text(answer)?.trim() == expected)
        };
        pairs.map(is_right).collect()
    }

    /// Predictions that each answer is right, from `log_confidence`, the logarithms of the answers' probabilities.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails or a confidence is NaN.
    pub fn predictions(
        &self,
        answers: &[Generation],
        log_confidence: impl Iterator<Item = f64>,
    ) -> Result<Vec<Prediction>, Error> {
        let said = log_confidence.zip(self.right(answers)?);
        let said = said.map(|(log_p, right)| {
            let prediction = Prediction::of_answer(log_p, right);
            Ok(prediction.ok_or_else(|| not_finite("the likelihood of an answer"))?)
        });
        said.collect()
    }

    /// [`Self::predictions`] with the probabilities under the model that gave the answers.
    ///
    /// # Errors
    /// As [`Self::predictions`].
    pub fn own_predictions(&self, answers: &[Generation]) -> Result<Vec<Prediction>, Error> {
        self.predictions(answers, answers.iter().map(|answer| answer.log_probability))
    }

    /// [`Self::predictions`] with the average probabilities under `adapters`.
    ///
    /// # Errors
    /// As [`Self::predictions`], or if the decoder fails.
    pub fn average_predictions(
        &self,
        decoder: &Decoder,
        answers: &[Generation],
        adapters: &[ActiveAdapter],
    ) -> anyhow::Result<Vec<Prediction>> {
        let found = certainties(decoder, &self.prompts, answers, adapters)?;
        Ok(self.predictions(answers, found.iter().map(|c| c.log_confidence))?)
    }

    /// The share of answers that are right.
    ///
    /// # Errors
    /// As [`Self::right`].
    pub fn exact_match(&self, answers: &[Generation]) -> Result<f64, Error> {
        let exact = self
            .right(answers)?
            .into_iter()
            .filter(|right| *right)
            .count();
        Ok(exact as f64 / answers.len().max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_support::{tiny_llama, write_temp};
    use crate::data::{EncodeOptions, Encoder, Overlong, Remedies, TrainOn};

    /// Two rows with prompts, with or without the chat template.
    fn rows(apply_chat_template: bool) -> (tempfile::TempDir, Dataset) {
        let text = r#"{"prompt":"One:","completion":" 1"}
{"prompt":"Two:","completion":" 2"}
"#;
        let (dir, path) = write_temp(text);
        let options = EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template,
            max_seq_length: 100,
            overlong: Overlong::Error,
            remedies: Remedies::Keys,
        };
        let encoder = Encoder::from_dir(&tiny_llama(), None, options).expect("an encoder");
        let data = Dataset::open(&path, None, encoder).expect("two rows");
        (dir, data)
    }

    #[test]
    fn a_prompt_is_asked_as_it_is_trained() {
        let (_dir, data) = rows(false);
        let recital = Recital::new(&data, 4, 1).expect("prompts");
        let bare = Opening::Text("One:".to_owned());
        assert_eq!(recital.questions[0], bare);
        let (_dir, chats) = rows(true);
        let in_turns = Recital::new(&chats, 4, 1).expect("prompts");
        let turns = Opening::Turns(vec![Message::new(Role::User, "One:")]);
        assert_eq!(in_turns.questions[0], turns);
        assert_eq!(in_turns.questions[0].text(), bare.text());
        assert!(in_turns.prompts[0].len() > recital.prompts[0].len());
        for (data, recital) in [(&data, recital), (&chats, in_turns)] {
            let example = data.example(0).expect("a row");
            let first = example.loss_mask.iter().position(|trained| *trained);
            let before = &example.input_ids[..first.expect("an answer")];
            assert_eq!(recital.prompts[0], before);
        }
    }

    #[test]
    fn only_whole_answers_match() {
        let (_dir, data) = rows(false);
        let recital = Recital::new(&data, 4, 1).expect("prompts");
        let answer = |text: &str, stopped: bool| Generation {
            tokens: data
                .encoder()
                .tokenizer()
                .encode(text, false)
                .expect("tokens"),
            end: stopped.then_some(0),
            log_probability: 0.0,
        };
        let score = |one, two| recital.exact_match(&[one, two]).expect("decoded");
        assert_eq!(score(answer(" 1", true), answer("2", true)), 1.0);
        assert_eq!(score(answer(" 1", false), answer(" 2", true)), 0.5);
        assert_eq!(score(answer(" 1 or 2", true), answer(" 1", true)), 0.0);
        let lines = recital
            .lines(
                &[answer("a", true), answer("b", true)],
                &[answer("c", true), answer(" 2", true)],
            )
            .expect("lines");
        let last: serde_json::Value =
            serde_json::from_str(lines.lines().last().expect("a line")).expect("JSON");
        let expected =
            serde_json::json!({"ticket": "Two:", "expected": "2", "base": "b", "mean": " 2"});
        assert_eq!(last, expected);
    }
}
