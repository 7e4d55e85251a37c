//! One model of an application: what its requests need to know of it, and the turns at its engine.

use std::ops::Deref;

use mistralrs::Model;
use mistralrs::error::{Error as SdkError, Result as SdkResult};
use tokio::sync::OwnedSemaphorePermit;

use crate::chat_template::ChatTemplate;
use crate::error::Result;
use crate::loader::{MonteCloraLoader, SharedPipeline};
use crate::quirks_0_8::batches_on_a_cpu::Turns;
use crate::quirks_0_8::logger_threads::NormalModel;
use crate::quirks_0_8::special_tokens::TextFrame;
use crate::server::vocabulary::ModelTokens;

/// A loaded model under its name.
pub(super) struct Served {
    pub(super) name: String,
    pub(super) is_adapter: bool,
    pub(super) model: NormalModel,
    pub(super) tokens: ModelTokens,
    /// What its conversations are written out by.
    pub(super) template: Option<ChatTemplate>,
    /// Tokens of prompt and answer together.
    pub(super) max_sequence_length: usize,
    /// Tokens that the model's tokenizer puts around plain text.
    pub(super) frame: TextFrame,
    turns: Turns,
}

impl Served {
    /// What `loader` has loaded as `pipeline`, which an engine is to work with; blocking.
    pub(super) fn new(loader: &MonteCloraLoader, pipeline: SharedPipeline) -> Result<Self> {
        let (tokens, max_sequence_length, device) = {
            let loaded = pipeline.blocking_lock();
            (
                ModelTokens::of(&*loaded)?,
                loaded.get_metadata().max_seq_len,
                loaded.device().location(),
            )
        };
        Ok(Self {
            name: loader.name().to_owned(),
            is_adapter: loader.adapter().is_some(),
            // SAFETY: `MonteCloraLoader` loads by a loader of mistral.rs.
            model: unsafe { NormalModel::new(pipeline) },
            tokens,
            template: loader.chat_template()?,
            max_sequence_length,
            frame: crate::chat_files::text_frame(loader.base())?,
            turns: Turns::new(device),
        })
    }

    /// A turn at the engine, in the order of asking.
    pub(super) async fn turn(&self) -> SdkResult<OwnedSemaphorePermit> {
        self.take(false).await
    }

    /// All turns at the engine: nothing is at work then, and nothing begins.
    pub(super) async fn all_turns(&self) -> SdkResult<OwnedSemaphorePermit> {
        self.take(true).await
    }

    async fn take(&self, alone: bool) -> SdkResult<OwnedSemaphorePermit> {
        // Nothing closes them.
        let turn = self.turns.take(alone).await;
        turn.map_err(|error| SdkError::Channel(error.to_string()))
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
