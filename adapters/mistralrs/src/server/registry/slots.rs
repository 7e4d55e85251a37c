//! Slots: engines that outlive their models and get another model when they no longer need theirs.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use either::Either;
use mistralrs_core::{
    DefaultSchedulerMethod, MistralRs, MistralRsBuilder, NormalRequest, Request, RequestMessage,
    Response, SamplingParams, SchedulerConfig,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{Sender, channel};

use crate::engine::{engine_error, plain_tokenization, silent};
use crate::error::{Error, Result};
use crate::loader::{WeakPipeline, panic_text};
use crate::quirks_0_8::late_step;
use crate::quirks_0_8::logger_threads::{
    LAST_STEP, NormalModel, NotExchanged, end_log_of, placeholder, threads_of_an_engine,
};
use crate::quirks_0_8::thread_locals::on_fresh_thread;

/// Number of idle slots that are kept forever, so that the next load finds a running engine.
const KEPT: usize = 1;

/// Time for which further idle slots are kept, because loads may come in waves.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// Time that a load waits for the engine of a generation that finishes its last requests, before it starts another
/// engine.
const PATIENCE: Duration = Duration::from_secs(10);

/// An engine that stays while its models change.
pub(crate) struct Slot {
    running: RwLock<Running>,
    /// Whether the engine has answered a request since it was started or got its model.
    is_proved: AtomicBool,
    /// The model that the engine runs.
    model: NormalModel,
    max_seqs: NonZeroUsize,
}

/// A running engine in its own host. A failure in one host, even under a lock of mistral.rs, affects only that host.
struct Running {
    host: Arc<MistralRs>,
    /// The input of the engine. It is kept here: if the engine has ended, asking mistral.rs for its input restarts it.
    /// The restart needs threads that it may not get, and a failure poisons the lock.
    input: Sender<Request>,
}

impl Running {
    /// Starts an engine that runs `model`; this takes a moment.
    fn start(model: &NormalModel, max_seqs: NonZeroUsize) -> Result<Self> {
        require_threads(threads_of_an_engine())?;
        let pipeline = model.shared().clone();
        let scheduler = SchedulerConfig::DefaultScheduler {
            method: DefaultSchedulerMethod::Fixed(max_seqs),
        };
        let start = move || -> Result<_> {
            // On a multi-threaded runtime mistral.rs would send the engine a request and wait for the answer without a
            // limit.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .map_err(engine_error)?;
            let host = runtime.block_on(
                MistralRsBuilder::new(pipeline, scheduler, false, None)
                    .with_no_prefix_cache(true)
                    .build(),
            );
            let input = host.get_sender(None).map_err(engine_error)?;
            Ok(Self { host, input })
        };
        on_fresh_thread(start)
            .map_err(|error| Error::no_threads(&error))?
            .map_err(|panic| Error::engine_unavailable(&panic_text(panic.as_ref())))?
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end_log_of(&self.host);
    }
}

impl Slot {
    /// Starts an engine for `model`. It blocks.
    fn start(model: NormalModel, max_seqs: NonZeroUsize) -> Result<Self> {
        Ok(Self {
            running: RwLock::new(Running::start(&model, max_seqs)?),
            is_proved: AtomicBool::new(false),
            model,
            max_seqs,
        })
    }

    pub(crate) fn host(&self) -> Arc<MistralRs> {
        self.running.read().host.clone()
    }

    #[cfg(test)]
    pub(super) fn model(&self) -> &NormalModel {
        &self.model
    }

    /// Whether the engine has ended by a panic.
    pub(crate) fn has_ended(&self) -> bool {
        self.running.read().input.is_closed()
    }

    /// Whether the engine has answered a request since its start. An engine that was restarted after a panic may panic
    /// again.
    pub(crate) fn is_proved(&self) -> bool {
        self.is_proved.load(Ordering::SeqCst)
    }

    /// The input of the engine. An engine that has ended is restarted.
    ///
    /// # Errors
    /// Returns an error if the engine cannot be restarted.
    pub(crate) fn input(&self) -> Result<Sender<Request>> {
        let input = self.running.read().input.clone();
        if !input.is_closed() {
            return Ok(input);
        }
        let mut running = self.running.write();
        if running.input.is_closed() {
            self.is_proved.store(false, Ordering::SeqCst);
            *running = Running::start(&self.model, self.max_seqs)?;
            tracing::warn!("an engine that had ended is started again");
        }
        Ok(running.input.clone())
    }

    /// Asks the engine for one token. If the engine takes one request at a time, the caller must send nothing else
    /// meanwhile.
    ///
    /// The engine may work longer than the caller waits; `held` is kept as long as the engine works.
    ///
    /// # Errors
    /// Returns an error if the engine cannot answer or reports a failure.
    pub(crate) async fn probe(&self, held: impl Send + 'static) -> Result<()> {
        let (sender, mut receiver) = channel(1);
        let params = SamplingParams {
            temperature: Some(0.0),
            max_len: Some(1),
            ..SamplingParams::neutral()
        };
        let prompt = RequestMessage::CompletionTokens(vec![0]);
        let id = self.host().next_request_id();
        let request = NormalRequest::new_simple(prompt, params, sender, id, None, None);
        let input = self.input()?;
        // A separate task: the engine must always find a receiver.
        let work = tokio::spawn(async move {
            let _held = held;
            let request = Request::Normal(Box::new(request));
            input.send(request).await.map_err(engine_error)?;
            let answer = receiver.recv().await.ok_or_else(silent);
            // The engine makes one more step with this request, during which it must have no other; see `late_step`.
            while receiver.recv().await.is_some() {}
            answer
        });
        match work.await.map_err(engine_error)?? {
            Response::ValidationError(error) | Response::InternalError(error) => {
                Err(engine_error(error))
            }
            Response::ModelError(message, _) | Response::CompletionModelError(message, _) => {
                Err(Error::Engine(message))
            }
            _ => {
                self.is_proved.store(true, Ordering::SeqCst);
                Ok(())
            }
        }
    }

    /// Whether the engine, from which nobody awaits an answer, finishes its last step within the limit. It asks
    /// `n_questions` to find out. It blocks.
    pub(super) fn is_idle(&self, n_questions: usize) -> bool {
        let input = self.running.read().input.clone();
        let deadline = Instant::now() + LAST_STEP;
        (0..n_questions).all(|_| {
            let (sender, mut receiver) = channel(1);
            let question = plain_tokenization(Either::Right("?".to_owned()), sender);
            if input.try_send(Request::Tokenize(question)).is_err() {
                return false;
            }
            loop {
                match receiver.try_recv() {
                    Ok(_) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                    Err(TryRecvError::Empty) if Instant::now() < deadline => {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    Err(TryRecvError::Empty) => {
                        // The engine must always find a receiver.
                        std::mem::forget(receiver);
                        return false;
                    }
                }
            }
        })
    }

    /// Gives the engine `model` instead of its placeholder. It blocks.
    pub(super) fn occupy(self, model: NormalModel) -> Result<Occupied> {
        match self.model.exchange(&model, LAST_STEP) {
            Ok(()) => {
                // With the new model the engine must answer a first request again.
                self.is_proved.store(false, Ordering::SeqCst);
                Ok(Occupied {
                    slot: self,
                    placeholder: Some(model),
                })
            }
            Err(NotExchanged::Unlike) => {
                tracing::debug!(
                    "a model of another kind than the placeholder gets an engine of its own"
                );
                Occupied::with(model, self.max_seqs)
            }
            Err(NotExchanged::Busy) => Err(Error::engine_unavailable("an idle one is busy")),
        }
    }
}

/// A slot whose engine has a model.
pub(crate) struct Occupied {
    pub(crate) slot: Slot,
    /// The placeholder that the engine had before. None if the engine was started with its model and ends with it.
    placeholder: Option<NormalModel>,
}

impl Occupied {
    /// Starts an engine that never has a model other than `model`. It blocks.
    pub(super) fn with(model: NormalModel, max_seqs: NonZeroUsize) -> Result<Self> {
        Ok(Self {
            slot: Slot::start(model, max_seqs)?,
            placeholder: None,
        })
    }

    /// Removes the model from the engine and frees it. It blocks.
    ///
    /// # Errors
    /// Returns a reference to the model if the engine does not release it. The engine then ends when it can, and frees
    /// the model.
    pub(super) fn vacate(self) -> std::result::Result<Slot, WeakPipeline> {
        let Self { slot, placeholder } = self;
        let is_free = placeholder.is_some_and(|placeholder| {
            slot.is_idle(late_step::QUESTIONS)
                && slot.model.exchange(&placeholder, LAST_STEP).is_ok()
        });
        match is_free {
            true => Ok(slot),
            false => Err(Arc::downgrade(slot.model.shared())),
        }
    }
}

/// The idle slots of a registry.
#[derive(Default)]
pub(crate) struct Slots {
    /// Each slot with the time since which it is idle.
    idle: Mutex<Vec<(Slot, Instant)>>,
}

impl Slots {
    /// Takes a slot whose engine runs `max_seqs` sequences: an idle one, or else a new one on `device`.
    ///
    /// While `one_is_leaving` is true, it waits up to [`PATIENCE`] for the slot of the model that leaves.
    pub(super) async fn take(
        &self,
        device: &Device,
        max_seqs: NonZeroUsize,
        one_is_leaving: impl Fn() -> bool,
    ) -> Result<Slot> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(slot) = self.pop(max_seqs) {
                return Ok(slot);
            }
            if !one_is_leaving() || Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self::make(device.clone(), max_seqs).await
    }

    fn pop(&self, max_seqs: NonZeroUsize) -> Option<Slot> {
        let mut idle = self.idle.lock();
        // Slots from before a change of `runtime.max_seqs` are useless.
        idle.retain(|(slot, _)| slot.max_seqs == max_seqs && !slot.has_ended());
        idle.pop().map(|(slot, _)| slot)
    }

    /// Ensures that the next load finds a slot.
    pub(super) async fn keep_one_ready(
        &self,
        device: &Device,
        max_seqs: NonZeroUsize,
    ) -> Result<()> {
        if self.idle.lock().is_empty() {
            let slot = Self::make(device.clone(), max_seqs).await?;
            self.put(slot);
        }
        Ok(())
    }

    async fn make(device: Device, max_seqs: NonZeroUsize) -> Result<Slot> {
        blocking(move || Slot::start(placeholder(&device)?, max_seqs)).await
    }

    pub(super) fn put(&self, slot: Slot) {
        self.idle.lock().push((slot, Instant::now()));
    }

    /// Ends the engines of slots that were idle for some time. Returns whether idle slots remain that may be ended
    /// later.
    pub(super) fn trim(&self) -> bool {
        let mut idle = self.idle.lock();
        // The slot that was used last is taken first, so the first slot has been idle longest.
        while idle.len() > KEPT && idle[0].1.elapsed() > KEPT_FOR {
            idle.remove(0);
        }
        idle.len() > KEPT
    }
}

/// Runs `work` on its own thread, where it may block.
///
/// # Errors
/// Returns an error as `work`, or [`Error::no_threads`] if no thread can be started. A thread pool would panic instead.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    blocking_as("loading", work).await
}

/// As [`blocking`], on a thread named `name`.
///
/// # Errors
/// Returns an error as [`blocking`].
pub(super) async fn blocking_as<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let outcome = catch_unwind(AssertUnwindSafe(work));
            // The caller may have gone away.
            let _ = sender.send(outcome);
        })
        .map_err(|error| Error::no_threads(&error))?;
    let stopped = |cause: String| Error::Engine(format!("{name} stopped unexpectedly: {cause}"));
    receiver
        .await
        .map_err(|error| stopped(error.to_string()))?
        .map_err(|panic| stopped(panic_text(panic.as_ref())))?
}

/// Checks whether `n` threads can be started now. If not, mistral.rs and its runtime would panic.
fn require_threads(n: usize) -> Result<()> {
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock();
    let mut threads = Vec::new();
    let mut outcome = Ok(());
    while threads.len() < n && outcome.is_ok() {
        let gate = gate.clone();
        let thread = std::thread::Builder::new()
            .name("engine-room".to_owned())
            .spawn(move || drop(gate.lock()));
        match thread {
            Ok(thread) => threads.push(thread),
            Err(error) => outcome = Err(Error::no_threads(&error)),
        }
    }
    drop(closed);
    for thread in threads {
        // The thread does nothing that could panic.
        let _ = thread.join();
    }
    outcome
}
