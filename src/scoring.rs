//! What scores answers for the server: our decoder, over one copy of a base that all its adapters share.
//!
//! It reads questions, draws and calibrations as `monteclora predict` does, and gives the same numbers for weights of the same type.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use mistralrs_monteclora::{
    BaseScorer, Continuation, Error as ServeError, Score, ScoreError, ScorePrompt, ScoreRequest,
    ScoredAdapter, ScoredBase, ScoredCalibration, ScoredChoice, ScoredUncertainty, Scorer,
    ScorerAbout, ScorerSurvey, Scoring, ScoringDtype,
};
use monteclora_adapters::weights::{self, Kind};
use monteclora_converters::architecture::ModelShape;
use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{self as converters, Adapter, ModelFiles, Problem, base_fingerprint};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::allocator;
use crate::data::{
    ChatTemplate, EncodeOptions, Encoder, Overlong, Remedies, Tokenizer, TrainOn, fault_of_row,
    parse_question,
};
use crate::eval::calibration::{self, Applicable, Calibration, Circumstances, Draws, Scaling};
use crate::eval::{Answer, Answerer, Cancelled, LengthNormalisation, Question, posterior_draw};
use crate::hub::{self, HubOptions};
use crate::model::{
    self, ActiveAdapter, Decoder, GenerationSettings, Sequences, held_bytes, read_shape,
};

/// Most tokens that are computed for one question with its choices: what is in memory at a time grows with them.
const MOST_TOKENS: usize = 16_384;

/// Seed of the draws where there is no calibration: the commands' own.
const SEED: u64 = 42;

type Result<T, E = ServeError> = std::result::Result<T, E>;

/// Scores by our decoder.
#[derive(Debug, Clone, Default)]
pub struct DecoderScoring {
    /// As `--token-source`.
    pub token_source: String,
}

impl DecoderScoring {
    /// The directory that the copy for scores is read from.
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
            let draws = calibration.default_draws(template.clone(), held);
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
            warnings: why.map(warning).into_iter().collect(),
        })
    }
}

/// The chat template of the base in `dir`, with the variables that `adapter` was trained with, and the time that goes on.
fn chat_template(
    dir: &Path,
    file: Option<&Path>,
    adapter: Option<&Path>,
) -> anyhow::Result<Option<ChatTemplate>> {
    let template = ChatTemplate::with_clock(dir, file, SystemTime::now)?;
    let variables = adapter.map(recorded_variables).unwrap_or_default();
    Ok(template.map(|template| template.with_variables(variables)))
}

fn kind(dtype: ScoringDtype) -> &'static Kind {
    match dtype {
        ScoringDtype::Bf16 => &weights::BF16,
        ScoringDtype::F32 => &weights::F32,
        ScoringDtype::Blocks => &weights::AUTO,
    }
}

/// An error of ours as one of the server's.
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

/// A base in memory, with what turns text into tokens.
#[derive(Debug)]
struct Base {
    decoder: Decoder,
    files: PathBuf,
    fingerprint: String,
    tokenizer: Arc<Tokenizer>,
    chat_template: Option<PathBuf>,
    /// Takes texts as they are.
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
        let plain = Encoder::new(tokenizer.clone(), None, options(&shape, false));
        Ok(Self {
            decoder,
            files: dir.to_owned(),
            fingerprint,
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
            let options = options(self.decoder.config(), true);
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

/// [`Base`], which each of its scorers holds.
#[derive(Debug)]
struct SharedBase(Arc<Base>);

impl BaseScorer for SharedBase {
    fn scorer(&self, adapter: Option<&ScoredAdapter<'_>>) -> Result<Arc<dyn Scorer>> {
        Ok(Arc::new(self.0.load_scorer(adapter).map_err(served)?))
    }
}

/// How texts are encoded: whole, as long as the model takes them.
fn options(shape: &ModelShape, apply_chat_template: bool) -> EncodeOptions {
    EncodeOptions {
        train_on: TrainOn::Assistant,
        apply_chat_template,
        max_seq_length: shape.max_position_embeddings,
        overlong: Overlong::Error,
        remedies: Remedies::Flags,
    }
}

/// Draws of a posterior that are in memory: the first `n` under `seed`, of which requests may ask for `n_asked`.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    n: usize,
    n_asked: usize,
    seed: u64,
}

/// What `calibrate` found for an adapter, and what it has to have been made for.
#[derive(Debug)]
struct Calibrated {
    calibration: Calibration,
    /// But for template and normalisation, which a request decides.
    circumstances: Circumstances,
}

impl Calibrated {
    /// What of it holds for prompts that this template writes out.
    fn applicable(
        &self,
        chat_template_sha256: Option<String>,
        length_normalised: bool,
        draws: Option<Draws>,
    ) -> Applicable {
        let now = Circumstances {
            chat_template_sha256,
            length_normalised,
            ..self.circumstances.clone()
        };
        self.calibration.applicable(&now, draws)
    }

    /// The draws that it is of, as far as they may be asked for; all that may be where it does not hold at all.
    fn default_draws(&self, chat_template_sha256: Option<String>, held: Held) -> Option<Draws> {
        let holds = self
            .applicable(chat_template_sha256, false, None)
            .mean
            .is_some();
        let n = match holds {
            true => self.calibration.draws.map_or(0, |draws| draws.n),
            false => held.n_asked,
        };
        held.first(n.min(held.n_asked))
    }
}

impl Held {
    fn first(self, n: usize) -> Option<Draws> {
        (n > 0).then_some(Draws { n, seed: self.seed })
    }
}

/// An adapter with what lies beside it.
struct ReadAdapter {
    adapter: Adapter,
    calibration: Option<Calibrated>,
    held: Held,
    /// As [`ScorerSurvey::fingerprint`].
    fingerprint: String,
    is_more_than_mean: bool,
}

impl ReadAdapter {
    fn new(
        asked: &ScoredAdapter<'_>,
        base: &ModelFiles,
        base_fingerprint: String,
    ) -> anyhow::Result<Self> {
        let adapter = Adapter::read_on(asked.path, base)?;
        adapter.require_fit(base)?;
        let calibration = Calibration::beside(asked.path)?;
        let variables = recorded_variables(asked.path);
        let whole = json!([
            base_fingerprint,
            adapter.fingerprint(),
            calibration,
            variables
        ]);
        let of_calibration = calibration.as_ref().and_then(|c| c.draws);
        let mut found = Self {
            fingerprint: format!("{:x}", Sha256::digest(whole.to_string())),
            is_more_than_mean: calibration.is_some() || !variables.is_empty(),
            calibration: calibration.map(|calibration| Calibrated {
                calibration,
                circumstances: Circumstances::new(
                    base_fingerprint,
                    &adapter,
                    None,
                    LengthNormalisation::None,
                ),
            }),
            held: Held::default(),
            adapter,
        };
        if found.has_posterior() {
            found.is_more_than_mean = true;
            found.held = Held {
                n: asked.n_held,
                n_asked: asked.n_asked,
                seed: of_calibration.map_or(SEED, |draws| draws.seed),
            };
        }
        Ok(found)
    }

    fn has_posterior(&self) -> bool {
        let sites = &self.adapter.sites;
        self.adapter.config.monteclora.is_some() && sites.iter().all(|s| s.posterior.is_some())
    }

    /// Mean and held draws, and with a posterior its parameters and draws of other seeds, for each score that is computed at a time.
    fn bytes(&self, base: &ScoredBase, asked: &ScoredAdapter<'_>) -> u64 {
        let sites = self.adapter.sites.iter();
        let (a, b) = sites.fold((0, 0), |(a, b), site| {
            (a + site.lora_a.n_elements(), b + site.lora_b.n_elements())
        });
        let mean = 4 * (a + b) as u64;
        if !self.has_posterior() {
            return mean;
        }
        let of_other_seeds = base.config.max_concurrent.get() * asked.n_asked;
        2 * mean + 4 * ((asked.n_held + of_other_seeds) * a) as u64
    }
}

/// A base in memory, alone or with an adapter.
#[derive(Debug)]
struct AdapterScorer {
    base: Arc<Base>,
    /// Writes conversations out; none without a chat template.
    chat: Option<Arc<Encoder>>,
    mean: ActiveAdapter,
    /// The whole adapter, where it has a posterior.
    posterior: Option<Adapter>,
    held: Held,
    draws: Vec<ActiveAdapter>,
    calibration: Option<Calibrated>,
    fingerprint: String,
}

impl AdapterScorer {
    /// The draws that are asked where a request does not say: those of the calibration, if it holds.
    fn default_draws(&self, encoder: &Encoder) -> Option<Draws> {
        match &self.calibration {
            Some(found) => found.default_draws(encoder.chat_template_sha256(), self.held),
            None => self.held.first(self.held.n_asked),
        }
    }

    /// The draws that a request asks for.
    fn asked_draws(
        &self,
        request: &ScoreRequest,
        encoder: &Encoder,
    ) -> Result<Option<Draws>, ScoreError> {
        let most = self.held.n_asked;
        let n = match request.draws {
            None => self.default_draws(encoder).map_or(0, |draws| draws.n),
            Some(0) => 0,
            Some(n) if most == 0 => {
                let message = format!(
                    "asks for {n} draws, and this model has no posterior; `monteclora fit` makes one around any LoRA"
                );
                return Err(ScoreError::invalid("draws", message));
            }
            Some(n) if n > most => {
                let message = format!("is {n}; this server draws at most {most}");
                return Err(ScoreError::invalid("draws", message));
            }
            Some(n) => n,
        };
        if n == 0 && request.seed.is_some() {
            let message = "is one of posterior draws, and none are asked for";
            return Err(ScoreError::invalid("seed", message));
        }
        let seed = request.seed.unwrap_or(self.held.seed);
        Ok((n > 0).then_some(Draws { n, seed }))
    }

    /// The question as tokens, by what turned it into them, and the hash of the template that did.
    fn question(&self, request: &ScoreRequest) -> Result<Asked<'_>, ScoreError> {
        let (encoder, mut row) = match &request.prompt {
            ScorePrompt::Messages(row) => {
                let encoder = self.chat.as_ref().ok_or_else(|| {
                    let message = "needs a chat template, which this model has not; give `prompt`";
                    ScoreError::invalid("messages", message)
                })?;
                (encoder, row.clone())
            }
            ScorePrompt::Text(text) => {
                let row = Map::from_iter([("prompt".to_owned(), json!(text))]);
                (&self.base.plain, row)
            }
        };
        if !request.choices.is_empty() {
            row.insert("choices".to_owned(), json!(request.choices));
        }
        let invalid =
            |problem: &Problem| ScoreError::invalid(problem.at.clone(), problem.message.clone());
        let bytes = Value::Object(row).to_string();
        let row = parse_question(bytes.as_bytes());
        let row = row.map_err(|problems| match problems.first() {
            Some(problem) => invalid(problem),
            None => ScoreError::invalid("body", "cannot be read"),
        })?;
        let question =
            Question::of_row(&row, encoder).map_err(|error| match fault_of_row(error) {
                Ok(problem) => invalid(&problem),
                Err(error) => ScoreError::Failed(error.to_string()),
            })?;
        let n_tokens = question.n_tokens();
        if n_tokens > MOST_TOKENS {
            let message = format!(
                "make {n_tokens} tokens with their prompts; this server computes at most {MOST_TOKENS} for a score: give fewer or shorter ones"
            );
            return Err(ScoreError::invalid("choices", message));
        }
        Ok(Asked {
            chat_template_sha256: encoder.chat_template_sha256_with(&row.variables),
            encoder,
            question,
        })
    }

    fn answer(&self, request: &ScoreRequest, cancelled: &AtomicBool) -> Result<Score, ScoreError> {
        let Asked {
            encoder,
            question,
            chat_template_sha256,
        } = self.question(request)?;
        let n_prompt = question.n_prompt();
        let prompt = match request.prompt {
            ScorePrompt::Messages(_) => "messages",
            ScorePrompt::Text(_) => "prompt",
        };
        let context = self.base.decoder.config().max_position_embeddings;
        let longest = request
            .max_prompt_tokens
            .unwrap_or(context)
            .min(context - 1);
        if !(1..=longest).contains(&n_prompt) {
            let message = format!("has {n_prompt} tokens; this model takes 1 to {longest}");
            return Err(ScoreError::invalid(prompt, message));
        }
        let asked = self.asked_draws(request, encoder)?;
        let judged = question.judged();
        let calibration = self.calibration.as_ref().and_then(|found| {
            let normalised = request.length_normalised;
            let found = found.applicable(chat_template_sha256, normalised, asked);
            found.of(judged).asked(asked)
        });
        let scaling = calibration.as_ref().map(|(_, scaling)| scaling);
        let threshold = threshold(scaling, request.target_error)?;
        let other;
        let draws = match (asked, &self.posterior) {
            (None, _) => &[],
            (Some(Draws { n, seed }), _) if seed == self.held.seed => &self.draws[..n],
            (Some(Draws { n, seed }), Some(adapter)) => {
                other = self.draws_of(adapter, seed, n, cancelled)?;
                other.as_slice()
            }
            (Some(_), None) => return Err(ScoreError::Failed("no posterior".to_owned())),
        };
        let answerer = Answerer {
            decoder: &self.base.decoder,
            mean: &self.mean,
            draws,
            calibration: calibration.as_ref(),
            threshold: threshold.map(|(threshold, _)| threshold),
            tokenizer: encoder.tokenizer(),
            generation: GenerationSettings {
                max_new_tokens: request.max_tokens.min(context - n_prompt),
                stop_tokens: encoder.stop_ids(),
                batch_size: 1,
            },
            normalisation: LengthNormalisation::per_token(request.length_normalised),
            cancelled: Some(cancelled),
        };
        let answers = answerer.answer(&[question]).map_err(failed)?;
        let [answer] = <[Answer; 1]>::try_from(answers)
            .map_err(|_| ScoreError::Failed("no answer to one question".to_owned()))?;
        let rows = self.calibration.as_ref();
        let rows = rows.map(|found| &found.calibration.data);
        let applied = rows
            .zip(calibration)
            .map(|(rows, (_, scaling))| ScoredCalibration {
                temperature: scaling.temperature,
                threshold: threshold.map(|(threshold, _)| threshold),
                target_error: threshold.map(|(_, target)| target),
                rows: rows.rows,
                data_sha256: rows.sha256.clone(),
            });
        Ok(scored(answer, asked, applied, n_prompt))
    }

    /// Draws that are not held.
    fn draws_of(
        &self,
        adapter: &Adapter,
        seed: u64,
        n: usize,
        cancelled: &AtomicBool,
    ) -> Result<Vec<ActiveAdapter>, ScoreError> {
        let draw = |index| {
            if cancelled.load(Ordering::Relaxed) {
                return Err(ScoreError::Cancelled);
            }
            posterior_draw(adapter, &self.mean, &self.base.decoder, seed, index).map_err(failed)
        };
        (0..n).map(draw).collect()
    }
}

/// A question as tokens.
struct Asked<'a> {
    encoder: &'a Encoder,
    question: Question,
    chat_template_sha256: Option<String>,
}

/// The confidence from which on answers are given, and the share of wrong ones that it is for.
fn threshold(
    scaling: Option<&Scaling>,
    asked: Option<f64>,
) -> Result<Option<(f64, f64)>, ScoreError> {
    let abstention = scaling.and_then(|scaling| scaling.abstention);
    let found = abstention.and_then(|found| Some((found.threshold?, found.target_error)));
    let Some(asked) = asked else {
        return Ok(found);
    };
    let message = match (found, abstention) {
        (Some((_, target)), _) if asked >= target => return Ok(found),
        (Some((_, target)), _) => {
            format!("is {asked}, and the calibration's threshold is for {target}")
        }
        (None, Some(off)) => format!(
            "asks for abstention, and no threshold was found that keeps the error below {}",
            off.target_error
        ),
        (None, None) => {
            "asks for abstention, and no calibration with a threshold holds for this request"
                .to_owned()
        }
    };
    let message = format!("{message}; `monteclora calibrate --target-error {asked}` looks for one");
    Err(ScoreError::invalid("target_error", message))
}

fn failed(error: anyhow::Error) -> ScoreError {
    match error.downcast_ref::<Cancelled>() {
        Some(_) => ScoreError::Cancelled,
        None => ScoreError::Failed(format!("{error:#}")),
    }
}

fn scored(
    answer: Answer,
    draws: Option<Draws>,
    calibration: Option<ScoredCalibration>,
    prompt_tokens: usize,
) -> Score {
    let choices = answer.choices.into_iter().map(|choice| ScoredChoice {
        text: choice.text,
        probability: choice.probability,
        std: choice.std,
        q05: choice.quantiles.map(|[low, _]| low),
        q95: choice.quantiles.map(|[_, high]| high),
    });
    let uncertainty = answer.uncertainty.zip(draws);
    Score {
        answer: answer.text,
        p_correct: answer.p_correct,
        calibrated: answer.calibrated,
        abstain: answer.abstain,
        choices: choices.collect(),
        uncertainty: uncertainty.map(|(found, draws)| ScoredUncertainty {
            draws: found.draws,
            seed: draws.seed,
            predictive_entropy: found.predictive_entropy,
            expected_entropy: found.expected_entropy,
            mutual_information: found.mutual_information,
            agreement: found.agreement,
        }),
        calibration,
        prompt_tokens,
        completion_tokens: answer.n_tokens,
    }
}

impl Scorer for AdapterScorer {
    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn about(&self) -> ScorerAbout {
        let encoder = self.chat.as_ref().unwrap_or(&self.base.plain);
        let draws = self.default_draws(encoder);
        let template = encoder.chat_template_sha256();
        let found = self.calibration.as_ref();
        let found = found.and_then(|found| found.applicable(template, false, draws).asked(draws));
        let abstention = found.as_ref().and_then(|(_, scaling)| scaling.abstention);
        ScorerAbout {
            draws: self.held.n_asked,
            default_draws: draws.map_or(0, |draws| draws.n),
            calibrated: found.is_some(),
            calibrated_for: found.map(|(judged, _)| judged.name()),
            target_error: abstention
                .filter(|found| found.threshold.is_some())
                .map(|found| found.target_error),
        }
    }

    fn score(&self, request: &ScoreRequest, cancelled: &AtomicBool) -> Result<Score, ScoreError> {
        self.answer(request, cancelled)
    }

    fn continuation(
        &self,
        draw: usize,
        prompt: &[u32],
    ) -> Result<Box<dyn Continuation + '_>, ScoreError> {
        let text = self.base.decoder.continuation(prompt, self.draw(draw)?);
        Ok(Box::new(Text(text)))
    }

    fn prompt_logits(
        &self,
        draw: usize,
        prompt: &[u32],
        each: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ScoreError> {
        let sequences = Sequences::new(&[prompt]);
        let told = self
            .base
            .decoder
            .each_logits(&sequences, self.draw(draw)?, each);
        told.map_err(|error| failed(error.into()))
    }
}

impl AdapterScorer {
    fn draw(&self, index: usize) -> Result<&ActiveAdapter, ScoreError> {
        let draw = self.draws.get(index);
        draw.ok_or_else(|| ScoreError::Failed(format!("draw {index} is not held")))
    }
}

/// A text that one draw goes on with.
struct Text<'a>(model::Continuation<'a>);

impl Continuation for Text<'_> {
    fn logits(&mut self) -> Result<Vec<f32>, ScoreError> {
        let logits = self.0.logits().map_err(|error| failed(error.into()))?;
        let row = logits.flatten_all().and_then(|row| row.to_vec1());
        row.map_err(|error| failed(error.into()))
    }

    fn push(&mut self, token: u32) -> Result<(), ScoreError> {
        self.0.push(token).map_err(|error| failed(error.into()))
    }
}
