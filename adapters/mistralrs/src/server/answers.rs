//! Sends answers to clients: whole, or as server-sent events that end with a chunk with the finish reason and `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::Json;
use axum::response::sse::{Event, KeepAlive};
use axum::response::{IntoResponse, Response as HttpResponse, Sse};
use mistralrs_core::{Response, ToolCallResponse};
use serde::Serialize;
use serde_json::Value;

use super::api_error::ApiError;
use super::job::{RunningJob, Said, Usage};
use super::logprobs::{Cursor, Shown};
use super::registry::Lease;
use super::request::Asked;
use super::stop::{StopFilter, whole_characters};

/// A response to one choice: the whole text, or the next piece of a stream.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub(crate) text: Option<String>,
    pub(crate) tool_calls: Option<Vec<ToolCallResponse>>,
    pub(crate) reasoning: Option<String>,
    pub(crate) finish_reason: Option<String>,
    /// The scores of its tokens, if they are wanted.
    pub(crate) scores: Vec<Shown>,
}

impl Piece {
    pub(crate) fn of(text: String, finish_reason: Option<String>) -> Self {
        Self {
            text: Some(text),
            finish_reason,
            ..Self::default()
        }
    }

    /// Cuts the text of a whole choice at the first of `stops`, and before an incomplete character. Returns whether one
    /// of `stops` occurs.
    pub(crate) fn cut(&mut self, stops: &[String]) -> bool {
        let Some(text) = &mut self.text else {
            return false;
        };
        let (shown, stopped) = StopFilter::cut(stops, whole_characters(text));
        *text = shown;
        if stopped {
            self.finish_reason = Some("stop".to_owned());
        }
        stopped
    }

    fn is_empty(&self) -> bool {
        let text = self.text.as_deref().unwrap_or_default();
        text.is_empty()
            && self.tool_calls.is_none()
            && self.reasoning.is_none()
            && self.scores.is_empty()
    }
}

/// How one endpoint formats its answers.
pub(crate) trait Form: Send + 'static {
    /// Prefix of ids.
    const ID: &'static str;
    /// Value of `object` in a whole answer.
    const WHOLE: &'static str;
    /// Value of `object` in a chunk.
    const CHUNK: &'static str;
    /// The content of a choice, under its own key.
    type Said: Serialize;

    /// Whether leading white space of an answer is cut.
    fn is_trimmed(&self) -> bool;

    /// The text before the first token of the choice `idx`.
    fn lead(&self, _idx: usize) -> &str {
        ""
    }

    /// Whether scores include the token that ends an answer.
    fn scores_end(&self) -> bool;

    /// Formats scores. `n_before` is the number of characters of the choice before these scores; the function advances
    /// it.
    fn logprobs(&self, scores: &[Shown], n_before: &mut usize) -> Value;

    /// Reads the pieces of `response`, if it is of the requested kind. There is one `begun` per choice of a stream; it
    /// is false at first.
    fn read(&self, response: Response, begun: &mut bool) -> Option<Vec<Piece>>;

    /// Formats the whole choice `idx`, including its lead.
    fn whole(&self, idx: usize, piece: Piece) -> Self::Said;

    /// Formats the content that a chunk adds to a choice.
    fn chunk(&self, piece: Piece, is_first: bool) -> Self::Said;
}

impl Said {
    /// Converts the response to the pieces of `form`; see [`Form::read`].
    pub(crate) fn pieces(self, form: &impl Form, begun: &mut bool) -> Option<Vec<Piece>> {
        let mut piece = match self {
            Self::Engine(response) => return form.read(*response, begun),
            Self::Draw(piece) => piece,
        };
        if let Some(text) = &mut piece.text {
            if form.is_trimmed() && !*begun {
                *text = text.trim_start().to_owned();
            }
            *begun |= !text.is_empty();
        }
        Some(vec![piece])
    }
}

/// The common fields of an answer and of each of its chunks.
struct Head {
    id: String,
    created: u64,
    /// Name of the model that answers.
    model: String,
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
    logprobs: Option<Value>,
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
            model: &self.model,
            system_fingerprint: &self.lease.hash,
            choices,
            usage,
        }
    }
}

/// Answers the request `asked` with the results of `job`, in the format `form`.
pub(crate) async fn answer<F: Form>(
    asked: Asked,
    mut job: RunningJob,
    form: F,
) -> Result<HttpResponse, ApiError> {
    let head = Head {
        id: format!("{}-{}", F::ID, uuid::Uuid::new_v4().simple()),
        created: now(),
        model: asked.model_name(),
        lease: asked.lease,
    };
    if asked.stream {
        return Ok(Stream::new(head, job, form, &asked.stop, asked.include_usage).into_response());
    }
    let mut choices = Vec::new();
    for (index, said) in job.responses().await?.into_iter().enumerate() {
        let pieces = match said {
            Some(said) => said.pieces(&form, &mut false).ok_or_else(another_kind)?,
            None => vec![Piece::of(String::new(), Some("length".to_owned()))],
        };
        for mut piece in pieces {
            let stopped = piece.cut(&asked.stop);
            let mut scores = Scoring::new(&form);
            let shown = scores.lead(&job, index);
            let shown = [shown, scores.piece(&job, index, &piece, stopped)].concat();
            let wanted = asked.n_top.is_some();
            choices.push(Choice {
                index,
                logprobs: wanted.then(|| form.logprobs(&shown, &mut scores.n_characters)),
                finish_reason: piece.finish_reason.take(),
                said: form.whole(index, piece),
            });
        }
    }
    let usage = Some(job.usage());
    Ok(Json(head.over(F::WHOLE, choices, usage)).into_response())
}

fn another_kind() -> ApiError {
    ApiError::internal("the engine answered in another way than asked")
}

/// Unix time in seconds.
pub(crate) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}

/// How many scores of one choice were shown.
#[derive(Default)]
pub(crate) struct Scoring {
    cursor: Cursor,
    /// Whether scores include the token that ends the answer.
    with_end: bool,
    /// Number of characters of the choice that were shown with scores.
    n_characters: usize,
}

impl Scoring {
    pub(crate) fn new(form: &impl Form) -> Self {
        Self {
            cursor: Cursor::new(form.is_trimmed()),
            with_end: form.scores_end(),
            n_characters: 0,
        }
    }

    /// The scores of the prompt, if the prompt is shown.
    fn lead(&self, job: &RunningJob, idx: usize) -> Vec<Shown> {
        let Some(scores) = &job.plan(idx).scores else {
            return Vec::new();
        };
        let mut prompt = Cursor::new(false);
        prompt.finish(job.vocabulary(), scores.scores(), |_| false, false)
    }

    /// The scores that belong to `piece`. The last piece gets all remaining scores, unless a stop text has cut the
    /// answer.
    pub(crate) fn piece(
        &mut self,
        job: &RunningJob,
        idx: usize,
        piece: &Piece,
        stopped: bool,
    ) -> Vec<Shown> {
        let steps = &job.plan(idx).steps;
        let Some(scores) = &steps.scores else {
            return Vec::new();
        };
        let (vocabulary, scores) = (job.vocabulary(), scores.recorded.lock());
        let length = |text: &Option<String>| text.as_deref().unwrap_or_default().len();
        let n_bytes = length(&piece.text) + length(&piece.reasoning);
        let mut shown = self.cursor.advance(vocabulary, &scores, n_bytes);
        if piece.finish_reason.is_some() && !stopped {
            shown.extend(self.cursor.finish(
                vocabulary,
                &scores,
                |token| steps.ends(token),
                self.with_end,
            ));
        }
        shown
    }
}

/// The state of one choice of a stream.
#[derive(Default)]
struct ChoiceState {
    scoring: Scoring,
    stop: StopFilter,
    led: bool,
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
            scoring: Scoring::new(&form),
            ..ChoiceState::default()
        });
        Self {
            choices: choices.collect(),
            head,
            job,
            form,
            include_usage,
            queue: VecDeque::new(),
            closed: false,
        }
    }

    /// Shows the text before the first token of the choice `idx`, with its scores, which are computed by then.
    fn lead(&mut self, idx: usize) {
        if std::mem::replace(&mut self.choices[idx].led, true) {
            return;
        }
        let scores = self.choices[idx].scoring.lead(&self.job, idx);
        let text = self.form.lead(idx).to_owned();
        if !text.is_empty() || !scores.is_empty() {
            let lead = Piece {
                scores,
                ..Piece::of(text, None)
            };
            self.show(idx, lead);
        }
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
                Ok((idx, Some(said))) => {
                    self.lead(idx);
                    match said.pieces(&self.form, &mut self.choices[idx].begun) {
                        Some(pieces) => pieces.into_iter().for_each(|piece| self.take(idx, piece)),
                        None => self.fail(&another_kind()),
                    }
                }
                Ok((idx, None)) if !self.choices[idx].ended => {
                    self.lead(idx);
                    let reason = self.job.finish_reason(idx).to_owned();
                    self.finish(idx, reason, false);
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
        piece.scores = choice.scoring.piece(&self.job, idx, &piece, stopped);
        if !piece.is_empty() {
            self.show(idx, piece);
        }
        if let Some(reason) = reason {
            self.finish(idx, reason, stopped);
        }
    }

    fn show(&mut self, index: usize, mut piece: Piece) {
        let is_first = !std::mem::replace(&mut self.choices[index].shown, true);
        let n_characters = &mut self.choices[index].scoring.n_characters;
        let scores = std::mem::take(&mut piece.scores);
        let logprobs = (!scores.is_empty()).then(|| self.form.logprobs(&scores, n_characters));
        let choice = Choice {
            index,
            logprobs,
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

    /// Ends one choice, which a stop text may have cut. The last choice also ends the stream.
    fn finish(&mut self, idx: usize, reason: String, stopped: bool) {
        let choice = &mut self.choices[idx];
        let mut last = Piece::of(choice.stop.finish(), Some(reason));
        last.scores = choice.scoring.piece(&self.job, idx, &last, stopped);
        self.show(idx, last);
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
