//! Answers with what the posterior says about them.

use anyhow::Result;
use serde::Serialize;

use super::answers::certainties;
use super::calibration::{Judged, Scaling};
use super::choices::{log_likelihoods, prediction};
use super::{Batching, LengthNormalisation, Prediction, not_finite};
use crate::data::{ChoiceSet, Tokenizer};
use crate::model::{ActiveAdapter, Decoder, GenerationSettings};

/// Something to be answered.
#[derive(Debug, Clone)]
pub enum Question {
    /// In the model's own words, after this prompt.
    Open(Vec<u32>),
    /// By one of several texts.
    Choice {
        /// The choices as tokens; which of them is right is not looked at.
        set: ChoiceSet,
        /// Their texts.
        texts: Vec<String>,
    },
}

/// What posterior draws say about an answer.
///
/// H is the entropy in nats, p_k the distribution of draw k: over the choices, or over the next token at each token of the
/// answer that the posterior mean gave, its end included, and then averaged over them. A draw is one model: its weights stay the
/// same for all of an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Uncertainty {
    /// Number K of draws.
    pub draws: usize,
    /// `H(1/K sum_k p_k)`: how unsure the posterior is.
    pub predictive_entropy: f64,
    /// `1/K sum_k H(p_k)`: how unsure a single draw is.
    pub expected_entropy: f64,
    /// Their difference: how much the draws disagree, from 0 to `ln K`. Few draws underestimate it.
    pub mutual_information: f64,
    /// Share of the draws that give the same answer: the same most likely choice, or the same greedy text.
    pub agreement: f64,
}

/// One of a question's choices.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChoiceProbability {
    /// Its text.
    pub text: String,
    /// Its probability among the choices: the mean over the draws, if there are any, after the temperature.
    pub probability: f64,
    /// Standard deviation of the draws' probabilities around their mean, before the temperature (divided by K).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<f64>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer {
    /// The posterior mean's greedy answer, or the most likely choice.
    pub text: String,
    /// Probability that it is right: of the choice, or the product of the probabilities of the answer's tokens and of its end, an
    /// average over the draws if there are any; after the temperature of `calibrate` where that holds.
    pub p_correct: f64,
    /// Whether a temperature was applied.
    pub calibrated: bool,
    /// Where a threshold was asked for: whether `p_correct` is below it, so that the answer is not to be given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abstain: Option<bool>,
    /// Where there are draws.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncertainty: Option<Uncertainty>,
    /// In the question's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ChoiceProbability>,
}

/// A decoder with a posterior that answers questions.
#[derive(Debug)]
pub struct Answerer<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// The adapter's posterior mean, or the first of several; an empty one for the base alone.
    pub mean: &'a ActiveAdapter,
    /// Draws of its posterior, or several adapters, whose average is asked.
    pub draws: &'a [ActiveAdapter],
    /// What was found of the confidence of answers, and of which.
    pub calibration: Option<&'a (Judged, Scaling)>,
    /// Confidence below which no answer is to be given.
    pub threshold: Option<f64>,
    /// Turns answers into text.
    pub tokenizer: &'a Tokenizer,
    /// How open questions are answered.
    pub generation: GenerationSettings,
    /// What is compared between choices.
    pub normalisation: LengthNormalisation,
}

impl Answerer<'_> {
    /// Answers `questions`, all in memory at once, in their order.
    ///
    /// # Errors
    /// Those of the decoder; scores that are not finite.
    pub fn answer(&self, questions: &[Question]) -> Result<Vec<Answer>> {
        let mut prompts = Vec::new();
        let mut sets = Vec::new();
        for question in questions {
            match question {
                Question::Open(prompt) => prompts.push(prompt.clone()),
                Question::Choice { set, .. } => sets.push(set),
            }
        }
        let mut open = self.open(&prompts)?.into_iter();
        let mut chosen = self.chosen(&sets)?.into_iter();
        let answers = questions.iter().filter_map(|question| match question {
            Question::Open(_) => open.next(),
            Question::Choice { texts, .. } => self.choose(texts, &chosen.next()?),
        });
        Ok(answers.collect())
    }

    /// `[row][adapter]`: the distribution over the choices of every row that each draw gives; without draws, the mean.
    fn chosen(&self, sets: &[&ChoiceSet]) -> Result<Vec<Vec<Prediction>>> {
        let adapters = match self.draws {
            [] => std::slice::from_ref(self.mean),
            draws => draws,
        };
        let tokens = |set: &&ChoiceSet| set.choices.iter().map(|c| c.tokens.len()).sum();
        let lengths: Vec<usize> = sets.iter().map(tokens).collect();
        let mut found = vec![Vec::with_capacity(adapters.len()); sets.len()];
        for batch in Batching::new(None).plan(&lengths) {
            for adapter in adapters {
                let of_batch = sets[batch.clone()].iter().copied();
                let scores = log_likelihoods(of_batch, self.decoder, adapter)?;
                for (row, scores) in batch.clone().zip(&scores) {
                    found[row].push(prediction(sets[row], scores, self.normalisation, row)?);
                }
            }
        }
        Ok(found)
    }

    fn open(&self, prompts: &[Vec<u32>]) -> Result<Vec<Answer>> {
        let generate = |adapter| {
            self.decoder
                .generate(prompts, adapter, &self.generation, |_| {})
        };
        let answers = generate(self.mean)?;
        let mut n_agreeing = vec![0usize; answers.len()];
        for draw in self.draws {
            for (count, (other, answer)) in n_agreeing
                .iter_mut()
                .zip(generate(draw)?.iter().zip(&answers))
            {
                *count += usize::from(other.says_the_same(answer));
            }
        }
        let of_draws = match self.draws {
            [] => Vec::new(),
            draws => certainties(self.decoder, prompts, &answers, draws)?,
        };
        let mut found = Vec::with_capacity(answers.len());
        for (idx, answer) in answers.iter().enumerate() {
            let certainty = of_draws.get(idx);
            let log_confidence = certainty.map_or(answer.log_probability, |c| c.log_confidence);
            // Which of the two it turns out to be does not matter here.
            let is_right = Prediction::of_answer(log_confidence, true);
            let is_right = is_right.ok_or_else(|| not_finite("the likelihood of an answer"))?;
            let text = self.tokenizer.decode(&answer.tokens, true)?;
            found.push(Answer {
                uncertainty: certainty.map(|c| {
                    let entropies = (c.predictive_entropy, c.expected_entropy);
                    self.uncertainty(entropies, n_agreeing[idx])
                }),
                ..self.judged(text, &is_right, Judged::Answers).0
            });
        }
        Ok(found)
    }

    /// An answer with its confidence, and the prediction after temperature scaling.
    fn judged(&self, text: String, prediction: &Prediction, kind: Judged) -> (Answer, Prediction) {
        let scaling = self.calibration.filter(|(judged, _)| *judged == kind);
        let prediction = match scaling {
            Some((_, scaling)) => prediction.tempered(scaling.temperature),
            None => prediction.clone(),
        };
        let answer = Answer {
            text,
            p_correct: prediction.confidence(),
            calibrated: scaling.is_some(),
            // A threshold is one on calibrated confidence.
            abstain: (self.threshold.filter(|_| scaling.is_some()))
                .map(|least| prediction.confidence() < least),
            uncertainty: None,
            choices: Vec::new(),
        };
        (answer, prediction)
    }

    fn choose(&self, texts: &[String], of_draws: &[Prediction]) -> Option<Answer> {
        let average = Prediction::average(of_draws)?;
        let best = average.choice();
        let (answer, scaled) = self.judged(texts[best].clone(), &average, Judged::Choices);
        let n = of_draws.len() as f64;
        let (average_p, scaled_p) = (average.probabilities(), scaled.probabilities());
        let draws_p: Vec<Vec<f64>> = of_draws.iter().map(Prediction::probabilities).collect();
        let choices = texts.iter().enumerate().map(|(idx, text)| {
            let away = |draw: &Vec<f64>| (draw[idx] - average_p[idx]).powi(2);
            let variance = draws_p.iter().map(away).sum::<f64>() / n;
            ChoiceProbability {
                text: text.clone(),
                probability: scaled_p[idx],
                std: (!self.draws.is_empty()).then(|| variance.sqrt()),
            }
        });
        let n_agreeing = of_draws.iter().filter(|draw| draw.choice() == best).count();
        let expected = of_draws.iter().map(Prediction::entropy).sum::<f64>() / n;
        Some(Answer {
            uncertainty: (!self.draws.is_empty())
                .then(|| self.uncertainty((average.entropy(), expected), n_agreeing)),
            choices: choices.collect(),
            ..answer
        })
    }

    fn uncertainty(&self, (predictive, expected): (f64, f64), n_agreeing: usize) -> Uncertainty {
        Uncertainty {
            draws: self.draws.len(),
            predictive_entropy: predictive,
            expected_entropy: expected,
            // Below 0 by rounding only.
            mutual_information: (predictive - expected).max(0.0),
            agreement: n_agreeing as f64 / self.draws.len() as f64,
        }
    }
}
