//! Multiple-choice rows: the log-likelihood of every choice as the answer.

use monteclora_adapters::Error;
use std::collections::{BTreeMap, BTreeSet};

use monteclora_converters::{self as converters, Problem, Problems};

use super::{Prediction, not_finite};
use crate::data::{ChoiceSet, Dataset, RowProblem, fault_of_row};
use crate::model::{ActiveAdapter, Decoder, Sequences};

/// How the likelihoods of choices are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LengthNormalisation {
    /// By the log-likelihood of the whole choice, given the prompt. Long choices are less likely.
    #[default]
    None,
    /// By the log-likelihood per token.
    Tokens,
}

impl LengthNormalisation {
    /// The setting for the value of `--length-normalised`.
    pub fn per_token(is_wanted: bool) -> Self {
        if is_wanted { Self::Tokens } else { Self::None }
    }
}

/// The rows of a data file that have choices, as tokens.
#[derive(Debug)]
pub struct ChoiceRows {
    by_example: BTreeMap<usize, ChoiceSet>,
}

impl ChoiceRows {
    /// Reads the rows with choices.
    ///
    /// # Errors
    /// Returns one error for all rows whose choices cannot be scored, or an error of the chat template or the
    /// tokenizer.
    pub fn read(data: &Dataset) -> Result<Self, converters::Error> {
        let mut by_example = BTreeMap::new();
        let mut problems = Problems::default();
        let mut seen = BTreeSet::new();
        for example in 0..data.len() {
            let (line, row) = data.row(example)?;
            // A row that gave several examples is scored once.
            if row.choices.is_none() || !seen.insert(line) {
                continue;
            }
            match data.encoder().choice_tokens(&row) {
                Ok(choices) => by_example.extend(choices.map(|choices| (example, choices))),
                Err(error) => {
                    let problem = RowProblem::new(data.path(), line, fault_of_row(error)?);
                    problems.push(problem.into());
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems.into());
        }
        Ok(Self { by_example })
    }

    /// The number of rows with choices.
    pub fn len(&self) -> usize {
        self.by_example.len()
    }

    /// Whether no row has choices.
    pub fn is_empty(&self) -> bool {
        self.by_example.is_empty()
    }

    /// The choices of the row that an example was made from. If a row gave several examples, only the first has them.
    pub fn of(&self, example: usize) -> Option<&ChoiceSet> {
        self.by_example.get(&example)
    }

    /// The choices of every row, in the file's order.
    pub fn sets(&self) -> impl Iterator<Item = &ChoiceSet> {
        self.by_example.values()
    }
}

/// The log-likelihood of every choice of every row under `adapter`, nats. All rows share one forward pass.
///
/// # Errors
/// As [`Decoder::evaluate`].
pub fn log_likelihoods<'a>(
    rows: impl IntoIterator<Item = &'a ChoiceSet>,
    model: &Decoder,
    adapter: &ActiveAdapter,
) -> Result<Vec<Vec<f64>>, Error> {
    let batch = ChoiceBatch::new(rows, model);
    let nll = (model.evaluate(&batch.sequences, &batch.targets, adapter))?.nll;
    Ok(batch.log_likelihoods(&nll))
}

/// The choices of several rows, for one pass.
#[derive(Debug)]
pub(super) struct ChoiceBatch {
    pub(super) sequences: Sequences,
    pub(super) targets: Vec<(usize, u32)>,
    places: Vec<Places>,
}

impl ChoiceBatch {
    pub(super) fn new<'a>(rows: impl IntoIterator<Item = &'a ChoiceSet>, model: &Decoder) -> Self {
        let prefixes = !model.depends_on_length();
        let (mut sequences, mut targets) = (Sequences::default(), Vec::new());
        let places = rows
            .into_iter()
            .map(|row| Places::new(row, (&mut sequences, &mut targets), None, prefixes))
            .collect();
        Self {
            sequences,
            targets,
            places,
        }
    }

    /// `[row][choice]`: the log-likelihoods, from the negative log-likelihoods of the targets.
    pub(super) fn log_likelihoods(&self, nll: &[f32]) -> Vec<Vec<f64>> {
        let rows = self.places.iter();
        rows.map(|row| row.log_likelihoods(nll)).collect()
    }
}

/// The targets of each choice of a row: `[choice][token]` is an index into the targets of a batch.
#[derive(Debug, PartialEq)]
pub(super) struct Places(Vec<Vec<usize>>);

impl Places {
    /// Appends the sequences and targets of the choices to a batch. `own` is the segment of the row's own answer, if
    /// the batch already contains it.
    ///
    /// The input of a choice is all its tokens but the last. Choices with equal inputs share a segment: those of one token
    /// share one pass over the prompt. With `prefixes`, an input that is a prefix of another one gets no segment of its own
    /// either: the right choice uses the pass over the answer. This is wrong for a model whose
    /// [rows depend on the length](Decoder::depends_on_length).
    pub(super) fn new(
        set: &ChoiceSet,
        (sequences, targets): (&mut Sequences, &mut Vec<(usize, u32)>),
        own: Option<usize>,
        prefixes: bool,
    ) -> Self {
        let input = |idx: usize| {
            let tokens = &set.choices[idx].tokens;
            &tokens[..tokens.len() - 1]
        };
        let mut longest_first: Vec<usize> = (0..set.choices.len()).collect();
        longest_first.sort_by_key(|idx| std::cmp::Reverse(input(*idx).len()));
        let mut segments = Vec::from_iter(own);
        let mut places = vec![Vec::new(); set.choices.len()];
        for idx in longest_first {
            let found = segments
                .iter()
                .find(|segment| {
                    let sequence = sequences.sequence(**segment);
                    match prefixes {
                        true => sequence.starts_with(input(idx)),
                        false => sequence == input(idx),
                    }
                })
                .copied();
            let segment = found.unwrap_or_else(|| {
                segments.push(sequences.push(input(idx)));
                sequences.segments.len() - 1
            });
            let start = sequences.segments[segment].query_start;
            let choice = &set.choices[idx];
            places[idx] = (choice.n_prompt..choice.tokens.len())
                .map(|position| {
                    let target = (start + position - 1, choice.tokens[position]);
                    let known = targets.iter().position(|known| *known == target);
                    known.unwrap_or_else(|| {
                        targets.push(target);
                        targets.len() - 1
                    })
                })
                .collect();
        }
        Self(places)
    }

    /// The log-likelihood of every choice, from the negative log-likelihoods of the batch's targets.
    pub(super) fn log_likelihoods(&self, nll: &[f32]) -> Vec<f64> {
        let sum = |choice: &Vec<usize>| -> f64 {
            choice.iter().map(|target| -f64::from(nll[*target])).sum()
        };
        self.0.iter().map(sum).collect()
    }
}

/// The distribution over the choices of a row: the softmax of its log-likelihoods. `row` is its index among the rows
/// with choices, for the error message.
///
/// # Errors
/// Returns an error if a log-likelihood is NaN or infinite.
pub(super) fn prediction(
    set: &ChoiceSet,
    log_likelihoods: &[f64],
    normalisation: LengthNormalisation,
    row: usize,
) -> Result<Prediction, Problem> {
    let scores: Vec<f64> = log_likelihoods
        .iter()
        .zip(&set.choices)
        .map(|(score, choice)| match normalisation {
            LengthNormalisation::None => *score,
            LengthNormalisation::Tokens => score / (choice.tokens.len() - choice.n_prompt) as f64,
        })
        .collect();
    Prediction::from_log_scores(&scores, set.answer).ok_or_else(|| {
        not_finite(&format!(
            "the likelihood of a choice of row {} with choices",
            row + 1
        ))
    })
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
        let (mut sequences, mut targets) = (Sequences::default(), Vec::new());
        let set = set(&[1, 2, 3], &[&[7], &[8], &[9]]);
        let places = Places::new(&set, (&mut sequences, &mut targets), None, true);
        assert_eq!(sequences.tokens, [1, 2, 3]);
        assert_eq!(targets, [(2, 7), (2, 8), (2, 9)]);
        assert_eq!(places.log_likelihoods(&[1.0, 2.0, 3.0]), [-1.0, -2.0, -3.0]);
    }

    #[test]
    fn longer_answers_share_what_they_begin_with() {
        let (mut sequences, mut targets) = (Sequences::default(), Vec::new());
        let row = set(&[1, 2], &[&[7], &[8, 9], &[8, 5, 6]]);
        let places = Places::new(&row, (&mut sequences, &mut targets), None, true);
        assert_eq!(sequences.tokens, [1, 2, 8, 5]);
        // The longest comes first, and the others use its segment.
        assert_eq!(targets, [(1, 8), (2, 5), (3, 6), (2, 9), (1, 7)]);
        assert_eq!(places, Places(vec![vec![4], vec![0, 3], vec![0, 1, 2]]));
        let mut apart = Sequences::default();
        let row = set(&[1], &[&[7, 7], &[8, 8]]);
        Places::new(&row, (&mut apart, &mut Vec::new()), None, true);
        assert_eq!(apart.segments.len(), 2);
    }

    #[test]
    fn the_right_answer_is_read_off_the_pass_over_the_row() {
        // Another row, then prompt, answer and end.
        let mut sequences = Sequences::new(&[vec![4, 4], vec![1, 2, 8, 9, 0]]);
        let mut targets = vec![(0, 4), (3, 8), (4, 9), (5, 0)];
        let row = set(&[1, 2], &[&[8, 9], &[7, 7]]);
        let places = Places::new(&row, (&mut sequences, &mut targets), Some(1), true);
        assert_eq!(sequences.tokens[7..], [1, 2, 7]);
        assert_eq!(targets[4..], [(8, 7), (9, 7)]);
        assert_eq!(places, Places(vec![vec![1, 2], vec![4, 5]]));
    }

    #[test]
    fn only_equal_inputs_share_where_rows_depend_on_the_length() {
        let mut sequences = Sequences::new(&[vec![1u32, 2, 8, 9]]);
        let mut targets = vec![(2, 9)];
        let row = set(&[1, 2], &[&[8], &[7], &[8, 9, 3]]);
        Places::new(&row, (&mut sequences, &mut targets), Some(0), false);
        // The longest choice has the row's own input.
        assert_eq!(sequences.tokens[4..], [1, 2]);
        assert_eq!(targets, [(2, 9), (1, 8), (3, 3), (5, 8), (5, 7)]);
    }
}
