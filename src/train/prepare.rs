//! All checks of a run before its base model is loaded, and the run itself.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use candle_core::Device;
use monteclora_adapters::Precision;
use monteclora_adapters::methods::Method;
use monteclora_adapters::weights::{AUTO, AUTO_BF16, Kind};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::files::{file_sha256, sha256, write_json};
use monteclora_converters::{
    Adapter, AdapterConfig, ConversationSettings, ModelFiles, Problem, base_fingerprint,
    base_sample, other_conversation,
};

use super::record::template_time;
use super::state::modules as modules_of;
use super::suggest::record_of;
use super::{
    Event, Identity, Interrupt, Outcome, Start, TrainSettings, Trainer, checkpoints, init_from,
};
use crate::card::Card;
use crate::config::RunConfig;
use crate::data::{Dataset, Encoder, Split};
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
        Self::at_time(run, base, SystemTime::now())
    }

    /// As [`Self::new`]. A run that is resumed gives its chat template the time of its first start, so that a template that
    /// writes the date writes the same text on another day.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn resumed(run: RunConfig, base: Option<Located>, from: &str) -> Result<Self> {
        let first = template_time(&record_of(from, &run.train.output_dir));
        Self::at_time(run, base, first.unwrap_or_else(SystemTime::now))
    }

    fn at_time(mut run: RunConfig, base: Option<Located>, now: SystemTime) -> Result<Self> {
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
        let init_from = init_from::read(&mut run.lora, &mut adapter_config, &files, &modules)?;
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
        let settings = TrainSettings::new(&run, max_seq_length);
        // The hashes open the files again: pages that are read stay mapped until the files are closed.
        let read = ModelFiles::open(&base.dir)?;
        let (fingerprint, sample) = (base_fingerprint(&read), base_sample(&read));
        drop(read);
        let chat_template_sha256 = encoder.template().map(|t| sha256(t.content().as_bytes()));
        let tokenizer_sha256 = file_sha256(&base.dir.join("tokenizer.json"));
        let identity = Identity::new(
            &serde_json::to_value(&run)?,
            [
                ("base", Some(&fingerprint)),
                ("tokenizer", tokenizer_sha256.as_deref()),
                ("chat_template", chat_template_sha256.as_deref()),
                ("data.train", Some(train.sha256().as_str())),
                ("data.valid", valid.as_ref().map(Dataset::sha256).as_deref()),
            ],
        );
        let method = run.lora.method()?;
        let total_steps = settings.total_steps(&train);
        method.configure(&mut adapter_config, total_steps);
        let described = modules_of(&adapter_config, &sites, &model_config)?;
        let described: Vec<_> = described.into_iter().map(|(_, module)| module).collect();
        method.check(&described)?;
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
        })
    }

    /// Logs [`Self::base_warnings`].
    pub fn warn(&self) {
        for warning in &self.base_warnings {
            tracing::warn!("{warning}");
        }
    }

    /// Loads the base model.
    ///
    /// # Errors
    /// As [`Decoder::load_as`].
    pub fn decoder(&self, device: &Device) -> Result<Decoder> {
        Ok(Decoder::load_as(&self.base.dir, device, self.weights)?)
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
        on_event: impl FnMut(&Event),
    ) -> Result<(Outcome, Decoder)> {
        let output_dir = self.run.train.output_dir.as_path();
        let run_json = output_dir.join("run.json");
        let parameters = start.from.state.n_parameters();
        write_json(&run_json, &self.record(parameters, device, None)?)?;
        let precision = match self.run.train.bf16 {
            true => Precision::Bf16,
            false => Precision::Single,
        };
        let decoder = self.decoder(device)?.with_precision(precision);
        let trainer = Trainer {
            model: &decoder,
            train: &self.train,
            valid: self.valid.as_ref(),
            settings: &self.settings,
            adapter_config: &self.adapter_config,
            output_dir,
            identity: &self.identity,
            interrupt,
        };
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
        if !outcome.interrupted {
            let record = self.record(parameters, device, Some(outcome.steps))?;
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
