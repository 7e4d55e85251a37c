//! `train`: fine-tune as run.toml says.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use candle_core::DType;
use monteclora_converters::{Adapter, AdapterConfig, ModelFiles};
use serde_json::json;

use super::{Interrupted, Usage, device, dry_run, print, print_json, require_empty, require_fit};
use crate::cli::TrainArgs;
use crate::config::{DtypeChoice, RunConfig};
use crate::data::{Dataset, Split};
use crate::hub::{self, HubOptions, Located};
use crate::model::{Decoder, ModelConfig};
use crate::progress::TrainProgress;
use crate::session::{self, BaseRecord, DataRecord, RunRecord};
use crate::train::{
    AdapterState, Checkpoint, Interrupt, Outcome, TrainSettings, Trainer, latest_checkpoint,
};

/// Everything checked that can be checked before the base is loaded.
pub(super) struct Prepared {
    pub(super) run: RunConfig,
    pub(super) base: Located,
    pub(super) files: ModelFiles,
    pub(super) model_config: ModelConfig,
    pub(super) adapter_config: AdapterConfig,
    pub(super) init_from: Option<Adapter>,
    pub(super) sites: Vec<String>,
    pub(super) train: Dataset,
    pub(super) valid: Option<Dataset>,
    pub(super) settings: TrainSettings,
    /// How the base's weights are held.
    pub(super) weights: DType,
}

pub(super) fn run(args: &TrainArgs) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let prepared = prepare(config, None)?;
    let output_dir = prepared.run.train.output_dir.clone();
    if args.dry_run {
        return dry_run::run(&prepared, args.json);
    }
    let checkpoint = match args.resume.as_deref() {
        None => {
            require_empty(&output_dir, args.force)?;
            None
        }
        Some("auto") => latest_checkpoint(&output_dir)?,
        Some(dir) => Some(existing(dir)?),
    };
    let interrupt = stop_on_signals()?;
    let (outcome, _) = execute(
        &prepared,
        checkpoint.as_deref(),
        device(args.cpu)?,
        interrupt,
    )?;
    if outcome.interrupted {
        return Err(Interrupted(format!(
            "interrupted at step {} of {}; continue with --resume auto",
            outcome.steps, outcome.total_steps
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

fn existing(dir: &str) -> Result<PathBuf> {
    let path = PathBuf::from(dir);
    if path.join("trainer_state.json").is_file() {
        return Ok(path);
    }
    Err(Usage(format!("--resume {dir}: not a checkpoint directory; give `auto` or a directory such as out/checkpoint-200")).into())
}

/// Checks configuration, base, adapter sites and data; `base` replaces the model of the configuration.
pub(super) fn prepare(run: RunConfig, base: Option<Located>) -> Result<Prepared> {
    let weights = match run.model.dtype {
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
    let model_config = ModelConfig::read(&base.dir)?;
    let files = ModelFiles::open(&base.dir)?;
    let modules = Decoder::linear_modules(&model_config);
    let mut adapter_config = session::adapter_config(&run.lora, &base);
    let init_from = run
        .lora
        .init_from
        .as_ref()
        .map(|dir| Adapter::read(dir))
        .transpose()?;
    let sites = match &init_from {
        None => adapter_config.resolve_targets(&modules)?,
        Some(adapter) => {
            require_fit(adapter, &files)?;
            // Shape and targets are the adapter's own; the posterior's settings are the run's.
            let settings = adapter_config.monteclora.take();
            adapter_config = AdapterConfig {
                base_model_name_or_path: adapter_config.base_model_name_or_path,
                revision: adapter_config.revision,
                lora_dropout: adapter_config.lora_dropout,
                monteclora: settings,
                ..adapter.config.clone()
            };
            adapter.sites.iter().map(|site| site.name.clone()).collect()
        }
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
    Ok(Prepared {
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
    resume: Option<&Path>,
    device: candle_core::Device,
    interrupt: Interrupt,
) -> Result<(Outcome, Decoder)> {
    let output_dir = prepared.run.train.output_dir.as_path();
    std::fs::create_dir_all(output_dir)
        .with_context(|| format!("cannot create `{}`", output_dir.display()))?;
    let decoder = Decoder::load_as(&prepared.base.dir, &device, prepared.weights)?;
    let objective = session::objective(&prepared.run.lora);
    let model_config = &prepared.model_config;
    let seed = prepared.run.seed;
    let state = match &prepared.init_from {
        None => AdapterState::initial(
            &prepared.adapter_config,
            &prepared.sites,
            model_config,
            objective,
            seed,
            &device,
        )?,
        Some(adapter) => {
            let settings = prepared.adapter_config.monteclora.as_ref();
            AdapterState::from_adapter(adapter, settings, model_config, objective, seed, &device)?
        }
    };
    let trainer = Trainer {
        model: &decoder,
        train: &prepared.train,
        valid: prepared.valid.as_ref(),
        settings: &prepared.settings,
        adapter_config: &prepared.adapter_config,
        output_dir,
        interrupt,
    };
    let checkpoint = resume
        .map(|dir| Checkpoint::read(dir, &state, model_config, prepared.settings.adamw))
        .transpose()?;
    let record = record(prepared, &state, trainer.total_steps())?;
    session::write_json(&output_dir.join("run.json"), &record)?;
    tracing::info!(
        "training {} of {} sites: {} parameters, {} examples, {} steps",
        state.sites.len(),
        Decoder::linear_modules(model_config).len(),
        state.n_parameters(),
        prepared.train.len(),
        trainer.total_steps()
    );
    let mut progress = TrainProgress::default();
    let outcome = trainer.run(state, checkpoint, |event| progress.show(event))?;
    Ok((outcome, decoder))
}

fn record(prepared: &Prepared, state: &AdapterState, total_steps: u64) -> Result<RunRecord> {
    let template = prepared.train.encoder().template();
    Ok(RunRecord {
        config: serde_json::to_value(&prepared.run)?,
        monteclora: env!("CARGO_PKG_VERSION"),
        base: BaseRecord {
            model_id: prepared.base.name.clone(),
            revision: prepared.base.revision.clone(),
            fingerprint: session::fingerprint(&prepared.files).with_context(|| {
                format!(
                    "cannot read the weights in `{}`",
                    prepared.base.dir.display()
                )
            })?,
        },
        train: DataRecord::new(&prepared.train),
        valid: prepared.valid.as_ref().map(DataRecord::new),
        chat_template_sha256: template.map(|t| {
            use sha2::Digest;
            session::hex(&sha2::Sha256::digest(t.source().as_bytes()))
        }),
        tokenizer_sha256: session::file_sha256(&prepared.base.dir.join("tokenizer.json")),
        sites: prepared.sites.clone(),
        trainable_parameters: state.n_parameters(),
        total_steps,
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
