//! A model with the methods of `mistralrs::Model`, each guarded where mistral.rs alone would answer wrongly.

use std::sync::Arc;

use candle_core::Tensor;
use either::Either;
use indexmap::IndexMap;
use mistralrs::error::{Error as SdkError, Result as SdkResult};
use mistralrs::schemars::{JsonSchema, schema_for};
use mistralrs::{
    ChatCompletionResponse, Constraint, MistralRs, MistralRsConfig, Model, RequestBuilder,
    RequestLike, RequestMessage, Response, ResponseOk, TextMessageRole, TextMessages, Tool,
};
use mistralrs_core::{MistralRsError, TokenizationRequest};
use parking_lot::RwLock;
use serde::de::DeserializeOwned;

use super::builder::Recipe;
use super::exchange::send;
use super::request::{Prepared, Wanted, check_messages, prepare};
use super::served::{Served, Turn};
use super::stream::{MonteCloraStream, StreamState};
use crate::quirks_0_8::abandoned_requests::tokenize;
use crate::server::stop::StopFilter;

/// A base model and its adapters, each under its name, in one [`MistralRs`].
///
/// [`MonteCloraModelBuilder`](super::MonteCloraModelBuilder) builds it. Its methods are those of [`mistralrs::Model`],
/// with the same arguments and answers. They add:
///
/// - On a CPU, an engine gets one request at a time, in order of arrival, because mistral.rs decodes batches wrongly on
///   a CPU. Each name has its own engine. On accelerators up to `max_num_seqs` requests per name run together.
/// - If a future or a stream is dropped, its answer ends at the next token, and no other answer is affected. mistral.rs
///   alone stops the engine.
/// - Structured output ends with the model's own end-of-turn tokens, and a forced tool call is always made.
/// - `logits_bias`, stop texts, `top_p: 0` and `min_p` without `top_p` work as documented.
/// - The last chunk of a stream has a `finish_reason`.
/// - Settings without effect are refused by name: `set_adapters`, `n_choices` above 1, web search, images.
///
/// For everything else, [`turn`](Self::turn) lends the [`mistralrs::Model`] itself.
///
/// A request without a temperature is sampled as in mistral.rs: [`TextMessages`] and [`RequestBuilder`] begin with
/// `SamplingParams::deterministic()`, which is greedy; `SamplingParams::neutral()` samples at temperature 1.
///
/// # Example
/// ```no_run
/// use mistralrs_monteclora::MonteCloraModelBuilder;
///
/// # async fn example() -> anyhow::Result<()> {
/// let model = MonteCloraModelBuilder::new("models/SmolLM2-135M-Instruct")
///     .with_adapter("triage", "out")
///     .build()
///     .await?;
/// println!("{}", model.chat("I was charged twice.").await?);
/// # Ok(())
/// # }
/// ```
pub struct MonteCloraModel {
    pub(super) model: Model,
    pub(super) host: Arc<MistralRs>,
    /// The models by name, the base first.
    pub(super) served: RwLock<IndexMap<String, Arc<Served>>>,
    pub(super) recipe: Recipe,
    /// Locked while models are loaded, swapped or unloaded.
    pub(super) changes: tokio::sync::Mutex<()>,
}

impl MonteCloraModel {
    /// Generate with the model (streaming).
    ///
    /// # Errors
    /// Returns an error if the request cannot be answered as it is.
    pub async fn stream_chat_request<R: RequestLike>(
        &self,
        request: R,
    ) -> SdkResult<MonteCloraStream> {
        self.stream_chat_request_with_model(request, None).await
    }

    /// Generate with a specific model (streaming). `None` is the default model.
    ///
    /// # Errors
    /// Returns an error if there is no such model, or if the request cannot be answered as it is.
    pub async fn stream_chat_request_with_model<R: RequestLike>(
        &self,
        request: R,
        model_id: Option<&str>,
    ) -> SdkResult<MonteCloraStream> {
        let served = self.find(model_id)?;
        let mut prepared = prepare(request, &served, Wanted::Stream).await?;
        self.fit(&served, &mut prepared).await?;
        let state = StreamState::new(
            served.name.clone(),
            prepared.steps.clone(),
            prepared.max_tokens,
            std::mem::take(&mut prepared.stops),
        );
        Ok(MonteCloraStream {
            receiver: send(&self.host, &served, prepared).await?,
            state,
            _host: self.host.clone(),
        })
    }

    /// Generate with the model (non-streaming).
    ///
    /// # Errors
    /// Returns an error if the request cannot be answered as it is, or if the engine fails.
    pub async fn send_chat_request<R: RequestLike>(
        &self,
        request: R,
    ) -> SdkResult<ChatCompletionResponse> {
        self.send_chat_request_with_model(request, None).await
    }

    /// Send a chat request to a specific model. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error if there is no such model, if the request cannot be answered as it is, or if the engine fails.
    pub async fn send_chat_request_with_model<R: RequestLike>(
        &self,
        request: R,
        model_id: Option<&str>,
    ) -> SdkResult<ChatCompletionResponse> {
        let served = self.find(model_id)?;
        let mut prepared = prepare(request, &served, Wanted::Answer).await?;
        self.fit(&served, &mut prepared).await?;
        let stops = std::mem::take(&mut prepared.stops);
        let ResponseOk::Done(mut response) = self.first(&served, prepared).await? else {
            return Err(SdkError::UnexpectedResponse { expected: "Done" });
        };
        for choice in &mut response.choices {
            if let Some(text) = &mut choice.message.content {
                let (shown, is_cut) = StopFilter::cut(&stops, text);
                *text = shown;
                if is_cut {
                    choice.finish_reason = "stop".to_owned();
                }
            }
        }
        Ok(response)
    }

    /// Generate with the model. It returns the raw logits of the prompt's positions, in chunks, and the prompt's
    /// tokens.
    ///
    /// # Errors
    /// Returns an error if the request cannot be answered as it is, or if the engine fails.
    pub async fn send_raw_chat_request<R: RequestLike>(
        &self,
        request: R,
    ) -> SdkResult<(Vec<Tensor>, Vec<u32>)> {
        self.send_raw_chat_request_with_model(request, None).await
    }

    /// As [`send_raw_chat_request`](Self::send_raw_chat_request), with a specific model. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error if there is no such model, if the request cannot be answered as it is, or if the engine fails.
    pub async fn send_raw_chat_request_with_model<R: RequestLike>(
        &self,
        request: R,
        model_id: Option<&str>,
    ) -> SdkResult<(Vec<Tensor>, Vec<u32>)> {
        let served = self.find(model_id)?;
        let prepared = prepare(request, &served, Wanted::RawLogits).await?;
        match self.first(&served, prepared).await? {
            ResponseOk::Raw {
                logits_chunks,
                tokens,
            } => Ok((logits_chunks, tokens)),
            _ => Err(SdkError::UnexpectedResponse { expected: "Raw" }),
        }
    }

    /// Quick chat: send a single user message and get the assistant's text reply.
    ///
    /// # Errors
    /// Returns an error as [`send_chat_request`](Self::send_chat_request), or if the response has no text.
    pub async fn chat(&self, message: impl ToString) -> SdkResult<String> {
        let messages = TextMessages::new().add_message(TextMessageRole::User, message);
        text_of(self.send_chat_request(messages).await?)
    }

    /// Send a chat request constrained to a JSON schema derived from `T`, then deserialize the response into it.
    ///
    /// # Errors
    /// Returns an error as [`send_chat_request`](Self::send_chat_request), or if the answer was cut off before its end.
    pub async fn generate_structured<T: DeserializeOwned + JsonSchema>(
        &self,
        messages: impl Into<RequestBuilder>,
    ) -> SdkResult<T> {
        self.generate_structured_with_model(messages, None).await
    }

    /// Send a structured request to a specific model. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error as [`generate_structured`](Self::generate_structured), or if there is no such model.
    pub async fn generate_structured_with_model<T: DeserializeOwned + JsonSchema>(
        &self,
        messages: impl Into<RequestBuilder>,
        model_id: Option<&str>,
    ) -> SdkResult<T> {
        let schema = serde_json::to_value(schema_for!(T))?;
        let request = messages
            .into()
            .set_constraint(Constraint::JsonSchema(schema));
        let response = self.send_chat_request_with_model(request, model_id).await?;
        Ok(serde_json::from_str(&text_of(response)?)?)
    }

    /// Tokenize some text or messages. `tools` and `add_generation_prompt` are only used for messages.
    ///
    /// # Errors
    /// Returns an error if the template refuses the messages, or if there is no template.
    pub async fn tokenize(
        &self,
        text: Either<TextMessages, String>,
        tools: Option<Vec<Tool>>,
        add_special_tokens: bool,
        add_generation_prompt: bool,
        enable_thinking: Option<bool>,
    ) -> SdkResult<Vec<u32>> {
        self.tokenize_with_model(
            text,
            tools,
            add_special_tokens,
            add_generation_prompt,
            enable_thinking,
            None,
        )
        .await
    }

    /// Tokenize some text or messages using a specific model. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error as [`tokenize`](Self::tokenize), or if there is no such model.
    pub async fn tokenize_with_model(
        &self,
        text: Either<TextMessages, String>,
        tools: Option<Vec<Tool>>,
        add_special_tokens: bool,
        add_generation_prompt: bool,
        enable_thinking: Option<bool>,
        model_id: Option<&str>,
    ) -> SdkResult<Vec<u32>> {
        let served = self.find(model_id)?;
        let is_plain = text.is_right();
        let text = match text {
            Either::Left(messages) => {
                let shown = tools.as_deref().unwrap_or_default();
                Either::Left(check_messages(
                    messages.into(),
                    shown,
                    enable_thinking,
                    &served,
                )?)
            }
            Either::Right(text) => Either::Right(text),
        };
        let request = |response| TokenizationRequest {
            text,
            tools,
            add_special_tokens,
            add_generation_prompt,
            response,
            enable_thinking,
            reasoning_effort: None,
        };
        let engine = self.host.get_sender(Some(&served.name))?;
        let tokens = tokenize(engine, request, ()).await.map_err(inference)?;
        if !(is_plain && add_special_tokens) {
            return Ok(tokens);
        }
        let frame = &served.frame;
        Ok([frame.prefix.clone(), tokens, frame.suffix.clone()].concat())
    }

    /// Detokenize some tokens.
    ///
    /// # Errors
    /// Returns an error if a token is not in the vocabulary.
    pub async fn detokenize(
        &self,
        tokens: Vec<u32>,
        skip_special_tokens: bool,
    ) -> SdkResult<String> {
        self.detokenize_with_model(tokens, skip_special_tokens, None)
            .await
    }

    /// Detokenize some tokens using a specific model. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error as [`detokenize`](Self::detokenize), or if there is no such model.
    pub async fn detokenize_with_model(
        &self,
        tokens: Vec<u32>,
        skip_special_tokens: bool,
        model_id: Option<&str>,
    ) -> SdkResult<String> {
        let served = self.find(model_id)?;
        served
            .tokens
            .tokenizer
            .decode(&tokens, skip_special_tokens)
            .map_err(SdkError::Inference)
    }

    /// Retrieve some information about the default model.
    ///
    /// # Errors
    /// Returns an error if the engine of the default model has ended.
    pub fn config(&self) -> SdkResult<MistralRsConfig> {
        self.config_with_model(None)
    }

    /// Retrieve some information about a specific model. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error if there is no such model.
    pub fn config_with_model(&self, model_id: Option<&str>) -> SdkResult<MistralRsConfig> {
        self.model.config_with_model(model_id)
    }

    /// The maximum sequence length of the default model, in tokens.
    ///
    /// # Errors
    /// Returns an error if the engine of the default model has ended.
    pub fn max_sequence_length(&self) -> SdkResult<Option<usize>> {
        self.max_sequence_length_with_model(None)
    }

    /// The maximum sequence length of a specific model, in tokens. `None` is the default model.
    ///
    /// # Errors
    /// Returns an error if there is no such model.
    pub fn max_sequence_length_with_model(
        &self,
        model_id: Option<&str>,
    ) -> SdkResult<Option<usize>> {
        self.model.max_sequence_length_with_model(model_id)
    }

    /// The names of all models: the base first, then the adapters in the order in which they were loaded.
    ///
    /// # Errors
    /// Never returns an error; the return type is that of [`Model::list_models`].
    pub fn list_models(&self) -> SdkResult<Vec<String>> {
        Ok(self.served.read().keys().cloned().collect())
    }

    /// The name of the model that answers calls that name none.
    ///
    /// # Errors
    /// Returns an error if an engine panicked while models changed.
    pub fn get_default_model_id(&self) -> SdkResult<Option<String>> {
        self.model.get_default_model_id()
    }

    /// Sets the model that answers calls that name none.
    ///
    /// # Errors
    /// Returns an error if there is no such model.
    pub fn set_default_model_id(&self, model_id: &str) -> SdkResult<()> {
        self.model.set_default_model_id(model_id)
    }

    /// Waits for a turn at a model's engine, and lends the [`Model`] for what this type has no method for. `None` is
    /// the default model.
    ///
    /// # Errors
    /// Returns an error if there is no such model.
    pub async fn turn(&self, model_id: Option<&str>) -> SdkResult<Turn<'_>> {
        let served = self.find(model_id)?;
        Ok(Turn {
            _permit: served.turn().await?,
            model: &self.model,
        })
    }

    /// The underlying [`Model`], without any guard.
    ///
    /// Without guards, two simultaneous requests to one name get wrong answers on a CPU. A future or stream that is
    /// dropped before its end stops the engine. Structured output may run to its token limit. A swap changes the
    /// weights under running requests.
    pub fn inner(&self) -> &Model {
        &self.model
    }

    /// The underlying [`Model`], for code that takes nothing else. The warning of [`inner`](Self::inner) applies.
    pub fn into_inner(self) -> Model {
        self.model
    }

    /// Finds the model served under `name`, or the default model.
    pub(super) fn find(&self, name: Option<&str>) -> SdkResult<Arc<Served>> {
        let name = match name {
            Some(name) => name.to_owned(),
            None => self
                .model
                .get_default_model_id()?
                .ok_or(MistralRsError::EnginePoisoned)?,
        };
        let served = self.served.read().get(&name).cloned();
        served.ok_or_else(|| MistralRsError::ModelNotFound(name).into())
    }

    /// Limits an answer to the positions that its prompt leaves free.
    async fn fit(&self, served: &Served, prepared: &mut Prepared) -> SdkResult<()> {
        let RequestMessage::Chat {
            messages,
            enable_thinking,
            reasoning_effort,
        } = &prepared.request.messages
        else {
            return Ok(());
        };
        let tools = prepared.request.tools.clone();
        let request = |response| TokenizationRequest {
            text: Either::Left(messages.clone()),
            tools,
            add_special_tokens: true,
            add_generation_prompt: true,
            response,
            enable_thinking: *enable_thinking,
            reasoning_effort: *reasoning_effort,
        };
        let tokens = tokenize(self.host.get_sender(Some(&served.name))?, request, ()).await;
        let refused = |error: crate::Error| SdkError::RequestValidation(error.to_string());
        prepared.fit(tokens.map_err(refused)?.len(), served);
        Ok(())
    }

    /// Sends a request and returns the engine's first response.
    async fn first(&self, served: &Served, prepared: Prepared) -> SdkResult<ResponseOk> {
        let mut receiver = send(&self.host, served, prepared).await?;
        let response: Option<Response> = receiver.recv().await;
        let silent = || SdkError::Channel("the engine stopped without an answer".into());
        Ok(response.ok_or_else(silent)?.as_result()?)
    }
}

fn inference(error: crate::Error) -> SdkError {
    SdkError::Inference(Box::new(error))
}

/// The text of the first choice.
fn text_of(response: ChatCompletionResponse) -> SdkResult<String> {
    response
        .choices
        .into_iter()
        .next()
        .and_then(|choice| choice.message.content)
        .ok_or(SdkError::UnexpectedResponse {
            expected: "content",
        })
}
