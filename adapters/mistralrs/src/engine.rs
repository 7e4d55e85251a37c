//! One model in its own mistral.rs engine, driven from blocking code: logits, tokens and greedy answers.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use mistralrs_core::{
    CustomLogitsProcessor, DefaultSchedulerMethod, MistralRs, MistralRsBuilder, NormalRequest,
    Request, RequestMessage, Response, SamplingParams, SchedulerConfig, TokenizationRequest,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{Sender, channel};

use crate::chat_files::text_frame;
use crate::chat_template::{ChatTemplate, Conversation, Refusal};
use crate::error::{Error, Result};
use crate::loader::{MonteCloraLoader, SharedPipeline, WeakPipeline};
use crate::quirks_0_8::abandoned_requests::tokenize;
use crate::quirks_0_8::conversations::{Rendering, rendered};
use crate::quirks_0_8::special_tokens::TextFrame;

/// Time that a dropped engine may take to free its memory.
const SHUT_DOWN_LIMIT: Duration = Duration::from_secs(30);

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

impl ChatMessage {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A greedy answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The text, without leading white space and without the end-of-turn token.
    pub text: String,
    /// Ids of all generated tokens, including the end-of-turn token if the model generated it.
    pub token_ids: Vec<u32>,
    /// Number of tokens in the rendered conversation or in the text.
    pub prompt_tokens: usize,
    /// `stop` or `length`.
    pub finish_reason: String,
}

/// Raw logits of every position of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogits {
    /// Row-major `[n_positions, vocab_size]`; row t predicts token t + 1.
    pub values: Vec<f32>,
    /// Length of a row.
    pub vocab_size: usize,
}

/// A private engine. It blocks the calling thread, so it must not be used inside an asynchronous runtime.
///
/// # Example
/// ```no_run
/// use mistralrs_monteclora::{ChatMessage, Engine, MonteCloraLoader};
///
/// let loader = MonteCloraLoader::builder("models/smollm2", "triage").adapter("out").build()?;
/// let engine = Engine::start(&loader)?;
/// let answer = engine.ask(&[ChatMessage::new("user", "My invoice is wrong.")], 64)?;
/// assert!(!answer.text.is_empty());
/// engine.shut_down()?;
/// # Ok::<(), mistralrs_monteclora::Error>(())
/// ```
pub struct Engine {
    host: Arc<MistralRs>,
    pipeline: WeakPipeline,
    max_sequence_length: usize,
    template: Option<ChatTemplate>,
    frame: TextFrame,
    runtime: Runtime,
}

impl Engine {
    /// Loads the model and starts its engine.
    ///
    /// # Errors
    /// Returns an error as [`MonteCloraLoader::load`], or [`Error::Engine`] if the engine cannot be started.
    pub fn start(loader: &MonteCloraLoader) -> Result<Self> {
        Self::launch(loader, false)
    }

    pub(crate) fn launch(loader: &MonteCloraLoader, prefix_cache: bool) -> Result<Self> {
        let mut loader = loader.clone();
        loader.rendering = Rendering::Before;
        let max_sequence_length = loader.check()?.max_sequence_length;
        let template = loader.chat_template()?;
        let frame = text_frame(loader.base())?;
        let pipeline = loader.load()?;
        // With a single-threaded runtime, mistral.rs omits its warm-up request, which would fill a prefix cache.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Engine(format!("cannot start a runtime: {error}")))?;
        let weak = Arc::downgrade(&pipeline);
        let host = runtime.block_on(async {
            let scheduler = scheduler(&pipeline, &loader).await;
            MistralRsBuilder::new(pipeline, scheduler, false, None)
                .with_no_prefix_cache(!prefix_cache)
                .build()
                .await
        });
        Ok(Self {
            host,
            pipeline: weak,
            max_sequence_length,
            template,
            frame,
            runtime,
        })
    }

    /// Maximum length of a prompt in tokens.
    pub fn max_sequence_length(&self) -> usize {
        self.max_sequence_length
    }

    /// Computes the raw logits of all positions of `tokens`.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] if the prompt is empty or too long, and [`Error::Engine`] if mistral.rs fails.
    pub fn prompt_logits(&self, tokens: &[u32]) -> Result<PromptLogits> {
        self.check_length(tokens.len())?;
        let prompt = RequestMessage::CompletionTokens(tokens.to_vec());
        match self.exchange(prompt, |request| request.return_raw_logits = true)? {
            Response::Raw { logits_chunks, .. } => logits_of(&logits_chunks, tokens.len())
                .map_err(|error| Error::Engine(error.to_string()))?,
            other => Err(Error::Engine(failure(other))),
        }
    }

    /// Tokenizes a conversation as mistral.rs does, with the opening of the assistant's turn appended.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] if the model has no chat template, and [`Error::Engine`] if the template refuses the
    /// conversation or mistral.rs fails.
    pub fn tokenize_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        self.tokenize(self.render(messages)?)
    }

    fn tokenize(&self, text: String) -> Result<Vec<u32>> {
        let text = either::Either::Right(text);
        let request = |response| plain_tokenization(text, response);
        let engine = self.host.get_sender(None).map_err(engine_error)?;
        self.runtime.block_on(tokenize(engine, request, ()))
    }

    /// Renders a conversation to text, with the opening of the assistant's turn.
    fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| {
            let message = "the model has no chat template; give one with `--chat-template`";
            Error::setting("chat_template", message)
        })?;
        let messages = messages.iter().map(|message| {
            let fields = [("role", &message.role), ("content", &message.content)];
            let fields = fields.map(|(key, text)| (key.to_owned(), text.clone().into()));
            fields.into_iter().collect()
        });
        let conversation = Conversation {
            messages: messages.collect(),
            ..Conversation::default()
        };
        template
            .render(&conversation)
            .map_err(|Refusal(reason)| Error::Engine(format!("the chat template {reason}")))
    }

    /// Answers a conversation greedily (the most probable token each time) with at most `max_tokens` tokens.
    ///
    /// # Errors
    /// Returns an error as [`Self::tokenize_chat`], [`Error::Problem`] if the conversation is too long, and
    /// [`Error::Engine`] if mistral.rs fails.
    pub fn ask(&self, messages: &[ChatMessage], max_tokens: usize) -> Result<Answer> {
        let text = self.render(messages)?;
        let prompt_tokens = self.tokenize(text.clone())?.len();
        self.answer(rendered(text), prompt_tokens, max_tokens)
    }

    /// Continues a text greedily with at most `max_tokens` tokens, without a chat template. The prompt is the tokens of
    /// the text with the begin and end tokens that its tokenizer puts around plain text, as at `/v1/completions`.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] if the text is empty or too long, and [`Error::Engine`] if mistral.rs fails.
    pub fn complete(&self, text: &str, max_tokens: usize) -> Result<Answer> {
        let inner = self.tokenize(text.to_owned())?;
        let tokens = [&*self.frame.prefix, &inner, &self.frame.suffix].concat();
        let prompt_tokens = tokens.len();
        let prompt = RequestMessage::CompletionTokens(tokens);
        self.answer(prompt, prompt_tokens, max_tokens)
    }

    fn answer(
        &self,
        prompt: RequestMessage,
        prompt_tokens: usize,
        max_tokens: usize,
    ) -> Result<Answer> {
        self.check_length(prompt_tokens)?;
        let room = self.max_sequence_length - prompt_tokens;
        let recorder = Arc::new(GreedyRecorder::default());
        let response = self.exchange(prompt, |request| {
            request.sampling_params.max_len = Some(max_tokens.min(room).max(1));
            request.logits_processors = Some(vec![recorder.clone()]);
        })?;
        let (text, finish_reason) = match response {
            Response::Done(mut done) if !done.choices.is_empty() => {
                let choice = done.choices.swap_remove(0);
                let text = choice.message.content.unwrap_or_default();
                (text, choice.finish_reason)
            }
            Response::CompletionDone(mut done) if !done.choices.is_empty() => {
                let choice = done.choices.swap_remove(0);
                (choice.text, choice.finish_reason)
            }
            other => return Err(Error::Engine(failure(other))),
        };
        Ok(Answer {
            text,
            token_ids: recorder.take(),
            prompt_tokens,
            finish_reason,
        })
    }

    /// Generates at most `n_new` greedy tokens after `tokens`; stops at the model's end of sequence.
    #[cfg(test)]
    pub(crate) fn continue_tokens(&self, tokens: &[u32], n_new: usize) -> Result<Vec<u32>> {
        let prompt = RequestMessage::CompletionTokens(tokens.to_vec());
        Ok(self.answer(prompt, tokens.len(), n_new)?.token_ids)
    }

    /// Stops the engine and waits until the memory of the model is freed.
    ///
    /// # Errors
    /// Returns [`Error::Engine`] if the memory is not freed within 30 seconds.
    pub fn shut_down(self) -> Result<()> {
        let Self { host, pipeline, .. } = self;
        drop(host);
        wait_until_freed(&pipeline)
    }

    #[cfg(test)]
    pub(crate) fn pipeline(&self) -> Option<SharedPipeline> {
        self.pipeline.upgrade()
    }

    fn check_length(&self, n_tokens: usize) -> Result<()> {
        if n_tokens == 0 || n_tokens > self.max_sequence_length {
            let most = self.max_sequence_length;
            let message = format!("{n_tokens} tokens, but this model takes 1 to {most}");
            return Err(Error::setting("prompt", message));
        }
        Ok(())
    }

    /// Sends a greedy request for one token, changed by `change`, and returns the first response.
    pub(crate) fn exchange(
        &self,
        messages: RequestMessage,
        change: impl FnOnce(&mut NormalRequest),
    ) -> Result<Response> {
        // Temperature 0 takes the argmax of the logits; without a temperature mistral.rs samples at temperature 1.
        let params = SamplingParams {
            temperature: Some(0.0),
            max_len: Some(1),
            ..SamplingParams::neutral()
        };
        let id = self.host.next_request_id();
        let (sender, mut receiver) = channel(1);
        let mut request = NormalRequest::new_simple(messages, params, sender, id, None, None);
        change(&mut request);
        let request = Request::Normal(Box::new(request));
        let engine = self.host.get_sender(None).map_err(engine_error)?;
        self.runtime.block_on(async {
            engine.send(request).await.map_err(engine_error)?;
            receiver.recv().await.ok_or_else(silent)
        })
    }
}

/// Waits until nothing holds `model` any more. Its engine must have been told to stop. It blocks.
///
/// # Errors
/// Returns an error if this takes longer than [`SHUT_DOWN_LIMIT`].
pub(crate) fn wait_until_freed(model: &WeakPipeline) -> Result<()> {
    let start = Instant::now();
    while model.strong_count() > 0 {
        if start.elapsed() > SHUT_DOWN_LIMIT {
            return Err(Error::Engine("the engine did not stop in time".to_owned()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Computes the raw logits of every position of each sequence, one sequence after the other, in a private engine.
///
/// Each result is row-major `[n_tokens, vocab_size]`.
///
/// # Errors
/// Returns an error as [`Engine::start`], [`Engine::prompt_logits`] and [`Engine::shut_down`].
pub fn prompt_logits(loader: &MonteCloraLoader, sequences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let engine = Engine::start(loader)?;
    let logits = sequences
        .iter()
        .map(|tokens| Ok(engine.prompt_logits(tokens)?.values))
        .collect();
    engine.shut_down()?;
    logits
}

/// The scheduler for a loaded model, for one sequence at a time; it is paged if the model was loaded with paged
/// attention.
async fn scheduler(pipeline: &SharedPipeline, loader: &MonteCloraLoader) -> SchedulerConfig {
    let cache = pipeline.lock().await.get_metadata().cache_config.clone();
    match cache {
        Some(config) if loader.paged_attention.is_some() => SchedulerConfig::PagedAttentionMeta {
            max_num_seqs: 1,
            config,
        },
        _ => SchedulerConfig::DefaultScheduler {
            method: DefaultSchedulerMethod::Fixed(NonZeroUsize::MIN),
        },
    }
}

/// Messages in the type that mistral.rs takes.
pub(crate) type TemplateMessages = Vec<indexmap::IndexMap<String, mistralrs_core::MessageContent>>;

/// Makes a request for the tokens of a conversation or of plain text.
pub(crate) fn plain_tokenization(
    text: either::Either<TemplateMessages, String>,
    response: Sender<anyhow::Result<Vec<u32>>>,
) -> TokenizationRequest {
    TokenizationRequest {
        text,
        tools: None,
        add_generation_prompt: true,
        add_special_tokens: true,
        enable_thinking: None,
        reasoning_effort: None,
        response,
    }
}

/// Iterates over the rows of raw logits as f32. It converts one row at a time: all rows of a long prompt take
/// gigabytes.
pub(crate) fn rows_of(
    chunk: &Tensor,
) -> candle_core::Result<impl Iterator<Item = candle_core::Result<Vec<f32>>>> {
    let vocab_size = chunk.dim(candle_core::D::Minus1)?;
    let rows = chunk.reshape(((), vocab_size))?;
    let n = rows.dim(0)?;
    Ok((0..n).map(move |idx| rows.get(idx)?.to_dtype(DType::F32)?.to_vec1()))
}

fn logits_of(chunks: &[Tensor], n_tokens: usize) -> candle_core::Result<Result<PromptLogits>> {
    let mut values = Vec::new();
    let mut n_positions = 0;
    for chunk in chunks {
        let vocab_size = chunk.dim(candle_core::D::Minus1)?;
        let rows = chunk.reshape(((), vocab_size))?.to_dtype(DType::F32)?;
        n_positions += rows.dim(0)?;
        values.extend(rows.flatten_all()?.to_vec1::<f32>()?);
    }
    if n_positions != n_tokens {
        return Ok(Err(Error::Engine(format!(
            "{n_positions} rows of logits for {n_tokens} tokens"
        ))));
    }
    let vocab_size = values.len() / n_positions;
    Ok(Ok(PromptLogits { values, vocab_size }))
}

pub(crate) fn engine_error(error: impl std::fmt::Display) -> Error {
    Error::Engine(error.to_string())
}

/// The error for an engine that ends before it answers.
pub(crate) fn silent() -> Error {
    Error::Engine("the engine stopped without an answer".to_owned())
}

/// The reason in a response that is not an answer.
fn failure(response: Response) -> String {
    match response {
        Response::InternalError(error) | Response::ValidationError(error) => error.to_string(),
        Response::ModelError(message, _) | Response::CompletionModelError(message, _) => message,
        _ => "an answer of another kind than was asked for".to_owned(),
    }
}

/// Records the token that an argmax picks at each step. Ties are resolved as in mistral.rs: the last of the largest.
#[derive(Default)]
pub(crate) struct GreedyRecorder(Mutex<Vec<u32>>);

impl GreedyRecorder {
    pub(crate) fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl CustomLogitsProcessor for GreedyRecorder {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        let row: Vec<f32> = logits.to_vec1()?;
        let best = row
            .iter()
            .enumerate()
            .max_by(|(_, a), (_, b)| a.total_cmp(b))
            .map_or(0, |(token, _)| token);
        let best = u32::try_from(best).map_err(candle_core::Error::wrap)?;
        self.0.lock().push(best);
        Ok(logits.clone())
    }
}
