//! `train`: fine-tune as run.toml says.

mod init_from;
mod start;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use candle_core::DType;
use monteclora_adapters::Precision;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::{Adapter, AdapterConfig, ModelFiles, files};
use serde_json::json;
use start::Begin;

pub(super) use start::Start;

use super::{Interrupted, Usage, device, dry_run, print, print_json};
use crate::cli::TrainArgs;
use crate::config::{DtypeChoice, RunConfig};
use crate::data::{Dataset, Split};
use crate::hub::{self, HubOptions, Located};
use crate::model::{Decoder, read_shape};
use crate::progress::TrainProgress;
use crate::session::{self, BaseRecord, DataRecord, RunRecord, Versions};
use crate::train::{
    AdapterState, Identity, Interrupt, Outcome, TrainSettings, Trainer, checkpoints,
};

/// Everything checked that can be checked before the base is loaded.
pub(super) struct Prepared {
    pub(super) run: RunConfig,
    pub(super) base: Located,
    pub(super) files: ModelFiles,
    pub(super) model_config: ModelShape,
    pub(super) adapter_config: AdapterConfig,
    pub(super) init_from: Option<Adapter>,
    pub(super) sites: Vec<String>,
    pub(super) train: Dataset,
    pub(super) valid: Option<Dataset>,
    pub(super) settings: TrainSettings,
    /// How the base's weights are held.
    pub(super) weights: DType,
    /// Optimiser steps of the whole run.
    pub(super) total_steps: u64,
    pub(super) provenance: Provenance,
    pub(super) identity: Identity,
}

/// Hashes of what a run reads besides its data.
pub(super) struct Provenance {
    /// See [`session::fingerprint`].
    fingerprint: String,
    chat_template_sha256: Option<String>,
    tokenizer_sha256: Option<String>,
}

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let prepared = prepare(config, None)?;
    let output_dir = prepared.run.train.output_dir.clone();
    if args.dry_run {
        return dry_run::run(&prepared, args.json);
    }
    let device = device(args.cpu)?;
    let start = match start::begin(&prepared, args.resume.as_deref(), args.force, &device)? {
        Begin::Run(start) => start,
        Begin::Finished(step) => return finished(&prepared, step, args.json),
    };
    let (outcome, _) = execute(&prepared, *start, device, stop_on_signals()?)?;
    if outcome.interrupted {
        return Err(Interrupted(format!(
            "interrupted at step {} of {}; continue with: {}",
            outcome.steps,
            outcome.total_steps,
            resumption(args)
        ))
        .into());
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
        "wrote {} after {} steps in {:.0} s{best}",
        output_dir.display(),
        outcome.steps,
        outcome.seconds
    ))
}

/// The command that continues an interrupted run, as a shell takes it.
fn resumption(args: &TrainArgs) -> String {
    let quoted = |word: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=+:,@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.to_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    let mut command = format!(
        "monteclora train -c {}",
        quoted(&args.config.display().to_string())
    );
    for setting in &args.overrides {
        command.push_str(&format!(" --set {}", quoted(setting)));
    }
    if args.cpu {
        command.push_str(" --cpu");
    }
    if args.json {
        command.push_str(" --json");
    }
    command + " --resume auto"
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

/// Checks configuration, base, adapter sites and data; `base` replaces the model of the configuration.
pub(super) fn prepare(mut run: RunConfig, base: Option<Located>) -> Result<Prepared> {
    for note in &run.notes {
        tracing::warn!("{note}");
    }
    let weights = match run.model.dtype {
        DtypeChoice::Auto if run.train.bf16 => DType::BF16,
        DtypeChoice::Auto | DtypeChoice::F32 => DType::F32,
        DtypeChoice::Bf16 => DType::BF16,
        DtypeChoice::F16 => {
            return Err(Usage(
                "[model] dtype: the trainer holds weights as f32 or bf16; use \"auto\", \"f32\" or \"bf16\""
                    .to_owned(),
            )
            .into());
        }
    };
    let base = match base {
        Some(base) => base,
        None => hub::locate(
            &run.model.model_id,
            &HubOptions {
                revision: run.model.revision.clone(),
                token_source: String::new(),
            },
        )?,
    };
    let model_config = read_shape(&base.dir)?;
    let files = ModelFiles::open(&base.dir)?;
    let modules = Decoder::linear_modules(&model_config);
    let mut adapter_config = session::adapter_config(&run.lora, &base);
    let init_from = init_from::read(&mut run.lora, &mut adapter_config, &files, &modules)?;
    let sites = match &init_from {
        None => adapter_config.resolve_targets(&modules)?,
        Some(adapter) => adapter.sites.iter().map(|site| site.name.clone()).collect(),
    };
    let max_seq_length = run
        .data
        .max_seq_length_for(model_config.max_position_embeddings);
    let encoder = session::encoder(
        &base.dir,
        run.model.chat_template.as_deref(),
        run.data.encode_options(max_seq_length),
    )?;
    encoder.tokenizer().check_vocab(model_config.vocab_size)?;
    let open = |path: &Path, split| {
        Dataset::open_split(path, split, run.data.row_schema(), encoder.clone())
    };
    let train = open(&run.data.train, Split::Train)?;
    let valid = run
        .data
        .valid
        .as_ref()
        .map(|path| open(path, Split::Valid))
        .transpose()?;
    let settings = session::train_settings(&run, max_seq_length);
    let provenance = Provenance {
        fingerprint: session::fingerprint(&files)
            .with_context(|| format!("cannot read the weights in `{}`", base.dir.display()))?,
        chat_template_sha256: encoder.template().map(|t| {
            use sha2::Digest;
            session::hex(&sha2::Sha256::digest(t.source().as_bytes()))
        }),
        tokenizer_sha256: session::file_sha256(&base.dir.join("tokenizer.json")),
    };
    let identity = Identity::new(
        &serde_json::to_value(&run)?,
        [
            ("base", Some(&provenance.fingerprint)),
            ("tokenizer", provenance.tokenizer_sha256.as_deref()),
            ("chat_template", provenance.chat_template_sha256.as_deref()),
            ("data.train", Some(train.sha256().as_str())),
            ("data.valid", valid.as_ref().map(Dataset::sha256).as_deref()),
        ],
    );
    Ok(Prepared {
        total_steps: settings.total_steps(&train),
        provenance,
        identity,
        run,
        base,
        files,
        model_config,
        adapter_config,
        init_from,
        sites,
        train,
        valid,
        settings,
        weights,
    })
}

/// Loads the base and trains; returns the decoder for further use.
pub(super) fn execute(
    prepared: &Prepared,
    start: Start,
    device: candle_core::Device,
    interrupt: Interrupt,
) -> Result<(Outcome, Decoder)> {
    let output_dir = prepared.run.train.output_dir.as_path();
    let run_json = output_dir.join("run.json");
    let mut record = record(prepared, &start.state, &device)?;
    files::write_json(&run_json, &record)?;
    let precision = match prepared.run.train.bf16 {
        true => Precision::Bf16,
        false => Precision::Single,
    };
    let decoder =
        Decoder::load_as(&prepared.base.dir, &device, prepared.weights)?.with_precision(precision);
    let trainer = Trainer {
        model: &decoder,
        train: &prepared.train,
        valid: prepared.valid.as_ref(),
        settings: &prepared.settings,
        adapter_config: &prepared.adapter_config,
        output_dir,
        identity: &prepared.identity,
        interrupt,
    };
    tracing::info!(
        "training {} of {} sites: {} parameters, {} examples, {} steps",
        start.state.sites.len(),
        Decoder::linear_modules(&prepared.model_config).len(),
        start.state.n_parameters(),
        prepared.train.len(),
        prepared.total_steps
    );
    let mut progress = TrainProgress::default();
    let outcome = trainer
        .run(start.state, start.checkpoint, |event| progress.show(event))
        .inspect_err(|_| {
            if let Ok(Some((_, last))) = checkpoints(output_dir).map(|mut all| all.pop()) {
                tracing::warn!(
                    "the last checkpoint, `{}`, is intact; --resume auto continues from it",
                    last.display()
                );
            }
        })?;
    if !outcome.interrupted {
        record.finished_step = Some(outcome.steps);
        files::write_json(&run_json, &record)?;
    }
    Ok((outcome, decoder))
}

fn record(
    prepared: &Prepared,
    state: &AdapterState,
    device: &candle_core::Device,
) -> Result<RunRecord> {
    let provenance = &prepared.provenance;
    Ok(RunRecord {
        config: serde_json::to_value(&prepared.run)?,
        seed: prepared.run.seed,
        monteclora: env!("CARGO_PKG_VERSION"),
        versions: Versions::here(device),
        base: BaseRecord {
            model_id: prepared.base.name.clone(),
            revision: prepared.base.revision.clone(),
            fingerprint: provenance.fingerprint.clone(),
        },
        train: DataRecord::new(&prepared.train),
        valid: prepared.valid.as_ref().map(DataRecord::new),
        chat_template_sha256: provenance.chat_template_sha256.clone(),
        tokenizer_sha256: provenance.tokenizer_sha256.clone(),
        sites: prepared.sites.clone(),
        trainable_parameters: state.n_parameters(),
        total_steps: prepared.total_steps,
        finished_step: None,
    })
}

/// A flag set by the first SIGINT or SIGTERM; a second one ends the process at once.
pub(super) fn stop_on_signals() -> Result<Interrupt> {
    let flag: Interrupt = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        tracing::warn!("stopping after this step; once more to quit at once");
    })
    .context("cannot install the signal handler")?;
    Ok(flag)
}
