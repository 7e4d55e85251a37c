//! `POST /v1/completions`: continues plain text, without a template.

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
use crate::server::common_keys::scores_of_completion;
use crate::server::fields::{checked, flag};
use crate::server::guard::Payload;
use crate::server::logprobs::{Shown, for_completion};
use crate::server::request::{Asked, Prompt};
use crate::server::vocabulary::ModelTokens;

/// Keys that only this endpoint has.
#[derive(Default, Deserialize)]
#[serde(default)]
struct CompletionKeys {
    #[serde(deserialize_with = "prompts")]
    prompt: Vec<Given>,
    #[serde(deserialize_with = "flag")]
    echo: bool,
}

/// A prompt as the request gives it.
#[derive(Debug, Clone, PartialEq)]
enum Given {
    Text(String),
    Tokens(Vec<u32>),
}

/// The error text for an invalid `prompt`.
const PROMPTS: &str = "must be a text, a list of token ids, or a list of such, none of them empty";

/// Continues texts, streamed or not.
pub(super) async fn handle(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<HttpResponse, ApiError> {
    let admission = Admission::new(&app)?;
    let (mut asked, keys): (Asked, CompletionKeys) =
        Asked::read(&app, &bytes, scores_of_completion)?;
    if keys.prompt.is_empty() {
        return Err(ApiError::invalid("prompt", format!("`prompt` {PROMPTS}")));
    }
    asked.may_be_empty = keys.echo;
    let mut prompts = Vec::new();
    let mut leads = Vec::new();
    for given in keys.prompt {
        let (text, tokens) = tokens(&asked, &admission, given).await?;
        leads.push(if keys.echo { text } else { String::new() });
        let scored = keys.echo && asked.n_top.is_some();
        prompts.push(prompt(tokens, scored));
    }
    let form = CompletionForm {
        leads,
        n_choices: asked.n_choices,
    };
    let job = asked.start(&app, admission, "prompt", prompts).await?;
    answer(asked, job, form).await
}

/// Returns the text and the tokens of a prompt.
async fn tokens(
    asked: &Asked,
    admission: &Admission,
    given: Given,
) -> Result<(String, Vec<u32>), ApiError> {
    match given {
        Given::Text(text) => {
            let plain = Either::Right(text.clone());
            let request = |response| plain_tokenization(plain, response);
            let inner = asked.tokens(admission, "prompt", request).await?;
            // The tokenizer of mistral.rs adds no tokens, so the tokens that the model's own tokenizer puts around
            // plain text are added here.
            let frame = &asked.lease.frame;
            Ok((text, [&*frame.prefix, &inner, &frame.suffix].concat()))
        }
        Given::Tokens(tokens) => {
            let ModelTokens {
                tokenizer,
                vocabulary,
                ..
            } = &asked.lease.tokens;
            let is_unknown = |token: &&u32| tokenizer.id_to_token(**token).is_none();
            if let Some(unknown) = tokens.iter().find(is_unknown) {
                let message =
                    format!("`prompt` has the token id {unknown}, which this model does not have");
                return Err(ApiError::invalid("prompt", message));
            }
            asked.require_vectors("prompt", &tokens)?;
            let bytes: Vec<u8> = tokens
                .iter()
                .flat_map(|token| vocabulary.text_bytes(*token))
                .collect();
            Ok((String::from_utf8_lossy(&bytes).into_owned(), tokens))
        }
    }
}

fn prompt(tokens: Vec<u32>, is_scored: bool) -> Prompt {
    let messages = RequestMessage::CompletionTokens(tokens.clone());
    let (nobody, _) = channel(1);
    let params = SamplingParams::neutral();
    let mut request = NormalRequest::new_simple(messages, params, nobody, 0, None, None);
    // Needed for the tokens of the answer; see `first_white_space`.
    request.return_logprobs = true;
    Prompt {
        request,
        tokens,
        is_scored,
    }
}

fn prompts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Given>, D::Error> {
    checked(deserializer, PROMPTS, |value| {
        if let Some(one) = one_prompt(value) {
            return Some(vec![one]);
        }
        value.as_array()?.iter().map(one_prompt).collect()
    })
}

fn one_prompt(value: &Value) -> Option<Given> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match value {
        Value::String(text) => Some(Given::Text(text.clone())),
        Value::Array(list) if !list.is_empty() => {
            let ids: Option<Vec<u32>> = list.iter().map(id).collect();
            ids.map(Given::Tokens)
        }
        _ => None,
    }
}

/// Formats answers as texts.
struct CompletionForm {
    /// The text before the answers, per prompt.
    leads: Vec<String>,
    /// Number of choices per prompt.
    n_choices: usize,
}

/// The content of a choice or of a chunk.
#[derive(Serialize)]
struct Said {
    text: String,
}

impl Form for CompletionForm {
    const ID: &'static str = "cmpl";
    const WHOLE: &'static str = "text_completion";
    const CHUNK: &'static str = Self::WHOLE;
    type Said = Said;

    fn scores_end(&self) -> bool {
        // As in vLLM: evaluation harnesses expect the last score to belong to a generated token.
        true
    }

    fn is_trimmed(&self) -> bool {
        false
    }

    fn lead(&self, idx: usize) -> &str {
        &self.leads[idx / self.n_choices]
    }

    fn logprobs(&self, scores: &[Shown], n_before: &mut usize) -> Value {
        for_completion(scores, n_before)
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

    fn whole(&self, idx: usize, piece: Piece) -> Said {
        let text = piece.text.unwrap_or_default();
        Said {
            text: format!("{}{text}", self.lead(idx)),
        }
    }

    fn chunk(&self, piece: Piece, _is_first: bool) -> Said {
        Said {
            text: piece.text.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn prompts_are_texts_or_tokens_one_or_many() {
        let read = |prompt: Value| {
            let keys = CompletionKeys::deserialize(json!({ "prompt": prompt }));
            keys.map(|keys| keys.prompt).ok()
        };
        let text = |text: &str| Given::Text(text.to_owned());
        let tokens = |tokens: &[u32]| Given::Tokens(tokens.to_vec());
        assert_eq!(read(json!("a")), Some(vec![text("a")]));
        assert_eq!(read(json!(["a", "b"])), Some(vec![text("a"), text("b")]));
        assert_eq!(read(json!([1, 2])), Some(vec![tokens(&[1, 2])]));
        assert_eq!(
            read(json!([[1, 2], [3]])),
            Some(vec![tokens(&[1, 2]), tokens(&[3])])
        );
        for wrong in [
            json!(3),
            json!([-1]),
            json!([[]]),
            json!([1.5]),
            json!({"a": 1}),
            json!(["a", 3.5]),
        ] {
            assert_eq!(read(wrong.clone()), None, "{wrong}");
        }
    }
}
