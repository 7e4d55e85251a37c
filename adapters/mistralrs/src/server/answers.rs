//! Answers as clients get them: whole, or as server-sent events that end with a chunk that says why, and `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse, Response as HttpResponse, Sse};
use mistralrs_core::{Response, ToolCallResponse};
use serde::Serialize;

use super::api_error::ApiError;
use super::job::{RunningJob, Usage};
use super::registry::Lease;
use super::request::Asked;
use super::stop::{StopFilter, whole_characters};

/// What an engine says of one choice: all of it, or the next piece of a stream.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: Option<String>,
    pub(crate) tool_calls: Option<Vec<ToolCallResponse>>,
    pub(crate) reasoning: Option<String>,
    pub(crate) finish_reason: Option<String>,
}

impl Piece {
    pub(crate) fn of(text: String, finish_reason: Option<String>) -> Self {
        Self {
            text: Some(text),
            finish_reason,
            ..Self::default()
        }
    }

    fn is_empty(&self) -> bool {
        let text = self.text.as_deref().unwrap_or_default();
        text.is_empty() && self.tool_calls.is_none() && self.reasoning.is_none()
    }
}

/// How one endpoint shows its answers.
pub(crate) trait Form: Send + 'static {
    /// What ids begin with.
    const ID: &'static str;
    /// What a whole answer says it is.
    const WHOLE: &'static str;
    /// What a chunk of one says it is.
    const CHUNK: &'static str;
    /// What a choice says, under a key of its own.
    type Said: Serialize;

    /// What comes before an answer's first token.
    fn lead(&self) -> &str {
        ""
    }

    /// What `response` says, if it is of the kind that was asked for; `begun` is for each choice of a stream, and false at first.
    fn read(&self, response: Response, begun: &mut bool) -> Option<Vec<Piece>>;

    /// All of a choice.
    fn whole(&self, piece: Piece) -> Self::Said;

    /// What a chunk, which may be its first, adds to a choice.
    fn chunk(&self, piece: Piece, is_first: bool) -> Self::Said;
}

/// What stands at the head of every answer, and of every chunk of one.
struct Head {
    id: String,
    created: u64,
    /// The generation that answers.
    lease: Lease,
}

#[derive(Serialize)]
struct Headed<'a, S> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<Choice<S>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Serialize)]
struct Choice<S> {
    index: usize,
    #[serde(flatten)]
    said: S,
    logprobs: (),
    finish_reason: Option<String>,
}

impl Head {
    fn over<S>(
        &self,
        object: &'static str,
        choices: Vec<Choice<S>>,
        usage: Option<Usage>,
    ) -> Headed<'_, S> {
        Headed {
            id: &self.id,
            object,
            created: self.created,
            model: &self.lease.name,
            system_fingerprint: &self.lease.hash,
            choices,
            usage,
        }
    }
}

/// The answer of `job` to what was `asked`, in `form`.
pub(crate) async fn answer<F: Form>(
    asked: Asked,
    mut job: RunningJob,
    form: F,
) -> Result<HttpResponse, ApiError> {
    let head = Head {
        id: format!("{}-{}", F::ID, uuid::Uuid::new_v4().simple()),
        created: now(),
        lease: asked.lease,
    };
    if asked.stream {
        return Ok(Stream::new(head, job, form, &asked.stop, asked.include_usage).into_response());
    }
    let mut choices = Vec::new();
    for (index, response) in job.responses().await?.into_iter().enumerate() {
        for mut piece in form.read(response, &mut false).ok_or_else(another_kind)? {
            let text = piece.text.as_deref().map(whole_characters);
            let cut = text.map(|text| StopFilter::cut(&asked.stop, text));
            let stopped = cut.as_ref().is_some_and(|(_, stopped)| *stopped);
            piece.text = cut.map(|(text, _)| text);
            choices.push(Choice {
                index,
                logprobs: (),
                finish_reason: match stopped {
                    true => Some("stop".to_owned()),
                    false => piece.finish_reason.take(),
                },
                said: form.whole(piece),
            });
        }
    }
    let usage = Some(job.usage());
    Ok(Json(head.over(F::WHOLE, choices, usage)).into_response())
}

fn another_kind() -> ApiError {
    ApiError::internal("the engine answered in another way than asked")
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

/// How far one choice of a stream is.
#[derive(Default)]
struct ChoiceState {
    stop: StopFilter,
    shown: bool,
    begun: bool,
    ended: bool,
}

struct Stream<F> {
    head: Head,
    job: RunningJob,
    form: F,
    include_usage: bool,
    queue: VecDeque<String>,
    choices: Vec<ChoiceState>,
    closed: bool,
}

impl<F: Form> Stream<F> {
    fn new(head: Head, job: RunningJob, form: F, stop: &[String], include_usage: bool) -> Self {
        let choices = (0..job.n_choices()).map(|_| ChoiceState {
            stop: StopFilter::new(stop.to_vec()),
            ..ChoiceState::default()
        });
        let mut stream = Self {
            choices: choices.collect(),
            head,
            job,
            form,
            include_usage,
            queue: VecDeque::new(),
            closed: false,
        };
        let lead = stream.form.lead().to_owned();
        for idx in (0..stream.choices.len()).filter(|_| !lead.is_empty()) {
            stream.show(idx, Piece::of(lead.clone(), None));
        }
        stream
    }

    fn into_response(self) -> HttpResponse {
        let events = futures::stream::unfold(self, async |mut stream| {
            let data = stream.next().await?;
            Some((Ok::<_, Infallible>(Event::default().data(data)), stream))
        });
        Sse::new(events)
            .keep_alive(KeepAlive::default())
            .into_response()
    }

    async fn next(&mut self) -> Option<String> {
        while self.queue.is_empty() && !self.closed {
            match self.job.next().await {
                Ok((idx, Some(response))) => {
                    match self.form.read(response, &mut self.choices[idx].begun) {
                        Some(pieces) => pieces.into_iter().for_each(|piece| self.take(idx, piece)),
                        None => self.fail(&another_kind()),
                    }
                }
                Ok((idx, None)) if !self.choices[idx].ended => {
                    let reason = self.job.finish_reason(idx).to_owned();
                    self.finish(idx, reason);
                }
                Ok((_, None)) => {}
                Err(error) => self.fail(&error),
            }
        }
        self.queue.pop_front()
    }

    fn take(&mut self, idx: usize, mut piece: Piece) {
        let choice = &mut self.choices[idx];
        if choice.ended {
            return;
        }
        let (mut text, stopped) = choice.stop.push(piece.text.as_deref().unwrap_or_default());
        let reason = match stopped {
            true => Some("stop".to_owned()),
            false => piece.finish_reason.take(),
        };
        if reason.is_some() && !stopped {
            text.push_str(&choice.stop.finish());
        }
        piece.text = Some(text);
        piece.finish_reason = None;
        if !piece.is_empty() {
            self.show(idx, piece);
        }
        if let Some(reason) = reason {
            self.finish(idx, reason);
        }
    }

    fn show(&mut self, index: usize, mut piece: Piece) {
        let is_first = !std::mem::replace(&mut self.choices[index].shown, true);
        let choice = Choice {
            index,
            logprobs: (),
            finish_reason: piece.finish_reason.take(),
            said: self.form.chunk(piece, is_first),
        };
        self.push(vec![choice], None);
    }

    fn push(&mut self, choices: Vec<Choice<F::Said>>, usage: Option<Usage>) {
        let chunk = serde_json::to_string(&self.head.over(F::CHUNK, choices, usage));
        let text = chunk.expect("structures of texts and numbers have a JSON form");
        self.queue.push_back(text);
    }

    /// Ends one choice, and with the last of them the stream.
    fn finish(&mut self, idx: usize, reason: String) {
        let text = self.choices[idx].stop.finish();
        self.show(idx, Piece::of(text, Some(reason)));
        self.choices[idx].ended = true;
        self.job.end_choice(idx);
        if self.choices.iter().all(|choice| choice.ended) {
            if self.include_usage {
                self.push(Vec::new(), Some(self.job.usage()));
            }
            self.close();
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.queue.push_back(error.body().to_string());
        self.close();
    }

    fn close(&mut self) {
        self.queue.push_back("[DONE]".to_owned());
        self.closed = true;
        self.job.complete();
    }
}
