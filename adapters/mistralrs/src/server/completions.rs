//! `POST /v1/completions`: plain text, no template.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response as HttpResponse};
use mistralrs_core::{NormalRequest, Request, RequestMessage, Response};
use mistralrs_server_core::completions::parse_request;
use mistralrs_server_core::openai::CompletionRequest;
use serde_json::{Value, json};
use tokio::sync::mpsc::channel;

use super::App;
use super::answer::ApiError;
use super::exchange::Admission;
use super::guard::Payload;
use super::opening::{self, token_text};
use super::request::{Body, flag};
use super::stop::StopFilter;
use super::stream::{Kind, Streamed, now};
use crate::engine::tokenize;

/// Keys that only this endpoint has.
const OWN_KEYS: &[&str] = &["prompt", "echo"];

/// Continues a text, streamed or not.
pub(crate) async fn completions(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<HttpResponse, ApiError> {
    let admission = Admission::new(&app)?;
    let mut body = Body::read(&app, &bytes, OWN_KEYS)?;
    let prompt = one_text(body.fields.get("prompt"))?;
    body.fields.insert("prompt".to_owned(), json!(prompt));
    let echo = flag(&body.fields, "echo")?;
    body.fields.remove("echo");
    let parsed: CompletionRequest = body.parse()?;

    // The tokenizer that mistral.rs has adds nothing, so what the model's own puts around plain text is added here.
    let engine_id = body.lease.engine_id();
    let tokenizing = async {
        let text = either::Either::Right(prompt.clone());
        let held = (body.lease.clone(), admission.places());
        tokenize(app.registry.host(), Some(engine_id), text, held)
            .await
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))
    };
    let text = admission.within(&app, tokenizing).await?;
    let frame = &body.lease.frame;
    let tokens: Vec<u32> = [&frame.prefix, &text, &frame.suffix]
        .into_iter()
        .flatten()
        .copied()
        .collect();
    let prompt_tokens = tokens.len();
    let mut request = prepare(&app, parsed)?;
    request.messages = RequestMessage::CompletionTokens(tokens);
    // For the tokens that come along; see `opening`.
    request.return_logprobs = true;
    let mut exchange = body
        .hand_over(&app, admission, "prompt", prompt_tokens)?
        .send(&app, request)?;
    let lead = if echo { prompt } else { String::new() };
    if body.stream {
        return Ok(Streamed {
            kind: Kind::Completion,
            lease: body.lease,
            exchange,
            stop: body.stop,
            include_usage: body.include_usage,
            lead,
            one_tool_call: false,
        }
        .into_response());
    }
    let choices = exchange
        .choices(|response| match response {
            Response::CompletionDone(done) => Some(done.choices),
            _ => None,
        })
        .await?;
    let choices: Vec<Value> = choices
        .into_iter()
        .map(|(idx, choice)| {
            let tokens = choice.logprobs.and_then(|logprobs| logprobs.content);
            let tokens = tokens.iter().flatten().filter_map(token_text);
            let text = opening::restore(&choice.text, tokens);
            let (text, stopped) = StopFilter::cut(&body.stop, &text);
            let reason = if stopped { "stop" } else { &choice.finish_reason };
            json!({"index": idx, "text": format!("{lead}{text}"), "logprobs": null, "finish_reason": reason})
        })
        .collect();
    Ok(Json(json!({
        "id": Kind::Completion.id(),
        "object": "text_completion",
        "created": now(),
        "model": body.lease.name,
        "system_fingerprint": body.lease.hash,
        "choices": choices,
        "usage": exchange.usage(),
    }))
    .into_response())
}

/// mistral.rs's own reading of grammar and sampling.
fn prepare(app: &App, parsed: CompletionRequest) -> Result<NormalRequest, ApiError> {
    let (sender, _) = channel(1);
    let (request, _) = parse_request(parsed, app.registry.host().clone(), sender)
        .map_err(|error| ApiError::invalid("body", error.root_cause().to_string()))?;
    match request {
        Request::Normal(request) => Ok(*request),
        _ => Err(ApiError::internal(
            "a completion became another kind of request",
        )),
    }
}

fn one_text(prompt: Option<&Value>) -> Result<String, ApiError> {
    let text = match prompt {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(list)) if list.len() == 1 => match &list[0] {
            Value::String(text) => Some(text),
            _ => None,
        },
        _ => None,
    };
    text.cloned()
        .ok_or_else(|| ApiError::invalid("prompt", "`prompt` must be one text"))
}
