//! Server-sent events: every stream ends with a chunk that says why, and `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse, Response as HttpResponse, Sse};
use mistralrs_core::Response;
use serde_json::{Value, json};

use super::answer::ApiError;
use super::exchange::Exchange;
use super::stop::StopFilter;

/// Which of the two endpoints a stream belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
}

impl Kind {
    pub(crate) fn id(self) -> String {
        let prefix = match self {
            Self::Chat => "chatcmpl",
            Self::Completion => "cmpl",
        };
        format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
    }
}

/// One streamed answer.
pub(crate) struct Streamed {
    pub(crate) kind: Kind,
    /// Public name.
    pub(crate) model: String,
    pub(crate) exchange: Exchange,
    pub(crate) stop: StopFilter,
    pub(crate) include_usage: bool,
    /// Text to send before the first token's.
    pub(crate) lead: String,
}

impl Streamed {
    pub(crate) fn into_response(self) -> HttpResponse {
        let writer = Writer {
            id: self.kind.id(),
            created: now(),
            queue: VecDeque::new(),
            finished: false,
            streamed: self,
        };
        let events = futures::stream::unfold(writer, async |mut writer| {
            let data = writer.next().await?;
            Some((Ok::<_, Infallible>(Event::default().data(data)), writer))
        });
        Sse::new(events)
            .keep_alive(KeepAlive::default())
            .into_response()
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

struct Writer {
    id: String,
    created: u64,
    queue: VecDeque<String>,
    finished: bool,
    streamed: Streamed,
}

impl Writer {
    async fn next(&mut self) -> Option<String> {
        if !self.streamed.lead.is_empty() {
            let lead = std::mem::take(&mut self.streamed.lead);
            self.push_text(&lead, &Value::Null, None);
        }
        while self.queue.is_empty() && !self.finished {
            match self.streamed.exchange.receiver.recv().await {
                Some(response) => self.take(response),
                None if self.streamed.exchange.timed_out() => self.fail(ApiError::timed_out()),
                // The last token added no text, and 0.8.1 then leaves its chunk out.
                None => {
                    let reason = self.streamed.exchange.finish_reason();
                    self.finish(Value::Null, reason);
                }
            }
        }
        self.queue.pop_front()
    }

    fn take(&mut self, response: Response) {
        match response {
            Response::Chunk(chunk) => {
                for choice in chunk.choices {
                    let mut extra = json!({});
                    if let Some(calls) = &choice.delta.tool_calls {
                        extra["tool_calls"] = json!(calls);
                    }
                    if let Some(reasoning) = &choice.delta.reasoning_content {
                        extra["reasoning_content"] = json!(reasoning);
                    }
                    let text = choice.delta.content.unwrap_or_default();
                    self.take_text(&text, extra, choice.finish_reason.as_deref());
                }
            }
            Response::CompletionChunk(chunk) => {
                for choice in chunk.choices {
                    self.take_text(&choice.text, Value::Null, choice.finish_reason.as_deref());
                }
            }
            Response::ValidationError(error) => {
                self.fail(ApiError::invalid("messages", error.to_string()));
            }
            Response::InternalError(error) => self.fail(ApiError::internal(error.to_string())),
            Response::ModelError(message, _) | Response::CompletionModelError(message, _) => {
                self.fail(ApiError::internal(message));
            }
            _ => self.fail(ApiError::internal(
                "the engine answered in another way than asked",
            )),
        }
    }

    fn take_text(&mut self, delta: &str, extra: Value, reason: Option<&str>) {
        let (mut text, stopped) = self.streamed.stop.push(delta);
        let reason = if stopped { Some("stop") } else { reason };
        if reason.is_some() && !stopped {
            text.push_str(&self.streamed.stop.finish());
        }
        let empty = text.is_empty() && extra.as_object().is_none_or(|extra| extra.is_empty());
        if !empty {
            self.push_text(&text, &extra, None);
        }
        if let Some(reason) = reason {
            self.finish(json!({}), reason);
        }
    }

    fn push_text(&mut self, text: &str, extra: &Value, reason: Option<&str>) {
        let chunk = match self.streamed.kind {
            Kind::Chat => {
                let mut delta = json!({"role": "assistant", "content": text});
                for (key, value) in extra.as_object().into_iter().flatten() {
                    delta[key] = value.clone();
                }
                json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason})
            }
            Kind::Completion => {
                json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason})
            }
        };
        self.push(vec![chunk], None);
    }

    fn push(&mut self, choices: Vec<Value>, usage: Option<Value>) {
        let object = match self.streamed.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        };
        let mut chunk = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.streamed.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        self.queue.push_back(chunk.to_string());
    }

    fn finish(&mut self, extra: Value, reason: &str) {
        let held = self.streamed.stop.finish();
        self.push_text(&held, &extra, Some(reason));
        if self.streamed.include_usage {
            let usage = self.streamed.exchange.usage();
            self.push(Vec::new(), Some(usage));
        }
        self.close();
    }

    fn fail(&mut self, error: ApiError) {
        self.queue.push_back(error.body().to_string());
        self.close();
    }

    fn close(&mut self) {
        self.queue.push_back("[DONE]".to_owned());
        self.finished = true;
        self.streamed.exchange.complete();
    }
}
