//! `tune`: searches for settings by trials, each an ordinary run.

use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use monteclora_converters::{Problem, files, shell_word};
use serde_json::json;

use super::opened::require_positive;
use super::train::stop_on_signals;
use super::{interrupted, print, print_json, program};
use crate::cli::TuneArgs;
use crate::config::{DataConfig, RunConfig};
use crate::data::Dataset;
use crate::train::Prepared;
use crate::tune::{
    self, Commands, Event, LOG, Log, Objective, Options, Outcome, SPACE, Space, Study, name_of,
    rungs,
};

pub(super) fn run(args: &TuneArgs) -> Result<()> {
    require_positive(&[("--trials", args.trials), ("--jobs", args.jobs)])?;
    let space_text = Space::text(&args.space)?;
    let space = Space::parse(&space_text, &args.space.display().to_string())?;
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read `{}`", args.config.display()))?;
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let objective = Objective::named(&args.objective)?;
    let Some(data) = args.data.clone().or_else(|| config.data.valid.clone()) else {
        let message = format!(
            "{}: trials are compared on validation rows, and there are none; set [data] valid, or give --data",
            args.config.display()
        );
        bail!(Problem::usage(message));
    };
    // Every key of the space must be one of run.toml, at both ends of its range.
    for u in [0.0, 1.0] {
        let ends = space.values(&vec![u; space.parameters.len()]);
        let mut keys = args.overrides.clone();
        keys.extend(space.settings(&ends));
        RunConfig::load(&args.config, &keys)?;
    }
    require_searchable(&space, &config)?;
    let prepared = Prepared::new(config.clone(), None)?;
    let max_seq_length = config
        .data
        .max_seq_length_for(prepared.model_config.max_position_embeddings);
    let changes_length = space
        .parameters
        .iter()
        .find(|parameter| LENGTHS.contains(&parameter.key.as_str()));
    if let (Some(parameter), false) = (changes_length, args.no_early_stopping) {
        tracing::warn!(
            "`{}` changes the length of a run, so trials are not stopped early: their steps cannot be compared",
            parameter.key
        );
    }
    let has_rungs =
        !args.no_early_stopping && config.data.valid.is_some() && changes_length.is_none();
    let eval_steps = if has_rungs {
        config.train.eval_steps
    } else {
        0
    };
    let options = Options {
        run_sha256: Options::hash(&text, &args.overrides),
        space_sha256: Options::hash(&space_text, &[]),
        strategy: args.strategy,
        seed: args.seed,
        objective,
        rungs: rungs(prepared.total_steps, eval_steps),
        data: match &args.data {
            Some(path) => path.display().to_string(),
            None => prepared
                .valid
                .as_ref()
                .map_or(String::new(), Dataset::sha256),
        },
        limit: args.limit,
    };
    drop(prepared);
    let interrupt = stop_on_signals(" after these trials have written their checkpoints")?;
    let study = Study {
        dir: args.output.clone(),
        space: &space,
        start: start(&space, &config)?,
        commands: commands(args, &config, &data, max_seq_length)?,
        options,
        interrupt: &interrupt,
    };
    let (mut log, _lock) = study.open()?;
    files::write_text(&args.output.join(SPACE), &space_text)?;
    let objective = study.options.objective.clone();
    let show = |event: &Event<'_>| match event {
        Event::Started(index, settings, false) => {
            tracing::info!("{}: {}", name_of(*index), settings.join("  "));
        }
        Event::Started(index, settings, true) => {
            tracing::info!("{} goes on: {}", name_of(*index), settings.join("  "));
        }
        Event::Waiting(index) => {
            tracing::warn!(
                "{} is still run by an earlier process: waiting for its end",
                name_of(*index)
            );
        }
        Event::Ended(index, outcome, n_ended, best) => {
            let best = best.map_or(String::new(), |best| {
                format!("; best {} {:.4}", objective.metric, objective.shown(best))
            });
            let what = match outcome {
                Outcome::Finished {
                    objective: value,
                    seconds,
                    ..
                } => {
                    format!(
                        "{} {:.4} in {seconds:.0} s",
                        objective.metric,
                        objective.shown(*value)
                    )
                }
                Outcome::Stopped { step } => {
                    format!("stopped at step {step}, where others are better")
                }
                Outcome::Failed { reason } => format!("failed: {reason}"),
            };
            tracing::info!(
                "{}: {what} ({n_ended} of {} ended{best})",
                name_of(*index),
                args.trials
            );
        }
    };
    let has_ended = study.run(&mut log, args.trials, args.jobs, show)?;
    let best = study.write_best(&log, &text, &args.overrides)?;
    if !has_ended && interrupt.load(Ordering::Relaxed) {
        return Err(interrupted(format!(
            "interrupted; the same command goes on with the study in `{}`",
            args.output.display()
        )));
    }
    tell(args, &study, &log, best.as_deref())
}

/// Keys that change how many steps a run has, or when it is evaluated.
const LENGTHS: [&str; 7] = [
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.num_train_epochs",
    "train.max_steps",
    "train.eval_steps",
    "data.packing",
    "data.max_seq_length",
];

/// Refuses keys under which trials could not be compared, and rows that `eval` reads in another way than the run.
fn require_searchable(space: &Space, config: &RunConfig) -> Result<()> {
    const OF_DATA: [&str; 3] = ["data.packing", "data.max_seq_length", "data.train_on"];
    let is_other = |key: &str| {
        key.starts_with("model.")
            || (key.starts_with("data.") && !OF_DATA.contains(&key))
            || key == "train.output_dir"
    };
    if let Some(parameter) = space.parameters.iter().find(|p| is_other(&p.key)) {
        bail!(Problem::usage(format!(
            "`{}` cannot be searched: trials would be evaluated on another base or on other rows; search keys of [lora] and [train]",
            parameter.key
        )));
    }
    let plain = DataConfig::default();
    if config.data.fields != plain.fields || config.data.format != plain.format {
        bail!(Problem::usage(
            "[data] fields and format are not known to `eval`, which judges the trials; rename the columns of the rows"
        ));
    }
    Ok(())
}

/// The point of run.toml itself, if it lies in the space: what is known to work is tried first.
fn start(space: &Space, config: &RunConfig) -> Result<Option<Vec<f64>>> {
    let config = toml::Value::try_from(config).context("the configuration as TOML")?;
    let value = |key: &str| {
        key.split('.')
            .try_fold(&config, |at, part| at.get(part))
            .cloned()
    };
    let values = space
        .parameters
        .iter()
        .map(|parameter| value(&parameter.key));
    let values: Option<Vec<toml::Value>> = values.collect();
    Ok(values.and_then(|values| space.point(&values)))
}

fn commands(
    args: &TuneArgs,
    config: &RunConfig,
    data: &Path,
    max_seq_length: usize,
) -> Result<Commands> {
    let mut train: Vec<OsString> = vec!["-c".into(), args.config.clone().into()];
    for setting in &args.overrides {
        train.extend(["--set".into(), setting.into()]);
    }
    let model = &config.model;
    let mut eval: Vec<OsString> = vec!["-m".into(), model.model_id.clone().into()];
    eval.extend([
        "--data".into(),
        data.into(),
        "--json".into(),
        "--no-base".into(),
        "--max-seq-length".into(),
        max_seq_length.to_string().into(),
    ]);
    if args.data.is_none() {
        eval.push("--held-out".into());
    }
    let mut option = |flag: &str, value: Option<OsString>| {
        if let Some(value) = value {
            eval.extend([flag.into(), value]);
        }
    };
    option("--revision", model.revision.clone().map(Into::into));
    option(
        "--chat-template",
        model.chat_template.clone().map(Into::into),
    );
    option("--limit", args.limit.map(|n| n.to_string().into()));
    if model.dtype != Default::default() {
        option("--dtype", Some(model.dtype.0.into()));
    }
    if !config.data.apply_chat_template {
        eval.push("--no-chat-template".into());
    }
    for arguments in [&mut train, &mut eval] {
        if args.cpu {
            arguments.push("--cpu".into());
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(Commands {
        program: std::env::current_exe().context("the program's own path")?,
        train,
        eval,
        threads: (cores / args.jobs).max(1),
    })
}

fn tell(args: &TuneArgs, study: &Study<'_>, log: &Log, best: Option<&Path>) -> Result<()> {
    let objective = &study.options.objective;
    let winner = log.best();
    let out = &args.output;
    if args.json {
        return print_json(&json!({
            "output_dir": out,
            "trials": log.trials.len(),
            "finished": log.trials.iter().filter(|trial| trial.objective().is_some()).count(),
            "objective": objective.metric,
            "best": winner.map(|(index, value)| json!({
                "trial": name_of(index),
                "value": objective.shown(value),
                "settings": study.settings(&log.trials[index]).unwrap_or_default(),
            })),
            "best_toml": best,
        }));
    }
    let (Some((index, value)), Some(best)) = (winner, best) else {
        bail!(
            Problem::sentence(
                "tune",
                format!(
                    "no trial was trained to its end; see {}",
                    out.join(LOG).display()
                )
            )
            .exit(1)
        );
    };
    let program = program();
    let word = |path: &Path| shell_word(&path.display().to_string());
    print(&format!(
        "best of {} trials: {} with {} {:.4}\n  {}\nwrote {}\nnext\n  {program} report {}               # all trials, and what decides\n  {program} train -c {}   # train with the best settings\n  {program} eval -a {} --data TEST",
        log.trials.len(),
        name_of(index),
        objective.metric,
        objective.shown(value),
        study.settings(&log.trials[index])?.join("\n  "),
        best.display(),
        word(out),
        word(best),
        word(&tune::dir_of(out, index)),
    ))
}
