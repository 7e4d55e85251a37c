//! Prepares a request of an application so that mistral.rs answers what was asked, or refuses it with the name of the
//! setting.

use std::sync::Arc;

use either::Either;
use mistralrs::error::{Error as SdkError, Result as SdkResult};
use mistralrs::{
    Constraint, MessageContent, NormalRequest, RequestLike, RequestMessage, SamplingParams,
    StopTokens, Tool, ToolChoice,
};
use mistralrs_core::CustomLogitsProcessor;
use mistralrs_core::llguidance::Matcher;
use serde_json::Value;
use tokio::sync::mpsc::channel;

use super::served::Served;
use crate::chat_template::{Conversation, Refusal};
use crate::engine::TemplateMessages;
use crate::quirks_0_8::forced_tools::ToolUse;
use crate::quirks_0_8::past_calls::name_as_templates_do;
use crate::quirks_0_8::{narrow_sampling, unreadable_calls};
use crate::server::sampling::Sampling;
use crate::server::steps::Steps;
use crate::server::stop::StopWatch;
use crate::server::vocabulary::Held;

/// The kind of response that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Answer,
    Stream,
    RawLogits,
}

/// A request that can be given to an engine.
pub(super) struct Prepared {
    pub(super) request: NormalRequest,
    pub(super) wanted: Wanted,
    pub(super) steps: Arc<Steps>,
    /// Texts that end the answer.
    pub(super) stops: Vec<String>,
    pub(super) max_tokens: usize,
}

impl Prepared {
    /// Limits the answer to a prompt of `prompt_tokens` tokens to the model's positions; mistral.rs would fail at the
    /// next position.
    pub(super) fn fit(&mut self, prompt_tokens: usize, served: &Served) {
        // mistral.rs refuses a prompt that is too long, or cuts it so that one token has room.
        let room = served.max_sequence_length.saturating_sub(prompt_tokens);
        self.max_tokens = self.max_tokens.min(room.max(1));
        self.request.sampling_params.max_len = Some(self.max_tokens);
    }
}

fn refused<T>(message: impl Into<String>) -> SdkResult<T> {
    Err(SdkError::RequestValidation(message.into()))
}

/// Prepares `request` for the engine of `served`.
pub(super) async fn prepare<R: RequestLike>(
    mut request: R,
    served: &Served,
    wanted: Wanted,
) -> SdkResult<Prepared> {
    if request
        .take_adapters()
        .is_some_and(|names| !names.is_empty())
    {
        return refused(
            "`set_adapters` has no effect on a text model; name the adapter in a `..._with_model` call",
        );
    }
    if request.take_web_search_options().is_some() {
        return refused("web search is not offered; search in a tool of your own");
    }
    let mut sampling = request.take_sampling_params();
    if sampling.n_choices != 1 {
        return refused(format!(
            "`n_choices` is {}, and must be 1: send the request as often as there are answers wanted",
            sampling.n_choices
        ));
    }
    say_sampling(&mut sampling);
    let mut stops = match sampling.stop_toks.take() {
        Some(StopTokens::Seqs(texts)) if wanted != Wanted::RawLogits => texts,
        other => {
            sampling.stop_toks = other;
            Vec::new()
        }
    };
    if stops.iter().any(String::is_empty) {
        return refused("a stop text is empty");
    }
    let (tools, tool_choice) = match request.take_tools() {
        Some((tools, choice)) => (Some(tools), Some(choice)),
        None => (None, None),
    };
    if tools.is_some() {
        stops.push(unreadable_calls::BEGINNING.to_owned());
    }
    let constraint = request.take_constraint();
    let (constraint, tool_choice) = hold_to_tool(constraint, tools.as_deref(), tool_choice)?;
    let messages = conversation(
        request.take_messages(),
        tools.as_deref().unwrap_or_default(),
        served,
    )?;
    let matcher = compile(constraint, served).await?;
    let steps = Arc::new(Steps::for_answer(
        served.tokens.end_tokens.clone(),
        sampling.logits_bias.take().unwrap_or_default(),
        StopWatch::new(&stops, &served.tokens.tokenizer),
        matcher.as_ref().map(Held::new),
    ));
    // The caller's processors see the model's logits first.
    let mut processors = request.take_logits_processors().unwrap_or_default();
    processors.push(steps.clone() as Arc<dyn CustomLogitsProcessor>);
    let max_tokens = sampling.max_len.unwrap_or(usize::MAX);
    // `send` replaces this sender.
    let (response, _) = channel(1);
    let request = NormalRequest {
        return_logprobs: request.return_logprobs(),
        truncate_sequence: request.truncate_sequence(),
        messages,
        sampling_params: sampling,
        response,
        is_streaming: wanted == Wanted::Stream,
        id: 0,
        // The steps enforce the constraint, with the model's own end tokens.
        constraint: Constraint::None,
        suffix: None,
        tools,
        tool_choice,
        logits_processors: Some(processors),
        return_raw_logits: wanted == Wanted::RawLogits,
        web_search_options: None,
        model_id: Some(served.name.clone()),
    };
    Ok(Prepared {
        request,
        wanted,
        steps,
        stops,
        max_tokens,
    })
}

/// Compiles `constraint` to the matcher that enforces it; none without a constraint.
async fn compile(constraint: Constraint, served: &Served) -> SdkResult<Option<Matcher>> {
    if matches!(constraint, Constraint::None) {
        return Ok(None);
    }
    let vocabulary = served.tokens.vocabulary.clone();
    let compiled = tokio::task::spawn_blocking(move || vocabulary.compile(&constraint)).await;
    match compiled {
        Ok(Ok(matcher)) => Ok(matcher),
        Ok(Err(cause)) => refused(format!(
            "the constraint cannot be used as a grammar: {cause}"
        )),
        Err(error) => Err(SdkError::Channel(error.to_string())),
    }
}

/// Checks that the template of `served` can show all of `messages` and `tools`, and returns the messages as the
/// template reads them.
pub(super) fn check_messages(
    mut messages: TemplateMessages,
    tools: &[Tool],
    enable_thinking: Option<bool>,
    served: &Served,
) -> SdkResult<TemplateMessages> {
    let name = &served.name;
    let Some(template) = &served.template else {
        return refused(format!(
            "`{name}` has no chat template; give one to the builder by `with_jinja_explicit` or `with_chat_template`"
        ));
    };
    if !(tools.is_empty() || template.takes_tools()) {
        return refused(format!(
            "the chat template of `{name}` has no place for tools, so that the model would not see them; give one that shows them to the \
             builder by `with_jinja_explicit` or `with_chat_template`"
        ));
    }
    name_as_templates_do(&mut messages);
    let thinking = enable_thinking.map(|on| ("enable_thinking".to_owned(), on.into()));
    let plain = |content: &MessageContent| match content {
        Either::Left(text) => Ok(Value::from(text.as_str())),
        Either::Right(parts) => serde_json::to_value(parts),
    };
    let entry = |(key, content): (&String, _)| Ok((key.clone(), plain(content)?));
    let shown = messages
        .iter()
        .map(|message| message.iter().map(entry).collect());
    let conversation = Conversation {
        messages: shown.collect::<serde_json::Result<_>>()?,
        tools: tools
            .iter()
            .map(serde_json::to_value)
            .collect::<serde_json::Result<_>>()?,
        variables: thinking.into_iter().collect(),
        ..Conversation::default()
    };
    // A refusal of the template is reported here, because some refusals are a panic in an engine.
    match template.render(&conversation) {
        Ok(_) => Ok(messages),
        Err(Refusal(reason)) => refused(format!("the chat template of `{name}` {reason}")),
    }
}

/// Checks `messages`, which must be text alone.
fn conversation(
    messages: RequestMessage,
    tools: &[Tool],
    served: &Served,
) -> SdkResult<RequestMessage> {
    let (messages, enable_thinking, reasoning_effort) = match messages {
        RequestMessage::Chat {
            messages,
            enable_thinking,
            reasoning_effort,
        } => (messages, enable_thinking, reasoning_effort),
        RequestMessage::MultimodalChat {
            images,
            audios,
            videos,
            messages,
            enable_thinking,
            reasoning_effort,
        } if images.is_empty() && audios.is_empty() && videos.is_empty() => {
            (messages, enable_thinking, reasoning_effort)
        }
        _ => return refused("a text model takes no images, audio or video"),
    };
    Ok(RequestMessage::Chat {
        messages: check_messages(messages, tools, enable_thinking, served)?,
        enable_thinking,
        reasoning_effort,
    })
}

/// Replaces narrow sampling settings that mistral.rs misreads by equivalent ones.
fn say_sampling(params: &mut SamplingParams) {
    let mut sampling = Sampling {
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        ..Sampling::default()
    };
    narrow_sampling::say_otherwise(&mut sampling);
    (params.top_k, params.top_p, params.min_p) = (sampling.top_k, sampling.top_p, sampling.min_p);
}

/// Constrains an answer that must call one tool to the schema of that call.
fn hold_to_tool(
    constraint: Constraint,
    tools: Option<&[Tool]>,
    choice: Option<ToolChoice>,
) -> SdkResult<(Constraint, Option<ToolChoice>)> {
    let Some(ToolChoice::Tool(tool)) = choice else {
        return Ok((constraint, choice));
    };
    if !matches!(constraint, Constraint::None) {
        return refused("a constraint and a tool that must be called exclude each other");
    }
    let tool_use = ToolUse::Function(tool.function.name);
    let tools = serde_json::to_value(tools)?;
    match tool_use.schema(Some(&tools)) {
        Ok(schema) => Ok((Constraint::JsonSchema(schema), Some(tool_use.told()))),
        Err(error) => refused(
            error.body()["error"]["message"]
                .as_str()
                .unwrap_or("the tool is not among the tools"),
        ),
    }
}
