//! The training loop.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use monteclora_adapters::Result;
use monteclora_adapters::device::has_loops;
use monteclora_adapters::methods::{Step, in_loss};
use monteclora_converters::{AdapterConfig, Problem};

use super::ahead::NoiseAhead;
use super::checkpoint::{self, Checkpoint};
use super::evaluation::{evaluate, sequences};
use super::identity::Identity;
use super::metrics::{EvalRecord, Metrics, Record, TrainRecord, peak_memory_bytes};
use super::optimizer::clip;
use super::progress::{StepResult, Window};
use super::schedule::Schedule;
use super::settings::TrainSettings;
use super::{audit, not_finite};
use crate::config::LrSchedulerType;
use crate::data::{Batches, Dataset};
use crate::distributed::{Communicator, micro_batches};
use crate::model::{ActiveAdapter, AdapterGradients, Decoder, Dropout, PassOptions};

/// Progress of the loop, for a caller to show.
#[derive(Debug, Clone)]
pub enum Event {
    /// The loop starts or continues at step `.0` of `.1`.
    Started(u64, u64),
    /// A step was completed: its number and the task loss.
    Step(u64, f64),
    /// The metrics of training.
    Train(TrainRecord),
    /// The metrics of an evaluation.
    Eval(EvalRecord),
    /// A checkpoint of this step was written.
    Saved(u64),
}

/// A flag that stops the run after the current step.
pub type Interrupt = Arc<AtomicBool>;

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Number of completed steps.
    pub steps: u64,
    /// Number of planned steps.
    pub total_steps: u64,
    /// Whether the run was interrupted. If so, a checkpoint was written.
    pub interrupted: bool,
    /// Whether the run stopped early because the validation loss did not improve.
    pub stopped_early: bool,
    /// Seconds in the loop.
    pub seconds: f64,
    /// Best validation loss and its step.
    pub best: Option<(f64, u64)>,
    /// Task loss of the last step. `None` if no step was left.
    pub last_task_loss: Option<f64>,
}

/// A training run.
pub struct Trainer<'a> {
    /// The frozen base model.
    pub model: &'a Decoder,
    /// Training rows.
    pub train: &'a Dataset,
    /// Validation rows.
    pub valid: Option<&'a Dataset>,
    /// Settings of the loop.
    pub settings: &'a TrainSettings,
    /// Configuration that is written with the adapter.
    pub adapter_config: &'a AdapterConfig,
    /// Directory of all output.
    pub output_dir: &'a Path,
    /// Identity of the run. Every checkpoint contains it.
    pub identity: &'a Identity,
    /// The caller sets this flag to stop the run.
    pub interrupt: Interrupt,
    /// The ranks of the run. Every rank has a trainer with the same settings; rank 0 writes the files.
    pub ranks: &'a dyn Communicator,
}

impl Trainer<'_> {
    /// Continues training from `from`, and writes the adapter to the output directory.
    ///
    /// # Errors
    /// Returns an error if a number is not finite, a gradient is missing, or a file or row cannot be read or written.
    /// Nothing is written after a bad step, and the last checkpoint stays intact.
    pub fn run(&self, from: Checkpoint, watch: impl FnMut(&Event)) -> Result<Outcome> {
        let (settings, progress) = (self.settings, &from.progress);
        let resumed = progress.step > 0;
        let report_to = match self.ranks.is_first() {
            true => settings.train.report_to.as_slice(),
            false => &[],
        };
        let mut run = Run {
            trainer: self,
            metrics: Metrics::open(self.output_dir, report_to, resumed.then_some(progress))?,
            batches: Batches::new(self.train, settings.batches, progress.cursor),
            noise: NoiseAhead::new(settings.seed, !has_loops(self.model.device())),
            total_steps: settings.total_steps(self.train),
            earlier: progress.wall_s,
            began: Instant::now(),
            at: from,
            watch,
        };
        run.event(if resumed { "resumed" } else { "started" })?;
        (run.watch)(&Event::Started(run.at.progress.step, run.total_steps));
        let (interrupted, last_task_loss) = run.steps()?;
        if interrupted {
            run.event("interrupted")?;
        } else {
            if run.at.progress.stopped_early {
                run.event("early_stop")?;
            }
            let (progress, load_best) = (&run.at.progress, settings.train.load_best_model_at_end);
            let is_best = progress.best.is_none_or(|(_, step)| step == progress.step);
            if !self.ranks.is_first() {
                // Rank 0 writes.
            } else if load_best && !is_best {
                checkpoint::restore_best(self.output_dir)?;
            } else {
                let adapter = run.at.state.to_adapter(self.adapter_config)?;
                adapter.write_peft(self.output_dir, true)?;
            }
            run.event("finished")?;
        }
        let progress = &run.at.progress;
        Ok(Outcome {
            steps: progress.step,
            total_steps: run.total_steps,
            interrupted,
            stopped_early: progress.stopped_early,
            seconds: run.began.elapsed().as_secs_f64(),
            best: progress.best,
            last_task_loss,
        })
    }
}

/// The forward and backward passes of a step, of all ranks together.
pub(super) struct Passed {
    /// Gradients of the loss with respect to the drawn updates.
    pub(super) gradients: AdapterGradients,
    /// Sum of the negative log-likelihoods of the trained tokens, nats.
    total: f64,
    /// Whether a trained token is predicted from more than one token.
    looks_back: bool,
    /// Time that this rank waited for the others.
    waited: Duration,
    /// Time of the exchange of gradients.
    exchanged: Duration,
}

impl Trainer<'_> {
    /// Passes the micro-batches `examples` through the model. The gradients are those of `scale` times the sum of the losses.
    ///
    /// Each rank passes its share of the rows; every rank gets the sums over all.
    pub(super) fn pass(
        &self,
        examples: Vec<Vec<usize>>,
        drawn: &ActiveAdapter,
        step: u64,
        scale: f64,
    ) -> Result<Passed> {
        let (settings, data, ranks) = (self.settings, self.train, self.ranks);
        let length = |example| data.n_tokens(example);
        // A rank without rows needs gradients of the right shapes, which are zero: those of any row times 0.
        let any_row = examples
            .iter()
            .flatten()
            .min_by_key(|row| length(**row))
            .copied();
        let mut own = micro_batches(examples, length, ranks.rank(), ranks.size());
        let is_idle = own.is_empty();
        if is_idle {
            own.extend(any_row.map(|row| vec![row]));
        }
        let scale = if is_idle { 0.0 } else { scale };
        let mut gradients = AdapterGradients::default();
        let (mut total, mut looks_back) = (0.0, false);
        for rows in &own {
            let batch = data.batch(rows)?;
            let dropout = (settings.lora_dropout > 0.0).then(|| Dropout {
                probability: settings.lora_dropout,
                seed: settings.seed,
                step,
                rows: batch.examples.iter().map(|row| *row as u64).collect(),
            });
            let options = PassOptions {
                dropout: dropout.as_ref(),
                checkpointing: settings.train.gradient_checkpointing,
            };
            let (input, targets) = (sequences(&batch), &batch.targets);
            let loss = (self.model).loss_and_gradients(&input, targets, drawn, scale, options)?;
            if !is_idle {
                total += loss.total();
                looks_back |= targets.iter().any(|(row, _)| batch.positions[*row] > 0);
            }
            if let Some(of_batch) = loss.gradients {
                gradients.add_all(of_batch)?;
            }
        }
        // The slowest rank is waited for here, and not where the time of the exchange is taken.
        let passed = Instant::now();
        let [total, looking_back] = ranks.sums([total, f64::from(u8::from(looks_back))]);
        let waited = passed.elapsed();
        gradients.sum_over(ranks)?;
        Ok(Passed {
            waited,
            exchanged: passed.elapsed() - waited,
            gradients,
            total,
            looks_back: looking_back > 0.0,
        })
    }
}

/// A running training.
struct Run<'a, W> {
    trainer: &'a Trainer<'a>,
    at: Checkpoint,
    metrics: Metrics,
    batches: Batches<'a>,
    noise: NoiseAhead,
    total_steps: u64,
    /// Seconds of earlier processes of the run.
    earlier: f64,
    began: Instant,
    watch: W,
}

impl<W: FnMut(&Event)> Run<'_, W> {
    /// Whether any rank is to stop.
    fn is_interrupted(&self) -> bool {
        let own = self.trainer.interrupt.load(Ordering::Relaxed);
        self.trainer.ranks.any(own)
    }

    fn wall(&self) -> f64 {
        self.earlier + self.began.elapsed().as_secs_f64()
    }

    fn epoch(&self) -> f64 {
        let cursor = self.batches.cursor();
        cursor.epoch as f64 + cursor.batch as f64 / self.batches.n_batches().max(1) as f64
    }

    fn event(&mut self, event: &'static str) -> Result<()> {
        let (step, wall_s) = (self.at.progress.step, self.wall());
        self.metrics.write(&Record::Event {
            event,
            step,
            wall_s,
        })
    }

    /// Runs the remaining steps. Returns whether the run was interrupted, and the task loss of the last step.
    fn steps(&mut self) -> Result<(bool, Option<f64>)> {
        let settings = &self.trainer.settings.train;
        let schedule = self.trainer.settings.schedule(self.total_steps);
        let method = self.at.state.method.clone();
        let (constant, metrics) = (LrSchedulerType::Constant, method.kind().metrics);
        let warmup = Schedule::new(constant, method.warmup_ratio(), self.total_steps);
        let mut last_task_loss = None;
        if self.at.progress.evaluation_due {
            // The run was interrupted during the evaluation of the checkpoint's step.
            self.assess()?;
            if self.at.progress.evaluation_due {
                return Ok((true, None));
            }
            self.save()?;
        }
        while self.at.progress.step < self.total_steps && !self.at.progress.stopped_early {
            let made = self.at.progress.step;
            self.at.progress.window.begin();
            let rate = schedule.factor(made);
            let result = self.step(made, rate, warmup.factor(made))?;
            let step = made + 1;
            let cursor = self.batches.cursor();
            let progress = &mut self.at.progress;
            (progress.step, progress.cursor) = (step, cursor);
            progress.tokens += result.tokens;
            progress.trained_tokens += result.trained_tokens;
            progress.window.add(&result, metrics);
            last_task_loss = Some(result.task_loss);
            (self.watch)(&Event::Step(step, result.task_loss));
            if step == 1 {
                self.require_one_adapter()?;
            }
            let last = step == self.total_steps;
            if last || step.is_multiple_of(settings.logging_steps.max(1)) {
                let (place, rate) = ((self.epoch(), self.wall()), settings.learning_rate * rate);
                let n_ranks = self.trainer.ranks.size();
                let peak = peak_memory_bytes(self.trainer.model.device());
                let progress = &self.at.progress;
                let record = TrainRecord::new(progress, metrics, place, rate, n_ranks, peak);
                self.metrics.write(&Record::Train(record.clone()))?;
                (self.watch)(&Event::Train(record));
                self.at.progress.window = Window::default();
            }
            let every = settings.eval_steps;
            let due = last || (every > 0 && step.is_multiple_of(every));
            self.at.progress.evaluation_due = due && self.trainer.valid.is_some();
            if self.at.progress.evaluation_due {
                self.assess()?;
            }
            let progress = &self.at.progress;
            let ends = (last || progress.stopped_early) && !progress.evaluation_due;
            let interrupted = self.is_interrupted() && !ends;
            let due = step.is_multiple_of(settings.save_steps.max(1)) || ends;
            if (settings.save_steps > 0 && due) || interrupted {
                self.save()?;
            }
            if interrupted {
                return Ok((true, last_task_loss));
            }
        }
        Ok((false, last_task_loss))
    }

    /// Evaluates the adapter, and writes it to `best` if it is the best so far. If the run is interrupted meanwhile,
    /// the evaluation stays due.
    fn assess(&mut self) -> Result<()> {
        let trainer = self.trainer;
        let Some(valid) = trainer.valid else {
            self.at.progress.evaluation_due = false;
            return Ok(());
        };
        let before = Instant::now();
        let step = self.at.progress.step;
        tracing::debug!("step {step}: evaluating {} rows", valid.len());
        let (batch_size, mean) = (trainer.settings.batches.batch_size, self.at.state.mean()?);
        let (interrupt, ranks) = (&trainer.interrupt, trainer.ranks);
        let record = evaluate(trainer.model, &mean, valid, batch_size, interrupt, ranks)?;
        self.at.progress.window.exclude(before.elapsed());
        let Some(mut record) = record else {
            return Ok(());
        };
        if !record.loss.is_finite() {
            let names = audit::largest_weights(&self.at.state)?;
            return Err(not_finite(step, "the validation loss", &names));
        }
        (record.step, record.epoch, record.wall_s) = (step, self.epoch(), self.wall());
        self.metrics.write(&Record::Eval(record.clone()))?;
        let unsettled = self.at.state.method.unsettled_steps(self.total_steps);
        let progress = &mut self.at.progress;
        progress.evaluation_due = false;
        if step < unsettled.min(self.total_steps) {
            (self.watch)(&Event::Eval(record));
            return Ok(());
        }
        progress.evaluations_without_improvement += 1;
        if progress.best.is_none_or(|(loss, _)| record.loss < loss) {
            let best = (record.loss, step);
            if ranks.is_first() {
                let adapter = self.at.state.to_adapter(trainer.adapter_config)?;
                checkpoint::write_best(trainer.output_dir, &adapter, best)?;
            }
            progress.best = Some(best);
            progress.evaluations_without_improvement = 0;
            self.event("best")?;
        }
        (self.watch)(&Event::Eval(record));
        let patience = trainer.settings.train.early_stopping_patience;
        let progress = &mut self.at.progress;
        progress.stopped_early =
            patience > 0 && progress.evaluations_without_improvement >= patience;
        Ok(())
    }

    /// Checks that all ranks have the same adapter.
    fn require_one_adapter(&self) -> Result<()> {
        let ranks = self.trainer.ranks;
        if ranks.size() == 1 {
            return Ok(());
        }
        let all = ranks.all_gather(audit::sha256(&self.at.state)?.as_bytes());
        let Some(other) = all.iter().position(|hash| *hash != all[0]) else {
            return Ok(());
        };
        let message = format!("the adapter of rank {other} is not the one of rank 0");
        let fix = "give all ranks processors and accelerators of the same kind, which round alike";
        let at = format!("step {}", self.at.progress.step);
        Err(Problem::new("ranks-differ", at, message, fix)
            .exit(5)
            .into())
    }

    fn save(&mut self) -> Result<()> {
        self.at.progress.wall_s = self.wall();
        let (trainer, keep) = (self.trainer, self.trainer.settings.train.save_total_limit);
        self.require_one_adapter()?;
        if trainer.ranks.is_first() {
            let config = trainer.adapter_config;
            checkpoint::write(trainer.output_dir, &self.at, trainer.identity, config, keep)?;
        }
        self.event("checkpoint")?;
        (self.watch)(&Event::Saved(self.at.progress.step));
        Ok(())
    }

    /// One optimiser step: one posterior draw, its micro-batches and one update.
    fn step(&mut self, step: u64, rate: f64, weight: f64) -> Result<StepResult> {
        let (trainer, settings) = (self.trainer, self.trainer.settings);
        let (state, batches) = (&mut self.at.state, &mut self.batches);
        let mut examples = vec![batches.next_examples()];
        // Accumulation ends at the end of an epoch, so that every row counts once per epoch.
        while examples.len() < settings.micro_batches && !batches.at_epoch_start() {
            examples.push(batches.next_examples());
        }
        let of_all = |count: fn(&Dataset, usize) -> usize| -> usize {
            let examples = examples.iter().flatten();
            examples.map(|row| count(trainer.train, *row)).sum()
        };
        let (tokens, trained_tokens) = (of_all(Dataset::n_tokens), of_all(Dataset::n_trained));
        let epoch_tokens = trainer.train.stats().trained_tokens.total;
        let noise = self.noise.at(step);
        let weighting = state.weighting(weight, epoch_tokens);
        let drawn = state.draw_with(&weighting, |module| noise.of(&module.name))?;
        if step + 1 < self.total_steps {
            self.noise.prepare_after(noise);
        }
        // The loss is the mean over the trained tokens of the whole step. It does not depend on the split into
        // micro-batches.
        let scale = 1.0 / trained_tokens.max(1) as f64;
        let passed = trainer.pass(examples, &drawn.active, step, scale)?;
        let (task, looks_back) = (passed.gradients, passed.looks_back);
        let between_ranks = [passed.waited, passed.exchanged].map(|time| time.as_secs_f64());
        let task_loss = passed.total * scale;
        let metrics = drawn.metrics(state);
        let refuse = |what, names: Vec<String>| not_finite(step + 1, what, &names);
        if !(task_loss + in_loss(state.method.kind().metrics, &metrics)).is_finite() {
            return Err(refuse("the loss", audit::largest_weights(state)?));
        }
        let unclipped = drawn.backward(state, &task)?;
        let mut gradients = unclipped.clone();
        let grad_norm = clip(&mut gradients, &state.owners, settings.train.max_grad_norm)?;
        if !grad_norm.is_finite() {
            let names = audit::non_finite(state, |idx| &gradients[idx])?;
            return Err(refuse("the gradient", names));
        }
        // Queries and keys get no gradient if every target sees only one key.
        if step < 2 && looks_back {
            audit::first_steps(state, &gradients, step)?;
        }
        let [learning_rate, variational_rate] = [
            settings.train.learning_rate,
            settings.train.variational_learning_rate,
        ]
        .map(|peak| peak * rate);
        let optimizer = &mut self.at.optimizer;
        optimizer.step(
            &settings.train,
            state,
            &gradients,
            learning_rate,
            variational_rate,
        )?;
        let method = state.method.clone();
        let made = Step {
            index: step,
            total: self.total_steps,
            trained_tokens,
            epoch_tokens,
        };
        let modules = state.described();
        method.after_step(&modules, &mut state.owners, &unclipped, made)?;
        let names = audit::non_finite(state, |idx| &state.owners[idx].values)?;
        if !names.is_empty() {
            return Err(refuse("a weight", names));
        }
        Ok(StepResult {
            task_loss,
            metrics,
            grad_norm,
            tokens: tokens as u64,
            trained_tokens: trained_tokens as u64,
            between_ranks,
        })
    }
}
