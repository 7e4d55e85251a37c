//! A streamed answer: named, numbered events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse, Response as HttpResponse, Sse};
use serde_json::{Value, json};

use super::output::{self, Answer, new_id};
use crate::server::answers::{Piece, Scoring};
use crate::server::api_error::ApiError;
use crate::server::endpoints::chat_completions::ChatForm;
use crate::server::job::RunningJob;
use crate::server::logprobs::entries;
use crate::server::stop::StopFilter;

/// An item that is not complete yet.
enum Open {
    Thought {
        id: String,
        text: String,
    },
    Message {
        id: String,
        text: String,
        logprobs: Vec<Value>,
    },
}

/// The events of one answer.
pub(super) struct Events {
    answer: Answer,
    job: RunningJob,
    form: ChatForm,
    begun: bool,
    stop: StopFilter,
    scoring: Scoring,
    /// Log-probabilities of tokens that have not added text yet.
    logprobs: Vec<Value>,
    queue: VecDeque<Event>,
    n_events: usize,
    /// Complete items.
    items: Vec<Value>,
    open: Option<Open>,
    closed: bool,
}

impl Events {
    pub(super) fn new(answer: Answer, job: RunningJob, form: ChatForm, stop: &[String]) -> Self {
        let mut events = Self {
            answer,
            job,
            begun: false,
            stop: StopFilter::new(stop.to_vec()),
            scoring: Scoring::new(&form),
            form,
            logprobs: Vec::new(),
            queue: VecDeque::new(),
            n_events: 0,
            items: Vec::new(),
            open: None,
            closed: false,
        };
        for name in ["response.created", "response.in_progress"] {
            let response = events.answer.begun();
            events.say(name, json!({"response": response}));
        }
        events
    }

    pub(super) fn into_response(self) -> HttpResponse {
        let events = futures::stream::unfold(self, async |mut events| {
            let event = events.next().await?;
            Some((Ok::<_, Infallible>(event), events))
        });
        Sse::new(events)
            .keep_alive(KeepAlive::default())
            .into_response()
    }

    async fn next(&mut self) -> Option<Event> {
        while self.queue.is_empty() && !self.closed {
            match self.job.next().await {
                Ok((_, Some(said))) => match said.pieces(&self.form, &mut self.begun) {
                    Some(pieces) => pieces.into_iter().for_each(|piece| self.take(piece)),
                    None => self.fail(&ApiError::internal("not an answer to a conversation")),
                },
                Ok((idx, None)) => {
                    let reason = self.job.finish_reason(idx);
                    self.finish(reason, false);
                }
                Err(error) => self.fail(&error),
            }
        }
        self.queue.pop_front()
    }

    fn say(&mut self, name: &str, mut data: Value) {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.n_events);
        self.n_events += 1;
        let event = Event::default().event(name).data(data.to_string());
        self.queue.push_back(event);
    }

    /// As [`say`](Self::say), with the index of the next item.
    fn say_of_item(&mut self, name: &str, mut data: Value) {
        data["output_index"] = json!(self.items.len());
        self.say(name, data);
    }

    fn take(&mut self, mut piece: Piece) {
        if self.closed {
            return;
        }
        let (mut text, stopped) = self.stop.push(piece.text.as_deref().unwrap_or_default());
        if piece.finish_reason.is_some() && !stopped {
            text.push_str(&self.stop.finish());
        }
        piece.text = Some(text.clone());
        self.score(&piece, stopped);
        if let Some(more) = piece.reasoning.filter(|more| !more.is_empty()) {
            self.think(&more);
        }
        self.write(&text);
        if stopped {
            return self.finish("stop", true);
        }
        for call in piece.tool_calls.unwrap_or_default() {
            self.end_item("completed");
            let id = new_id("fc");
            let begun = output::call(&id, &call, false, "in_progress");
            self.say_of_item("response.output_item.added", json!({"item": begun}));
            let arguments = &call.function.arguments;
            self.say_of_item(
                "response.function_call_arguments.delta",
                json!({"item_id": id, "delta": arguments}),
            );
            self.say_of_item(
                "response.function_call_arguments.done",
                json!({"item_id": id, "name": call.function.name, "arguments": arguments}),
            );
            self.push(output::call(&id, &call, true, "completed"));
        }
        if let Some(reason) = piece.finish_reason {
            self.finish(&reason, false);
        }
    }

    /// Records the log-probabilities of `piece`, which a stop text may have cut.
    fn score(&mut self, piece: &Piece, stopped: bool) {
        let shown = self.scoring.piece(&self.job, 0, piece, stopped);
        self.logprobs.extend(entries(&shown));
    }

    fn think(&mut self, more: &str) {
        if !matches!(self.open, Some(Open::Thought { .. })) {
            self.end_item("completed");
            let id = new_id("rs");
            let begun = output::thought(&id, "", "in_progress");
            self.say_of_item("response.output_item.added", json!({"item": begun}));
            let text = String::new();
            self.open = Some(Open::Thought { id, text });
        }
        if let Some(Open::Thought { id, text }) = &mut self.open {
            text.push_str(more);
            let delta = json!({"item_id": id, "content_index": 0, "delta": more});
            self.say_of_item("response.reasoning_text.delta", delta);
        }
    }

    fn write(&mut self, more: &str) {
        if more.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.begin_message();
        }
        let added = std::mem::take(&mut self.logprobs);
        if let Some(Open::Message { id, text, logprobs }) = &mut self.open {
            text.push_str(more);
            let delta =
                json!({"item_id": id, "content_index": 0, "delta": more, "logprobs": added});
            logprobs.extend(added);
            self.say_of_item("response.output_text.delta", delta);
        }
    }

    fn begin_message(&mut self) {
        self.end_item("completed");
        let id = new_id("msg");
        let begun = output::message(&id, None, "in_progress");
        self.say_of_item("response.output_item.added", json!({"item": begun}));
        let part = json!({"item_id": id, "content_index": 0, "part": output::text_part("", &[])});
        self.say_of_item("response.content_part.added", part);
        self.open = Some(Open::Message {
            id,
            text: String::new(),
            logprobs: Vec::new(),
        });
    }

    /// Ends the open item, if there is one.
    fn end_item(&mut self, status: &str) {
        match self.open.take() {
            None => {}
            Some(Open::Thought { id, text }) => {
                let done = json!({"item_id": id, "content_index": 0, "text": text});
                self.say_of_item("response.reasoning_text.done", done);
                self.push(output::thought(&id, &text, "completed"));
            }
            Some(Open::Message {
                id,
                text,
                mut logprobs,
            }) => {
                logprobs.append(&mut self.logprobs);
                let done =
                    json!({"item_id": id, "content_index": 0, "text": text, "logprobs": logprobs});
                self.say_of_item("response.output_text.done", done);
                let part = output::text_part(&text, &logprobs);
                let done = json!({"item_id": id, "content_index": 0, "part": part});
                self.say_of_item("response.content_part.done", done);
                self.push(output::message(&id, Some(part), status));
            }
        }
    }

    /// Sends a complete item.
    fn push(&mut self, item: Value) {
        self.say_of_item("response.output_item.done", json!({"item": item}));
        self.items.push(item);
    }

    /// Ends the answer, which a stop text may have cut.
    fn finish(&mut self, reason: &str, stopped: bool) {
        let held = self.stop.finish();
        self.score(&Piece::of(held.clone(), Some(reason.to_owned())), stopped);
        self.write(&held);
        if self.items.is_empty() && self.open.is_none() {
            self.begin_message();
        }
        let status = output::status(reason);
        self.end_item(status);
        let items = std::mem::take(&mut self.items);
        let response = self.answer.ended_with(items, reason, self.job.usage());
        self.say(&format!("response.{status}"), json!({"response": response}));
        self.close();
    }

    fn fail(&mut self, error: &ApiError) {
        self.end_item("incomplete");
        let items = std::mem::take(&mut self.items);
        let response = self.answer.failed(items, error);
        self.say("response.failed", json!({"response": response}));
        self.close();
    }

    fn close(&mut self) {
        self.queue.push_back(Event::default().data("[DONE]"));
        self.closed = true;
        self.job.complete();
    }
}
