//! `train`: fine-tunes a model as run.toml or the command line configures it.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use monteclora_converters::{Problem, shell_word};
use serde_json::json;

use super::{computes_on_cpu, device, dry_run, interrupted, print, print_json, program};
use crate::cli::TrainArgs;
use crate::config::RunConfig;
use crate::distributed::{not_joined, world};
use crate::output::name_of;
use crate::progress::TrainProgress;
use crate::train::{Begin, Event, Interrupt, Prepared, begin, without_file};

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let config = configuration(args)?;
    let ranks = world();
    if let Some(warning) = not_joined() {
        tracing::warn!("{warning}");
    }
    let mut prepared = Prepared::of_ranks(config, args.resume.as_deref(), ranks)?;
    prepared.on_cpu = computes_on_cpu(args.cpu);
    prepared.warn();
    let output_dir = prepared.run.train.output_dir.clone();
    if args.dry_run {
        return dry_run::run(&prepared, args.json);
    }
    prepared.require_same(ranks)?;
    prepared.warn_of_memory()?;
    let device = device(args.cpu)?;
    let start = match begin(
        &prepared,
        args.resume.as_deref(),
        args.force,
        &device,
        ranks,
    )? {
        Begin::Run(start) => start,
        Begin::Finished(step) => return finished(&prepared, step, args.json),
    };
    let mut progress = TrainProgress::default();
    let show = |event: &Event| progress.show(event);
    let interrupt = stop_on_signals(AFTER_STEP)?;
    let (outcome, _) = prepared.train(*start, &device, interrupt, ranks, show)?;
    if outcome.interrupted {
        return Err(interrupted(format!(
            "interrupted at step {} of {}; continue with: {}",
            outcome.steps,
            outcome.total_steps,
            of_ranks(resumption(std::env::args()), ranks.size())
        )));
    }
    if args.json {
        return print_json(&json!({
            "output_dir": output_dir,
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "train_loss": outcome.last_task_loss,
            "best_eval_loss": outcome.best.map(|b| b.0),
            "best_step": outcome.best.map(|b| b.1),
            "stopped_early": outcome.stopped_early,
        }));
    }
    let best = outcome.best.map_or(String::new(), |(loss, step)| {
        format!(", best validation loss {loss:.4} at step {step}")
    });
    print(&format!(
        "wrote {} after {} steps in {:.0} s{best}\n{}",
        output_dir.display(),
        outcome.steps,
        outcome.seconds,
        next(&prepared)
    ))
}

/// Suggested commands for a newly trained adapter.
fn next(prepared: &Prepared) -> String {
    let (program, dir) = (program(), &prepared.run.train.output_dir);
    let out = shell_word(&dir.display().to_string());
    let data = prepared.run.data.valid.as_ref();
    let data = data.map_or("test.jsonl".to_owned(), |path| {
        shell_word(&path.display().to_string())
    });
    let mut lines = vec![
        format!("{program} report {out}                # curves and what was learnt, as a page"),
        format!("{program} eval -a {out} --data {data}"),
        format!("{program} chat -a {out}"),
    ];
    if cfg!(feature = "mistralrs") {
        lines.push(format!(
            "{program} serve --adapter {}={out}",
            shell_word(&name_of(dir))
        ));
    }
    format!("next\n  {}", lines.join("\n  "))
}

/// The configuration from the run's file, if there is one, with the keys of the command line.
fn configuration(args: &TrainArgs) -> Result<RunConfig> {
    let mut keys = args.keys.overrides();
    keys.extend(args.overrides.iter().cloned());
    let Some(file) = &args.config else {
        if args.keys.model_id.is_none() && args.keys.data.is_none() {
            let message = "which run? Give -c run.toml (`monteclora init` writes one), or -m MODEL and --data FILE";
            bail!(Problem::usage(message));
        }
        // The default comes first, so that flags override it.
        keys.insert(0, "train.output_dir=\"out\"".to_owned());
        return without_file(&keys, args.resume.as_deref(), world());
    };
    Ok(RunConfig::load(file, &keys)?)
}

/// The command that continues an interrupted run: the one that was typed, as a shell takes it, with `--resume auto`.
fn resumption(typed: impl Iterator<Item = String>) -> String {
    let mut command = program();
    let mut typed = typed.skip(1);
    while let Some(word) = typed.next() {
        match word.as_str() {
            "--resume" => {
                let _ = typed.next();
            }
            "--force" => {}
            word if word.starts_with("--resume=") => {}
            word => command.push_str(&format!(" {}", shell_word(word))),
        }
    }
    command + " --resume auto"
}

/// A command on `n_ranks`.
fn of_ranks(command: String, n_ranks: usize) -> String {
    match n_ranks {
        1 => command,
        n => format!("mpirun -n {n} {command}"),
    }
}

fn finished(prepared: &Prepared, step: u64, as_json: bool) -> Result<()> {
    let output_dir = prepared.run.train.output_dir.display();
    if as_json {
        return print_json(
            &json!({"output_dir": output_dir.to_string(), "steps": step, "finished": true}),
        );
    }
    print(&format!(
        "{output_dir} is finished: all {step} steps were made; raise max_steps or num_train_epochs to train further"
    ))
}

/// When training stops after a signal, for [`say_stopping`].
pub(super) const AFTER_STEP: &str = " after this step";

/// What the first signal does.
enum OnSignal {
    /// It is noted. The end of its message says when the program stops.
    Stop(&'static str),
    /// It ends the process at once with a message, because nothing would be kept of the part that the program is in.
    End(String),
}

static ON_SIGNAL: Mutex<OnSignal> = Mutex::new(OnSignal::Stop(""));

fn on_signal() -> MutexGuard<'static, OnSignal> {
    ON_SIGNAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the first signal end the process with `message`, until [`say_stopping`].
pub(super) fn end_at_once(message: String) {
    *on_signal() = OnSignal::End(message);
}

/// Lets the first signal be noted, and sets the end of its message.
pub(super) fn say_stopping(after: &'static str) {
    *on_signal() = OnSignal::Stop(after);
}

/// A flag that the first SIGINT or SIGTERM sets. The signal also logs when the program stops. A second signal ends the
/// process at once.
pub(super) fn stop_on_signals(after: &'static str) -> Result<Interrupt> {
    say_stopping(after);
    let flag: Interrupt = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    ctrlc::set_handler(move || {
        let after = match &*on_signal() {
            OnSignal::End(message) => {
                // Nothing is left to do if standard error is closed.
                let _ = writeln!(std::io::stderr(), "error: {message}");
                std::process::exit(130);
            }
            OnSignal::Stop(after) => *after,
        };
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        tracing::warn!("stopping{after}; once more to quit at once");
    })
    .context("cannot install the signal handler")?;
    Ok(flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_run_goes_on_with_the_command_that_was_typed() {
        let after = |typed: &str| {
            let words = typed.split(' ').map(str::to_owned);
            let said = resumption(words);
            let (_, rest) = said.split_once(' ').expect("a program and its arguments");
            rest.to_owned()
        };
        assert_eq!(
            after("monteclora train -m base --data rows --lora-r 4 --lr 1e-3 --force"),
            "train -m base --data rows --lora-r 4 --lr 1e-3 --resume auto"
        );
        assert_eq!(
            after("x train -c run.toml --resume checkpoint-5 --json"),
            "train -c run.toml --json --resume auto"
        );
        assert_eq!(
            after("x train --resume=auto -c it's"),
            r"train -c 'it'\''s' --resume auto"
        );
    }
}
