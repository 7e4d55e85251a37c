//! What `eval` and `predict` start from: a base, an adapter that fits it, and what turns text into tokens.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use monteclora_adapters::weights::Kind;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::jinja::{self, recorded_variables};
use monteclora_converters::{Adapter, ConversationSettings, Problem};

use super::{device, weight_type};
use crate::cli::ModelArgs;
use crate::data::{EncodeOptions, Encoder, Overlong, Remedies, TrainOn};
use crate::eval::posterior_draws;
use crate::hub::{self, Located};
use crate::model::{ActiveAdapter, Decoder, open_base, read_shape};
use crate::provenance::{read_fitting, warn_of_conversation};

/// All of it checked, and no weights of the base read.
pub(super) struct Opened {
    pub(super) config: ModelShape,
    pub(super) encoder: Arc<Encoder>,
    /// Whether prompts are written out by the chat template: as was asked for, where there is one.
    pub(super) applies_chat_template: bool,
    adapter: Option<Adapter>,
    base: Located,
    weights: &'static Kind,
    n_draws: usize,
    cpu: bool,
}

/// The base in memory, with what the adapter makes of it.
pub(super) struct Loaded {
    pub(super) decoder: Decoder,
    /// The adapter's posterior mean, if there is an adapter.
    pub(super) mean: Option<ActiveAdapter>,
    /// Draws of its posterior, if they are asked for.
    pub(super) draws: Vec<ActiveAdapter>,
}

impl Opened {
    pub(super) fn new(
        model: &ModelArgs,
        adapter: Option<&Path>,
        posterior_samples: Option<usize>,
        apply_chat_template: bool,
        max_seq_length: impl FnOnce(&ModelShape) -> usize,
    ) -> Result<Self> {
        /// Each is an adapter in memory.
        const MOST: usize = 1000;
        let weights = weight_type(model.options.dtype)?;
        let n_draws = posterior_samples.unwrap_or(0);
        if n_draws > MOST {
            let problem = format!("--posterior-samples {n_draws}: expected at most {MOST}");
            bail!(Problem::usage(problem));
        }
        let adapter_dir = adapter;
        let base = hub::locate(&model.model_id, &model.options.hub())?;
        let config = read_shape(&base.dir)?;
        let files = open_base(&base.dir)?;
        let template = model.options.chat_template.as_deref();
        let apply_chat_template =
            apply_chat_template && jinja::find(&base.dir, template)?.is_some();
        if let Some(path) = adapter {
            let settings = ConversationSettings {
                template,
                prompts_as_chats: Some(apply_chat_template),
            };
            warn_of_conversation(path, &base.dir, settings)?;
        }
        let adapter = adapter.map(|path| read_fitting(path, &files)).transpose()?;
        let options = EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template,
            max_seq_length: max_seq_length(&config),
            overlong: Overlong::Error,
            remedies: Remedies::Flags,
        };
        let variables = adapter_dir.map(recorded_variables).unwrap_or_default();
        let encoder = Encoder::with_variables(&base.dir, template, variables, options)?;
        encoder.tokenizer().check_vocab(config.vocab_size)?;
        for warning in encoder.unread_variables() {
            tracing::warn!("{warning}");
        }
        Ok(Self {
            adapter,
            base,
            config,
            encoder,
            applies_chat_template: apply_chat_template,
            weights,
            n_draws,
            cpu: model.options.cpu,
        })
    }

    /// Loads the base. Draws are made before anything is computed, so that an adapter without a posterior is refused at once.
    pub(super) fn load(&self, seed: u64) -> Result<Loaded> {
        let decoder = Decoder::load_as(&self.base.dir, &device(self.cpu)?, self.weights)?;
        let mut loaded = Loaded {
            decoder,
            mean: None,
            draws: Vec::new(),
        };
        if let Some(adapter) = &self.adapter {
            let decoder = &loaded.decoder;
            let mean = ActiveAdapter::from_adapter(adapter, &self.config, decoder.device())?;
            loaded.draws = posterior_draws(adapter, &mean, decoder, seed, self.n_draws)?;
            loaded.mean = Some(mean);
        }
        Ok(loaded)
    }
}

/// Refuses flags that are 0.
pub(super) fn require_positive(flags: &[(&str, usize)]) -> Result<()> {
    match flags.iter().find(|(_, value)| *value == 0) {
        Some((flag, _)) => Err(Problem::usage(format!("{flag} 0: expected at least 1")).into()),
        None => Ok(()),
    }
}
