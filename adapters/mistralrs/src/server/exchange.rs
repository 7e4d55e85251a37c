//! One request in an engine's hands, from its admission to its last token, whether or not the client stays.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use futures::StreamExt;
use mistralrs_core::{NormalRequest, Request, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc::{
    Receiver, Sender, UnboundedReceiver, UnboundedSender, channel, unbounded_channel,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::App;
use super::answer::ApiError;
use super::context::RequestContext;
use super::metrics::{AnswerRecord, Counted, Metrics};
use super::registry::Lease;
use super::steps::Steps;

/// Responses an engine may be ahead of the task that takes them.
const CHANNEL_SIZE: usize = 1024;

/// A place among the requests that are worked on or queued, for each choice asked for.
pub(crate) struct Admission {
    started: Instant,
    places: Vec<Arc<OwnedSemaphorePermit>>,
    _in_flight: Counted,
}

impl Admission {
    /// A place, unless all are taken or the server is stopping.
    pub(crate) fn new(app: &App) -> Result<Self, ApiError> {
        if app.draining.load(Ordering::SeqCst) {
            return Err(ApiError::unavailable("the server is stopping"));
        }
        let permit = Semaphore::try_acquire_owned(app.places.clone()).map_err(|_| too_many())?;
        Ok(Self {
            started: Instant::now(),
            places: vec![Arc::new(permit)],
            _in_flight: app.metrics.in_flight(),
        })
    }

    /// Takes places for all of `n_choices`, if there are any left.
    pub(crate) fn widen(&mut self, app: &App, n_choices: usize) -> Result<(), ApiError> {
        let most = app.limits.max_concurrent_requests;
        if n_choices > most {
            return Err(ApiError::invalid(
                "n",
                format!("`n` is {n_choices}; this server works on at most {most} at a time"),
            ));
        }
        let more = u32::try_from(n_choices.saturating_sub(1)).map_err(|_| too_many())?;
        let permit = Semaphore::try_acquire_many_owned(app.places.clone(), more);
        self.places.push(Arc::new(permit.map_err(|_| too_many())?));
        Ok(())
    }

    /// What keeps the places taken, for work that may go on after the request.
    pub(crate) fn places(&self) -> Vec<Arc<OwnedSemaphorePermit>> {
        self.places.clone()
    }

    /// `work`, unless it takes longer than a whole answer may.
    pub(crate) async fn within<T>(
        &self,
        app: &App,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let deadline = self.started + app.limits.request_timeout;
        tokio::time::timeout_at(deadline.into(), work)
            .await
            .unwrap_or_else(|_| Err(ApiError::timed_out()))
    }
}

fn too_many() -> ApiError {
    ApiError::unavailable("too many requests at a time; try again shortly")
}

/// What is needed to hand a request over.
pub(crate) struct Handover {
    pub(crate) admission: Admission,
    pub(crate) lease: Lease,
    /// One for each choice asked for.
    pub(crate) steps: Vec<Arc<Steps>>,
    pub(crate) max_tokens: usize,
    pub(crate) prompt_tokens: usize,
}

impl Handover {
    /// Gives `request` to the engine, once for each choice.
    ///
    /// Choices are requests of their own. They run together, but where an engine takes one request at a time: there each waits for
    /// its turn when the former is over, so that other requests come between.
    pub(crate) fn send(self, app: &App, request: NormalRequest) -> Result<Exchange, ApiError> {
        let host = app.registry.host();
        let engine_input = host
            .get_sender(Some(self.lease.engine_id()))
            .map_err(|error| ApiError::internal(error.to_string()))?;
        let choices = self.steps.iter().enumerate().map(|(idx, steps)| {
            let (sender, engine) = channel(CHANNEL_SIZE);
            let mut request = request.clone();
            request.id = host.next_request_id();
            request.response = sender;
            request.model_id = Some(self.lease.engine_id().to_owned());
            request.sampling_params.n_choices = 1;
            request.sampling_params.max_len = Some(self.max_tokens);
            request.logits_processors = Some(vec![steps.clone()]);
            Choice {
                idx,
                request: Request::Normal(Box::new(request)),
                engine,
            }
        });
        let choices: Vec<Choice> = choices.collect();
        let (client, receiver) = unbounded_channel();
        let complete = Arc::new(AtomicBool::new(false));
        let exchange = Exchange {
            receiver,
            steps: self.steps.clone(),
            complete: complete.clone(),
            max_tokens: self.max_tokens,
            prompt_tokens: self.prompt_tokens,
        };
        let keeper = Keeper {
            deadline: self.admission.started + app.limits.request_timeout,
            cut: app.cut.subscribe(),
            metrics: app.metrics.clone(),
            context: RequestContext::current(),
            streaming: request.is_streaming,
            complete,
            handover: self,
        };
        // A task of its own, begun before the engine knows of the request: the client may go at any time, and the engine
        // must find a receiver whenever it answers.
        tokio::spawn(async move {
            let answers = choices
                .into_iter()
                .map(|choice| keeper.answer(choice, &engine_input, &client));
            let outcomes = match keeper.handover.lease.turns() {
                Some(_) => {
                    futures::stream::iter(answers)
                        .then(|answer| answer)
                        .collect()
                        .await
                }
                None => futures::future::join_all(answers).await,
            };
            keeper.record(outcomes.into_iter().max().unwrap_or(Outcome::Finished));
        });
        Ok(exchange)
    }
}

/// One choice of a request, ready for the engine.
struct Choice {
    idx: usize,
    request: Request,
    engine: Receiver<Response>,
}

/// What the client's side hears of an answer.
pub(crate) enum Event {
    /// A response of the engine to the choice of this index.
    Answer(usize, Box<Response>),
    /// Nothing more comes for the choice of this index.
    Over(usize),
    /// The answer ends here: it took too long, or the server stops.
    Ended(Ending),
}

/// Why an answer ends before its engine is done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It took longer than a whole answer may.
    Timeout,
    /// The server stops, and the time to drain is over.
    Stopped,
    /// The engine is no more.
    Broken,
}

impl From<Ending> for ApiError {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Timeout => Self::timed_out(),
            Ending::Broken => Self::internal("the engine failed before the answer's end"),
            Ending::Stopped => Self::unavailable("the server has stopped before the answer's end"),
        }
    }
}

impl From<Ending> for Outcome {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Timeout => Self::TimedOut,
            Ending::Stopped => Self::Stopped,
            Ending::Broken => Self::Failed,
        }
    }
}

/// How an answer ended; of several choices, the last in this order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Finished,
    Canceled,
    Stopped,
    TimedOut,
    Failed,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Canceled => "canceled",
            Self::Stopped => "stopped",
            Self::TimedOut => "timeout",
            Self::Failed => "failed",
        }
    }
}

/// Takes an engine's responses as long as it sends any, holding the lease, so that the engine outlives the request.
struct Keeper {
    handover: Handover,
    deadline: Instant,
    /// Becomes true when the time to drain is over.
    cut: watch::Receiver<bool>,
    streaming: bool,
    /// The client has all it asked for.
    complete: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
    context: Option<Arc<RequestContext>>,
}

impl Keeper {
    /// Sees one choice through.
    async fn answer(
        &self,
        choice: Choice,
        engine_input: &Sender<Request>,
        client: &UnboundedSender<Event>,
    ) -> Outcome {
        let outcome = match self.turn(client).await {
            Err(outcome) => outcome,
            Ok(_turn) => match engine_input.send(choice.request).await {
                Err(_) => {
                    let _ = client.send(Event::Ended(Ending::Broken));
                    Outcome::Failed
                }
                Ok(()) => {
                    self.keep(choice.idx, choice.engine, engine_input, client)
                        .await
                }
            },
        };
        // A client that is gone needs no word of it.
        let _ = client.send(Event::Over(choice.idx));
        outcome
    }

    /// A turn at the engine, where it takes one request at a time; else how the wait for it ended.
    async fn turn(
        &self,
        client: &UnboundedSender<Event>,
    ) -> Result<Option<OwnedSemaphorePermit>, Outcome> {
        let Some(turns) = self.handover.lease.turns() else {
            return Ok(None);
        };
        tokio::select! {
            biased;
            () = client.closed() => Err(self.left()),
            ending = self.ending() => {
                let _ = client.send(Event::Ended(ending));
                Err(ending.into())
            }
            turn = turns.acquire_owned() => turn.map(Some).map_err(|_| Outcome::Failed),
        }
    }

    /// Completes when the answer has to end.
    async fn ending(&self) -> Ending {
        let mut cut = self.cut.clone();
        tokio::select! {
            () = tokio::time::sleep_until(self.deadline.into()) => Ending::Timeout,
            // The sender lives as long as the server.
            _ = cut.wait_for(|cut| *cut) => Ending::Stopped,
        }
    }

    async fn keep(
        &self,
        idx: usize,
        mut engine: Receiver<Response>,
        engine_input: &Sender<Request>,
        client: &UnboundedSender<Event>,
    ) -> Outcome {
        let steps = &self.handover.steps[idx];
        let mut is_awaited = true;
        let mut outcome = Outcome::Finished;
        loop {
            tokio::select! {
                biased;
                response = engine.recv() => {
                    let Some(response) = response else {
                        // An engine that ends on its way, by a panic, lets go of its input before its answers.
                        if engine_input.is_closed() {
                            outcome = Outcome::Failed;
                            let _ = client.send(Event::Ended(Ending::Broken));
                        }
                        break;
                    };
                    if is_failure(&response) {
                        outcome = Outcome::Failed;
                    }
                    if is_awaited {
                        // A client that is gone shows in `closed`.
                        let _ = client.send(Event::Answer(idx, Box::new(response)));
                    }
                    // The only response, unless it is a stream.
                    if !self.streaming {
                        break;
                    }
                }
                () = client.closed(), if is_awaited => {
                    is_awaited = false;
                    outcome = outcome.max(self.left());
                    steps.cancel();
                }
                ending = self.ending(), if is_awaited => {
                    is_awaited = false;
                    outcome = ending.into();
                    let _ = client.send(Event::Ended(ending));
                    steps.cancel();
                    // The process is about to end, with the engine and whatever else it is at.
                    if ending == Ending::Stopped {
                        break;
                    }
                }
            }
        }
        outcome
    }

    /// What it means that the client no longer listens.
    fn left(&self) -> Outcome {
        if self.complete.load(Ordering::SeqCst) {
            Outcome::Finished
        } else {
            Outcome::Canceled
        }
    }

    fn record(&self, outcome: Outcome) {
        let Handover {
            admission,
            lease,
            steps,
            prompt_tokens,
            ..
        } = &self.handover;
        let first = steps.iter().filter_map(|steps| steps.first()).min();
        let record = AnswerRecord {
            prompt_tokens: *prompt_tokens,
            completion_tokens: steps.iter().map(|steps| steps.count()).sum(),
            duration: admission.started.elapsed(),
            time_to_first_token: first.map(|first| first - admission.started),
            outcome: outcome.name(),
        };
        self.metrics.answer(&lease.name, &record);
        tracing::info!(
            request_id = self.context.as_ref().map(|context| context.id()),
            model = lease.name,
            generation = lease.hash,
            prompt_tokens = record.prompt_tokens,
            completion_tokens = record.completion_tokens,
            first_token_ms = record.time_to_first_token.map(|time| time.as_millis()),
            duration_ms = record.duration.as_millis(),
            outcome = record.outcome,
            "answered"
        );
    }
}

fn is_failure(response: &Response) -> bool {
    matches!(
        response,
        Response::ValidationError(_)
            | Response::InternalError(_)
            | Response::ModelError(..)
            | Response::CompletionModelError(..)
    )
}

/// The client's side of a request that an engine is working on. Dropping it ends the answer.
pub(crate) struct Exchange {
    receiver: UnboundedReceiver<Event>,
    steps: Vec<Arc<Steps>>,
    complete: Arc<AtomicBool>,
    max_tokens: usize,
    prompt_tokens: usize,
}

impl Exchange {
    /// Choices asked for.
    pub(crate) fn n_choices(&self) -> usize {
        self.steps.len()
    }

    /// What the engine says next; none once it says nothing more.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// Notes that nothing more is wanted of the choice `idx`, and lets the engine stop with it.
    pub(crate) fn end_choice(&self, idx: usize) {
        self.steps[idx].cancel();
    }

    /// Notes that nothing more is wanted, and lets the engine stop.
    pub(crate) fn complete(&mut self) {
        self.complete.store(true, Ordering::SeqCst);
        self.receiver.close();
    }

    /// Why the finished choice `idx` ended, where the engine has not said so.
    pub(crate) fn finish_reason(&self, idx: usize) -> &'static str {
        if self.steps[idx].count() >= self.max_tokens {
            "length"
        } else {
            "stop"
        }
    }

    /// The choices of a request that is not streamed, each with its index; `of` takes them from the engine's final answer.
    pub(crate) async fn choices<C>(
        &mut self,
        of: impl Fn(Response) -> Option<Vec<C>>,
    ) -> Result<Vec<(usize, C)>, ApiError> {
        let silent = || ApiError::internal("the engine stopped without an answer");
        let other = || ApiError::internal("the engine answered in another way than asked");
        let mut answers: Vec<Option<Vec<C>>> = self.steps.iter().map(|_| None).collect();
        let mut n_over = 0;
        while n_over < answers.len() {
            match self.next().await {
                None => return Err(silent()),
                Some(Event::Ended(ending)) => return Err(ending.into()),
                Some(Event::Answer(idx, response)) => {
                    answers[idx] = Some(of(sound(*response)?).ok_or_else(other)?);
                }
                Some(Event::Over(idx)) if answers[idx].is_none() => return Err(silent()),
                Some(Event::Over(_)) => n_over += 1,
            }
        }
        let answers = answers.into_iter().flatten().enumerate();
        Ok(answers
            .flat_map(|(idx, choices)| choices.into_iter().map(move |choice| (idx, choice)))
            .collect())
    }

    pub(crate) fn usage(&self) -> Value {
        let completion_tokens: usize = self.steps.iter().map(|steps| steps.count()).sum();
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        })
    }
}

/// `response`, unless it says that there is no answer.
pub(crate) fn sound(response: Response) -> Result<Response, ApiError> {
    match response {
        Response::ValidationError(error) => Err(ApiError::invalid("messages", error.to_string())),
        Response::InternalError(error) => Err(ApiError::internal(error.to_string())),
        Response::ModelError(message, _) | Response::CompletionModelError(message, _) => {
            Err(ApiError::internal(message))
        }
        response => Ok(response),
    }
}
