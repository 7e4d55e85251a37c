//! Answers to questions, with their probability and the uncertainty of the posterior.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use monteclora_converters as converters;
use serde::{Deserialize, Serialize};

use super::answers::certainties;
use super::calibration::{Judged, Scaling};
use super::choices::{ChoiceBatch, prediction};
use super::{Batching, LengthNormalisation, Prediction, not_finite};
use crate::data::{ChoiceSet, Encoder, Row, Tokenizer};
use crate::model::{ActiveAdapter, Decoder, Generation, GenerationSettings};

/// A question to the model.
#[derive(Debug, Clone)]
pub enum Question {
    /// The answer is generated after this prompt.
    Open(Vec<u32>),
    /// The answer is one of several texts.
    Choice {
        /// The choices as tokens. The index of the right one is not used.
        set: ChoiceSet,
        /// Their texts.
        texts: Vec<String>,
    },
}

impl Question {
    /// The question of a row.
    ///
    /// # Errors
    /// As [`Encoder::choice_tokens`] and [`Encoder::row_prompt`].
    pub fn of_row(row: &Row, encoder: &Encoder) -> Result<Self, converters::Error> {
        if let (Some(set), Some(choices)) = (encoder.choice_tokens(row)?, &row.choices) {
            return Ok(Self::Choice {
                set,
                texts: choices.texts.clone(),
            });
        }
        Ok(Self::Open(encoder.row_prompt(row)?))
    }

    /// How the answer is judged.
    pub fn judged(&self) -> Judged {
        match self {
            Self::Choice { .. } => Judged::Choices,
            Self::Open(_) => Judged::Answers,
        }
    }

    /// Number of tokens that attention reads for the question, which bounds its memory. Choices of one token share the
    /// prompt; each longer choice reads a prompt of its own, even where the prompt is computed once.
    pub fn n_tokens(&self) -> usize {
        let Self::Choice { set, .. } = self else {
            return self.n_prompt();
        };
        let longer = set.choices.iter().map(|choice| choice.tokens.len());
        let apart = longer.filter(|n_tokens| *n_tokens > self.n_prompt() + 1);
        self.n_prompt() + apart.sum::<usize>()
    }

    /// Number of tokens of the prompt: of the first choice's prompt if the choices' prompts differ.
    pub fn n_prompt(&self) -> usize {
        match self {
            Self::Choice { set, .. } => set.choices.first().map_or(0, |choice| choice.n_prompt),
            Self::Open(prompt) => prompt.len(),
        }
    }
}

/// The uncertainty of an answer over posterior draws.
///
/// H is the entropy in nats, and p_k the distribution of draw k over the choices. For a generated answer, p_k is the
/// distribution over the next token at each token of the posterior mean's answer, its end token included, and the
/// values are averaged over these tokens. A draw is one model: its weights stay the same for the whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Uncertainty {
    /// Number K of draws.
    pub draws: usize,
    /// `H(1/K sum_k p_k)`: how unsure the posterior is.
    pub predictive_entropy: f64,
    /// `1/K sum_k H(p_k)`: how unsure a single draw is.
    pub expected_entropy: f64,
    /// The difference of the two entropies: how much the draws disagree, from 0 to `ln K`. Few draws underestimate it.
    pub mutual_information: f64,
    /// Share of the draws that give the answer: the same most likely choice, or the same greedy text.
    pub agreement: f64,
}

/// One of a question's choices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChoiceProbability {
    /// Its text.
    pub text: String,
    /// Its probability among the choices after the temperature: the mean over the draws, if there are any.
    pub probability: f64,
    /// Standard deviation of the draws' probabilities around their mean, before the temperature (divided by K).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<f64>,
    /// 5 % and 95 % quantiles of the draws' probabilities after the temperature, interpolated between neighbours.
    #[serde(skip)]
    pub quantiles: Option<[f64; 2]>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The posterior mean's greedy answer, or the most likely choice.
    pub text: String,
    /// Probability that the answer is right: the probability of the choice, or the product of the probabilities of the
    /// answer's tokens and its end token. With draws it is the average over them. It is after the temperature of
    /// `calibrate` if that applies.
    pub p_correct: f64,
    /// Whether a temperature was applied.
    pub calibrated: bool,
    /// Whether the answer was cut at the token limit. Then `p_correct` is the probability of its beginning, and the
    /// probability of the whole answer is unknown.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// Whether the answer should be withheld because `p_correct` is below the threshold, or because the answer was cut.
    /// Absent without a threshold or a calibration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abstain: Option<bool>,
    /// The uncertainty over the draws, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncertainty: Option<Uncertainty>,
    /// The choices, in the question's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<ChoiceProbability>,
    /// Number of tokens of a generated answer, its end token included; 0 for a choice.
    #[serde(skip)]
    pub n_tokens: usize,
}

/// Answers questions with a decoder and a posterior.
#[derive(Debug)]
pub struct Answerer<'a> {
    /// The base model.
    pub decoder: &'a Decoder,
    /// The adapter's posterior mean, or the first of several adapters. An empty adapter means the base model alone.
    pub mean: &'a ActiveAdapter,
    /// Draws of the posterior, or several adapters. Their predictions are averaged.
    pub draws: &'a [ActiveAdapter],
    /// The calibration of the confidence, and the kind of answer that it applies to.
    pub calibration: Option<&'a (Judged, Scaling)>,
    /// Confidence below which an answer should be withheld.
    pub threshold: Option<f64>,
    /// Decodes answers into text.
    pub tokenizer: &'a Tokenizer,
    /// Settings of generated answers.
    pub generation: GenerationSettings,
    /// How the likelihoods of choices are compared.
    pub normalisation: LengthNormalisation,
    /// The caller sets this flag to cancel.
    pub cancelled: Option<&'a AtomicBool>,
}

/// The caller cancelled the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Answerer<'_> {
    /// Answers all `questions`, in their order.
    ///
    /// # Errors
    /// Returns an error if the decoder fails, if a score is not finite, or [`Cancelled`].
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

    fn go_on(&self) -> Result<(), Cancelled> {
        let cancelled = self
            .cancelled
            .is_some_and(|flag| flag.load(Ordering::Relaxed));
        if cancelled { Err(Cancelled) } else { Ok(()) }
    }

    /// `[row][adapter]`: each draw's distribution over the choices of every row. Without draws, the mean's.
    fn chosen(&self, sets: &[&ChoiceSet]) -> Result<Vec<Vec<Prediction>>> {
        let adapters = match self.draws {
            [] => std::slice::from_ref(self.mean),
            draws => draws,
        };
        let lengths: Vec<usize> = sets.iter().map(|set| set.n_tokens()).collect();
        let mut found = vec![Vec::with_capacity(adapters.len()); sets.len()];
        for batch in Batching::new(None).plan(&lengths) {
            let of_batch = sets[batch.clone()].iter().copied();
            let asked = ChoiceBatch::new(of_batch, self.decoder);
            self.go_on()?;
            let shared = (self.decoder).shared(&asked.sequences, &asked.targets, adapters)?;
            for adapter in adapters {
                self.go_on()?;
                let scores = asked.log_likelihoods(&shared.evaluate(adapter)?.nll);
                for (row, scores) in batch.clone().zip(&scores) {
                    found[row].push(prediction(sets[row], scores, self.normalisation, row)?);
                }
            }
        }
        Ok(found)
    }

    fn open(&self, prompts: &[Vec<u32>]) -> Result<Vec<Answer>> {
        self.about(prompts, &self.generate(prompts, self.mean)?)
    }

    fn generate(&self, prompts: &[Vec<u32>], adapter: &ActiveAdapter) -> Result<Vec<Generation>> {
        let goes_on = || self.go_on().is_ok();
        let answers =
            (self.decoder).generate_while(prompts, adapter, &self.generation, &goes_on, |_| {})?;
        Ok(answers.ok_or(Cancelled)?)
    }

    /// Adds confidence and uncertainty to `answers`, the mean's greedy answers to `prompts`.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn about(&self, prompts: &[Vec<u32>], answers: &[Generation]) -> Result<Vec<Answer>> {
        let mut n_agreeing = vec![0usize; answers.len()];
        for draw in self.draws {
            for (count, (other, answer)) in n_agreeing
                .iter_mut()
                .zip(self.generate(prompts, draw)?.iter().zip(answers))
            {
                *count += usize::from(other.says_the_same(answer));
            }
        }
        let of_draws = match self.draws {
            [] => Vec::new(),
            draws => {
                self.go_on()?;
                certainties(self.decoder, prompts, answers, draws)?
            }
        };
        let mut found = Vec::with_capacity(answers.len());
        for (idx, answer) in answers.iter().enumerate() {
            let certainty = of_draws.get(idx);
            let log_confidence = certainty.map_or(answer.log_probability, |c| c.log_confidence);
            // Whether the answer is really right does not matter: only the confidence is used.
            let is_right = Prediction::of_answer(log_confidence, true);
            let is_right = is_right.ok_or_else(|| not_finite("the likelihood of an answer"))?;
            let text = self.tokenizer.decode(&answer.tokens, true)?;
            let judged = match answer.end {
                Some(_) => self.judged(text, &is_right, Judged::Answers).0,
                None => self.cut(text, &is_right),
            };
            found.push(Answer {
                uncertainty: certainty.map(|c| {
                    let entropies = (c.predictive_entropy, c.expected_entropy);
                    self.uncertainty(entropies, n_agreeing[idx])
                }),
                n_tokens: answer.tokens.len() + usize::from(answer.end.is_some()),
                ..judged
            });
        }
        Ok(found)
    }

    /// The calibration for this kind of answer, if there is one.
    fn scaling(&self, kind: Judged) -> Option<&Scaling> {
        let (_, scaling) = self.calibration.filter(|(judged, _)| *judged == kind)?;
        Some(scaling)
    }

    fn tempered(&self, prediction: &Prediction, kind: Judged) -> Prediction {
        match self.scaling(kind) {
            Some(scaling) => prediction.tempered(scaling.temperature),
            None => prediction.clone(),
        }
    }

    /// An answer that was cut at the token limit. The confidence of the whole answer is unknown, so it is not
    /// calibrated, and withheld if there is a threshold.
    fn cut(&self, text: String, prediction: &Prediction) -> Answer {
        let (answer, _) = self.judged(text, prediction, Judged::Answers);
        Answer {
            p_correct: prediction.confidence(),
            calibrated: false,
            truncated: true,
            abstain: answer.abstain.map(|_| true),
            ..answer
        }
    }

    /// An answer with its confidence, and the prediction after temperature scaling.
    fn judged(&self, text: String, prediction: &Prediction, kind: Judged) -> (Answer, Prediction) {
        let scaling = self.scaling(kind);
        let prediction = self.tempered(prediction, kind);
        let answer = Answer {
            text,
            p_correct: prediction.confidence(),
            calibrated: scaling.is_some(),
            truncated: false,
            // The threshold is defined on calibrated confidence.
            abstain: (self.threshold.filter(|_| scaling.is_some()))
                .map(|least| prediction.confidence() < least),
            uncertainty: None,
            choices: Vec::new(),
            n_tokens: 0,
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
        let tempered = of_draws.iter();
        let tempered = tempered.map(|draw| self.tempered(draw, Judged::Choices));
        let tempered_p: Vec<Vec<f64>> = tempered.map(|draw| draw.probabilities()).collect();
        let choices = texts.iter().enumerate().map(|(idx, text)| {
            let away = |draw: &Vec<f64>| (draw[idx] - average_p[idx]).powi(2);
            let variance = draws_p.iter().map(away).sum::<f64>() / n;
            let mut sorted: Vec<f64> = tempered_p.iter().map(|draw| draw[idx]).collect();
            sorted.sort_by(f64::total_cmp);
            ChoiceProbability {
                text: text.clone(),
                probability: scaled_p[idx],
                std: (!self.draws.is_empty()).then(|| variance.sqrt()),
                quantiles: (!self.draws.is_empty())
                    .then(|| [0.05, 0.95].map(|share| quantile(&sorted, share))),
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
            // Only rounding makes the difference negative.
            mutual_information: (predictive - expected).max(0.0),
            agreement: n_agreeing as f64 / self.draws.len() as f64,
        }
    }
}

/// A quantile of sorted values, interpolated linearly between neighbours; NaN without values.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len().max(1) - 1) as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(below), sorted.get(above)) {
        (Some(low), Some(high)) => low + (high - low) * at.fract(),
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ChoiceTokens;

    #[test]
    fn choices_of_one_token_share_their_prompt() {
        let choice = |n_answer: usize| ChoiceTokens {
            tokens: vec![1; 10 + n_answer],
            n_prompt: 10,
        };
        let question = |answers: &[usize]| Question::Choice {
            set: ChoiceSet {
                choices: answers.iter().map(|n| choice(*n)).collect(),
                answer: 0,
            },
            texts: Vec::new(),
        };
        assert_eq!(question(&[1, 1, 1]).n_tokens(), 10);
        assert_eq!(question(&[1, 2, 3]).n_tokens(), 10 + 12 + 13);
        assert_eq!(Question::Open(vec![1; 7]).n_tokens(), 7);
    }

    /// numpy.quantile's default.
    #[test]
    fn quantiles_lie_between_neighbours() {
        let sorted = [0.1, 0.2, 0.4, 0.8];
        assert!((quantile(&sorted, 0.05) - 0.115).abs() < 1e-12);
        assert!((quantile(&sorted, 0.95) - 0.74).abs() < 1e-12);
        assert_eq!(quantile(&[0.3], 0.95), 0.3);
    }
}
