//! All checks of a run before its base model is loaded, and the run itself.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use candle_core::Device;
use monteclora_adapters::Precision;
use monteclora_adapters::device::set_tf32;
use monteclora_adapters::methods::Method;
use monteclora_adapters::product::has_fast_bf16;
use monteclora_adapters::weights::{AUTO, AUTO_BF16, Kind};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::files::{file_sha256, sha256, write_json};
use monteclora_converters::{
    Adapter, AdapterConfig, ConversationSettings, LinearModule, ModelFiles, Problem, TargetModules,
    base_fingerprint, base_sample, other_conversation,
};

use super::record::{micro_batches, template_time};
use super::state::modules as modules_of;
use super::suggest::record_of;
use super::{
    Event, Identity, Interrupt, Outcome, Start, TrainSettings, Trainer, checkpoints, init_from,
};
use crate::card::Card;
use crate::config::RunConfig;
use crate::data::{Dataset, Encoder, Split};
use crate::distributed::Communicator;
use crate::hub::{self, HubOptions, Located};
use crate::model::{Decoder, read_shape};
use crate::output::name_of;

/// A run whose inputs are checked, as far as possible before the base model is loaded.
pub struct Prepared {
    /// The configuration. If the run starts from an adapter, it has that adapter's shape.
    pub run: RunConfig,
    /// The base model.
    pub base: Located,
    /// The base model's files.
    pub files: ModelFiles,
    /// Warnings about the base model and the conversation format. None of them prevents the run.
    pub base_warnings: Vec<Problem>,
    /// The base model's sizes and options.
    pub model_config: ModelShape,
    /// The adapter's configuration, in PEFT's terms.
    pub adapter_config: AdapterConfig,
    /// The training method.
    pub method: Arc<dyn Method>,
    /// The adapter that the run starts from, if any.
    pub init_from: Option<Adapter>,
    /// Names of the adapted modules.
    pub sites: Vec<String>,
    /// Training rows.
    pub train: Dataset,
    /// Validation rows.
    pub valid: Option<Dataset>,
    /// Settings of the training loop.
    pub settings: TrainSettings,
    /// How the base model's weights are held in memory.
    pub weights: &'static Kind,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// Whether the run computes on the CPU, which is assumed until the caller knows better. The estimate of the memory
    /// depends on it.
    pub on_cpu: bool,
    pub(super) identity: Identity,
    /// See [`base_fingerprint`].
    pub fingerprint: String,
    /// See [`base_sample`].
    pub(super) sample: Vec<f32>,
    /// The time that the chat template gets, in seconds since 1970, if its text depends on the date.
    pub(super) template_time: Option<u64>,
    pub(super) chat_template_sha256: Option<String>,
    pub(super) tokenizer_sha256: Option<String>,
}

impl Prepared {
    /// Checks configuration, base model, adapted modules and data. `base` replaces the model of the configuration.
    ///
    /// # Errors
    /// Returns an error if any of them is invalid or cannot be read.
    pub fn new(run: RunConfig, base: Option<Located>) -> Result<Self> {
        let micro_batches = run.train.gradient_accumulation_steps;
        Self::at_time(run, base, SystemTime::now(), micro_batches)
    }

    /// As [`Self::new`]. A run that is resumed gives its chat template the time of its first start, so that a template that
    /// writes the date writes the same text on another day.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn resumed(run: RunConfig, base: Option<Located>, from: &str) -> Result<Self> {
        let first = template_time(&record_of(from, &run.train.output_dir));
        let micro_batches = run.train.gradient_accumulation_steps;
        let first = first.unwrap_or_else(SystemTime::now);
        Self::at_time(run, base, first, micro_batches)
    }

    /// As [`Self::new`] or, with `resume`, as [`Self::resumed`], on each of `ranks`. Rank 0 alone needs to see the run that is resumed,
    /// and is the first to look for the base model, which the others may then find in the cache.
    ///
    /// A resumed run keeps its batches per step, whatever the number of ranks, unless `gradient_accumulation_steps` has changed.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_ranks(
        run: RunConfig,
        resume: Option<&str>,
        ranks: &dyn Communicator,
    ) -> Result<Self> {
        let record = resume.map(|from| record_of(from, &run.train.output_dir));
        let time = record.as_deref().and_then(template_time);
        let accumulation = run.train.gradient_accumulation_steps;
        let before = (record.as_deref()).and_then(|record| micro_batches(record, accumulation));
        let now = accumulation * ranks.size();
        if let Some(before) = before.filter(|before| *before != now) {
            tracing::info!(
                "ranks: {}; each step still takes {before} batches, as when the run began",
                ranks.size()
            );
        }
        let own = (time.unwrap_or_else(SystemTime::now), before.unwrap_or(now));
        let (time, micro_batches) = ranks.of_first(own)?;
        if !ranks.is_first() {
            ranks.any(false);
        }
        let options = HubOptions {
            revision: run.model.revision.clone(),
            token_source: String::new(),
        };
        let base = hub::locate(&run.model.model_id, &options)?;
        if ranks.is_first() {
            ranks.any(false);
        }
        Self::at_time(run, Some(base), time, micro_batches)
    }

    /// [`Self::new`] with `micro_batches` per step. The chat template gets the time `now`.
    pub(super) fn at_time(
        mut run: RunConfig,
        base: Option<Located>,
        now: SystemTime,
        micro_batches: usize,
    ) -> Result<Self> {
        for note in &run.notes {
            tracing::warn!("{note}");
        }
        let auto = if run.train.bf16 { &AUTO_BF16 } else { &AUTO };
        let weights = (run.model.dtype).kind(auto, "[model] dtype: the trainer", "\"")?;
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
        let mut base_warnings = files.check()?;
        let modules = Decoder::linear_modules(&model_config);
        let mut adapter_config = run.lora.adapter_config(&base);
        name_targets(
            &mut adapter_config,
            run.lora.method()?.as_ref(),
            &modules,
            &model_config,
        )?;
        let init_from = init_from::read(&mut run.lora, &mut adapter_config, &files, &modules)?;
        let method = run.lora.method()?;
        let sites = match &init_from {
            None => adapter_config.resolve_targets(&modules)?,
            Some(adapter) => adapter.sites.iter().map(|site| site.name.clone()).collect(),
        };
        if files.wrapper().is_some() {
            adapter_config.target_in_full(&sites);
        }
        let max_seq_length = run
            .data
            .max_seq_length_for(model_config.max_position_embeddings);
        let positions = model_config.max_position_embeddings;
        if max_seq_length > positions {
            let message = format!(
                "[data] max_seq_length: found {max_seq_length}, expected at most {positions}, the positions of the model"
            );
            return Err(Problem::usage(message).into());
        }
        let encoder = Encoder::at_time(
            &base.dir,
            run.model.chat_template.as_deref(),
            run.data.template_variables.clone(),
            run.data.encode_options(max_seq_length),
            now,
        )?;
        let template = encoder.template();
        let template_time = template
            .filter(|template| template.depends_on_date())
            .and_then(|_| Some(now.duration_since(UNIX_EPOCH).ok()?.as_secs()));
        encoder.tokenizer().check_vocab(model_config.vocab_size)?;
        if let Some(dir) = &run.lora.init_from {
            let settings = ConversationSettings {
                template: run.model.chat_template.as_deref(),
                prompts_as_chats: Some(run.data.apply_chat_template),
            };
            base_warnings.extend(other_conversation(dir, &base.dir, settings)?);
        }
        base_warnings.extend(encoder.unread_variables());
        let open = |path: &Path, split| {
            Dataset::open_split(path, split, run.data.row_schema(), encoder.clone())
        };
        let train = open(&run.data.train, Split::Train)?;
        let valid = run.data.valid.as_deref();
        let valid = valid.map(|path| open(path, Split::Valid)).transpose()?;
        let settings = TrainSettings {
            micro_batches,
            ..TrainSettings::new(&run, max_seq_length)
        };
        // The hashes open the files again: pages that are read stay mapped until the files are closed.
        let read = ModelFiles::open(&base.dir)?;
        let (fingerprint, sample) = (base_fingerprint(&read), base_sample(&read));
        drop(read);
        let chat_template_sha256 = encoder.template().map(|t| sha256(t.content().as_bytes()));
        let tokenizer_sha256 = file_sha256(&base.dir.join("tokenizer.json"));
        let mut config = serde_json::to_value(&run)?;
        // Two ranks with one batch each make the same steps as one rank with two.
        config["train"]["gradient_accumulation_steps"] = settings.micro_batches.into();
        let identity = Identity::new(
            &config,
            [
                ("base", Some(&fingerprint)),
                ("tokenizer", tokenizer_sha256.as_deref()),
                ("chat_template", chat_template_sha256.as_deref()),
                ("data.train", Some(train.sha256().as_str())),
                ("data.valid", valid.as_ref().map(Dataset::sha256).as_deref()),
            ],
        );
        let total_steps = settings.total_steps(&train);
        let (of_method, shape) = (method.as_ref(), &model_config);
        configure(&mut adapter_config, of_method, &sites, shape, total_steps)?;
        Ok(Self {
            method,
            total_steps,
            identity,
            fingerprint,
            sample,
            template_time,
            chat_template_sha256,
            tokenizer_sha256,
            run,
            base,
            files,
            base_warnings,
            model_config,
            adapter_config,
            init_from,
            sites,
            train,
            valid,
            settings,
            weights,
            on_cpu: true,
        })
    }

    /// Checks that the method of `run`, a run on the same base, can train the modules that it adapts. Rows are not read.
    ///
    /// # Errors
    /// Returns an error if a pattern finds no module, or if the method refuses a module or the length of the run.
    pub fn require_fitting(&self, run: &RunConfig) -> Result<()> {
        if run.lora.init_from.is_some() {
            return Ok(());
        }
        let (method, shape) = (run.lora.method()?, &self.model_config);
        let modules = Decoder::linear_modules(shape);
        let mut config = run.lora.adapter_config(&self.base);
        name_targets(&mut config, method.as_ref(), &modules, shape)?;
        let sites = config.resolve_targets(&modules)?;
        Ok(configure(
            &mut config,
            method.as_ref(),
            &sites,
            shape,
            self.total_steps,
        )?)
    }

    /// Logs [`Self::base_warnings`].
    pub fn warn(&self) {
        for warning in &self.base_warnings {
            tracing::warn!("{warning}");
        }
    }

    /// Checks that all ranks have the same program, configuration, base model and rows. Files may lie in other places.
    ///
    /// # Errors
    /// Returns the same error on every rank if one of them differs from rank 0.
    pub fn require_same(&self, ranks: &dyn Communicator) -> Result<()> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let start = self.init_from.as_ref().map(Adapter::fingerprint);
        let all = ranks.gather((version, start, self.identity.clone()))?;
        let (version, start, identity) = &all[0];
        for (rank, (its_version, its_start, its_identity)) in all.iter().enumerate() {
            let (mut found, is_data) = identity.unlike(its_identity);
            if version != its_version {
                found.push(format!(
                    "monteclora is version {version} on rank 0, {its_version} there"
                ));
            }
            if start != its_start {
                found.push("lora.init_from is another adapter".to_owned());
            }
            if !found.is_empty() {
                let message = format!(
                    "rank {rank} does not have what rank 0 has:\n  {}",
                    found.join("\n  ")
                );
                let problem = Problem::sentence("ranks-differ", message);
                return Err(problem.exit(if is_data { 3 } else { 2 }).into());
            }
        }
        Ok(())
    }

    /// Loads the base model.
    ///
    /// # Errors
    /// As [`Decoder::load_as`].
    pub fn decoder(&self, device: &Device) -> Result<Decoder> {
        Ok(Decoder::load_as(&self.base.dir, device, self.weights)?)
    }

    /// The trainer of this run on a loaded base model.
    pub(super) fn trainer<'a>(
        &'a self,
        model: &'a Decoder,
        interrupt: Interrupt,
        ranks: &'a dyn Communicator,
    ) -> Trainer<'a> {
        Trainer {
            model,
            train: &self.train,
            valid: self.valid.as_ref(),
            settings: &self.settings,
            adapter_config: &self.adapter_config,
            output_dir: &self.run.train.output_dir,
            identity: &self.identity,
            interrupt,
            ranks,
        }
    }

    /// Loads the base model and trains. Returns the decoder for further use.
    ///
    /// # Errors
    /// As [`Self::decoder`] and [`Trainer::run`], or if a file in the output directory cannot be written.
    pub fn train(
        &self,
        start: Start,
        device: &Device,
        interrupt: Interrupt,
        ranks: &dyn Communicator,
        on_event: impl FnMut(&Event),
    ) -> Result<(Outcome, Decoder)> {
        let output_dir = self.run.train.output_dir.as_path();
        let run_json = output_dir.join("run.json");
        let parameters = start.from.state.n_parameters();
        if ranks.is_first() {
            write_json(&run_json, &self.record(parameters, device, ranks, None)?)?;
        }
        let precision = match self.run.train.bf16 {
            true => Precision::Bf16,
            false => Precision::Single,
        };
        let is_slower = self.run.train.bf16 && device.is_cpu() && !has_fast_bf16();
        if is_slower {
            tracing::warn!(
                "train.bf16 makes a step slower on this processor; for less memory alone, model.dtype = \"bf16\" is enough"
            );
        }
        if !set_tf32(self.run.train.tf32, device) && self.run.train.tf32 {
            tracing::warn!(
                "train.tf32 is without effect: only CUDA multiplies in TF32, and this run does not compute on CUDA"
            );
        }
        let decoder = self.decoder(device)?.with_precision(precision);
        let trainer = self.trainer(&decoder, interrupt, ranks);
        if ranks.size() > 1 {
            tracing::info!(
                "training on {} ranks with {} threads each on this machine; {} batches of up to {} rows per step",
                ranks.size(),
                rayon::current_num_threads(),
                self.settings.micro_batches,
                self.settings.batches.batch_size
            );
        }
        tracing::info!(
            "training {} of {} sites: {parameters} parameters, {} examples, {} steps",
            start.from.state.modules.len(),
            Decoder::linear_modules(&self.model_config).len(),
            self.train.len(),
            self.total_steps
        );
        let mut from = start.from;
        let is_new = from.progress.step == 0;
        from.state.attach(&decoder, is_new, self.run.seed)?;
        let outcome = trainer.run(from, on_event).inspect_err(|_| {
            if let Ok(Some((_, last))) = checkpoints(output_dir).map(|mut all| all.pop()) {
                tracing::warn!(
                    "the last checkpoint, `{}`, is intact; --resume auto continues from it",
                    last.display()
                );
            }
        })?;
        if !outcome.interrupted && ranks.is_first() {
            let record = self.record(parameters, device, ranks, Some(outcome.steps))?;
            write_json(&run_json, &record)?;
            let card = Card {
                name: &name_of(output_dir),
                config: &self.adapter_config,
                record: &record,
                scores: &serde_json::Value::Null,
            };
            card.write(output_dir)?;
        }
        Ok((outcome, decoder))
    }
}

/// Lets the method say in `config` what its files hold, and checks that it can train the modules `sites`.
fn configure(
    config: &mut AdapterConfig,
    method: &dyn Method,
    sites: &[String],
    shape: &ModelShape,
    total_steps: u64,
) -> monteclora_adapters::Result<()> {
    method.configure(config, total_steps)?;
    let described = modules_of(config, sites, shape)?.into_iter();
    let described: Vec<_> = described.map(|(_, module)| module).collect();
    method.check(&described)
}

/// Names the modules that `all-linear` means for a method that does not take all of them, or for some layers: PEFT takes layers
/// only beside a list, and confines only its entries to them.
fn name_targets(
    config: &mut AdapterConfig,
    method: &dyn Method,
    modules: &[LinearModule],
    shape: &ModelShape,
) -> monteclora_adapters::Result<()> {
    if config.target_modules != TargetModules::AllLinear {
        return Ok(());
    }
    let described = modules_of(config, &config.resolve_targets(modules)?, shape)?;
    let (taken, left): (Vec<_>, Vec<_>) =
        (described.iter().map(|(_, module)| module)).partition(|module| method.takes(module));
    if !left.is_empty() || config.layers_to_transform.is_some() {
        let leaves = taken
            .iter()
            .filter_map(|module| module.name.rsplit('.').next());
        let mut names: Vec<String> = leaves.map(str::to_owned).collect();
        names.sort();
        names.dedup();
        config.target_modules = TargetModules::List(names);
    }
    Ok(())
}
