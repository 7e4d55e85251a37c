//! Server-sent events: every stream ends with a chunk that says why, and `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse, Response as HttpResponse, Sse};
use mistralrs_core::Response;
use serde_json::{Value, json};

use super::answer::ApiError;
use super::exchange::{Event as Heard, Exchange, sound};
use super::opening::{self, token_text};
use super::registry::Lease;
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
    /// The generation that answers.
    pub(crate) lease: Lease,
    pub(crate) exchange: Exchange,
    /// Texts that end an answer.
    pub(crate) stop: Vec<String>,
    pub(crate) include_usage: bool,
    /// Text to send before the first token's.
    pub(crate) lead: String,
    /// Whether only the first of several tool calls is wanted.
    pub(crate) one_tool_call: bool,
}

impl Streamed {
    pub(crate) fn into_response(self) -> HttpResponse {
        let choices = (0..self.exchange.n_choices()).map(|_| ChoiceState {
            stop: StopFilter::new(self.stop.clone()),
            announced: false,
            begun: false,
            ended: false,
        });
        let mut writer = Writer {
            id: self.kind.id(),
            created: now(),
            queue: VecDeque::new(),
            choices: choices.collect(),
            closed: false,
            streamed: self,
        };
        let lead = std::mem::take(&mut writer.streamed.lead);
        if !lead.is_empty() {
            for idx in 0..writer.choices.len() {
                writer.push_text(idx, &lead, &Value::Null, None);
            }
        }
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

/// How far one choice of a stream is.
struct ChoiceState {
    stop: StopFilter,
    /// Whether the client knows who speaks: only the first chunk says so, as clients add up what they get.
    announced: bool,
    begun: bool,
    ended: bool,
}

struct Writer {
    id: String,
    created: u64,
    queue: VecDeque<String>,
    choices: Vec<ChoiceState>,
    closed: bool,
    streamed: Streamed,
}

impl Writer {
    async fn next(&mut self) -> Option<String> {
        while self.queue.is_empty() && !self.closed {
            match self.streamed.exchange.next().await {
                Some(Heard::Answer(idx, response)) => match sound(*response) {
                    Ok(response) => self.take(idx, response),
                    Err(error) => self.fail(error),
                },
                // The last token added no text, and 0.8.1 then leaves its chunk out.
                Some(Heard::Over(idx)) if !self.choices[idx].ended => {
                    let reason = self.streamed.exchange.finish_reason(idx);
                    self.finish(idx, Value::Null, reason);
                }
                Some(Heard::Over(_)) => {}
                Some(Heard::Ended(ending)) => self.fail(ending.into()),
                None => self.fail(ApiError::internal("the engine stopped without an answer")),
            }
        }
        self.queue.pop_front()
    }

    fn take(&mut self, idx: usize, response: Response) {
        match response {
            Response::Chunk(chunk) => {
                for choice in chunk.choices {
                    let mut extra = json!({});
                    if let Some(mut calls) = choice.delta.tool_calls {
                        if self.streamed.one_tool_call {
                            calls.retain(|call| call.index == 0);
                        }
                        if !calls.is_empty() {
                            extra["tool_calls"] = json!(calls);
                        }
                    }
                    if let Some(reasoning) = &choice.delta.reasoning_content {
                        extra["reasoning_content"] = json!(reasoning);
                    }
                    let text = choice.delta.content.unwrap_or_default();
                    let begun = &mut self.choices[idx].begun;
                    // As in a whole answer, which begins with its first character that is no white space.
                    let text = if *begun { &text } else { text.trim_start() };
                    *begun |= !text.is_empty();
                    self.take_text(idx, text, extra, choice.finish_reason.as_deref());
                }
            }
            Response::CompletionChunk(chunk) => {
                for choice in chunk.choices {
                    let reason = choice.finish_reason.as_deref();
                    let is_first = !std::mem::replace(&mut self.choices[idx].begun, true);
                    let text = match choice.logprobs.as_ref().filter(|_| is_first) {
                        Some(token) => opening::restore(&choice.text, token_text(token)),
                        None => choice.text,
                    };
                    self.take_text(idx, &text, Value::Null, reason);
                }
            }
            _ => self.fail(ApiError::internal(
                "the engine answered in another way than asked",
            )),
        }
    }

    fn take_text(&mut self, idx: usize, delta: &str, extra: Value, reason: Option<&str>) {
        let choice = &mut self.choices[idx];
        if choice.ended {
            return;
        }
        let (mut text, stopped) = choice.stop.push(delta);
        let reason = if stopped { Some("stop") } else { reason };
        if reason.is_some() && !stopped {
            text.push_str(&choice.stop.finish());
        }
        let empty = text.is_empty() && extra.as_object().is_none_or(|extra| extra.is_empty());
        if !empty {
            self.push_text(idx, &text, &extra, None);
        }
        if let Some(reason) = reason {
            self.finish(idx, json!({}), reason);
        }
    }

    fn push_text(&mut self, idx: usize, text: &str, extra: &Value, reason: Option<&str>) {
        let chunk = match self.streamed.kind {
            Kind::Chat => {
                let mut delta = json!({"content": text});
                if !std::mem::replace(&mut self.choices[idx].announced, true) {
                    delta["role"] = json!("assistant");
                }
                for (key, value) in extra.as_object().into_iter().flatten() {
                    delta[key] = value.clone();
                }
                json!({"index": idx, "delta": delta, "logprobs": null, "finish_reason": reason})
            }
            Kind::Completion => {
                json!({"index": idx, "text": text, "logprobs": null, "finish_reason": reason})
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
            "model": self.streamed.lease.name,
            "system_fingerprint": self.streamed.lease.hash,
            "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        self.queue.push_back(chunk.to_string());
    }

    /// Ends one choice, and with the last of them the stream.
    fn finish(&mut self, idx: usize, extra: Value, reason: &str) {
        let held = self.choices[idx].stop.finish();
        self.push_text(idx, &held, &extra, Some(reason));
        self.choices[idx].ended = true;
        self.streamed.exchange.end_choice(idx);
        if self.choices.iter().all(|choice| choice.ended) {
            if self.streamed.include_usage {
                let usage = self.streamed.exchange.usage();
                self.push(Vec::new(), Some(usage));
            }
            self.close();
        }
    }

    fn fail(&mut self, error: ApiError) {
        self.queue.push_back(error.body().to_string());
        self.close();
    }

    fn close(&mut self) {
        self.queue.push_back("[DONE]".to_owned());
        self.closed = true;
        self.streamed.exchange.complete();
    }
}
