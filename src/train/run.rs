//! The training loop.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use monteclora_converters::AdapterConfig;

use super::audit;
use super::checkpoint::{self, Checkpoint, Progress};
use super::evaluation::{evaluate_while, sequences};
use super::identity::Identity;
use super::metrics::{EvalRecord, EventRecord, Metrics, Record, TrainRecord};
use super::optimizer::{AdamW, clip};
use super::settings::TrainSettings;
use super::state::{AdapterState, DrawForm};
use super::window::{StepResult, Window};
use super::{Error, Result};
use crate::data::{Batches, Dataset};
use crate::model::{AdapterGradients, Decoder, Dropout, PassOptions};

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
    /// Loss of the last step, task only; none where no step was left to make.
    pub last_task_loss: Option<f64>,
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
    /// What the run is made of; kept in every checkpoint.
    pub identity: &'a Identity,
    /// Set to stop.
    pub interrupt: Interrupt,
}

impl Trainer<'_> {
    /// Trains `state`, from `resume` or from the beginning, and leaves the adapter in the output directory.
    ///
    /// # Errors
    /// [`Error::NonFinite`] and [`Error::Audit`] before anything is written with the bad step; errors of files and data.
    /// The last checkpoint stays as it is.
    pub fn run(
        &self,
        mut state: AdapterState,
        resume: Option<Checkpoint>,
        mut watch: impl FnMut(&Event),
    ) -> Result<Outcome> {
        let settings = self.settings;
        let total_steps = settings.total_steps(self.train);
        let schedule = settings.schedule(total_steps);
        let kl_schedule = settings.kl_schedule(total_steps);
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
            resumed.then_some(&progress),
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
        let mut batches = Batches::new(self.train, settings.batch_options(), progress.cursor);
        let mut interrupted = false;
        let mut last_task_loss = None;
        if progress.evaluation_due {
            // Of the step that the checkpoint is of: the run was interrupted within it.
            let place = (self.epoch(&batches), wall());
            self.assess(&state, &mut progress, place, &mut metrics, &mut watch)?;
            interrupted = progress.evaluation_due;
            if !interrupted {
                self.save(&state, &optimizer, &mut progress, wall())?;
                metrics.write(&event("checkpoint", progress.step, None))?;
                watch(&Event::Saved(progress.step));
            }
        }
        while progress.step < total_steps && !progress.stopped_early && !interrupted {
            progress.window.begin();
            let factor = schedule.factor(progress.step);
            let kl_factor = kl_schedule.factor(progress.step);
            let result = self.step(
                &mut state,
                &mut optimizer,
                &mut batches,
                progress.step,
                (factor, kl_factor),
            )?;
            progress.step += 1;
            progress.cursor = batches.cursor();
            progress.tokens += result.tokens;
            progress.trained_tokens += result.trained_tokens;
            progress.window.add(&result);
            last_task_loss = Some(result.task_loss);
            let step = progress.step;
            watch(&Event::Step(
                step,
                result.task_loss + result.regulariser.total(),
            ));
            let last = step == total_steps;
            if last || step.is_multiple_of(settings.logging_steps.max(1)) {
                let record = progress.window.record(
                    &progress,
                    self.epoch(&batches),
                    settings.learning_rate * factor,
                    wall(),
                );
                metrics.write(&Record::Train(record.clone()))?;
                watch(&Event::Train(record));
                progress.window = Window::default();
            }
            progress.evaluation_due = self.valid.is_some()
                && (last || (settings.eval_steps > 0 && step.is_multiple_of(settings.eval_steps)));
            if progress.evaluation_due {
                let place = (self.epoch(&batches), wall());
                self.assess(&state, &mut progress, place, &mut metrics, &mut watch)?;
            }
            let ends = (last || progress.stopped_early) && !progress.evaluation_due;
            interrupted = self.interrupt.load(Ordering::Relaxed) && !ends;
            let due = step.is_multiple_of(settings.save_steps.max(1)) || ends;
            if (settings.save_steps > 0 && due) || interrupted {
                self.save(&state, &optimizer, &mut progress, wall())?;
                metrics.write(&event("checkpoint", step, None))?;
                watch(&Event::Saved(step));
            }
        }
        if interrupted {
            metrics.write(&event("interrupted", progress.step, None))?;
        } else {
            if progress.stopped_early {
                metrics.write(&event("early_stop", progress.step, None))?;
            }
            match progress.best {
                Some((_, best)) if settings.load_best_model_at_end && best != progress.step => {
                    checkpoint::restore_best(self.output_dir)?;
                }
                _ => checkpoint::write_adapter(self.output_dir, &state, self.adapter_config)?,
            }
            metrics.write(&event("finished", progress.step, None))?;
        }
        Ok(Outcome {
            steps: progress.step,
            total_steps,
            interrupted,
            stopped_early: progress.stopped_early,
            seconds: began.elapsed().as_secs_f64(),
            best: progress.best,
            last_task_loss,
        })
    }

    /// Evaluates and keeps the adapter if it is the best so far; the evaluation stays due if the run is told to stop meanwhile.
    fn assess(
        &self,
        state: &AdapterState,
        progress: &mut Progress,
        (epoch, wall_s): (f64, f64),
        metrics: &mut Metrics,
        watch: &mut impl FnMut(&Event),
    ) -> Result<()> {
        let Some(valid) = self.valid else {
            progress.evaluation_due = false;
            return Ok(());
        };
        let before = Instant::now();
        tracing::debug!("step {}: evaluating {} rows", progress.step, valid.len());
        let (mut record, complete) = evaluate_while(
            self.model,
            &state.mean(),
            valid,
            self.settings.batch_size,
            |_| !self.interrupt.load(Ordering::Relaxed),
        )?;
        let pause = before.elapsed();
        progress.window.exclude(pause);
        if !complete {
            return Ok(());
        }
        progress.evaluation_due = false;
        let step = progress.step;
        if !record.loss.is_finite() {
            return Err(Error::NonFinite {
                step,
                what: "the validation loss",
                names: audit::largest_weights(state)?,
            });
        }
        let wall_s = wall_s + pause.as_secs_f64();
        (record.step, record.epoch, record.wall_s) = (step, epoch, wall_s);
        metrics.write(&Record::Eval(record.clone()))?;
        if progress.best.is_none_or(|(loss, _)| record.loss < loss) {
            let best = (record.loss, step);
            checkpoint::write_best(self.output_dir, state, self.adapter_config, best)?;
            progress.best = Some(best);
            progress.evaluations_without_improvement = 0;
            metrics.write(&Record::Event(EventRecord {
                event: "best",
                step,
                wall_s,
                detail: None,
            }))?;
        } else {
            progress.evaluations_without_improvement += 1;
        }
        watch(&Event::Eval(record));
        let patience = self.settings.early_stopping_patience;
        progress.stopped_early =
            patience > 0 && progress.evaluations_without_improvement >= patience;
        Ok(())
    }

    fn save(
        &self,
        state: &AdapterState,
        optimizer: &AdamW,
        progress: &mut Progress,
        wall_s: f64,
    ) -> Result<()> {
        progress.wall_s = wall_s;
        checkpoint::write(
            self.output_dir,
            (state, optimizer),
            progress,
            self.identity,
            self.adapter_config,
            self.settings.save_total_limit,
        )
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
        (factor, kl_factor): (f64, f64),
    ) -> Result<StepResult> {
        let settings = self.settings;
        let mut micro = vec![batches.next_batch()?];
        // Accumulation ends with the epoch, so that every row counts once an epoch.
        while micro.len() < settings.gradient_accumulation_steps && !batches.at_epoch_start() {
            micro.push(batches.next_batch()?);
        }
        let trained_tokens: usize = micro.iter().map(|b| b.targets.len()).sum();
        let tempered = (kl_factor < 1.0).then(|| state.with_kl_factor(kl_factor));
        let drawn =
            tempered
                .as_ref()
                .unwrap_or(state)
                .draw(settings.seed, step, DrawForm::Collapsed)?;
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
                names: audit::largest_weights(state)?,
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
        let names = audit::non_finite_weights(state)?;
        if !names.is_empty() {
            return Err(Error::NonFinite {
                step: step + 1,
                what: "a weight",
                names,
            });
        }
        Ok(StepResult {
            task_loss,
            regulariser,
            grad_norm,
            tokens: micro.iter().map(|b| b.tokens.len() as u64).sum(),
            trained_tokens: trained_tokens as u64,
        })
    }
}
