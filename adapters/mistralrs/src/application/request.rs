//! A request of an application, made so that mistral.rs answers what was asked, or refused by name.

use std::sync::Arc;

use mistralrs::error::{Error as SdkError, Result as SdkResult};
use mistralrs::{
    Constraint, NormalRequest, RequestLike, RequestMessage, SamplingParams, StopTokens, Tool,
    ToolChoice,
};
use mistralrs_core::CustomLogitsProcessor;
use mistralrs_core::llguidance::Matcher;
use tokio::sync::mpsc::channel;

use super::served::Served;
use crate::quirks_0_8::forced_tools::ToolUse;
use crate::quirks_0_8::narrow_sampling;
use crate::server::sampling::Sampling;
use crate::server::steps::Steps;
use crate::server::stop::StopWatch;
use crate::server::vocabulary::Held;

/// What is wanted of a request.
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
    /// Lets an answer to `prompt_tokens` tokens end where the model's positions do: mistral.rs would fail at the next one.
    pub(super) fn fit(&mut self, prompt_tokens: usize, served: &Served) {
        // A prompt that is too long is refused, or cut so that one token has room.
        let room = served.max_sequence_length.saturating_sub(prompt_tokens);
        self.max_tokens = self.max_tokens.min(room.max(1));
        self.request.sampling_params.max_len = Some(self.max_tokens);
    }
}

fn refused<T>(message: impl Into<String>) -> SdkResult<T> {
    Err(SdkError::RequestValidation(message.into()))
}

/// Makes `request` ready for the engine of `served`.
pub(super) async fn prepare<R: RequestLike>(
    mut request: R,
    served: &Served,
    wanted: Wanted,
) -> SdkResult<Prepared> {
    check_template(served)?;
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
    let stops = match sampling.stop_toks.take() {
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
    let constraint = request.take_constraint();
    let (constraint, tool_choice) = hold_to_tool(constraint, tools.as_deref(), tool_choice)?;
    let matcher = compile(constraint, served).await?;
    let steps = Arc::new(Steps::for_answer(
        served.end_tokens.clone(),
        sampling.logits_bias.take().unwrap_or_default(),
        StopWatch::new(&stops, &served.tokenizer),
        matcher.as_ref().map(Held::new),
    ));
    // Those of the caller see the model's logits first.
    let mut processors = request.take_logits_processors().unwrap_or_default();
    processors.push(steps.clone() as Arc<dyn CustomLogitsProcessor>);
    let max_tokens = sampling.max_len.unwrap_or(usize::MAX);
    // Replaced when it is sent.
    let (response, _) = channel(1);
    let request = NormalRequest {
        return_logprobs: request.return_logprobs(),
        truncate_sequence: request.truncate_sequence(),
        messages: text_only(request.take_messages())?,
        sampling_params: sampling,
        response,
        is_streaming: wanted == Wanted::Stream,
        id: 0,
        // The steps hold the answer, with the model's own end tokens.
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

/// What holds an answer to `constraint`.
async fn compile(constraint: Constraint, served: &Served) -> SdkResult<Option<Matcher>> {
    if matches!(constraint, Constraint::None) {
        return Ok(None);
    }
    let vocabulary = served.vocabulary.clone();
    let compiled = tokio::task::spawn_blocking(move || vocabulary.compile(&constraint)).await;
    match compiled {
        Ok(Ok(matcher)) => Ok(matcher),
        Ok(Err(cause)) => refused(format!(
            "the constraint cannot be used as a grammar: {cause}"
        )),
        Err(error) => Err(SdkError::Channel(error.to_string())),
    }
}

/// Refuses conversations with a model that has no template for them.
pub(super) fn check_template(served: &Served) -> SdkResult<()> {
    if !served.has_template {
        let name = &served.name;
        return refused(format!(
            "`{name}` has no chat template; give one to the builder by `with_jinja_explicit` or `with_chat_template`"
        ));
    }
    Ok(())
}

/// `messages`, which must be text alone.
fn text_only(messages: RequestMessage) -> SdkResult<RequestMessage> {
    match messages {
        RequestMessage::MultimodalChat {
            images,
            audios,
            videos,
            messages,
            enable_thinking,
            reasoning_effort,
        } => {
            if !(images.is_empty() && audios.is_empty() && videos.is_empty()) {
                return refused("a text model takes no images, audio or video");
            }
            Ok(RequestMessage::Chat {
                messages,
                enable_thinking,
                reasoning_effort,
            })
        }
        messages => Ok(messages),
    }
}

/// Says narrow sampling so that it means what it says.
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

/// Holds an answer that must call one tool to the schema of that call.
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
