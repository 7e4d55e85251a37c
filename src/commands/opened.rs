//! What `eval` and `predict` start from: a base, an adapter that fits it, and what turns text into tokens.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use monteclora_converters::{Adapter, ModelFiles};

use super::Usage;
use crate::cli::ModelArgs;
use crate::data::{EncodeOptions, Encoder, Overlong, TrainOn};
use crate::hub::{self, Located};
use crate::model::ModelConfig;
use crate::session;

/// All of it checked, and no weights of the base read.
pub(super) struct Opened {
    pub(super) adapter: Option<Adapter>,
    pub(super) base: Located,
    pub(super) config: ModelConfig,
    pub(super) encoder: Arc<Encoder>,
}

impl Opened {
    pub(super) fn new(
        model: &ModelArgs,
        adapter: Option<&Path>,
        apply_chat_template: bool,
        max_seq_length: impl FnOnce(&ModelConfig) -> usize,
    ) -> Result<Self> {
        let adapter = adapter.map(Adapter::read).transpose()?;
        let base = hub::locate(&model.model_id, &model.options.hub())?;
        let config = ModelConfig::read(&base.dir)?;
        if let Some(adapter) = &adapter {
            adapter.require_fit(&ModelFiles::open(&base.dir)?)?;
        }
        let options = EncodeOptions {
            train_on: TrainOn::Assistant,
            apply_chat_template,
            max_seq_length: max_seq_length(&config),
            overlong: Overlong::Error,
        };
        let template = model.options.chat_template.as_deref();
        let encoder = session::encoder(&base.dir, template, options)?;
        encoder.tokenizer().check_vocab(config.vocab_size)?;
        Ok(Self {
            adapter,
            base,
            config,
            encoder,
        })
    }
}

/// Refuses flags that are 0.
pub(super) fn require_positive(flags: &[(&str, usize)]) -> Result<()> {
    match flags.iter().find(|(_, value)| *value == 0) {
        Some((flag, _)) => Err(Usage(format!("{flag} 0: expected at least 1")).into()),
        None => Ok(()),
    }
}
