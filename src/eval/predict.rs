//! Answers with what the posterior says about them.

use anyhow::Result;
use serde::Serialize;

use super::LengthNormalisation;
use super::calibration::Prediction;
use super::choices::{log_likelihoods, prediction};
use crate::data::{ChoiceSet, Tokenizer};
use crate::model::{ActiveAdapter, Decoder, Generation, GenerationSettings, Sequences};

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
    /// Its probability among the choices: the mean over the draws, if there are any.
    pub probability: f64,
    /// Standard deviation of the draws' probabilities around it (divided by K).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<f64>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer {
    /// The posterior mean's greedy answer, or the most likely choice.
    pub text: String,
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
    /// The adapter's posterior mean; an empty one for the base alone.
    pub mean: &'a ActiveAdapter,
    /// Draws of its posterior, if it is asked.
    pub draws: &'a [ActiveAdapter],
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
            Question::Choice { texts, .. } => Some(self.choose(texts, &chosen.next()?)),
        });
        Ok(answers.collect())
    }

    /// `[row][adapter]`: the distribution over the choices of every row that each draw gives; without draws, the mean.
    fn chosen(&self, sets: &[&ChoiceSet]) -> Result<Vec<Vec<Prediction>>> {
        let adapters = match self.draws {
            [] => std::slice::from_ref(self.mean),
            draws => draws,
        };
        let mut found = vec![Vec::with_capacity(adapters.len()); sets.len()];
        let batch_size = self.generation.batch_size.max(1);
        for adapter in adapters {
            let batches = sets.chunks(batch_size);
            let scores = batches
                .map(|sets| log_likelihoods(sets.iter().copied(), self.decoder, adapter))
                .collect::<Result<Vec<_>, _>>()?
                .concat();
            for (row, (set, scores)) in sets.iter().zip(&scores).enumerate() {
                found[row].push(prediction(set, scores, self.normalisation, row)?);
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
                *count += usize::from(other == answer);
            }
        }
        let entropies = self.entropies(prompts, &answers)?;
        let mut found = Vec::with_capacity(answers.len());
        for (idx, answer) in answers.iter().enumerate() {
            found.push(Answer {
                text: self.tokenizer.decode(&answer.tokens, true)?,
                uncertainty: entropies
                    .get(idx)
                    .map(|entropies| self.uncertainty(*entropies, n_agreeing[idx])),
                choices: Vec::new(),
            });
        }
        Ok(found)
    }

    /// Predictive and expected entropy of each answer, averaged over its tokens and its end; none without draws.
    fn entropies(&self, prompts: &[Vec<u32>], answers: &[Generation]) -> Result<Vec<(f64, f64)>> {
        if self.draws.is_empty() {
            return Ok(Vec::new());
        }
        let mut found = Vec::with_capacity(answers.len());
        let batch_size = self.generation.batch_size.max(1);
        for (prompts, answers) in prompts.chunks(batch_size).zip(answers.chunks(batch_size)) {
            let sequences: Vec<Vec<u32>> = prompts
                .iter()
                .zip(answers)
                .map(|(prompt, answer)| [prompt.as_slice(), &answer.tokens].concat())
                .collect();
            let mut targets = Vec::new();
            let mut n_steps = Vec::new();
            let mut start = 0;
            for ((prompt, answer), sequence) in prompts.iter().zip(answers).zip(&sequences) {
                let first = start + prompt.len() - 1;
                let steps = answer.tokens.len() + usize::from(answer.stopped);
                // Entropies do not depend on the token that came.
                targets.extend((first..first + steps).map(|row| (row, 0)));
                n_steps.push(steps);
                start += sequence.len();
            }
            let average =
                self.decoder
                    .evaluate_average(&Sequences::new(&sequences), &targets, self.draws)?;
            let mut predictive = average.predictive_entropy.into_iter();
            let mut expected = average.expected_entropy.into_iter();
            for n in n_steps {
                let mean = |values: &mut dyn Iterator<Item = f64>| {
                    values.take(n).sum::<f64>() / n.max(1) as f64
                };
                found.push((mean(&mut predictive), mean(&mut expected)));
            }
        }
        Ok(found)
    }

    fn choose(&self, texts: &[String], of_draws: &[Prediction]) -> Answer {
        let Some(average) = Prediction::average(of_draws) else {
            return Answer {
                text: String::new(),
                uncertainty: None,
                choices: Vec::new(),
            };
        };
        let n = of_draws.len() as f64;
        let choices = texts.iter().zip(average.probabilities()).enumerate();
        let choices = choices.map(|(idx, (text, probability))| {
            let away = |draw: &Prediction| (draw.probabilities()[idx] - probability).powi(2);
            let variance = of_draws.iter().map(away).sum::<f64>() / n;
            ChoiceProbability {
                text: text.clone(),
                probability: *probability,
                std: (!self.draws.is_empty()).then(|| variance.sqrt()),
            }
        });
        let best = average.choice();
        let n_agreeing = of_draws.iter().filter(|draw| draw.choice() == best).count();
        let expected = of_draws.iter().map(Prediction::entropy).sum::<f64>() / n;
        Answer {
            text: texts[best].clone(),
            uncertainty: (!self.draws.is_empty())
                .then(|| self.uncertainty((average.entropy(), expected), n_agreeing)),
            choices: choices.collect(),
        }
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
