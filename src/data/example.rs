//! Turns rows and conversations into tokens: for training with a loss mask, for evaluation and for generation.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use monteclora_converters::{Error, Problem};
use serde_json::{Map, Value};

use super::{
    error::{bad_data, field_problem},
    printed::refuse_unprinted,
    rows::{Message, Role, Row, RowContent},
    template::{Beside, ChatTemplate},
    tokenizer::{SpannedToken, Tokenizer},
};

mod conversation;
mod options;

use conversation::last;

pub use options::{EncodeOptions, Overlong, Remedies, TrainOn};

/// Setting that trains every token of a conversation.
const ALL: &str = "train_on = \"all\"";

/// End-of-turn tokens that mistral.rs also stops at when the chat template mentions them.
const TURN_ENDS: [&str; 8] = [
    "<|im_end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot_id|>",
    "<|message|>",
    "<|start|>",
    "<|channel|>",
];

/// One training sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Whether each token is to be predicted; as long as `input_ids`. The first token has no predecessor, so it never
    /// counts.
    pub loss_mask: Vec<bool>,
}

impl Example {
    /// The number of predicted tokens.
    pub fn n_trained(&self) -> usize {
        let predicted = self.loss_mask.iter().skip(1);
        predicted.filter(|trained| **trained).count()
    }

    /// The range from the first to the last trained token. If no token is trained, an empty range at the end.
    fn trained_range(&self) -> Range<usize> {
        let mask = &self.loss_mask;
        let first = mask.iter().position(|trained| *trained);
        let last = mask.iter().rposition(|trained| *trained);
        first.unwrap_or(mask.len())..last.map_or(mask.len(), |last| last + 1)
    }
}

/// The result of encoding one row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedRow {
    /// The examples that remain; more than one if the template rewrites earlier turns.
    pub examples: Vec<Example>,
    /// Number of examples left out because they are too long.
    pub n_dropped: usize,
    /// Number of examples cut to `max_seq_length`.
    pub n_truncated: usize,
}

/// A conversation that ends before the assistant's turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// The messages, each with the keys that the row gives it.
    pub messages: Vec<Map<String, Value>>,
    /// The tools that the model may call.
    pub tools: Vec<Value>,
    /// The text that the chat template makes of the messages, or the template's error message.
    pub text: Result<String, String>,
}

/// The answers to a row with `choices`, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceSet {
    /// One entry per answer, in the row's order.
    pub choices: Vec<ChoiceTokens>,
    /// Index of the right answer.
    pub answer: usize,
}

impl ChoiceSet {
    /// Number of tokens in a forward pass over all choices, in which a prompt that neighbours share is computed once.
    pub fn n_tokens(&self) -> usize {
        let mut n_tokens = 0;
        let mut before: &[u32] = &[];
        for choice in &self.choices {
            let (prompt, answer) = choice.tokens.split_at(choice.n_prompt);
            n_tokens += answer.len() + if prompt == before { 0 } else { prompt.len() };
            before = prompt;
        }
        n_tokens
    }
}

/// One answer after its prompt. Each answer carries its own prompt, because its first token may merge with the prompt's
/// last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceTokens {
    /// Prompt and answer, without an end token.
    pub tokens: Vec<u32>,
    /// Number of prompt tokens at the start of `tokens`, at least 1.
    pub n_prompt: usize,
}

/// Turns rows and prompts into tokens with one model's tokenizer and chat template.
///
/// # Beginning of text
/// A rendered conversation is tokenised without special tokens, because templates print their own. transformers'
/// `apply_chat_template` does the same, and the plugin makes mistral.rs do the same. Bare text gets the tokenizer's
/// BOS.
///
/// # The loss mask
/// Turn `i` is the text that rendering `messages[..=i]` adds to rendering `messages[..i]` with the generation prompt.
/// The tokenizer's offsets map these byte ranges to tokens. White space after the end-of-turn token is not trained,
/// because it is never generated. If the template has `{% generation %}` blocks, the blocks decide which part of a turn
/// is trained, as in transformers' `return_assistant_tokens_mask`. If a later message changes how the template prints
/// an earlier turn (templates that strip thinking), the row becomes one example per turn, each with exactly the text
/// that the model would see.
#[derive(Debug)]
pub struct Encoder {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    options: EncodeOptions,
    stop_ids: Vec<u32>,
}

impl Encoder {
    /// Creates an encoder. Without a template it can encode only text rows and plain prompts.
    pub fn new(
        tokenizer: impl Into<Arc<Tokenizer>>,
        template: Option<ChatTemplate>,
        options: EncodeOptions,
    ) -> Self {
        let tokenizer = tokenizer.into();
        Self {
            stop_ids: stop_ids(&tokenizer, template.as_ref()),
            tokenizer,
            template,
            options,
        }
    }

    /// Creates the encoder of the model in `dir`. `chat_template` is a file that replaces the model's own template.
    ///
    /// # Errors
    /// Returns an error if the tokenizer is missing, or if the tokenizer or the template is malformed.
    pub fn from_dir(
        dir: &Path,
        chat_template: Option<&Path>,
        options: EncodeOptions,
    ) -> Result<Arc<Self>, Error> {
        Self::with_variables(dir, chat_template, Map::new(), options)
    }

    /// As [`Self::from_dir`], with variables that the template gets for every conversation.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn with_variables(
        dir: &Path,
        chat_template: Option<&Path>,
        variables: Map<String, Value>,
        options: EncodeOptions,
    ) -> Result<Arc<Self>, Error> {
        Self::at_time(dir, chat_template, variables, options, SystemTime::now())
    }

    /// As [`Self::with_variables`], for templates that write the date: `now` is the time they get.
    ///
    /// # Errors
    /// As [`Self::from_dir`].
    pub fn at_time(
        dir: &Path,
        chat_template: Option<&Path>,
        variables: Map<String, Value>,
        options: EncodeOptions,
        now: SystemTime,
    ) -> Result<Arc<Self>, Error> {
        let tokenizer = Tokenizer::from_dir(dir)?;
        let template = ChatTemplate::from_dir(dir, chat_template, now)?;
        let template = template.map(|template| template.with_variables(variables));
        Ok(Arc::new(Self::new(tokenizer, template, options)))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// SHA-256 of the chat template and its variables; `None` if the encoder does not apply a template to prompts.
    pub fn chat_template_sha256(&self) -> Option<String> {
        self.chat_template_sha256_with(&Map::new())
    }

    /// As [`Self::chat_template_sha256`], with the variables of a row, which override the encoder's.
    pub fn chat_template_sha256_with(&self, of_row: &Map<String, Value>) -> Option<String> {
        let applied = self
            .template
            .as_ref()
            .filter(|_| self.options.apply_chat_template);
        applied.map(|template| template.sha256(of_row))
    }

    /// The options.
    pub fn options(&self) -> &EncodeOptions {
        &self.options
    }

    /// The token ids at which generation stops: the tokenizer's end tokens, and the well-known end-of-turn tokens that
    /// the template mentions. mistral.rs uses the same rule.
    pub fn stop_ids(&self) -> Vec<u32> {
        self.stop_ids.clone()
    }

    /// The tokens of a conversation that the model is to continue, generation prompt included.
    ///
    /// # Errors
    /// Returns an error if there is no template, or if the template or the tokenizer fails.
    pub fn prompt_tokens(&self, messages: &[Message], tools: &[Value]) -> Result<Vec<u32>, Error> {
        let variables = &Map::new();
        self.opened(messages, Beside { tools, variables })
    }

    fn opened(&self, messages: &[Message], beside: Beside<'_>) -> Result<Vec<u32>, Error> {
        let template = self.chat_template()?;
        refuse_unprinted(template, messages, beside)?;
        let text = template.render_with(messages, beside, true)?.text;
        Ok(ids(self.tokenizer.encode_spans(&text)?))
    }

    /// The tokens of a bare prompt, without a template. The tokenizer's BOS comes first, unless the text already begins
    /// with it.
    ///
    /// # Errors
    /// Returns an error if the tokenizer fails.
    pub fn plain_prompt_tokens(&self, prompt: &str) -> Result<Vec<u32>, Error> {
        let mut ids = match self.tokenizer.begins_itself(prompt) {
            true => Vec::new(),
            false => self.tokenizer.prefix_ids().to_vec(),
        };
        ids.extend(self.tokenizer.encode(prompt, false)?);
        Ok(ids)
    }

    /// Warnings about variables that are set for every conversation but do not occur in the chat template.
    pub fn unread_variables(&self) -> Vec<Problem> {
        let unread = self
            .template
            .iter()
            .flat_map(ChatTemplate::unread_variables);
        unread
            .map(|name| {
                let message = "a variable that the chat template does not have: it changes nothing";
                let fix = "correct its name or leave it out";
                Problem::new(
                    "unread-variable",
                    format!("data.template_variables.{name}"),
                    message,
                    fix,
                )
            })
            .collect()
    }

    /// What a row asks as a conversation, and the text that the model gets, with the generation prompt. Returns `None`
    /// for a row that is encoded without the template. The text is the template's error message if the template refuses
    /// the row.
    ///
    /// # Errors
    /// Returns an error if there is no template.
    pub fn asked(&self, row: &Row) -> Result<Option<Asked>, Error> {
        let (messages, tools) = match &row.content {
            RowContent::Conversation { messages, tools } => {
                let end = last(Role::Assistant, messages).unwrap_or(messages.len());
                (messages[..end].to_vec(), tools)
            }
            RowContent::Prompt {
                system,
                prompt,
                tools,
                ..
            } if self.options.apply_chat_template => (asked(system.as_deref(), prompt), tools),
            RowContent::Prompt { .. } | RowContent::Text(_) => return Ok(None),
        };
        let variables = &row.variables;
        let rendered =
            self.chat_template()?
                .render_with(&messages, Beside { tools, variables }, true);
        Ok(Some(Asked {
            messages: messages.iter().map(|m| m.fields().clone()).collect(),
            tools: tools.clone(),
            text: rendered
                .map(|rendered| rendered.text)
                .map_err(|error| error.to_string()),
        }))
    }

    /// The tokens of a row's prompt for generation: everything before the last assistant turn, or the prompt.
    ///
    /// # Errors
    /// Returns an error for a text row, which has no prompt, or if the template or the tokenizer fails.
    pub fn row_prompt(&self, row: &Row) -> Result<Vec<u32>, Error> {
        let variables = &row.variables;
        match &row.content {
            RowContent::Conversation { messages, tools } => {
                let end = last(Role::Assistant, messages).unwrap_or(messages.len());
                self.opened(&messages[..end], Beside { tools, variables })
            }
            RowContent::Prompt {
                system,
                prompt,
                tools,
                ..
            } if self.options.apply_chat_template => {
                let beside = Beside { tools, variables };
                self.opened(&asked(system.as_deref(), prompt), beside)
            }
            RowContent::Prompt {
                system,
                prompt,
                tools,
                ..
            } => {
                refuse_without_template(system.as_deref(), tools)?;
                self.plain_prompt_tokens(prompt)
            }
            RowContent::Text(_) => refuse(
                "text",
                "a text row has no prompt",
                "expected messages, or prompt and completion",
            ),
        }
    }

    /// Encodes a row as examples.
    ///
    /// # Errors
    /// Returns an error if the template refuses the row, if the row has no token to train on, or if it is too long and
    /// [`Overlong::Error`] is set. [`super::fault_of_row`] separates these errors from faults of the model.
    pub fn encode_row(&self, row: &Row) -> Result<EncodedRow, Error> {
        let variables = &row.variables;
        let (field, examples) = match &row.content {
            RowContent::Conversation { messages, tools } => (
                "messages",
                self.conversation(messages, Beside { tools, variables }, self.options.train_on)?,
            ),
            RowContent::Prompt { completion, .. } => {
                let example = self.prompt_and_completion(row, completion)?;
                ("completion", vec![example])
            }
            RowContent::Text(text) => {
                let input_ids = self.plain_prompt_tokens(self.ended(text))?;
                let loss_mask = vec![true; input_ids.len()];
                let example = self.with_end(text, input_ids, loss_mask)?;
                ("text", vec![example])
            }
        };
        let mut encoded = EncodedRow::default();
        for example in examples {
            self.fit(field, example, &mut encoded)?;
        }
        Ok(encoded)
    }

    /// The tokens of a row's choices, each put in the place of the answer; `None` for a row without choices.
    ///
    /// # Errors
    /// As [`Self::encode_row`]. Also returns an error if a choice has no tokens, if there is no prompt before it or no
    /// answer that it could replace, or if a choice and its prompt are longer than `max_seq_length`.
    pub fn choice_tokens(&self, row: &Row) -> Result<Option<ChoiceSet>, Error> {
        let Some(asked) = &row.choices else {
            return Ok(None);
        };
        let texts = asked.texts.iter().enumerate();
        let choices = texts.map(|(idx, text)| self.choice(row, idx, text));
        Ok(Some(ChoiceSet {
            choices: choices.collect::<Result<_, _>>()?,
            answer: asked.answer,
        }))
    }

    fn choice(&self, row: &Row, idx: usize, text: &str) -> Result<ChoiceTokens, Error> {
        let variables = &row.variables;
        let answered = match &row.content {
            RowContent::Prompt { .. } => Some(self.prompt_and_completion(row, text)?),
            RowContent::Conversation { messages, tools } => match last(Role::Assistant, messages) {
                Some(end) => {
                    let mut messages = messages[..=end].to_vec();
                    messages[end] = messages[end].with_content(text);
                    let beside = Beside { tools, variables };
                    self.conversation(&messages, beside, TrainOn::LastAssistant)?
                        .pop()
                }
                None => None,
            },
            RowContent::Text(_) => None,
        };
        let Some(mut example) = answered else {
            return refuse(
                "choices",
                "the row has no answer that they could replace",
                "expected an assistant turn, or prompt and completion",
            );
        };
        let Range { start, mut end } = example.trained_range();
        if end > start && self.tokenizer.is_special(example.input_ids[end - 1]) {
            end -= 1;
        }
        let limit = self.options.max_seq_length;
        let field = || format!("choices[{idx}]");
        if start == end {
            let fix = "expected an answer of at least one token";
            return refuse(field(), "has no tokens", fix);
        }
        if start == 0 {
            let fix = "expected a prompt of at least one token";
            return refuse(field(), "follows nothing", fix);
        }
        if end > limit {
            let problem = format!("{end} tokens with its prompt, more than max_seq_length {limit}");
            let fix = "raise max_seq_length, or shorten the row";
            return refuse(field(), problem, fix);
        }
        example.input_ids.truncate(end);
        Ok(ChoiceTokens {
            tokens: example.input_ids,
            n_prompt: start,
        })
    }

    /// Whether an end token of the example is trained, so that the model learns to stop.
    pub(super) fn ends(&self, example: &Example) -> bool {
        let stop_ids = &self.stop_ids;
        let mut tokens = example.input_ids.iter().zip(&example.loss_mask);
        tokens.any(|(id, is_trained)| *is_trained && stop_ids.contains(id))
    }

    fn or_set(&self, remedy: &str, setting: &str) -> String {
        self.options.remedies.or_set(remedy, setting)
    }

    fn chat_template(&self) -> Result<&ChatTemplate, Error> {
        self.template.as_ref().ok_or_else(|| {
            Problem::usage(
                "the model has no chat template; give one with --chat-template, or take rows of prompt and completion as they are (data.apply_chat_template = false, or --no-chat-template)",
            )
            .into()
        })
    }

    fn end_token(&self) -> Result<u32, Error> {
        self.tokenizer.eos_id().ok_or_else(|| {
            let message = "the tokenizer failed: the model names no end token; set eos_token in tokenizer_config.json";
            bad_data("tokenizer", message.to_owned())
        })
    }

    /// The example of a row of prompt and completion, with `completion` instead of the row's own.
    fn prompt_and_completion(&self, row: &Row, completion: &str) -> Result<Example, Error> {
        let RowContent::Prompt {
            system,
            prompt,
            tools,
            ..
        } = &row.content
        else {
            return refuse("row", "has no prompt", "expected prompt and completion");
        };
        let system = system.as_deref();
        if self.options.apply_chat_template {
            let mut messages = asked(system, prompt);
            messages.push(Message::new(Role::Assistant, completion));
            let variables = &row.variables;
            let beside = Beside { tools, variables };
            let mut examples = self.conversation(&messages, beside, TrainOn::LastAssistant)?;
            return Ok(examples.swap_remove(0));
        }
        refuse_without_template(system, tools)?;
        let mut input_ids = self.plain_prompt_tokens(prompt)?;
        let mut loss_mask = vec![false; input_ids.len()];
        let tokens = self.tokenizer.encode(self.ended(completion), false)?;
        if tokens.is_empty() {
            return refuse("completion", "has no tokens", "expected the text to learn");
        }
        input_ids.extend(tokens);
        loss_mask.resize(input_ids.len(), true);
        self.with_end(completion, input_ids, loss_mask)
    }

    /// The text without white space after its own end token, since such white space is never generated.
    fn ended<'a>(&self, text: &'a str) -> &'a str {
        match self.tokenizer.end_in(text) {
            Some(_) => text.trim_end(),
            None => text,
        }
    }

    /// The example of a text's tokens. Appends an end token, unless the text ends with one.
    fn with_end(
        &self,
        text: &str,
        mut input_ids: Vec<u32>,
        mut loss_mask: Vec<bool>,
    ) -> Result<Example, Error> {
        if self.tokenizer.end_in(text).is_none() {
            input_ids.push(self.end_token()?);
            loss_mask.push(true);
        }
        Ok(Example {
            input_ids,
            loss_mask,
        })
    }

    /// Applies the length limit and refuses an example that trains nothing.
    fn fit(
        &self,
        field: &str,
        mut example: Example,
        encoded: &mut EncodedRow,
    ) -> Result<(), Error> {
        let limit = self.options.max_seq_length;
        let n_tokens = example.input_ids.len();
        if example.n_trained() == 0 {
            let fix = self.or_set("add an answer", ALL);
            return refuse(field, "no token to train on", fix);
        }
        if n_tokens > limit {
            match self.options.overlong {
                Overlong::Error => {
                    let problem = format!("{n_tokens} tokens, more than max_seq_length {limit}");
                    let setting = "overlong to \"drop\" or \"truncate\"";
                    let fix = self.options.remedies.raise_limit(setting);
                    return refuse("row", problem, fix);
                }
                Overlong::Drop => {
                    encoded.n_dropped += 1;
                    return Ok(());
                }
                Overlong::Truncate => {
                    example.input_ids.truncate(limit);
                    example.loss_mask.truncate(limit);
                    encoded.n_truncated += 1;
                }
            }
            if example.n_trained() == 0 {
                let problem =
                    format!("no token to train on in the first {limit} of {n_tokens} tokens");
                let fix = self.options.remedies.raise_limit("overlong = \"drop\"");
                return refuse(field, problem, fix);
            }
        }
        encoded.examples.push(example);
        Ok(())
    }
}

fn stop_ids(tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Vec<u32> {
    let mut ids = tokenizer.eos_ids().to_vec();
    let source = template.map_or("", ChatTemplate::source);
    let mentioned = TURN_ENDS.iter().filter(|token| source.contains(**token));
    for id in mentioned.filter_map(|token| tokenizer.token_to_id(token)) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// The turns before the completion of a prompt row.
fn asked(system: Option<&str>, prompt: &str) -> Vec<Message> {
    let system = system.map(|text| Message::new(Role::System, text));
    let user = Message::new(Role::User, prompt);
    system.into_iter().chain([user]).collect()
}

/// Refuses a system message or tools beside a prompt: without the chat template nothing prints them.
fn refuse_without_template(system: Option<&str>, tools: &[Value]) -> Result<(), Error> {
    let field = match system {
        Some(_) => "system",
        None if !tools.is_empty() => "tools",
        None => return Ok(()),
    };
    let problem = "only a chat template can print it, and the row is taken without one";
    let fix =
        "write it into the prompt, or set data.apply_chat_template = true (no --no-chat-template)";
    refuse(field, problem, fix)
}

fn ids(tokens: Vec<SpannedToken>) -> Vec<u32> {
    tokens.into_iter().map(|token| token.id).collect()
}

/// Returns an error that blames the row.
fn refuse<T>(
    field: impl Into<String>,
    problem: impl Into<String>,
    fix: impl Into<String>,
) -> Result<T, Error> {
    Err(field_problem(field, problem, fix).into())
}

#[cfg(test)]
mod tests;
