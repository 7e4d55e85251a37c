//! The stream of an answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use mistralrs::{ChatCompletionChunkResponse, ChunkChoice, Delta, MistralRs, Response};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::quirks_0_8::lost_last_chunk::finish_reason;
use crate::server::answers::now;
use crate::server::steps::Steps;
use crate::server::stop::StopFilter;

/// The parts of an answer while it is generated, as [`mistralrs::Model::stream_chat_request`] gives them.
///
/// The last chunk has a `finish_reason`. Dropping the stream ends the answer. It need not be read quickly, or to its
/// end.
pub struct MonteCloraStream {
    pub(super) receiver: UnboundedReceiver<Response>,
    pub(super) state: StreamState,
    /// Keeps the engine alive.
    pub(super) _host: Arc<MistralRs>,
}

/// The state of an answer that is being generated.
pub(super) struct StreamState {
    model: String,
    steps: Arc<Steps>,
    max_tokens: usize,
    stops: StopFilter,
    /// Whether a stop text was reached; what the engine sends afterwards is not part of the answer.
    is_cut: bool,
    /// Whether the end, or a failure, was passed on.
    is_over: bool,
    last: Option<ChatCompletionChunkResponse>,
}

impl MonteCloraStream {
    /// Returns the next part of the answer, or none after its end.
    pub async fn next(&mut self) -> Option<Response> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Response>> {
        loop {
            let response = ready!(self.receiver.poll_recv(context));
            let is_end = response.is_none();
            let shown = match response {
                Some(response) => self.state.pass(response),
                None => self.state.end(),
            };
            if shown.is_some() || is_end {
                return Poll::Ready(shown);
            }
        }
    }
}

impl futures::Stream for MonteCloraStream {
    type Item = Response;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Response>> {
        self.poll(context)
    }
}

impl StreamState {
    pub(super) fn new(
        model: String,
        steps: Arc<Steps>,
        max_tokens: usize,
        stops: Vec<String>,
    ) -> Self {
        Self {
            model,
            steps,
            max_tokens,
            stops: StopFilter::new(stops),
            is_cut: false,
            is_over: false,
            last: None,
        }
    }

    /// Returns the part of `response` that the application sees.
    fn pass(&mut self, response: Response) -> Option<Response> {
        if self.is_over {
            return None;
        }
        let Response::Chunk(mut chunk) = response else {
            self.is_over = true;
            return Some(response);
        };
        let Some(choice) = chunk.choices.first_mut() else {
            return Some(Response::Chunk(chunk));
        };
        let is_last = choice.finish_reason.is_some();
        if let Some(text) = choice.delta.content.take() {
            let mut shown = String::new();
            if !self.is_cut {
                (shown, self.is_cut) = self.stops.push(&text);
            }
            if is_last && !self.is_cut {
                shown.push_str(&self.stops.finish());
            }
            let is_held_back = shown.is_empty() && !text.is_empty();
            if is_held_back && !is_last && choice.delta.tool_calls.is_none() {
                return None;
            }
            choice.delta.content = Some(shown);
        }
        if is_last && self.is_cut {
            choice.finish_reason = Some("stop".to_owned());
        }
        self.is_over = is_last;
        self.last = Some(chunk.clone());
        Some(Response::Chunk(chunk))
    }

    /// Makes the last chunk if the engine left it out.
    fn end(&mut self) -> Option<Response> {
        if std::mem::replace(&mut self.is_over, true) {
            return None;
        }
        let mut chunk = self
            .last
            .take()
            .unwrap_or_else(|| ChatCompletionChunkResponse {
                id: "0".to_owned(),
                choices: Vec::new(),
                created: u128::from(now()),
                model: self.model.clone(),
                system_fingerprint: "local".to_owned(),
                object: "chat.completion.chunk".to_owned(),
                usage: None,
            });
        let reason = match self.is_cut {
            true => "stop",
            false => finish_reason(self.steps.count(), self.max_tokens),
        };
        chunk.choices = vec![ChunkChoice {
            finish_reason: Some(reason.to_owned()),
            index: 0,
            delta: Delta {
                content: Some(self.stops.finish()),
                role: "assistant".to_owned(),
                tool_calls: None,
                reasoning_content: None,
            },
            logprobs: None,
        }];
        Some(Response::Chunk(chunk))
    }
}
