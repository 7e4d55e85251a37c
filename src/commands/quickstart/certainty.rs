//! The confidence of the tuned model: fits and calibrates a posterior on the validation tickets, and asks it two
//! questions.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result};
use monteclora_adapters::methods::monteclora::Geometry;
use monteclora_converters::{Adapter, Beside};
use serde::Serialize;

use super::job::{Form, TICKET};
use super::{DECODE_BATCH, MAX_NEW_TOKENS};
use crate::commands::calibrate::common_system;
use crate::commands::{fit, predict};
use crate::config::ECE_BINS;
use crate::data::{Dataset, Encoder, epoch_order};
use crate::distributed::Alone;
use crate::eval::calibration::{Calibration, Circumstances, Draws, FILE, Judged, Rows, Scaling};
use crate::eval::{
    Answer, Answerer, Batching, ChoiceRows, DEFAULT_SEED, EvalOptions, LengthNormalisation,
    Opening, Prediction, Question, Recital, measures, posterior_draws, tempered,
};
use crate::fit::{Criterion, FitRecord, Search};
use crate::model::{ActiveAdapter, Decoder, Generation, GenerationSettings};
use crate::progress;
use crate::train::Prepared;

/// Number of validation tickets for the fit of the scale, and of others for the temperature. They are few, so that this
/// takes about a minute.
const FIT_ROWS: usize = 24;
const CALIBRATION_ROWS: usize = 60;
/// Number of draws for the evaluation of a scale.
const FIT_DRAWS: usize = 2;
/// Number of draws whose average answers.
const DRAWS: usize = 4;

/// Scores of a model's answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Score {
    pub(super) exact_match: f64,
    /// Exact match among the 80 % most confident answers.
    pub(super) surest_80: f64,
    /// Expected calibration error of the answers' confidence.
    pub(super) ece: f64,
}

/// The posterior and its scores.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Certainty {
    pub(super) draws: usize,
    pub(super) geometry: Geometry,
    pub(super) sigma: f64,
    pub(super) temperature: f64,
    /// Scores of the average over the draws, on the test tickets, after the temperature.
    #[serde(flatten)]
    pub(super) score: Score,
    /// A test ticket, and a ticket of a kind that is not in the training data.
    pub(super) questions: [Asked; 2],
    pub(super) seconds: f64,
}

/// A question with its answer.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Asked {
    pub(super) question: String,
    #[serde(flatten)]
    pub(super) answer: Answer,
}

/// Scores of `predictions`.
pub(super) fn score(predictions: &[Prediction]) -> Score {
    let outcomes = measures::outcomes(predictions);
    Score {
        exact_match: measures::accuracy(&outcomes).unwrap_or_default(),
        surest_80: measures::accuracy_of_surest(&outcomes, 0.8).unwrap_or_default(),
        ece: measures::expected_calibration_error(&outcomes, ECE_BINS).unwrap_or_default(),
    }
}

/// Fits and calibrates a posterior around `adapter`, writes it to `output`, and scores it on the test tickets.
pub(super) fn assess(
    (prepared, form): (&Prepared, Form),
    (decoder, adapter): (&Decoder, &Adapter),
    valid: &Path,
    output: &Path,
    (tickets, mean_answers): (&Recital<'_>, &[Generation]),
    interrupt: &AtomicBool,
) -> Result<Certainty> {
    let began = Instant::now();
    let encoder = prepared.train.encoder();
    let valid = Dataset::open(valid, None, encoder.clone())?;
    let order = epoch_order(valid.len(), DEFAULT_SEED, 0);
    let (for_fit, others) = order.split_at(FIT_ROWS.min(valid.len() / 2));
    let for_calibration = &others[..others.len().min(CALIBRATION_ROWS)];

    tracing::info!(
        "fitting a posterior around the adapter on {} validation tickets",
        for_fit.len()
    );
    let search = Search {
        decoder,
        adapter,
        data: &valid,
        rows: for_fit,
        choices: &ChoiceRows::read(&valid)?,
        options: EvalOptions {
            batching: Batching::new(None),
            ece_bins: ECE_BINS,
            normalisation: LengthNormalisation::None,
        },
        n_draws: FIT_DRAWS,
        seed: DEFAULT_SEED,
        criterion: Criterion::Nll,
        interrupt,
        ranks: &Alone,
        watch: &fit::tell,
    };
    let fitted = search.run(&[Geometry::Rows])?;
    let base = prepared.fingerprint.clone();
    let training = fit::training(&prepared.run.train.output_dir);
    let record = FitRecord::new(&search, &fitted, base.clone(), training);
    fit::write(output, &fitted.adapter, &record, &Beside::default())?;

    tracing::info!("calibrating it on {} others", for_calibration.len());
    let mean = ActiveAdapter::from_adapter(&fitted.adapter, decoder.config(), decoder.device())?;
    let draws = posterior_draws(&fitted.adapter, decoder, DEFAULT_SEED, DRAWS)?;
    let held_out = Recital::of(&valid, for_calibration, MAX_NEW_TOKENS, DECODE_BATCH)?;
    let answer = |name, adapter: &ActiveAdapter| -> Result<_> {
        let bar = progress::items(name, held_out.prompts.len() as u64);
        let answers = held_out.answers(decoder, adapter, |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        Ok(answers)
    };
    let of_base = answer("base model", &ActiveAdapter::default())?;
    let of_mean = answer("posterior mean", &mean)?;
    let bar = progress::busy("the draws' words on these answers");
    let averaged = held_out.average_predictions(decoder, &of_mean, &draws)?;
    bar.finish_and_clear();
    let scaling = Scaling::fit(&averaged, ECE_BINS)?;
    let written = Calibration::new(
        Circumstances::new(
            base,
            &fitted.adapter,
            encoder.chat_template_sha256(),
            LengthNormalisation::None,
        ),
        Rows {
            rows: for_calibration.len(),
            sha256: valid.sha256(),
            judged: Judged::Answers,
            system: common_system(&valid, for_calibration.iter().copied())?,
        },
        [
            Scaling::fit(&held_out.own_predictions(&of_base)?, ECE_BINS)?,
            Scaling::fit(&held_out.own_predictions(&of_mean)?, ECE_BINS)?,
        ],
        Some((
            Draws {
                n: DRAWS,
                seed: DEFAULT_SEED,
            },
            scaling.clone(),
        )),
    );
    written.write(&output.join(FILE))?;

    tracing::info!("asking {DRAWS} draws about the test tickets");
    let bar = progress::busy("the draws' words on the answers");
    let averaged = tickets.average_predictions(decoder, mean_answers, &draws)?;
    bar.finish_and_clear();
    let temperature = scaling.temperature;
    let answerer = Answerer {
        decoder,
        mean: &mean,
        draws: &draws,
        calibration: Some(&(Judged::Answers, scaling)),
        threshold: None,
        tokenizer: encoder.tokenizer(),
        generation: GenerationSettings {
            max_new_tokens: MAX_NEW_TOKENS,
            stop_tokens: encoder.stop_ids(),
            batch_size: DECODE_BATCH,
        },
        normalisation: LengthNormalisation::None,
        cancelled: None,
    };
    let unknown = unknown_ticket(encoder, form)?;
    let prompts = [tickets.prompts[0].clone(), unknown];
    let answers = answerer.answer(&prompts.map(Question::Open))?;
    let known = match &tickets.questions[0] {
        Opening::Turns(turns) => turns.last().map_or("", |turn| turn.content()).to_owned(),
        Opening::Text(text) => ticket_of(text).to_owned(),
    };
    let asked = [known, TICKET.to_owned()].into_iter().zip(answers);
    let asked: Vec<Asked> = asked
        .map(|(question, answer)| Asked { question, answer })
        .collect();
    Ok(Certainty {
        draws: DRAWS,
        geometry: record.geometry,
        sigma: record.sigma,
        temperature,
        score: score(&tempered(&averaged, temperature)),
        questions: asked
            .try_into()
            .ok()
            .context("two questions have two answers")?,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The ticket in a plain prompt.
fn ticket_of(prompt: &str) -> &str {
    let ticket = prompt
        .rsplit_once("Ticket: ")
        .map_or(prompt, |(_, ticket)| ticket);
    ticket.strip_suffix("\nAnswer:").unwrap_or(ticket)
}

/// The tokens of [`TICKET`], whose topic is not in the training data.
fn unknown_ticket(encoder: &Encoder, form: Form) -> Result<Vec<u32>> {
    Ok(match form.question() {
        Opening::Turns(turns) => encoder.prompt_tokens(&turns, &[])?,
        Opening::Text(text) => encoder.plain_prompt_tokens(&text)?,
    })
}

impl Certainty {
    /// The two questions and answers as text.
    pub(super) fn words(&self) -> String {
        let titles = [
            "a ticket like those it was trained on",
            "a ticket about a product it never saw",
        ];
        let mut text = String::new();
        for (title, asked) in titles.iter().zip(&self.questions) {
            let sure = predict::how_sure(&asked.answer);
            text.push_str(&format!(
                "\n{title}\n  {}\n  {}\n  {sure}\n",
                asked.question.replace('\n', "\n  "),
                asked.answer.text.trim(),
            ));
        }
        text
    }
}
