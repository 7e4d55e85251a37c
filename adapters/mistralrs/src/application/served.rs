//! One model of an application: what its requests need to know about it, and the turns at its engine.

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

/// A loaded model and its name.
pub(super) struct Served {
    pub(super) name: String,
    pub(super) is_adapter: bool,
    pub(super) model: NormalModel,
    pub(super) tokens: ModelTokens,
    /// The template that renders its conversations.
    pub(super) template: Option<ChatTemplate>,
    /// Maximum number of tokens of prompt and answer together.
    pub(super) max_sequence_length: usize,
    /// Tokens that the model's tokenizer puts around plain text.
    pub(super) frame: TextFrame,
    turns: Turns,
}

impl Served {
    /// Describes the model that `loader` has loaded as `pipeline`. It blocks.
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

    /// Waits for a turn at the engine, in order of arrival.
    pub(super) async fn turn(&self) -> SdkResult<OwnedSemaphorePermit> {
        self.take(false).await
    }

    /// Waits for all turns at the engine: then no request runs, and none begins.
    pub(super) async fn all_turns(&self) -> SdkResult<OwnedSemaphorePermit> {
        self.take(true).await
    }

    async fn take(&self, alone: bool) -> SdkResult<OwnedSemaphorePermit> {
        // Nothing closes the semaphore of the turns.
        let turn = self.turns.take(alone).await;
        turn.map_err(|error| SdkError::Channel(error.to_string()))
    }
}

/// A turn at a model's engine; it dereferences to [`mistralrs::Model`].
///
/// [`MonteCloraModel::turn`](super::MonteCloraModel::turn) makes it. Until it is dropped, calls of
/// [`MonteCloraModel`](super::MonteCloraModel) to the same model may wait; on a CPU all of them wait. Calls on it go to
/// mistral.rs unchanged: make one call at a time, and wait for its end before the drop.
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
