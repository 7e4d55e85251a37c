//! The common inputs of `eval`, `predict`, `chat`, `fit` and `calibrate`: a base model, adapters that fit it, and the
//! encoder of text.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use monteclora_adapters::weights::Kind;
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::jinja::{self, recorded_variables};
use monteclora_converters::{Adapter, ConversationSettings, ModelFiles, Problem, base_fingerprint};

use super::{device, weight_type};
use crate::cli::{ModelArgs, ScoringArgs};
use crate::data::{Dataset, EncodeOptions, Encoder, RowSchema, Split, splits};
use crate::distributed::{require_same, world};
use crate::eval::calibration::{self, Applicable, Calibration, Circumstances, Draws, Scaling};
use crate::eval::{
    Batching, ChoiceRows, EvalOptions, LengthNormalisation, is_at_bound, posterior_draws,
};
use crate::hub::{self, Located};
use crate::model::{ActiveAdapter, Decoder, open_base, read_shape};
use crate::provenance::{read_fitting, warn_of_conversation};

/// Largest number of draws. Each draw is an adapter in memory.
pub(super) const MOST_DRAWS: usize = 1000;

/// The checked inputs. The base model's weights are not read yet.
pub(super) struct Opened {
    pub(super) config: ModelShape,
    pub(super) encoder: Arc<Encoder>,
    /// Whether prompts are rendered with the chat template: if the model has one and the user did not turn it off.
    pub(super) applies_chat_template: bool,
    /// The adapters, in the given order.
    pub(super) adapters: Vec<Adapter>,
    base: Located,
    weights: &'static Kind,
    draws: Option<Draws>,
    normalisation: LengthNormalisation,
    cpu: bool,
}

/// The inputs to open.
pub(super) struct Request<'a> {
    pub(super) model: &'a ModelArgs,
    pub(super) adapters: &'a [PathBuf],
    pub(super) posterior_samples: Option<usize>,
    pub(super) scoring: &'a ScoringArgs,
}

/// The base model and the adapters in memory.
pub(super) struct Loaded {
    pub(super) decoder: Decoder,
    /// The posterior mean of each adapter.
    pub(super) means: Vec<ActiveAdapter>,
    /// Draws of the only adapter's posterior, if requested.
    pub(super) draws: Vec<ActiveAdapter>,
}

impl Opened {
    pub(super) fn new(
        request: &Request<'_>,
        max_seq_length: impl FnOnce(&ModelShape) -> usize,
    ) -> Result<Self> {
        let (model, scoring) = (request.model, request.scoring);
        require_positive(&[("--batch-size", scoring.batch_size.unwrap_or(1))])?;
        let weights = weight_type(model.options.dtype)?;
        let n_draws = request.posterior_samples.unwrap_or(0);
        require_at_most("--posterior-samples", n_draws, MOST_DRAWS)?;
        if n_draws > 0 && request.adapters.len() > 1 {
            let problem = format!(
                "--posterior-samples draws from the posterior of one adapter, and {} are given; leave it out to average their means",
                request.adapters.len()
            );
            bail!(Problem::usage(problem));
        }
        let base = hub::locate(model.id()?, &model.options.hub())?;
        let config = read_shape(&base.dir)?;
        let files = open_base(&base.dir)?;
        let most = config.max_position_embeddings;
        let limit = scoring
            .max_seq_length
            .unwrap_or_else(|| max_seq_length(&config));
        if !(2..=most).contains(&limit) {
            let problem = format!(
                "--max-seq-length {limit}: expected 2 to {most}, the positions of the model"
            );
            bail!(Problem::usage(problem));
        }
        let template = model.options.chat_template.as_deref();
        let applies_chat_template =
            !scoring.no_chat_template && jinja::find(&base.dir, template)?.is_some();
        let mut adapters = Vec::with_capacity(request.adapters.len());
        for path in request.adapters {
            let settings = ConversationSettings {
                template,
                prompts_as_chats: Some(applies_chat_template),
            };
            warn_of_conversation(path, &base.dir, settings)?;
            adapters.push(read_fitting(path, &files)?);
        }
        warn_of_equal_means(&adapters, request.adapters);
        let options = EncodeOptions::whole(applies_chat_template, limit);
        let variables = variables(request.adapters)?;
        let encoder = Encoder::with_variables(&base.dir, template, variables, options)?;
        encoder.tokenizer().check_vocab(config.vocab_size)?;
        for warning in encoder.unread_variables() {
            tracing::warn!("{warning}");
        }
        Ok(Self {
            adapters,
            base,
            config,
            encoder,
            applies_chat_template,
            weights,
            draws: (n_draws > 0).then_some(Draws {
                n: n_draws,
                seed: scoring.seed,
            }),
            normalisation: LengthNormalisation::per_token(scoring.length_normalised),
            cpu: model.options.cpu,
        })
    }

    /// Loads the base model and the adapters. It is an error if draws are requested from an adapter without a
    /// posterior.
    pub(super) fn load(&self) -> Result<Loaded> {
        let decoder = Decoder::load_as(&self.base.dir, &device(self.cpu)?, self.weights)?;
        let (means, draws) = self.load_adapters(&decoder)?;
        Ok(Loaded {
            decoder,
            means,
            draws,
        })
    }

    /// Loads the adapters for a base model that is already in memory: the mean of each, and the draws of the only one.
    pub(super) fn load_adapters(
        &self,
        decoder: &Decoder,
    ) -> Result<(Vec<ActiveAdapter>, Vec<ActiveAdapter>)> {
        let device = decoder.device();
        let mean = |adapter| Ok(ActiveAdapter::from_adapter(adapter, &self.config, device)?);
        let means = self.adapters.iter().map(mean).collect::<Result<_>>()?;
        let draws = match (self.adapters.as_slice(), self.draws) {
            ([adapter], Some(Draws { n, seed })) => posterior_draws(adapter, decoder, seed, n)?,
            _ => Vec::new(),
        };
        Ok((means, draws))
    }

    /// Checks that all ranks have the same base model, adapters, template, rows (of this SHA-256) and `options`.
    ///
    /// # Errors
    /// As [`require_same`].
    pub(super) fn require_same(&self, rows: String, options: impl std::fmt::Debug) -> Result<()> {
        if world().size() == 1 {
            return Ok(());
        }
        let adapters = self.adapters.iter().map(Adapter::fingerprint);
        let adapters: Vec<String> = adapters.collect();
        require_same(&[
            ("the program", env!("CARGO_PKG_VERSION").to_owned()),
            ("the base model", self.base_fingerprint()?),
            ("the adapters", adapters.join(" ")),
            (
                "the chat template",
                format!("{:?}", self.encoder.chat_template_sha256()),
            ),
            ("the rows", rows),
            (
                "the options",
                format!("{options:?} {:?} {:?}", self.draws, self.normalisation),
            ),
        ])
    }

    /// The name of the only adapter's mean in reports: `adapter` for a plain LoRA, which has no posterior.
    pub(super) fn name_of_mean(&self) -> &'static str {
        match self.adapters.first() {
            Some(adapter) if adapter.config.monteclora.is_some() => "posterior mean",
            _ => "adapter",
        }
    }

    /// The requested draws.
    pub(super) fn draws(&self) -> Option<Draws> {
        self.draws
    }

    /// Fingerprint of the base model.
    pub(super) fn base_fingerprint(&self) -> Result<String> {
        // The fingerprint opens the files again: pages that are read stay mapped until the files are closed.
        Ok(base_fingerprint(&ModelFiles::open(&self.base.dir)?))
    }

    /// The circumstances of predictions with `adapter`.
    pub(super) fn circumstances(&self, adapter: &Adapter) -> Result<Circumstances> {
        let base = self.base_fingerprint()?;
        let template = self.encoder.chat_template_sha256();
        Ok(Circumstances::new(
            base,
            adapter,
            template,
            self.normalisation,
        ))
    }

    /// The applicable parts of the calibration in the only adapter's directory. Logs a warning about parts that do not
    /// apply.
    pub(super) fn calibration(&self, paths: &[PathBuf]) -> Result<Applicable> {
        let ([path], [adapter]) = (paths, self.adapters.as_slice()) else {
            return Ok(Applicable::default());
        };
        let Some(calibration) = Calibration::beside(path)? else {
            return Ok(Applicable::default());
        };
        let found = calibration.applicable(&self.circumstances(adapter)?, self.draws);
        let scalings = [&found.mean, &found.posterior];
        let at_bound = |scaling: &&Option<Scaling>| {
            scaling
                .as_ref()
                .is_some_and(|scaling| is_at_bound(scaling.temperature))
        };
        if scalings.iter().any(at_bound) {
            tracing::warn!(
                "`{}` was made on rows that are all answered rightly, or about which confidence says nothing: its probabilities are not to be trusted; calibrate on more rows, some of which the model gets wrong",
                path.join(calibration::FILE).display()
            );
        }
        if let Some(why) = &found.why_not {
            tracing::warn!(
                "`{}` {why}: it is not used there; `monteclora calibrate` makes another",
                path.join(calibration::FILE).display()
            );
        }
        Ok(found)
    }
}

/// Logs a warning if two adapters have the same mean, since averaging them has no effect.
fn warn_of_equal_means(adapters: &[Adapter], paths: &[PathBuf]) {
    if adapters.len() < 2 {
        return;
    }
    let means: Vec<String> = adapters
        .iter()
        .map(|a| a.collapse().fingerprint())
        .collect();
    for (at, mean) in means.iter().enumerate() {
        if let Some(before) = means[..at].iter().position(|other| other == mean) {
            tracing::warn!(
                "`{}` and `{}` have the same mean: in an ensemble they are one model twice",
                paths[before].display(),
                paths[at].display()
            );
        }
    }
}

/// The chat template variables that the adapters were trained with. It is an error if they differ.
fn variables(adapters: &[PathBuf]) -> Result<serde_json::Map<String, serde_json::Value>> {
    let all = adapters
        .iter()
        .map(|path| Ok((path, recorded_variables(path)?)));
    let mut all = all.collect::<Result<Vec<_>>>()?.into_iter();
    let Some((_, variables)) = all.next() else {
        return Ok(serde_json::Map::new());
    };
    match all.find(|(_, others)| *others != variables) {
        None => Ok(variables),
        Some((path, _)) => {
            let problem = format!(
                "`{}` was trained with other template_variables than `{}`; evaluate each by itself",
                path.display(),
                adapters[0].display()
            );
            Err(Problem::usage(problem).into())
        }
    }
}

/// The options for scoring rows, with `ece_bins` bins for the calibration error.
pub(super) fn eval_options(scoring: &ScoringArgs, ece_bins: usize) -> EvalOptions {
    EvalOptions {
        batching: Batching::new(scoring.batch_size),
        ece_bins,
        normalisation: LengthNormalisation::per_token(scoring.length_normalised),
    }
}

/// Default of the largest length of a row, tokens.
pub(super) fn row_limit(config: &ModelShape) -> usize {
    config.max_position_embeddings.min(1024)
}

/// Returns an error if only some rows have choices: the result would mix two kinds of answer.
pub(super) fn require_one_kind(data: &Dataset, choices: &ChoiceRows) -> Result<()> {
    if choices.is_empty() || choices.len() == data.len() {
        return Ok(());
    }
    let message = format!(
        "{} of {} rows have `choices`, and what is found is of one kind of answer",
        choices.len(),
        data.len()
    );
    let fix = "put rows with choices and rows without into files of their own";
    let at = format!("`{}`", data.path().display());
    Err(Problem::new("mixed-rows", at, message, fix).exit(3).into())
}

/// Returns an error if the value of a flag is above `most`.
pub(super) fn require_at_most(flag: &str, value: usize, most: usize) -> Result<()> {
    if value > most {
        bail!(Problem::usage(format!(
            "{flag} {value}: expected at most {most}"
        )));
    }
    Ok(())
}

/// Opens the rows of `data`. Of a directory it takes the test rows, or else the validation rows, or else the training
/// rows.
pub(super) fn open_rows(data: &Path, encoder: &Arc<Encoder>) -> Result<Dataset> {
    let present = splits(data)?;
    let split = present.last().copied().unwrap_or_default();
    if !data.is_file() && split == Split::Train {
        tracing::warn!(
            "`{}` has neither test rows nor validation rows: the training rows are scored, which flatters what was trained on them",
            data.display()
        );
    }
    open_split(data, split, encoder)
}

/// Opens held-out rows for a fit. Of a directory it takes the validation rows, since the test rows should score the
/// result.
pub(super) fn open_held_out(data: &Path, encoder: &Arc<Encoder>) -> Result<Dataset> {
    let present = splits(data)?;
    if data.is_file() {
        return open_split(data, present.first().copied().unwrap_or_default(), encoder);
    }
    if !present.contains(&Split::Valid) {
        let message = format!(
            "`{}` has no validation rows: name the file of held-out rows",
            data.display()
        );
        bail!(Problem::usage(message));
    }
    open_split(data, Split::Valid, encoder)
}

fn open_split(data: &Path, split: Split, encoder: &Arc<Encoder>) -> Result<Dataset> {
    if !data.is_file() {
        let name = format!("{split:?}").to_lowercase();
        tracing::info!("`{}`: its {name} rows", data.display());
    }
    Ok(Dataset::open_split(
        data,
        split,
        RowSchema::default(),
        encoder.clone(),
    )?)
}

/// Returns an error if a flag is 0.
pub(super) fn require_positive(flags: &[(&str, usize)]) -> Result<()> {
    match flags.iter().find(|(_, value)| *value == 0) {
        Some((flag, _)) => Err(Problem::usage(format!("{flag} 0: expected at least 1")).into()),
        None => Ok(()),
    }
}
