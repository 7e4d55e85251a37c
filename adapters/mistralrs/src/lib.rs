//! Serves MonteCLoRA and LoRA adapters with [mistral.rs](https://github.com/EricLBuehler/mistral.rs), collapsed to the
//! posterior mean.
//!
//! There are four entry points:
//!
//! - [`MonteCloraModelBuilder`], for applications. It is built like [`mistralrs::TextModelBuilder`] and has the methods
//!   of [`mistralrs::Model`].
//! - [`MonteCloraLoader`], a mistral.rs [`Loader`](mistralrs_core::Loader) for programs that build
//!   [`mistralrs::MistralRs`] themselves.
//! - [`Engine`], one model that blocking code drives: raw logits, token ids, greedy answers.
//! - [`serve`], the OpenAI-compatible server that `serve.toml` describes ([`ServeFile`]).
//!
//! The loader merges the adapter in float32 into the tensors that it changes. It writes these tensors to a temporary
//! overlay, which mistral.rs reads after the base's own files. The loader does not use mistral.rs's own LoRA path,
//! because that path silently drops most PEFT settings. For the same reason it first rewrites the base's configuration,
//! and it refuses by name whatever mistral.rs cannot represent.
//!
//! ```no_run
//! use mistralrs_monteclora::MonteCloraModelBuilder;
//!
//! # async fn example() -> anyhow::Result<()> {
//! let model = MonteCloraModelBuilder::new("models/SmolLM2-135M-Instruct")
//!     .with_adapter("triage", "out") // raw MonteCLoRA or plain LoRA, as PEFT writes them
//!     .build()
//!     .await?;
//! println!("{}", model.chat("I was charged twice.").await?);
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
extern crate self as mistralrs_monteclora;

mod application;
mod chat_files;
mod chat_template;
mod config;
mod engine;
mod error;
mod field_names;
mod keys;
mod loader;
mod memory;
mod quantisation;
mod quirks_0_8;
mod scoring;
mod server;

#[cfg(test)]
mod fixture_tests;

/// Compiles the code blocks of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use application::{MonteCloraModel, MonteCloraModelBuilder, MonteCloraStream, Turn};
pub use config::{
    AdapterSection, AdminSection, AuthSection, DeviceSection, Held, LimitsSection, Locate,
    ModelConfig, ModelSection, PageExample, QuantizationSection, RuntimeSection, ServeConfig,
    ServeFile, ServerSection, TlsFiles, UncertaintySection, Wanted, local_only,
};
pub use engine::{Answer, ChatMessage, Engine, PromptLogits, prompt_logits};
pub use error::{Error, Result};
pub use keys::KeySet;
pub use loader::{MonteCloraLoader, MonteCloraLoaderBuilder, SharedPipeline, check_public_name};
pub use mistralrs;
pub use mistralrs_core::{IsqType, ModelDType};
pub use quantisation::parse_in_situ_quant;
pub use quirks_0_8::logger_threads::{
    end_throughput_log, is_throughput_log, spare_engine_threads, watch_throughput_logs,
};
pub use quirks_0_8::model_config::{NormalisedConfig, normalise_config};
pub use quirks_0_8::own_text::{AskedConversation, own_differences, own_texts};
pub use scoring::{
    BaseScorer, Continuation, Score, ScoreError, ScorePrompt, ScoreRequest, ScoredAdapter,
    ScoredBase, ScoredCalibration, ScoredChoice, ScoredUncertainty, Scorer, ScorerAbout,
    ScorerSurvey, Scoring, ScoringDtype, UncertaintyConfig,
};
pub use server::{Applied, ConfigSource, Reloaded, Server, generation_of, serve};
