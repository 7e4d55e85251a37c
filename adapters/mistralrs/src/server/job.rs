//! A job: one request in an engine's hands, until its last token, whether or not the client stays.

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

/// Responses an engine may be ahead of the task that takes them.
const CHANNEL_SIZE: usize = 1024;

mod by_draw;

/// What an engine is given to do.
pub(crate) struct Job {
    pub(crate) lease: Lease,
    /// Which of its posterior draws answers, in place of the engine.
    pub(crate) draw: Option<usize>,
    /// One for each choice asked for.
    pub(crate) plans: Vec<Plan>,
    pub(crate) prompt_tokens: usize,
    /// The client has all it asked for; false at first.
    pub(crate) complete: AtomicBool,
}

/// How one choice is made.
pub(crate) struct Plan {
    pub(crate) steps: Arc<Steps>,
    /// Those of its prompt.
    pub(crate) tokens: Arc<[u32]>,
    pub(crate) request: NormalRequest,
    /// 0 asks for the prompt alone.
    pub(crate) max_tokens: usize,
    /// The scores of its prompt, which choices share.
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

    /// One for each token, once they are computed.
    pub(crate) fn scores(&self) -> &[TokenScore] {
        self.computed.get().map_or(&[], Vec::as_slice)
    }

    /// The scores from the engine's raw logits.
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

/// Scores of a prompt that come row by row; row t of the logits predicts token t + 1.
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

    /// Takes the next row. The last one predicts what comes after the prompt.
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

/// How a job ended; of several choices, the last in this order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum JobEnd {
    Finished,
    Canceled,
    /// The server stops, and the time to drain is over.
    Stopped,
    TimedOut,
    /// The engine is no more, or said that it failed.
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

    /// What a client hears that waits for more.
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

/// What is said of a choice.
pub(crate) enum Said {
    /// By the engine.
    Engine(Box<Response>),
    /// By a posterior draw.
    Draw(Piece),
}

/// What the client's side is told: of the choice of this index, what is said or that nothing more comes; or that the job ends here.
type Message = Result<(usize, Option<Said>), JobEnd>;

impl Job {
    /// Gives each choice's request to the engine.
    ///
    /// Choices are requests of their own. They run together, but where an engine takes one request at a time: there each waits for
    /// its turn when the former is over, so that other requests come between.
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
        // A task of its own, begun before the engine knows of the request: the client may go at any time, and the engine
        // must find a receiver whenever it answers.
        tokio::spawn(worker.run());
        Ok(RunningJob { job, receiver })
    }

    fn completion_tokens(&self) -> usize {
        self.plans.iter().map(|plan| plan.steps.count()).sum()
    }

    /// What it means that the client no longer listens.
    fn left(&self) -> JobEnd {
        if self.complete.load(Ordering::SeqCst) {
            JobEnd::Finished
        } else {
            JobEnd::Canceled
        }
    }
}

/// Takes an engine's responses as long as it sends any, holding the lease, so that the engine outlives the request.
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

    /// A client that is gone needs no word, and shows in `closed`.
    fn tell(&self, message: Message) {
        let _ = self.client.send(message);
    }

    /// Sees one choice through.
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

    /// Computes the scores of the prompt, if they are wanted and nobody has done it.
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
            // One token is the least that the engine makes.
            request.sampling_params = SamplingParams {
                max_len: Some(1),
                ..SamplingParams::neutral()
            };
            let mut engine = self.send(request).await?;
            let Some(response) = engine.recv().await else {
                return Err(self.end(JobEnd::Failed));
            };
            // The engine makes one more step of it, and says so; until then it takes no other kind of request.
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

    /// Gives `request` to the engine; what it answers.
    async fn send(&self, mut request: NormalRequest) -> Result<Receiver<Response>, JobEnd> {
        let (sender, engine) = channel(CHANNEL_SIZE);
        request.id = self.job.lease.host().next_request_id();
        request.response = sender;
        // Its engine has the host for itself.
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

    /// A turn at the engine; else how the wait for it ended.
    async fn turn(&self, alone: bool) -> Result<OwnedSemaphorePermit, JobEnd> {
        tokio::select! {
            biased;
            () = self.client.closed() => Err(self.job.left()),
            end = self.overdue() => Err(self.end(end)),
            turn = self.job.lease.turns.take(alone) => turn.map_err(|_| JobEnd::Failed),
        }
    }

    /// Completes when the answer has to end.
    async fn overdue(&self) -> JobEnd {
        let mut cut = self.cut.clone();
        tokio::select! {
            () = tokio::time::sleep_until(self.admission.deadline.into()) => JobEnd::TimedOut,
            // The sender lives as long as the server.
            _ = cut.wait_for(|cut| *cut) => JobEnd::Stopped,
        }
    }

    /// Passes on what the engine says, until it says nothing more; what nobody waits for any longer is made to end.
    async fn listen(&self, idx: usize, mut engine: Receiver<Response>) -> JobEnd {
        let mut is_awaited = true;
        let mut end = JobEnd::Finished;
        loop {
            tokio::select! {
                biased;
                response = engine.recv() => {
                    let Some(response) = response else {
                        // An engine that ends on its way, by a panic, lets go of its input before its answers.
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
                    // The only response, unless it is a stream.
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
                    // The process is about to end, with the engine and whatever else it is at.
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

/// The client's side of a job that an engine is working on. Dropping it ends the answer.
pub(crate) struct RunningJob {
    job: Arc<Job>,
    receiver: UnboundedReceiver<Message>,
}

impl RunningJob {
    pub(crate) fn n_choices(&self) -> usize {
        self.job.plans.len()
    }

    /// What is said next of the choice of this index; nothing if that was all.
    pub(crate) async fn next(&mut self) -> Result<(usize, Option<Said>), ApiError> {
        match self.receiver.recv().await {
            Some(Ok((idx, said))) => Ok((idx, said.map(sound).transpose()?)),
            Some(Err(end)) => Err(end.error()),
            None => Err(silent()),
        }
    }

    /// The tokens of the model that answers.
    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.job.lease.tokens.vocabulary
    }

    /// How the choice `idx` is made.
    pub(crate) fn plan(&self, idx: usize) -> &Plan {
        &self.job.plans[idx]
    }

    /// The response to each choice of a request that is not streamed; none where only the prompt was wanted.
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

    /// Notes that nothing more is wanted of the choice `idx`, and lets the engine stop with it.
    pub(crate) fn end_choice(&self, idx: usize) {
        self.job.plans[idx].steps.cancel();
    }

    /// Notes that nothing more is wanted, and lets the engine stop.
    pub(crate) fn complete(&mut self) {
        self.job.complete.store(true, Ordering::SeqCst);
        self.receiver.close();
    }

    /// Why the finished choice `idx` ended, where the engine has not said so.
    pub(crate) fn finish_reason(&self, idx: usize) -> &'static str {
        let plan = &self.job.plans[idx];
        finish_reason(plan.steps.count(), plan.max_tokens)
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage::new(self.job.prompt_tokens, self.job.completion_tokens())
    }
}

/// Tokens of a request and its answers.
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

/// What is said, unless that is that there is no answer.
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
