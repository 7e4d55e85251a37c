//! The training loop.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use monteclora_converters::AdapterConfig;

use super::audit;
use super::checkpoint::{self, Checkpoint, Progress};
use super::metrics::{
    EvalRecord, EventRecord, Metrics, Record, Sinks, TrainRecord, peak_memory_bytes,
};
use super::optimizer::{AdamW, AdamWSettings, clip};
use super::schedule::{Schedule, Shape};
use super::state::{AdapterState, DrawForm, RegulariserMeans};
use super::{Error, Result};
use crate::data::{Batch, BatchOptions, Batches, Cursor, Dataset};
use crate::model::ops::attention::Segment;
use crate::model::{ActiveAdapter, AdapterGradients, Decoder, Dropout, PassOptions, Sequences};

/// Everything the loop is told.
#[derive(Debug, Clone)]
pub struct TrainSettings {
    /// Seed of noise, initial values, order and dropout.
    pub seed: u64,
    /// Passes over the data.
    pub num_train_epochs: f64,
    /// Optimiser steps; takes precedence over epochs.
    pub max_steps: Option<u64>,
    /// Rows (or packs) a micro-batch.
    pub batch_size: usize,
    /// Tokens a pack holds, where rows are packed.
    pub pack_tokens: Option<usize>,
    /// Micro-batches an optimiser step; they share one posterior draw.
    pub gradient_accumulation_steps: usize,
    /// Peak learning rate of A and B.
    pub learning_rate: f64,
    /// Peak learning rate of the variational parameters.
    pub variational_learning_rate: f64,
    /// Shape of the schedule.
    pub shape: Shape,
    /// Share of the steps spent warming up.
    pub warmup_ratio: f64,
    /// AdamW's constants.
    pub adamw: AdamWSettings,
    /// Largest gradient norm; 0 for no clipping.
    pub max_grad_norm: f64,
    /// Dropout on the adapters' inputs.
    pub lora_dropout: f64,
    /// Recompute activations in the backward pass.
    pub gradient_checkpointing: bool,
    /// Steps between metrics lines.
    pub logging_steps: u64,
    /// Steps between evaluations; 0 for only at the end.
    pub eval_steps: u64,
    /// Steps between checkpoints; 0 for none.
    pub save_steps: u64,
    /// Checkpoints kept.
    pub save_total_limit: usize,
    /// Whether the best adapter by validation loss is what remains at the end.
    pub load_best_model_at_end: bool,
    /// Evaluations without improvement before the run ends; 0 for never.
    pub early_stopping_patience: u64,
    /// Where metrics go.
    pub sinks: Sinks,
}

/// What a caller may show while the loop runs.
#[derive(Debug, Clone)]
pub enum Event {
    /// The loop begins (or continues) at step `.0` of `.1`.
    Started(u64, u64),
    /// A step was made; step and loss.
    Step(u64, f64),
    /// A line of metrics.
    Train(TrainRecord),
    /// An evaluation.
    Eval(EvalRecord),
    /// A checkpoint was written.
    Saved(u64),
}

/// A request to stop after the current step.
pub type Interrupt = Arc<AtomicBool>;

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Steps made.
    pub steps: u64,
    /// Steps planned.
    pub total_steps: u64,
    /// Whether it was interrupted; a checkpoint was written then.
    pub interrupted: bool,
    /// Whether it stopped for lack of improvement.
    pub stopped_early: bool,
    /// Seconds in the loop.
    pub seconds: f64,
    /// Best validation loss and its step.
    pub best: Option<(f64, u64)>,
    /// Loss of the last step, task only.
    pub last_task_loss: f64,
}

/// A training run.
pub struct Trainer<'a> {
    /// The frozen base.
    pub model: &'a Decoder,
    /// Training rows.
    pub train: &'a Dataset,
    /// Validation rows.
    pub valid: Option<&'a Dataset>,
    /// What the loop is told.
    pub settings: &'a TrainSettings,
    /// Configuration written next to the weights.
    pub adapter_config: &'a AdapterConfig,
    /// Where everything is written.
    pub output_dir: &'a Path,
    /// Set to stop.
    pub interrupt: Interrupt,
}

#[derive(Default)]
struct Window {
    steps: u64,
    task_loss: f64,
    regulariser: RegulariserMeans,
    grad_norm: f64,
    tokens: u64,
    since: Option<Instant>,
}

struct StepResult {
    task_loss: f64,
    regulariser: RegulariserMeans,
    grad_norm: f64,
    tokens: u64,
    trained_tokens: u64,
}

impl Trainer<'_> {
    fn options(&self) -> BatchOptions {
        BatchOptions {
            batch_size: self.settings.batch_size,
            pack_tokens: self.settings.pack_tokens,
            shuffle_seed: Some(self.settings.seed),
        }
    }

    /// Optimiser steps this run will make.
    pub fn total_steps(&self) -> u64 {
        let settings = self.settings;
        settings.max_steps.unwrap_or_else(|| {
            Batches::new(self.train, self.options(), Cursor::default()).n_steps(
                settings.num_train_epochs,
                settings.gradient_accumulation_steps,
            )
        })
    }

    /// Trains `state`, from `resume` or from the beginning, and leaves the adapter in the output directory.
    ///
    /// # Errors
    /// [`Error::NonFinite`] and [`Error::Audit`] before anything was updated with the bad step; errors of files and data.
    pub fn run(
        &self,
        mut state: AdapterState,
        resume: Option<Checkpoint>,
        mut watch: impl FnMut(&Event),
    ) -> Result<Outcome> {
        let settings = self.settings;
        let total_steps = self.total_steps();
        let schedule = Schedule::new(settings.shape, settings.warmup_ratio, total_steps);
        let mut optimizer = AdamW::new(settings.adamw, &state)?;
        let mut progress = Progress::default();
        let began = Instant::now();
        let resumed = resume.is_some();
        if let Some(checkpoint) = resume {
            (state, optimizer, progress) =
                (checkpoint.state, checkpoint.optimizer, checkpoint.progress);
        }
        let mut metrics = Metrics::open(
            self.output_dir,
            settings.sinks,
            resumed.then_some(progress.step),
        )?;
        let earlier = progress.wall_s;
        let wall = || earlier + began.elapsed().as_secs_f64();
        let event = |event: &'static str, step: u64, detail: Option<String>| {
            Record::Event(EventRecord {
                event,
                step,
                wall_s: wall(),
                detail,
            })
        };
        metrics.write(&event(
            if resumed { "resumed" } else { "started" },
            progress.step,
            None,
        ))?;
        watch(&Event::Started(progress.step, total_steps));
        let mut batches = Batches::new(self.train, self.options(), progress.cursor);
        let mut window = Window::default();
        let mut outcome = Outcome {
            steps: progress.step,
            total_steps,
            interrupted: false,
            stopped_early: false,
            seconds: 0.0,
            best: progress.best,
            last_task_loss: f64::NAN,
        };
        while progress.step < total_steps {
            window.since.get_or_insert_with(Instant::now);
            let factor = schedule.factor(progress.step);
            let result = self.step(
                &mut state,
                &mut optimizer,
                &mut batches,
                progress.step,
                factor,
            )?;
            progress.step += 1;
            progress.cursor = batches.cursor();
            progress.tokens += result.tokens;
            progress.trained_tokens += result.trained_tokens;
            progress.wall_s = wall();
            outcome.last_task_loss = result.task_loss;
            window.add(&result);
            let step = progress.step;
            watch(&Event::Step(
                step,
                result.task_loss + result.regulariser.total(),
            ));
            let last = step == total_steps;
            if last || step.is_multiple_of(settings.logging_steps.max(1)) {
                let record = window.record(
                    &progress,
                    self.epoch(&batches),
                    settings.learning_rate * factor,
                    wall(),
                );
                metrics.write(&Record::Train(record.clone()))?;
                watch(&Event::Train(record));
                window = Window::default();
            }
            if let Some(valid) = self.valid
                && (last || (settings.eval_steps > 0 && step.is_multiple_of(settings.eval_steps)))
            {
                let before = Instant::now();
                let mut record = evaluate(
                    self.model,
                    &state.mean(),
                    valid,
                    settings.batch_size,
                    |_| {},
                )?;
                (record.step, record.epoch, record.wall_s) = (step, self.epoch(&batches), wall());
                metrics.write(&Record::Eval(record.clone()))?;
                if progress.best.is_none_or(|(loss, _)| record.loss < loss) {
                    progress.best = Some((record.loss, step));
                    progress.evaluations_without_improvement = 0;
                    write_best(&self.output_dir.join("best"), &state, self.adapter_config)?;
                    metrics.write(&event("best", step, None))?;
                } else {
                    progress.evaluations_without_improvement += 1;
                }
                watch(&Event::Eval(record));
                if let Some(since) = &mut window.since {
                    *since += before.elapsed();
                }
                let patience = settings.early_stopping_patience;
                outcome.stopped_early =
                    patience > 0 && progress.evaluations_without_improvement >= patience;
            }
            outcome.interrupted = self.interrupt.load(Ordering::Relaxed) && !last;
            let due = settings.save_steps > 0 && step.is_multiple_of(settings.save_steps);
            if due || outcome.interrupted {
                let checkpoint = Checkpoint::borrow(&state, &optimizer, &progress);
                checkpoint::write(
                    self.output_dir,
                    &checkpoint,
                    self.adapter_config,
                    settings.save_total_limit,
                )?;
                metrics.write(&event("checkpoint", step, None))?;
                watch(&Event::Saved(step));
            }
            if outcome.interrupted {
                metrics.write(&event("interrupted", step, None))?;
                break;
            }
            if outcome.stopped_early {
                metrics.write(&event("early_stop", step, None))?;
                break;
            }
        }
        outcome.steps = progress.step;
        outcome.best = progress.best;
        outcome.seconds = began.elapsed().as_secs_f64();
        if !outcome.interrupted {
            let best = self.output_dir.join("best");
            if settings.load_best_model_at_end
                && outcome.best.is_some_and(|(_, step)| step != outcome.steps)
            {
                let best = monteclora_converters::Adapter::read_dir(&best)?;
                best.write_peft(self.output_dir, true)?;
            } else {
                checkpoint::write_adapter(self.output_dir, &state, self.adapter_config)?;
            }
            metrics.write(&event("finished", outcome.steps, None))?;
        }
        Ok(outcome)
    }

    fn epoch(&self, batches: &Batches<'_>) -> f64 {
        let cursor = batches.cursor();
        cursor.epoch as f64 + cursor.batch as f64 / batches.n_batches().max(1) as f64
    }

    /// One optimiser step: one posterior draw, its micro-batches, one update.
    fn step(
        &self,
        state: &mut AdapterState,
        optimizer: &mut AdamW,
        batches: &mut Batches<'_>,
        step: u64,
        factor: f64,
    ) -> Result<StepResult> {
        let settings = self.settings;
        let mut micro = vec![batches.next_batch()?];
        // Accumulation ends with the epoch, so that every row counts once an epoch.
        while micro.len() < settings.gradient_accumulation_steps && !batches.at_epoch_start() {
            micro.push(batches.next_batch()?);
        }
        let trained_tokens: usize = micro.iter().map(|b| b.targets.len()).sum();
        let drawn = state.draw(settings.seed, step, DrawForm::Collapsed)?;
        // The loss is the mean over the trained tokens of the whole step, however it is cut into micro-batches.
        let scale = 1.0 / trained_tokens.max(1) as f64;
        let mut task = AdapterGradients::default();
        let mut total = 0.0;
        let mut looks_back = false;
        for batch in &micro {
            let dropout = (settings.lora_dropout > 0.0).then(|| Dropout {
                probability: settings.lora_dropout,
                seed: settings.seed,
                step,
                rows: batch.examples.iter().map(|row| *row as u64).collect(),
            });
            let options = PassOptions {
                dropout: dropout.as_ref(),
                checkpointing: settings.gradient_checkpointing,
            };
            let loss = self.model.loss_and_gradients(
                &sequences(batch),
                &batch.targets,
                &drawn.active,
                scale,
                options,
            )?;
            total += loss.total();
            looks_back |= batch
                .targets
                .iter()
                .any(|(row, _)| batch.positions[*row] > 0);
            if let Some(gradients) = loss.gradients {
                task.add_all(gradients)?;
            }
        }
        let task_loss = total * scale;
        let regulariser = drawn.regulariser();
        if !(task_loss + regulariser.total()).is_finite() {
            return Err(Error::NonFinite {
                step: step + 1,
                what: "the loss",
                names: Vec::new(),
            });
        }
        let mut gradients = drawn.backward(state, &task)?;
        let grad_norm = clip(&mut gradients, settings.max_grad_norm)?;
        if !grad_norm.is_finite() {
            let names = audit::non_finite_sites(state, &gradients)?;
            return Err(Error::NonFinite {
                step: step + 1,
                what: "the gradient",
                names,
            });
        }
        // Queries and keys get no gradient where every target sees a single key.
        if step < 2 && looks_back {
            audit::first_steps(state, &gradients, step, settings.adamw.train_a)?;
        }
        let spread_rate = settings.variational_learning_rate * factor;
        optimizer.step(
            state,
            &gradients,
            settings.learning_rate * factor,
            spread_rate,
        )?;
        Ok(StepResult {
            task_loss,
            regulariser,
            grad_norm,
            tokens: micro.iter().map(|b| b.tokens.len() as u64).sum(),
            trained_tokens: trained_tokens as u64,
        })
    }
}

impl Window {
    fn add(&mut self, result: &StepResult) {
        self.steps += 1;
        self.task_loss += result.task_loss;
        self.regulariser.dirichlet += result.regulariser.dirichlet;
        self.regulariser.wishart += result.regulariser.wishart;
        self.regulariser.gaussian += result.regulariser.gaussian;
        self.regulariser.weighted_kl += result.regulariser.weighted_kl;
        self.regulariser.sum_of_squares += result.regulariser.sum_of_squares;
        self.grad_norm += result.grad_norm;
        self.tokens += result.tokens;
    }

    fn record(
        &self,
        progress: &Progress,
        epoch: f64,
        learning_rate: f64,
        wall_s: f64,
    ) -> TrainRecord {
        let mean = |sum: f64| sum / self.steps.max(1) as f64;
        let seconds = self
            .since
            .map_or(0.0, |since| since.elapsed().as_secs_f64());
        TrainRecord {
            step: progress.step,
            epoch,
            loss: mean(self.task_loss + self.regulariser.total()),
            task_loss: mean(self.task_loss),
            kl_loss: mean(self.regulariser.weighted_kl),
            kl_dirichlet: mean(self.regulariser.dirichlet),
            kl_wishart: mean(self.regulariser.wishart),
            kl_gaussian: mean(self.regulariser.gaussian),
            entropy_loss: mean(self.regulariser.sum_of_squares),
            grad_norm: mean(self.grad_norm),
            learning_rate,
            tokens: progress.tokens,
            trained_tokens: progress.trained_tokens,
            tokens_per_second: self.tokens as f64 / seconds.max(1e-9),
            peak_memory_bytes: peak_memory_bytes(),
            wall_s,
        }
    }
}

/// `best/` is replaced whole.
fn write_best(dir: &Path, state: &AdapterState, config: &AdapterConfig) -> Result<()> {
    state.to_adapter(config)?.write_peft(dir, true)?;
    Ok(())
}

/// The decoder's view of a batch.
pub(crate) fn sequences(batch: &Batch) -> Sequences {
    Sequences {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch
            .segments
            .iter()
            .map(|(start, len)| Segment {
                query_start: *start,
                query_len: *len,
                key_start: *start,
                key_len: *len,
            })
            .collect(),
    }
}

/// Loss, perplexity and token accuracy of `adapter` over all rows of `data`, in the file's order; `done` is told the rows of
/// every batch.
pub fn evaluate(
    model: &Decoder,
    adapter: &ActiveAdapter,
    data: &Dataset,
    batch_size: usize,
    mut done: impl FnMut(usize),
) -> Result<EvalRecord> {
    let began = Instant::now();
    let options = BatchOptions {
        batch_size: batch_size.max(1),
        pack_tokens: None,
        shuffle_seed: None,
    };
    let mut batches = Batches::new(data, options, Cursor::default());
    let (mut total, mut tokens, mut correct) = (0.0, 0usize, 0usize);
    for _ in 0..batches.n_batches() {
        let batch = batches.next_batch()?;
        let loss = model.evaluate(&sequences(&batch), &batch.targets, adapter)?;
        total += loss.total();
        tokens += loss.nll.len();
        correct += loss.correct.iter().filter(|c| **c).count();
        done(batch.segments.len());
    }
    let loss = total / tokens.max(1) as f64;
    Ok(EvalRecord {
        step: 0,
        epoch: 0.0,
        loss,
        perplexity: loss.exp(),
        token_accuracy: correct as f64 / tokens.max(1) as f64,
        rows: data.len(),
        seconds: began.elapsed().as_secs_f64(),
        wall_s: 0.0,
    })
}
