//! Multiple-choice rows: the log-likelihood of every choice in the place of the answer.

use std::collections::BTreeSet;

use anyhow::Result;

use super::NotFinite;
use super::calibration::Prediction;
use crate::data::{ChoiceSet, DataError, Dataset, Problems, RowError, RowProblem};
use crate::model::{ActiveAdapter, Decoder, Sequences};

/// What is compared between choices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LengthNormalisation {
    /// The log-likelihood of the whole choice, given the prompt: long choices are less likely.
    #[default]
    None,
    /// The log-likelihood a token.
    Tokens,
}

impl LengthNormalisation {
    /// What `--length-normalised` asks for.
    pub fn per_token(is_wanted: bool) -> Self {
        if is_wanted { Self::Tokens } else { Self::None }
    }
}

/// The rows of a data file that have choices, as tokens.
#[derive(Debug)]
pub struct ChoiceRows {
    rows: Vec<ChoiceSet>,
}

/// Sequences to run for one row, and where each choice's tokens are predicted in them.
struct Plan {
    inputs: Vec<Vec<u32>>,
    /// `[choice][token]`: index into `inputs`, position in it, label.
    targets: Vec<Vec<(usize, usize, u32)>>,
}

impl ChoiceRows {
    /// Reads the rows with choices.
    ///
    /// # Errors
    /// [`DataError::Rows`] with every row whose choices cannot be scored; errors of the model's template or tokenizer.
    pub fn read(data: &Dataset) -> Result<Self, DataError> {
        let mut rows = Vec::new();
        let mut problems = Problems::default();
        let mut seen = BTreeSet::new();
        for example in 0..data.len() {
            let (line, row) = data.row(example)?;
            // A row that became several examples is scored once.
            if row.choices.is_none() || !seen.insert(line) {
                continue;
            }
            match data.encoder().choice_tokens(&row) {
                Ok(choices) => rows.extend(choices),
                Err(RowError::Problem(problem)) => {
                    problems.push(RowProblem::new(data.path(), line, problem));
                }
                Err(RowError::Other(error)) => return Err(error),
            }
        }
        if !problems.is_empty() {
            return Err(DataError::Rows(problems));
        }
        Ok(Self { rows })
    }

    /// Rows that are tokens already.
    pub fn new(rows: Vec<ChoiceSet>) -> Self {
        Self { rows }
    }

    /// The number of rows with choices.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether no row has choices.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The log-likelihood of every choice of every row, nats.
    ///
    /// # Errors
    /// Those of the decoder.
    pub fn log_likelihoods(
        &self,
        model: &Decoder,
        adapter: &ActiveAdapter,
        batch_size: usize,
        mut done: impl FnMut(usize),
    ) -> Result<Vec<Vec<f64>>> {
        let mut scores = Vec::with_capacity(self.rows.len());
        for rows in self.rows.chunks(batch_size.max(1)) {
            let plans: Vec<Plan> = rows.iter().map(Plan::new).collect();
            let inputs: Vec<&Vec<u32>> = plans.iter().flat_map(|plan| &plan.inputs).collect();
            let mut starts = Vec::with_capacity(inputs.len());
            let mut n_tokens = 0;
            for input in &inputs {
                starts.push(n_tokens);
                n_tokens += input.len();
            }
            let mut targets = Vec::new();
            let mut first_input = 0;
            for plan in &plans {
                for (input, position, label) in plan.targets.iter().flatten() {
                    targets.push((starts[first_input + input] + position, *label));
                }
                first_input += plan.inputs.len();
            }
            let loss = model.evaluate(&Sequences::new(&inputs), &targets, adapter)?;
            let mut nll = loss.nll.iter().map(|v| f64::from(*v));
            for plan in &plans {
                let row = plan
                    .targets
                    .iter()
                    .map(|choice| -nll.by_ref().take(choice.len()).sum::<f64>());
                scores.push(row.collect());
            }
            done(rows.len());
        }
        Ok(scores)
    }

    /// `[row][adapter]`: the distribution over the choices of every row that each of `adapters` gives.
    ///
    /// # Errors
    /// Those of the decoder; [`NotFinite`].
    pub fn distributions(
        &self,
        model: &Decoder,
        adapters: &[ActiveAdapter],
        batch_size: usize,
        normalisation: LengthNormalisation,
        mut done: impl FnMut(usize),
    ) -> Result<Vec<Vec<Prediction>>> {
        let mut found: Vec<Vec<Prediction>> = self.rows.iter().map(|_| Vec::new()).collect();
        for adapter in adapters {
            let scores = self.log_likelihoods(model, adapter, batch_size, &mut done)?;
            let predictions = self.predictions(&scores, normalisation)?;
            for (row, prediction) in found.iter_mut().zip(predictions) {
                row.push(prediction);
            }
        }
        Ok(found)
    }

    /// The distribution over the choices of every row: softmax of [`Self::log_likelihoods`].
    ///
    /// # Errors
    /// [`NotFinite`] for log-likelihoods that are not numbers.
    pub fn predictions(
        &self,
        log_likelihoods: &[Vec<f64>],
        normalisation: LengthNormalisation,
    ) -> Result<Vec<Prediction>, NotFinite> {
        self.rows
            .iter()
            .zip(log_likelihoods)
            .enumerate()
            .map(|(idx, (row, scores))| {
                let scores: Vec<f64> = scores
                    .iter()
                    .zip(&row.choices)
                    .map(|(score, choice)| match normalisation {
                        LengthNormalisation::None => *score,
                        LengthNormalisation::Tokens => {
                            score / (choice.tokens.len() - choice.n_prompt) as f64
                        }
                    })
                    .collect();
                Prediction::from_log_scores(&scores, row.answer).ok_or_else(|| NotFinite {
                    what: format!("the likelihood of a choice of row {} with choices", idx + 1),
                })
            })
            .collect()
    }
}

impl Plan {
    /// Every choice needs all its tokens but the last as input. An input that begins another is not run on its own, so
    /// choices of one token share one pass over the prompt.
    fn new(set: &ChoiceSet) -> Self {
        let input = |idx: usize| {
            let tokens = &set.choices[idx].tokens;
            &tokens[..tokens.len() - 1]
        };
        let mut longest_first: Vec<usize> = (0..set.choices.len()).collect();
        longest_first.sort_by_key(|idx| std::cmp::Reverse(input(*idx).len()));
        let mut inputs: Vec<Vec<u32>> = Vec::new();
        let mut targets = vec![Vec::new(); set.choices.len()];
        for idx in longest_first {
            let needed = input(idx);
            let place = match inputs.iter().position(|input| input.starts_with(needed)) {
                Some(place) => place,
                None => {
                    inputs.push(needed.to_vec());
                    inputs.len() - 1
                }
            };
            let choice = &set.choices[idx];
            targets[idx] = (choice.n_prompt..choice.tokens.len())
                .map(|position| (place, position - 1, choice.tokens[position]))
                .collect();
        }
        Self { inputs, targets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ChoiceTokens;

    fn set(prompt: &[u32], answers: &[&[u32]]) -> ChoiceSet {
        ChoiceSet {
            choices: answers
                .iter()
                .map(|answer| ChoiceTokens {
                    tokens: [prompt, answer].concat(),
                    n_prompt: prompt.len(),
                })
                .collect(),
            answer: 0,
        }
    }

    #[test]
    fn answers_of_one_token_share_the_prompt() {
        let plan = Plan::new(&set(&[1, 2, 3], &[&[7], &[8], &[9]]));
        assert_eq!(plan.inputs, [vec![1, 2, 3]]);
        assert_eq!(
            plan.targets,
            [vec![(0, 2, 7)], vec![(0, 2, 8)], vec![(0, 2, 9)]]
        );
    }

    #[test]
    fn longer_answers_run_on_their_own() {
        let plan = Plan::new(&set(&[1, 2], &[&[7], &[8, 9], &[8, 5, 6]]));
        assert_eq!(plan.inputs, [vec![1, 2, 8, 5], vec![1, 2, 8]][..1]);
        assert_eq!(plan.targets[0], [(0, 1, 7)]);
        assert_eq!(plan.targets[1], [(0, 1, 8), (0, 2, 9)]);
        assert_eq!(plan.targets[2], [(0, 1, 8), (0, 2, 5), (0, 3, 6)]);
        let apart = Plan::new(&set(&[1], &[&[7, 7], &[8, 8]]));
        assert_eq!(apart.inputs.len(), 2);
    }
}
