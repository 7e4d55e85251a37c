//! Scores answers for the server with our decoder. All adapters of a base model share one copy of it.
//!
//! Reads questions, draws and calibrations as `monteclora predict` does, and gives the same numbers for weights of the
//! same type.

mod adapter;
mod answers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use mistralrs_monteclora::{
    BaseScorer, Error as ServeError, ScoredAdapter, ScoredBase, Scorer, ScorerSurvey, Scoring,
    ScoringDtype,
};
use monteclora_adapters::weights::{self, Kind};
use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{self as converters, ModelFiles, Problem, base_fingerprint};
use serde_json::Map;

use self::adapter::{Held, ReadAdapter};
use self::answers::AdapterScorer;
use crate::allocator;
use crate::data::{ChatTemplate, EncodeOptions, Encoder, Tokenizer};
use crate::eval::{calibration, posterior_draw};
use crate::hub::{self, HubOptions};
use crate::model::{ActiveAdapter, Decoder, held_bytes, read_shape};

type Result<T, E = ServeError> = std::result::Result<T, E>;

/// Scores answers with our decoder.
#[derive(Debug, Clone, Default)]
pub struct DecoderScoring {
    /// Source of the Hub's access token, as in `--token-source`.
    pub token_source: String,
}

impl DecoderScoring {
    /// The directory from which the scorer's copy of the base model is read.
    fn directory(&self, base: &ScoredBase) -> anyhow::Result<PathBuf> {
        if base.config.dtype != ScoringDtype::Blocks {
            return Ok(base.dir.clone());
        }
        let options = HubOptions {
            revision: base.config.revision.clone(),
            token_source: self.token_source.clone(),
        };
        let found = hub::locate(&base.config.model_id, &options)?;
        let files = ModelFiles::open(&found.dir)?;
        if !files
            .names()
            .any(|name| files.get(name).is_some_and(|t| t.blocks().is_some()))
        {
            let message = format!(
                "\"blocks\" needs a quantised .gguf file, and `{}` is none; use \"bf16\"",
                found.name
            );
            return Err(ServeError::setting("models.uncertainty.dtype", message).into());
        }
        Ok(found.dir)
    }

    fn survey(
        &self,
        base: &ScoredBase,
        adapter: Option<&ScoredAdapter<'_>>,
    ) -> anyhow::Result<ScorerSurvey> {
        let dir = self.directory(base)?;
        let files = ModelFiles::open(&dir)?;
        let fingerprint = base_fingerprint(&files);
        let Some(adapter) = adapter else {
            read_shape(&dir)?;
            return Ok(ScorerSurvey {
                bytes: held_bytes(&files, kind(base.config.dtype)),
                fingerprint,
                ..ScorerSurvey::default()
            });
        };
        let read = ReadAdapter::new(adapter, &files, fingerprint)?;
        let template = chat_template(&dir, base.chat_template.as_deref(), Some(adapter.path))?;
        let template = template.map(|template| template.sha256(&Map::new()));
        let held = read.held;
        let why = read.calibration.as_ref().and_then(|calibration| {
            let draws = calibration.default_draws(template.clone(), false, held);
            calibration
                .applicable(template.clone(), false, draws)
                .why_not
        });
        let at = format!("`{}`", adapter.path.join(calibration::FILE).display());
        let warning = |why| {
            let message = format!("{why}: it is not used there");
            Problem::new(
                "calibration",
                &at,
                message,
                "make another with `monteclora calibrate`",
            )
        };
        Ok(ScorerSurvey {
            bytes: read.bytes(base, adapter),
            has_posterior: read.has_posterior(),
            is_more_than_mean: read.is_more_than_mean,
            fingerprint: read.fingerprint,
            content: read.content,
            warnings: why.map(warning).into_iter().collect(),
        })
    }
}

/// The chat template of the base model in `dir`, with the variables that `adapter` was trained with and with a running
/// clock.
fn chat_template(
    dir: &Path,
    file: Option<&Path>,
    adapter: Option<&Path>,
) -> anyhow::Result<Option<ChatTemplate>> {
    let template = ChatTemplate::with_clock(dir, file, SystemTime::now)?;
    let variables = adapter
        .map(recorded_variables)
        .transpose()?
        .unwrap_or_default();
    Ok(template.map(|template| template.with_variables(variables)))
}

fn kind(dtype: ScoringDtype) -> &'static Kind {
    match dtype {
        ScoringDtype::Bf16 => &weights::BF16,
        ScoringDtype::F32 => &weights::F32,
        ScoringDtype::Blocks => &weights::AUTO,
    }
}

/// Converts an error to one of the server.
fn served(error: anyhow::Error) -> ServeError {
    let error = match error.downcast::<ServeError>() {
        Ok(error) => return error,
        Err(error) => error,
    };
    let error = match error.downcast::<Problem>() {
        Ok(problem) => return problem.into(),
        Err(error) => error,
    };
    match error.downcast::<converters::Error>() {
        Ok(error) => error.into(),
        Err(error) => ServeError::setting("models.uncertainty", format!("{error:#}")),
    }
}

impl Scoring for DecoderScoring {
    fn survey(
        &self,
        base: &ScoredBase,
        adapter: Option<&ScoredAdapter<'_>>,
    ) -> Result<ScorerSurvey> {
        self.survey(base, adapter).map_err(served)
    }

    fn load(&self, base: &ScoredBase) -> Result<Arc<dyn BaseScorer>> {
        let load = || Base::load(base, &self.directory(base)?);
        Ok(Arc::new(SharedBase(Arc::new(load().map_err(served)?))))
    }
}

/// A base model in memory, with its tokenizer.
#[derive(Debug)]
struct Base {
    decoder: Decoder,
    files: PathBuf,
    fingerprint: String,
    dtype: ScoringDtype,
    tokenizer: Arc<Tokenizer>,
    chat_template: Option<PathBuf>,
    /// Encoder of texts without a chat template.
    plain: Arc<Encoder>,
}

impl Base {
    fn load(base: &ScoredBase, dir: &Path) -> anyhow::Result<Self> {
        let shape = read_shape(dir)?;
        let tokenizer = Arc::new(Tokenizer::from_dir(dir)?);
        tokenizer.check_vocab(shape.vocab_size)?;
        let decoder = Decoder::load_as(dir, &base.device, kind(base.config.dtype))?;
        let fingerprint = base_fingerprint(&ModelFiles::open(dir)?);
        allocator::return_freed_memory();
        let plain = Encoder::new(
            tokenizer.clone(),
            None,
            EncodeOptions::whole(false, shape.max_position_embeddings),
        );
        Ok(Self {
            decoder,
            files: dir.to_owned(),
            fingerprint,
            dtype: base.config.dtype,
            tokenizer,
            chat_template: base.chat_template.clone(),
            plain: Arc::new(plain),
        })
    }

    fn load_scorer(
        self: &Arc<Self>,
        adapter: Option<&ScoredAdapter<'_>>,
    ) -> anyhow::Result<AdapterScorer> {
        let path = adapter.map(|adapter| adapter.path);
        let template = chat_template(&self.files, self.chat_template.as_deref(), path)?;
        let chat = template.map(|template| {
            let limit = self.decoder.config().max_position_embeddings;
            let options = EncodeOptions::whole(true, limit);
            Arc::new(Encoder::new(
                self.tokenizer.clone(),
                Some(template),
                options,
            ))
        });
        let mut found = AdapterScorer {
            base: self.clone(),
            chat,
            mean: ActiveAdapter::default(),
            posterior: None,
            held: Held::default(),
            draws: Vec::new(),
            calibration: None,
            fingerprint: self.fingerprint.clone(),
        };
        let Some(adapter) = adapter else {
            return Ok(found);
        };
        let files = ModelFiles::open(&self.files)?;
        let read = ReadAdapter::new(adapter, &files, self.fingerprint.clone())?;
        let decoder = &self.decoder;
        let (config, device) = (decoder.config(), decoder.device());
        found.mean = ActiveAdapter::from_adapter(&read.adapter, config, device)?;
        found.held = read.held;
        found.draws = (0..read.held.n)
            .map(|index| posterior_draw(&read.adapter, &found.mean, decoder, read.held.seed, index))
            .collect::<anyhow::Result<_>>()?;
        found.posterior = read.has_posterior().then_some(read.adapter);
        found.calibration = read.calibration;
        found.fingerprint = read.fingerprint;
        allocator::return_freed_memory();
        Ok(found)
    }
}

/// A [`Base`] that its scorers share.
#[derive(Debug)]
struct SharedBase(Arc<Base>);

impl BaseScorer for SharedBase {
    fn scorer(&self, adapter: Option<&ScoredAdapter<'_>>) -> Result<Arc<dyn Scorer>> {
        Ok(Arc::new(self.0.load_scorer(adapter).map_err(served)?))
    }
}
