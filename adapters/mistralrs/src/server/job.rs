//! A job: one request in an engine until its last token, even if the client leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use mistralrs_core::{NormalRequest, Request, Response, SamplingParams};
use serde::Serialize;
use tokio::sync::mpsc::{
    Receiver, Sender, UnboundedReceiver, UnboundedSender, channel, unbounded_channel,
};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, watch};

use super::App;
use super::admission::Admission;
use super::answers::Piece;
use super::api_error::ApiError;
use super::context::RequestContext;
use super::logprobs::TokenScore;
use super::metrics::{AnswerRecord, Metrics};
use super::registry::Lease;
use super::steps::Steps;
use super::vocabulary::Vocabulary;
use crate::engine::rows_of;
use crate::quirks_0_8::lost_last_chunk::finish_reason;

/// Number of responses that an engine may be ahead of the task that takes them.
const CHANNEL_SIZE: usize = 1024;

mod by_draw;

/// The work for an engine: one or several choices of one request.
pub(crate) struct Job {
    pub(crate) lease: Lease,
    /// The posterior draw that answers instead of the engine.
    pub(crate) draw: Option<usize>,
    /// One plan per requested choice.
    pub(crate) plans: Vec<Plan>,
    pub(crate) prompt_tokens: usize,
    /// Whether the client has everything it asked for; false at first.
    pub(crate) complete: AtomicBool,
}

/// How one choice is generated.
pub(crate) struct Plan {
    pub(crate) steps: Arc<Steps>,
    /// Tokens of the prompt.
    pub(crate) tokens: Arc<[u32]>,
    pub(crate) request: NormalRequest,
    /// Maximum number of tokens; 0 requests the prompt alone.
    pub(crate) max_tokens: usize,
    /// The scores of the prompt, which choices share.
    pub(crate) scores: Option<Arc<PromptScores>>,
}

/// The scores of the tokens of a prompt, computed once.
pub(crate) struct PromptScores {
    tokens: Vec<u32>,
    n_top: usize,
    computed: OnceCell<Vec<TokenScore>>,
}

impl PromptScores {
    pub(crate) fn new(tokens: Vec<u32>, n_top: usize) -> Self {
        Self {
            tokens,
            n_top,
            computed: OnceCell::new(),
        }
    }

    /// One score per token, once the scores are computed.
    pub(crate) fn scores(&self) -> &[TokenScore] {
        self.computed.get().map_or(&[], Vec::as_slice)
    }

    /// Computes the scores from the engine's raw logits.
    fn of(&self, response: &Response) -> Result<Vec<TokenScore>, String> {
        let Response::Raw { logits_chunks, .. } = response else {
            return Err("the engine gave no logits".to_owned());
        };
        let mut scores = RowScores::of(self);
        for chunk in logits_chunks {
            for row in rows_of(chunk).map_err(|error| error.to_string())? {
                scores.push(&row.map_err(|error| error.to_string())?);
            }
        }
        scores.whole()
    }
}

/// Computes the scores of a prompt row by row; row t of the logits predicts token t + 1.
struct RowScores<'a> {
    of: &'a PromptScores,
    scores: Vec<TokenScore>,
}

impl<'a> RowScores<'a> {
    fn of(of: &'a PromptScores) -> Self {
        let first = of.tokens.first().map(|token| TokenScore::first(*token));
        Self {
            of,
            scores: first.into_iter().collect(),
        }
    }

    /// Adds the next row. The last row predicts the token after the prompt and is ignored.
    fn push(&mut self, row: &[f32]) {
        let next = self.of.tokens.get(self.scores.len());
        let score = next.map(|token| TokenScore::new(row, *token, self.of.n_top));
        self.scores.extend(score);
    }

    fn whole(self) -> Result<Vec<TokenScore>, String> {
        match self.scores.len() == self.of.tokens.len() {
            true => Ok(self.scores),
            false => Err(format!(
                "logits for {} of {} tokens",
                self.scores.len(),
                self.of.tokens.len()
            )),
        }
    }
}

/// How a job ended. For several choices, the last variant in this order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum JobEnd {
    Finished,
    Canceled,
    /// The server stopped, and the time to drain was over.
    Stopped,
    TimedOut,
    /// The engine ended or reported a failure.
    Failed,
}

impl JobEnd {
    fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Canceled => "canceled",
            Self::Stopped => "stopped",
            Self::TimedOut => "timeout",
            Self::Failed => "failed",
        }
    }

    /// The error for a client that waits for more.
    fn error(self) -> ApiError {
        match self {
            Self::TimedOut => ApiError::timed_out(),
            Self::Stopped => {
                ApiError::unavailable("the server has stopped before the answer's end")
            }
            Self::Finished | Self::Canceled | Self::Failed => {
                ApiError::internal("the engine failed before the answer's end")
            }
        }
    }
}

/// One response to a choice.
pub(crate) enum Said {
    /// A response of the engine.
    Engine(Box<Response>),
    /// A piece of text from a posterior draw.
    Draw(Piece),
}

/// A message to the client's side. `Ok` holds the index of a choice and its next response, or none if the choice is
/// over. `Err` ends the job.
type Message = Result<(usize, Option<Said>), JobEnd>;

impl Job {
    /// Sends the request of each choice to the engine.
    ///
    /// Choices are separate requests. They run together, except if the engine takes one request at a time. Then each
    /// choice waits for its turn after the previous one, so that other requests can run in between.
    pub(crate) fn start(
        self,
        app: &App,
        admission: Admission,
        streaming: bool,
    ) -> Result<RunningJob, ApiError> {
        let engine_input = self.lease.input()?;
        let job = Arc::new(self);
        let (client, receiver) = unbounded_channel();
        let worker = Worker {
            job: job.clone(),
            admission,
            engine_input,
            client,
            cut: app.cut.subscribe(),
            metrics: app.metrics.clone(),
            context: RequestContext::current(),
            streaming,
        };
        // A separate task, started before the engine gets the request: the client may leave at any time, and the engine
        // must always find a receiver.
        tokio::spawn(worker.run());
        Ok(RunningJob { job, receiver })
    }

    fn completion_tokens(&self) -> usize {
        self.plans.iter().map(|plan| plan.steps.count()).sum()
    }

    /// How the job ends when the client no longer listens.
    fn left(&self) -> JobEnd {
        if self.complete.load(Ordering::SeqCst) {
            JobEnd::Finished
        } else {
            JobEnd::Canceled
        }
    }
}

/// Receives an engine's responses until the last one. It holds the lease, so that the engine outlives the request.
struct Worker {
    job: Arc<Job>,
    admission: Admission,
    engine_input: Sender<Request>,
    client: UnboundedSender<Message>,
    /// Becomes true when the time to drain is over.
    cut: watch::Receiver<bool>,
    streaming: bool,
    metrics: Arc<Metrics>,
    context: Option<Arc<RequestContext>>,
}

impl Worker {
    async fn run(self) {
        let answers = (0..self.job.plans.len()).map(|idx| self.answer(idx));
        let ends: Vec<JobEnd> = if self.job.lease.turns.one_by_one() {
            let one_by_one = futures::stream::iter(answers).then(|answer| answer);
            one_by_one.collect().await
        } else {
            futures::future::join_all(answers).await
        };
        self.record(ends.into_iter().max().unwrap_or(JobEnd::Finished));
    }

    /// Sends a message to the client. A client that has left shows in `closed`.
    fn tell(&self, message: Message) {
        let _ = self.client.send(message);
    }

    /// Answers one choice until its end.
    async fn answer(&self, idx: usize) -> JobEnd {
        let plan = &self.job.plans[idx];
        let end = match self.score(plan).await {
            Err(end) => end,
            Ok(()) if plan.max_tokens == 0 => JobEnd::Finished,
            Ok(()) => self.generate(idx, plan).await,
        };
        self.tell(Ok((idx, None)));
        end
    }

    /// Computes the scores of the prompt, if they are wanted and not yet computed.
    async fn score(&self, plan: &Plan) -> Result<(), JobEnd> {
        let Some(scores) = &plan.scores else {
            return Ok(());
        };
        let compute = async || {
            if let Some(draw) = self.job.draw {
                return self.score_by_draw(draw, scores.clone()).await;
            }
            let _turn = self.turn(true).await?;
            let mut request = plan.request.clone();
            request.return_raw_logits = true;
            request.is_streaming = false;
            // The engine always generates at least one token.
            request.sampling_params = SamplingParams {
                max_len: Some(1),
                ..SamplingParams::neutral()
            };
            let mut engine = self.send(request).await?;
            let Some(response) = engine.recv().await else {
                return Err(self.end(JobEnd::Failed));
            };
            // The engine makes one more step with this request and reports it. Until then it takes no other kind of
            // request.
            while engine.recv().await.is_some() {}
            let scores = scores.clone();
            let computed = tokio::task::spawn_blocking(move || scores.of(&response));
            match computed.await.map_err(|error| error.to_string()).flatten() {
                Ok(computed) => Ok(computed),
                Err(cause) => {
                    tracing::error!(cause, "a prompt could not be scored");
                    Err(self.end(JobEnd::Failed))
                }
            }
        };
        scores.computed.get_or_try_init(compute).await.map(drop)
    }

    async fn generate(&self, idx: usize, plan: &Plan) -> JobEnd {
        if let Some(draw) = self.job.draw {
            return self.generate_by_draw(idx, plan, draw).await;
        }
        let turn = match self.turn(false).await {
            Ok(turn) => turn,
            Err(end) => return end,
        };
        let mut request = plan.request.clone();
        request.logits_processors = Some(vec![plan.steps.clone()]);
        let end = match self.send(request).await {
            Ok(engine) => self.listen(idx, engine).await,
            Err(end) => end,
        };
        drop(turn);
        end
    }

    /// Sends `request` to the engine and returns the receiver of its responses.
    async fn send(&self, mut request: NormalRequest) -> Result<Receiver<Response>, JobEnd> {
        let (sender, engine) = channel(CHANNEL_SIZE);
        request.id = self.job.lease.host().next_request_id();
        request.response = sender;
        // The engine is the only one in its host.
        request.model_id = None;
        let request = Request::Normal(Box::new(request));
        match self.engine_input.send(request).await {
            Ok(()) => Ok(engine),
            Err(_) => Err(self.end(JobEnd::Failed)),
        }
    }

    fn end(&self, end: JobEnd) -> JobEnd {
        self.tell(Err(end));
        end
    }

    /// Waits for a turn at the engine. Returns how the job ends if the wait fails.
    async fn turn(&self, alone: bool) -> Result<OwnedSemaphorePermit, JobEnd> {
        tokio::select! {
            biased;
            () = self.client.closed() => Err(self.job.left()),
            end = self.overdue() => Err(self.end(end)),
            turn = self.job.lease.turns.take(alone) => turn.map_err(|_| JobEnd::Failed),
        }
    }

    /// Completes when the answer must end.
    async fn overdue(&self) -> JobEnd {
        let mut cut = self.cut.clone();
        tokio::select! {
            () = tokio::time::sleep_until(self.admission.deadline.into()) => JobEnd::TimedOut,
            // The sender lives as long as the server.
            _ = cut.wait_for(|cut| *cut) => JobEnd::Stopped,
        }
    }

    /// Passes on the engine's responses until the last one, and cancels a choice that nobody waits for any more.
    async fn listen(&self, idx: usize, mut engine: Receiver<Response>) -> JobEnd {
        let mut is_awaited = true;
        let mut end = JobEnd::Finished;
        loop {
            tokio::select! {
                biased;
                response = engine.recv() => {
                    let Some(response) = response else {
                        // An engine that ends early, by a panic, closes its input before its answers.
                        if self.engine_input.is_closed() {
                            end = self.end(JobEnd::Failed);
                        }
                        return end;
                    };
                    if is_failure(&response) {
                        end = JobEnd::Failed;
                    }
                    if is_awaited {
                        self.tell(Ok((idx, Some(Said::Engine(Box::new(response))))));
                    }
                    // Without streaming this is the only response.
                    if !self.streaming {
                        return end;
                    }
                }
                () = self.client.closed(), if is_awaited => {
                    is_awaited = false;
                    end = end.max(self.job.left());
                    self.job.plans[idx].steps.cancel();
                }
                overdue = self.overdue(), if is_awaited => {
                    is_awaited = false;
                    end = self.end(overdue);
                    self.job.plans[idx].steps.cancel();
                    // The process is about to end, together with the engine.
                    if overdue == JobEnd::Stopped {
                        return end;
                    }
                }
            }
        }
    }

    fn record(&self, end: JobEnd) {
        let (job, started) = (&self.job, self.admission.started);
        let first = job.plans.iter().filter_map(|plan| plan.steps.first()).min();
        let record = AnswerRecord {
            prompt_tokens: job.prompt_tokens,
            completion_tokens: job.completion_tokens(),
            duration: started.elapsed(),
            time_to_first_token: first.map(|first| first - started),
            outcome: end.name(),
        };
        self.metrics.answer(&job.lease.name, &record);
        tracing::info!(
            request_id = self.context.as_ref().map(|context| &context.id),
            model = job.lease.name,
            draw = job.draw,
            generation = job.lease.hash,
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

/// The client's side of a running job. Dropping it ends the answer.
pub(crate) struct RunningJob {
    job: Arc<Job>,
    receiver: UnboundedReceiver<Message>,
}

impl RunningJob {
    pub(crate) fn n_choices(&self) -> usize {
        self.job.plans.len()
    }

    /// The next response to any choice, with the index of the choice; none if the choice is over.
    pub(crate) async fn next(&mut self) -> Result<(usize, Option<Said>), ApiError> {
        match self.receiver.recv().await {
            Some(Ok((idx, said))) => Ok((idx, said.map(sound).transpose()?)),
            Some(Err(end)) => Err(end.error()),
            None => Err(silent()),
        }
    }

    /// The vocabulary of the model that answers.
    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.job.lease.tokens.vocabulary
    }

    /// How the choice `idx` is generated.
    pub(crate) fn plan(&self, idx: usize) -> &Plan {
        &self.job.plans[idx]
    }

    /// The response to each choice of a request without streaming; none if only the prompt was requested.
    pub(crate) async fn responses(&mut self) -> Result<Vec<Option<Said>>, ApiError> {
        let mut responses: Vec<Option<Said>> = (0..self.n_choices()).map(|_| None).collect();
        let mut n_over = 0;
        while n_over < responses.len() {
            match self.next().await? {
                (idx, Some(said)) => responses[idx] = Some(said),
                (idx, None) if responses[idx].is_none() && self.plan(idx).max_tokens > 0 => {
                    return Err(silent());
                }
                (_, None) => n_over += 1,
            }
        }
        Ok(responses)
    }

    /// Records that nothing more is wanted of the choice `idx`, and lets the engine stop it.
    pub(crate) fn end_choice(&self, idx: usize) {
        self.job.plans[idx].steps.cancel();
    }

    /// Records that nothing more is wanted, and lets the engine stop.
    pub(crate) fn complete(&mut self) {
        self.job.complete.store(true, Ordering::SeqCst);
        self.receiver.close();
    }

    /// Why the finished choice `idx` ended, if the engine has not reported it.
    pub(crate) fn finish_reason(&self, idx: usize) -> &'static str {
        let plan = &self.job.plans[idx];
        finish_reason(plan.steps.count(), plan.max_tokens)
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage::new(self.job.prompt_tokens, self.job.completion_tokens())
    }
}

/// Token counts of a request and its answers.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
}

impl Usage {
    pub(crate) fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

fn silent() -> ApiError {
    ApiError::internal("the engine stopped without an answer")
}

/// Returns `said`, or an error if the response is a failure.
fn sound(said: Said) -> Result<Said, ApiError> {
    let response = match said {
        Said::Engine(response) => response,
        draw @ Said::Draw(_) => return Ok(draw),
    };
    match *response {
        Response::ValidationError(error) => Err(ApiError::invalid("messages", error.to_string())),
        Response::InternalError(error) => Err(ApiError::internal(error.to_string())),
        Response::ModelError(message, _) | Response::CompletionModelError(message, _) => {
            Err(ApiError::internal(message))
        }
        response => Ok(Said::Engine(Box::new(response))),
    }
}
