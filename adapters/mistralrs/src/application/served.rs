//! One model of an application: what its requests need to know of it, and the turns at its engine.

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use mistralrs::Model;
use mistralrs::error::{Error as SdkError, Result as SdkResult};
use tokenizers::Tokenizer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};
use crate::loader::{MonteCloraLoader, SharedPipeline};
use crate::quirks_0_8::batches_on_a_cpu;
use crate::quirks_0_8::logger_threads::NormalModel;
use crate::quirks_0_8::special_tokens::TextFrame;

/// A loaded model under its name.
pub(super) struct Served {
    pub(super) name: String,
    pub(super) is_adapter: bool,
    pub(super) model: NormalModel,
    pub(super) end_tokens: Vec<u32>,
    pub(super) has_template: bool,
    /// Tokens of prompt and answer together.
    pub(super) max_sequence_length: usize,
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Tokens that the model's tokenizer puts around plain text.
    pub(super) frame: TextFrame,
    turns: Arc<Semaphore>,
    n_turns: u32,
}

impl Served {
    /// What `loader` has loaded as `pipeline`, whose engine works on up to `max_num_seqs` sequences at a time; blocking.
    pub(super) fn new(
        loader: &MonteCloraLoader,
        pipeline: SharedPipeline,
        max_num_seqs: NonZeroUsize,
    ) -> Result<Self> {
        let (end_tokens, max_sequence_length, has_template, tokenizer, device) = {
            let loaded = pipeline.blocking_lock();
            let template = loaded.get_chat_template();
            (
                loaded.get_metadata().eos_tok.clone(),
                loaded.get_metadata().max_seq_len,
                template.is_some_and(|template| template.has_chat_template()),
                loaded.tokenizer(),
                loaded.device().location(),
            )
        };
        let tokenizer = tokenizer
            .ok_or_else(|| Error::Engine("the model came without a tokenizer".to_owned()))?;
        let n_turns = match batches_on_a_cpu::turns(device) {
            Some(_) => 1,
            None => u32::try_from(max_num_seqs.get()).unwrap_or(u32::MAX),
        };
        Ok(Self {
            name: loader.name().to_owned(),
            is_adapter: loader.adapter().is_some(),
            // SAFETY: `MonteCloraLoader` loads by `NormalLoader`.
            model: unsafe { NormalModel::new(pipeline) },
            end_tokens,
            has_template,
            max_sequence_length,
            tokenizer,
            frame: crate::chat_files::text_frame(loader.base())?,
            turns: Arc::new(Semaphore::new(n_turns as usize)),
            n_turns,
        })
    }

    /// A turn at the engine, in the order of asking.
    pub(super) async fn turn(&self) -> SdkResult<OwnedSemaphorePermit> {
        self.take(1).await
    }

    /// All turns at the engine: nothing is at work then, and nothing begins.
    pub(super) async fn all_turns(&self) -> SdkResult<OwnedSemaphorePermit> {
        self.take(self.n_turns).await
    }

    async fn take(&self, n: u32) -> SdkResult<OwnedSemaphorePermit> {
        let turns = self.turns.clone().acquire_many_owned(n);
        // Nothing closes it.
        turns
            .await
            .map_err(|error| SdkError::Channel(error.to_string()))
    }
}

/// A turn at a model's engine, with all of [`mistralrs::Model`]; made by [`MonteCloraModel::turn`](super::MonteCloraModel::turn).
///
/// Until this is dropped, calls of [`MonteCloraModel`](super::MonteCloraModel) to the same model wait, on a CPU all of them.
/// What is called on it goes to mistral.rs as it is: call one thing at a time, and wait for its end before the drop.
pub struct Turn<'a> {
    pub(super) model: &'a Model,
    pub(super) _permit: OwnedSemaphorePermit,
}

impl Deref for Turn<'_> {
    type Target = Model;

    fn deref(&self) -> &Model {
        self.model
    }
}
