//! `POST /v1/responses`: answers a conversation in the format of OpenAI's Responses interface. It stores nothing.

mod events;
mod input;
mod output;
mod settings;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response as HttpResponse};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use self::events::Events;
use self::output::{Answer, Parts};
use self::settings::Settings;
use super::chat_completions::ChatForm;
use crate::chat_template::{Conversation, End};
use crate::server::App;
use crate::server::admission::Admission;
use crate::server::answers::Scoring;
use crate::server::api_error::ApiError;
use crate::server::chat::{Chat, Keys, set_thinking, template};
use crate::server::common_keys::scores_of_chat;
use crate::server::fields::{checked, maybe, object, refuse_unknown, take, wrong};
use crate::server::guard::Payload;
use crate::server::logprobs::entries;
use crate::server::messages::Messages;
use crate::server::request::Asked;

/// Keys that only this endpoint has.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ResponseKeys {
    input: Option<Value>,
    instructions: Option<Value>,
    #[serde(deserialize_with = "positive")]
    max_output_tokens: Option<usize>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    #[serde(deserialize_with = "maybe")]
    parallel_tool_calls: Option<bool>,
    text: Option<Value>,
    reasoning: Option<Value>,
    truncation: Option<Value>,
    include: Option<Value>,
    #[serde(deserialize_with = "maybe")]
    background: Option<bool>,
    #[serde(deserialize_with = "maybe")]
    store: Option<bool>,
    top_logprobs: Option<Value>,
    max_tool_calls: Option<Value>,
    metadata: Option<Value>,
    user: Option<Value>,
    stream_options: Option<Value>,
    previous_response_id: Option<Value>,
    conversation: Option<Value>,
    prompt: Option<Value>,
}

/// Keys with the same meaning as in chat completions.
const SHARED: &[&str] = &[
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
];

#[derive(Deserialize)]
struct NoKeys {}

/// Answers a conversation, streamed or not.
pub(super) async fn handle(
    State(app): State<App>,
    Payload(bytes): Payload,
) -> Result<HttpResponse, ApiError> {
    let admission = Admission::new(&app)?;
    let mut fields = object(&bytes)?;
    let own = crate::field_names::field_names::<ResponseKeys>();
    refuse_unknown(&fields, &[own, SHARED])?;
    let keys: ResponseKeys = take(&mut fields)?;
    let mut shared: Map<String, Value> = SHARED
        .iter()
        .filter_map(|key| fields.remove_entry(*key))
        .collect();
    if let Some(most) = keys.max_output_tokens {
        shared.insert("max_tokens".to_owned(), json!(most));
    }
    if settings::wants_logprobs(keys.include.as_ref())? {
        shared.insert("logprobs".to_owned(), json!(true));
        let most = keys.top_logprobs.clone();
        shared.insert("top_logprobs".to_owned(), most.unwrap_or_default());
    } else {
        let most = keys.top_logprobs.as_ref().filter(|most| **most != 0);
        if most.is_some() {
            let message = "needs `include`: [\"message.output_text.logprobs\"]";
            return Err(wrong("top_logprobs", message));
        }
    }
    let shared = Value::Object(shared);
    let (mut asked, NoKeys {}) = Asked::read(&app, shared.to_string().as_bytes(), scores_of_chat)?;
    let settings = Settings::read(keys, &shared, &asked.lease)?;
    let chat = settings.chat(&asked)?;
    let form = ChatForm {
        one_tool_call: !settings.parallel_tool_calls,
        must_call: chat.must_call(),
        continues: false,
    };
    let (stream, model) = (asked.stream, asked.model_name());
    let mut job = chat.start(&app, &mut asked, admission).await?;
    let answer = Answer::new(settings, model);
    if stream {
        return Ok(Events::new(answer, job, form, &asked.stop).into_response());
    }
    let mut parts = Parts::default();
    let mut reason = "stop".to_owned();
    for said in job.responses().await? {
        let pieces = said.and_then(|said| said.pieces(&form, &mut false));
        let pieces = pieces.ok_or_else(|| ApiError::internal("not an answer to a conversation"))?;
        for mut piece in pieces {
            let stopped = piece.cut(&asked.stop);
            if asked.n_top.is_some() {
                parts.logprobs = entries(&Scoring::new(&form).piece(&job, 0, &piece, stopped));
            }
            reason = parts.take(piece).unwrap_or(reason);
        }
    }
    Ok(Json(answer.ended(&parts, &reason, job.usage())).into_response())
}

impl Settings {
    fn chat(&self, asked: &Asked) -> Result<Chat, ApiError> {
        let keys = Keys {
            messages: "input",
            format: "text.format",
        };
        let template = template(&asked.lease, keys.messages)?;
        let has_tools = !self.tools.is_empty();
        let has_calls = |message: &Value| message.get("tool_calls").is_some();
        if self.messages.iter().any(has_calls) && !template.mentions("tool_calls", has_tools) {
            let message = "has calls of functions, which cannot be shown to this model: its chat template has no place for them";
            return Err(wrong(keys.messages, message));
        }
        let messages = Value::Array(self.messages.clone());
        let messages = Messages::read(keys.messages, Some(messages), template, has_tools)?;
        let mut variables = Map::new();
        set_thinking(&mut variables, None, self.effort)?;
        Ok(Chat {
            keys,
            conversation: Conversation {
                messages: messages.list,
                tools: self.tools.clone(),
                variables,
                end: End::Opening,
            },
            tool_choice: self.tool_choice.clone(),
            schema: self.schema.clone(),
        })
    }
}

fn positive<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    checked(deserializer, "must be a positive integer", |value| {
        let number = usize::try_from(value.as_u64()?).ok()?;
        (number > 0).then_some(Some(number))
    })
}

#[cfg(test)]
mod tests;
