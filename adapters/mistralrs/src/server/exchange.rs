//! One request in an engine's hands, from its admission to its last token, whether or not the client stays.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mistralrs_core::{NormalRequest, Request, Response};
use serde_json::Value;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender, channel, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::App;
use super::answer::ApiError;
use super::context::RequestContext;
use super::metrics::{AnswerRecord, Counted, Metrics};
use super::registry::Lease;
use super::request::usage;
use super::steps::Steps;

/// Responses an engine may be ahead of the task that takes them.
const CHANNEL_SIZE: usize = 1024;

/// A place among the requests that are worked on or queued.
pub(crate) struct Admission {
    started: Instant,
    _permit: OwnedSemaphorePermit,
    _in_flight: Counted,
}

impl Admission {
    /// A place, unless all are taken or the server is stopping.
    pub(crate) fn new(app: &App) -> Result<Self, ApiError> {
        if app.draining.load(Ordering::SeqCst) {
            return Err(ApiError::unavailable("the server is stopping"));
        }
        let permit = Semaphore::try_acquire_owned(app.places.clone())
            .map_err(|_| ApiError::unavailable("too many requests at a time; try again shortly"))?;
        Ok(Self {
            started: Instant::now(),
            _permit: permit,
            _in_flight: app.metrics.in_flight(),
        })
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

/// What is needed to hand a request over.
pub(crate) struct Handover {
    pub(crate) admission: Admission,
    pub(crate) lease: Lease,
    pub(crate) steps: Arc<Steps>,
    pub(crate) max_tokens: usize,
    pub(crate) prompt_tokens: usize,
}

impl Handover {
    /// Gives the request that `build` makes to the engine.
    pub(crate) async fn send(
        self,
        app: &App,
        build: impl AsyncFnOnce(tokio::sync::mpsc::Sender<Response>) -> Result<NormalRequest, ApiError>,
    ) -> Result<Exchange, ApiError> {
        let (sender, engine) = channel(CHANNEL_SIZE);
        let mut request = build(sender).await?;
        request.model_id = Some(self.lease.engine_id().to_owned());
        request.sampling_params.max_len = Some(self.max_tokens);
        request.logits_processors = Some(vec![self.steps.clone()]);
        let streaming = request.is_streaming;
        let engine_input = app
            .registry
            .host()
            .get_sender(Some(self.lease.engine_id()))
            .map_err(|error| ApiError::internal(error.to_string()))?;
        let (client, receiver) = unbounded_channel();
        let end = Arc::new(End::default());
        let exchange = Exchange {
            receiver,
            steps: self.steps.clone(),
            end: end.clone(),
            max_tokens: self.max_tokens,
            prompt_tokens: self.prompt_tokens,
        };
        let keeper = Keeper {
            deadline: self.admission.started + app.limits.request_timeout,
            metrics: app.metrics.clone(),
            context: RequestContext::current(),
            streaming,
            end,
            handover: self,
        };
        // A task of its own, begun before the engine knows of the request: the client may go at any time, and the engine
        // must find a receiver whenever it answers.
        let request = Request::Normal(Box::new(request));
        tokio::spawn(async move {
            match keeper.turn(&client).await {
                Ok(_turn) => {
                    if engine_input.send(request).await.is_ok() {
                        keeper.keep(engine, client).await;
                    }
                }
                Err(outcome) => keeper.record(outcome),
            }
        });
        Ok(exchange)
    }
}

/// How an answer came to its end, as either side knows it.
#[derive(Default)]
struct End {
    timed_out: AtomicBool,
    /// The client has all it asked for.
    complete: AtomicBool,
}

/// Takes an engine's responses as long as it sends any, holding the lease, so that the engine outlives the request.
struct Keeper {
    handover: Handover,
    deadline: Instant,
    streaming: bool,
    end: Arc<End>,
    metrics: Arc<Metrics>,
    context: Option<Arc<RequestContext>>,
}

impl Keeper {
    /// A turn at the engine, where it takes one request at a time; else how the wait for it ended.
    async fn turn(
        &self,
        client: &UnboundedSender<Response>,
    ) -> Result<Option<OwnedSemaphorePermit>, &'static str> {
        let Some(turns) = self.handover.lease.turns() else {
            return Ok(None);
        };
        tokio::select! {
            biased;
            () = client.closed() => Err("canceled"),
            () = tokio::time::sleep_until(self.deadline.into()) => {
                self.end.timed_out.store(true, Ordering::SeqCst);
                Err("timeout")
            }
            turn = turns.acquire_owned() => turn.map(Some).map_err(|_| "failed"),
        }
    }

    async fn keep(self, mut engine: Receiver<Response>, client: UnboundedSender<Response>) {
        let steps = &self.handover.steps;
        let mut client = Some(client);
        let mut outcome = "finished";
        loop {
            tokio::select! {
                biased;
                response = engine.recv() => {
                    let Some(response) = response else {
                        break;
                    };
                    if is_failure(&response) {
                        outcome = "failed";
                    }
                    // The only response, unless it is a stream.
                    let last = !self.streaming;
                    if let Some(client) = &client {
                        // A client that is gone shows in `closed`.
                        let _ = client.send(response);
                    }
                    if last {
                        break;
                    }
                }
                () = closed(client.as_ref()), if client.is_some() => {
                    client = None;
                    if !self.end.complete.load(Ordering::SeqCst) {
                        outcome = "canceled";
                    }
                    steps.cancel();
                }
                () = tokio::time::sleep_until(self.deadline.into()), if client.is_some() => {
                    self.end.timed_out.store(true, Ordering::SeqCst);
                    client = None;
                    outcome = "timeout";
                    steps.cancel();
                }
            }
        }
        self.record(outcome);
    }

    fn record(&self, outcome: &'static str) {
        let Handover {
            admission,
            lease,
            steps,
            prompt_tokens,
            ..
        } = &self.handover;
        let record = AnswerRecord {
            prompt_tokens: *prompt_tokens,
            completion_tokens: steps.count(),
            duration: admission.started.elapsed(),
            time_to_first_token: steps.first().map(|first| first - admission.started),
            outcome,
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
            outcome,
            "answered"
        );
    }
}

async fn closed(client: Option<&UnboundedSender<Response>>) {
    if let Some(client) = client {
        client.closed().await;
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
    pub(crate) receiver: UnboundedReceiver<Response>,
    steps: Arc<Steps>,
    end: Arc<End>,
    max_tokens: usize,
    pub(crate) prompt_tokens: usize,
}

impl Exchange {
    /// Tokens generated so far, over all choices.
    pub(crate) fn completion_tokens(&self) -> usize {
        self.steps.count()
    }

    /// Whether the answer was ended because it took too long.
    pub(crate) fn timed_out(&self) -> bool {
        self.end.timed_out.load(Ordering::SeqCst)
    }

    /// Notes that nothing more is wanted, and lets the engine stop.
    pub(crate) fn complete(&mut self) {
        self.end.complete.store(true, Ordering::SeqCst);
        self.receiver.close();
    }

    /// Why a finished answer ended, where the engine has not said so.
    pub(crate) fn finish_reason(&self) -> &'static str {
        if self.completion_tokens() >= self.max_tokens {
            "length"
        } else {
            "stop"
        }
    }

    /// The final answer of a request that is not streamed.
    pub(crate) async fn answer(&mut self) -> Result<Response, ApiError> {
        match self.receiver.recv().await {
            None if self.timed_out() => Err(ApiError::timed_out()),
            None => Err(ApiError::internal("the engine stopped without an answer")),
            Some(Response::ValidationError(error)) => {
                Err(ApiError::invalid("messages", error.to_string()))
            }
            Some(Response::InternalError(error)) => Err(ApiError::internal(error.to_string())),
            Some(Response::ModelError(message, _) | Response::CompletionModelError(message, _)) => {
                Err(ApiError::internal(message))
            }
            Some(response) => Ok(response),
        }
    }

    pub(crate) fn usage(&self) -> Value {
        usage(self.prompt_tokens, self.completion_tokens())
    }
}
