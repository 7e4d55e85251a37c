//! `POST /v1/completions`: plain text, no template.

use axum::extract::State;
use axum::response::Response as HttpResponse;
use either::Either;
use mistralrs_core::{NormalRequest, RequestMessage, Response, SamplingParams};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use tokio::sync::mpsc::channel;

use crate::engine::plain_tokenization;
use crate::quirks_0_8::first_white_space::{restore, token_text};
use crate::server::App;
use crate::server::admission::Admission;
use crate::server::answers::{Form, Piece, answer};
use crate::server::api_error::ApiError;
use crate::server::fields::{checked, flag};
use crate::server::guard::Payload;
use crate::server::request::Asked;

/// Keys that only this endpoint has.
#[derive(Default, Deserialize)]
#[serde(default)]
struct CompletionKeys {
    #[serde(deserialize_with = "one_text")]
    prompt: Option<String>,
    #[serde(deserialize_with = "flag")]
    echo: bool,
}

/// What `prompt` must be.
const ONE_TEXT: &str = "must be one text";

/// Continues a text, streamed or not.
pub(super) async fn handle(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<HttpResponse, ApiError> {
    let admission = Admission::new(&app)?;
    let (asked, keys): (Asked, CompletionKeys) = Asked::read(&app, &bytes)?;
    let prompt = keys
        .prompt
        .ok_or_else(|| ApiError::invalid("prompt", format!("`prompt` {ONE_TEXT}")))?;
    // The tokenizer that mistral.rs has adds nothing, so what the model's own puts around plain text is added here.
    let text = Either::Right(prompt.clone());
    let request = |response| plain_tokenization(text, response);
    let text = asked.tokens(&admission, "prompt", request).await?;
    let frame = &asked.lease.frame;
    let tokens = [&*frame.prefix, &text, &frame.suffix].concat();
    let (n_prompt, messages) = (tokens.len(), RequestMessage::CompletionTokens(tokens));
    let (nobody, _) = channel(1);
    let params = SamplingParams::neutral();
    let mut request = NormalRequest::new_simple(messages, params, nobody, 0, None, None);
    // For the tokens that come along; see `first_white_space`.
    request.return_logprobs = true;
    let job = asked.start(&app, admission, "prompt", n_prompt, request)?;
    let lead = if keys.echo { prompt } else { String::new() };
    answer(asked, job, CompletionForm { lead }).await
}

fn one_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    checked(deserializer, ONE_TEXT, |value| {
        let text = match value {
            Value::Array(list) if list.len() == 1 => &list[0],
            value => value,
        };
        Some(Some(text.as_str()?.to_owned()))
    })
}

/// Answers as texts.
struct CompletionForm {
    /// What stands before each.
    lead: String,
}

/// What a choice says, or a chunk adds to it.
#[derive(Serialize)]
struct Said {
    text: String,
}

impl Form for CompletionForm {
    const ID: &'static str = "cmpl";
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = Self::WHOLE;
    type Said = Said;

    fn lead(&self) -> &str {
        &self.lead
    }

    fn read(&self, response: Response, begun: &mut bool) -> Option<Vec<Piece>> {
        match response {
            Response::CompletionDone(done) => {
                let choices = done.choices.into_iter().map(|choice| {
                    let tokens = choice.logprobs.and_then(|logprobs| logprobs.content);
                    let tokens = tokens.iter().flatten().filter_map(token_text);
                    Piece::of(restore(&choice.text, tokens), Some(choice.finish_reason))
                });
                Some(choices.collect())
            }
            Response::CompletionChunk(chunk) => {
                let choices = chunk.choices.into_iter().map(|choice| {
                    let is_first = !std::mem::replace(begun, true);
                    let text = match choice.logprobs.as_ref().filter(|_| is_first) {
                        Some(token) => restore(&choice.text, token_text(token)),
                        None => choice.text,
                    };
                    Piece::of(text, choice.finish_reason)
                });
                Some(choices.collect())
            }
            _ => None,
        }
    }

    fn whole(&self, piece: Piece) -> Said {
        let text = piece.text.unwrap_or_default();
        Said {
            text: format!("{}{text}", self.lead),
        }
    }

    fn chunk(&self, piece: Piece, _is_first: bool) -> Said {
        Said {
            text: piece.text.unwrap_or_default(),
        }
    }
}
