//! `predict`: answers, and what the posterior says about them.

use std::path::Path;

use anyhow::{Result, bail};
use monteclora_converters::{Error, Problem, Problems, shell_word};
use serde::Serialize;

use super::opened::{Opened, Request, require_positive};
use super::{print, print_json};
use crate::cli::PredictArgs;
use crate::data::{
    Encoder, Findings, Message, Role, Row, RowProblem, Source, fault_of_row, field_problem,
    findings_of_question, parse_question, splits,
};
use crate::eval::abstention::Abstention;
use crate::eval::calibration::{Judged, Scaling};
use crate::eval::{Answer, Answerer, LengthNormalisation, Question};
use crate::model::{ActiveAdapter, GenerationSettings};
use crate::progress;

#[derive(Debug, Serialize)]
struct Report {
    answers: Vec<Given>,
    /// Confidence from which on answers are given.
    #[serde(skip_serializing_if = "Option::is_none")]
    threshold: Option<f64>,
}

/// An answer, and to which row.
#[derive(Debug, Serialize)]
struct Given {
    /// The row's line, or place, in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    #[serde(flatten)]
    answer: Answer,
}

pub(super) fn run(args: &PredictArgs) -> Result<()> {
    require_positive(&[("--max-tokens", args.max_tokens)])?;
    let request = Request {
        model: &args.model,
        adapters: &args.adapter,
        posterior_samples: args.posterior_samples,
        scoring: &args.scoring,
    };
    let opened = Opened::new(&request, |config| config.max_position_embeddings)?;
    let calibration = calibration(&opened, args)?;
    let threshold = match args.abstain {
        true => Some(threshold(calibration.as_ref(), args)?),
        false => None,
    };
    let (encoder, config) = (&opened.encoder, &opened.config);
    let reader = Reader {
        encoder,
        room: config
            .max_position_embeddings
            .saturating_sub(args.max_tokens),
        max_tokens: args.max_tokens,
    };
    let source = match (&args.data, &args.prompt) {
        (Some(data), _) => Some(reader.checked(data)?),
        _ => None,
    };
    let alone = match &args.prompt {
        Some(prompt) if !args.choices.is_empty() => vec![reader.choice(prompt, &args.choices)?],
        Some(prompt) => vec![reader.prompt(prompt, opened.applies_chat_template)?],
        None => Vec::new(),
    };
    let kinds = Kinds {
        judged: calibration.as_ref().map(|(judged, _)| *judged),
        abstains: args.abstain,
    };
    kinds.check(&alone, None)?;

    let loaded = opened.load()?;
    let base = ActiveAdapter::default();
    let draws = match loaded.means.as_slice() {
        [_, _, ..] => &loaded.means,
        _ => &loaded.draws,
    };
    let batch_size = args.scoring.batch_size.unwrap_or(8);
    let answerer = Answerer {
        decoder: &loaded.decoder,
        mean: loaded.means.first().unwrap_or(&base),
        draws,
        calibration: calibration.as_ref(),
        threshold,
        tokenizer: encoder.tokenizer(),
        generation: GenerationSettings {
            max_new_tokens: args.max_tokens,
            stop_tokens: encoder.stop_ids(),
            batch_size,
        },
        normalisation: LengthNormalisation::per_token(args.scoring.length_normalised),
        cancelled: None,
    };
    let given = |line, answer| Given { line, answer };
    let alone = answerer.answer(&alone)?.into_iter();
    let mut report = Report {
        answers: alone.map(|answer| given(None, answer)).collect(),
        threshold,
    };
    if let Some(source) = &source {
        let bar = progress::items("questions", source.n_rows() as u64);
        let rows: Vec<usize> = (0..source.n_rows()).collect();
        for rows in rows.chunks(batch_size) {
            let questions = rows
                .iter()
                .map(|row| {
                    // A row that was sound before, and no longer is.
                    let sound = reader.question(source, *row)?;
                    sound.map_err(|found| Error::from(Problems::from_iter(found)))
                })
                .collect::<Result<Vec<_>, Error>>()?;
            kinds.check(&questions, Some((source, rows[0])))?;
            let answers = rows.iter().zip(answerer.answer(&questions)?);
            let answers = answers.map(|(row, answer)| given(Some(source.place(*row).1), answer));
            report.answers.extend(answers);
            bar.inc(rows.len() as u64);
        }
        bar.finish_and_clear();
    }
    if args.json {
        return print_json(&report);
    }
    let who = if args.adapter.len() > 1 {
        "adapters"
    } else {
        "draws"
    };
    let mut lines: Vec<String> = report
        .answers
        .iter()
        .map(|given| describe(given, who))
        .collect();
    if let (Some(threshold), [_, _, ..]) = (threshold, report.answers.as_slice()) {
        let is_given = |given: &&Given| given.answer.abstain == Some(false);
        let n_given = report.answers.iter().filter(is_given).count();
        lines.push(format!(
            "{n_given} of {} answered, those that are at least {:.1} % likely to be right",
            report.answers.len(),
            100.0 * threshold
        ));
    }
    print(&lines.join("\n\n"))
}

/// Whether a calibration is of the kind of the questions that are asked.
struct Kinds {
    judged: Option<Judged>,
    abstains: bool,
}

impl Kinds {
    /// Warns, or refuses where answers may be withheld, of questions that the calibration says nothing about; `at` is where the first
    /// of them is from.
    fn check(&self, questions: &[Question], at: Option<(&Source, usize)>) -> Result<()> {
        let Some(judged) = self.judged else {
            return Ok(());
        };
        let Some(first) = questions
            .iter()
            .position(|question| question.judged() != judged)
        else {
            return Ok(());
        };
        let (of, asked) = match judged {
            Judged::Choices => ("rows with choices", "has none: give them with the question"),
            Judged::Answers => ("answers in the model's own words", "has choices"),
        };
        let at = at.map_or("the question".to_owned(), |(source, row)| {
            let (path, line) = source.place(row + first);
            format!("{}:{line}", path.display())
        });
        let message = format!("the calibration is of {of}, and this {asked}");
        if self.abstains {
            let fix = "calibrate on rows of the same kind, or leave --abstain out";
            return Err(Problem::new("other-kind", at, message, fix).exit(2).into());
        }
        tracing::warn!("{at}: {message}; no temperature is applied");
        Ok(())
    }
}

/// What `calibrate` found for what answers.
fn calibration(opened: &Opened, args: &PredictArgs) -> Result<Option<(Judged, Scaling)>> {
    let found = opened.calibration(&args.adapter)?;
    Ok(found.asked(opened.draws()))
}

/// The confidence below which no answer is given.
fn threshold(calibration: Option<&(Judged, Scaling)>, args: &PredictArgs) -> Result<f64> {
    let adapter = args.adapter.first().map(|path| path.display().to_string());
    if args.adapter.len() > 1 {
        let problem = "--abstain goes by the calibration of one adapter, and several are given";
        return Err(Problem::usage(problem).into());
    }
    let again = |target: f64| {
        let samples = args
            .posterior_samples
            .map(|k| format!(" --posterior-samples {k}"));
        format!(
            "find one with `monteclora calibrate -m {} -a {} --data ROWS{} --target-error {target}`, and give it here as there",
            shell_word(&args.model.model_id),
            shell_word(adapter.as_deref().unwrap_or("ADAPTER")),
            samples.unwrap_or_default(),
        )
    };
    let (message, fix) = match calibration.map(|(_, scaling)| scaling.abstention) {
        None => (
            "there is no calibration that holds for this".to_owned(),
            again(0.05),
        ),
        Some(None) => ("the calibration has no threshold".to_owned(), again(0.05)),
        Some(Some(Abstention {
            threshold: Some(threshold),
            ..
        })) => return Ok(threshold),
        Some(Some(off)) => (
            format!(
                "no confidence was found that keeps the error below {}",
                off.target_error
            ),
            again(reachable(&off)),
        ),
    };
    Err(Problem::new("no-threshold", "--abstain", message, fix)
        .exit(2)
        .into())
}

/// A target that the rows of a calibration may reach, as they did not reach theirs: the least bound that was seen, rounded up.
fn reachable(off: &Abstention) -> f64 {
    let least = off
        .error_bound
        .unwrap_or(off.least_bound)
        .max(off.least_bound);
    ((100.0 * least).ceil() / 100.0).clamp(0.01, 0.99)
}

/// Turns rows into questions.
struct Reader<'a> {
    encoder: &'a Encoder,
    /// Tokens that a prompt may have.
    room: usize,
    max_tokens: usize,
}

impl Reader<'_> {
    /// The rows to answer, after looking at all of them: what is wrong with any is said before the first is answered.
    fn checked(&self, data: &Path) -> Result<Source> {
        let split = splits(data)?.last().copied().unwrap_or_default();
        let source = Source::open(data, split)?;
        let mut problems = Problems::default();
        let mut findings = Findings::default();
        for row in 0..source.n_rows() {
            for problem in self.question(&source, row)?.err().into_iter().flatten() {
                problems.push(problem.into());
            }
            if let Ok(asked) = parse_question(&source.row_bytes(row)?) {
                let (_, line) = source.place(row);
                findings.add(line, findings_of_question(&asked, self.encoder));
            }
        }
        if problems.is_empty() {
            if let Some(found) = findings.warning() {
                tracing::warn!("`{}`: {found}", data.display());
            }
            Ok(source)
        } else {
            Err(problems.into())
        }
    }

    fn question(
        &self,
        source: &Source,
        row: usize,
    ) -> Result<Result<Question, Vec<RowProblem>>, Error> {
        let (path, line) = source.place(row);
        let at_row = |problem| RowProblem::new(path, line, problem);
        let problems = match parse_question(&source.row_bytes(row)?) {
            Ok(row) => match self.of_row(&row) {
                Ok(question) => return Ok(Ok(question)),
                Err(error) => vec![fault_of_row(error)?],
            },
            Err(problems) => problems,
        };
        Ok(Err(problems.into_iter().map(at_row).collect()))
    }

    fn of_row(&self, row: &Row) -> Result<Question, Error> {
        let question = Question::of_row(row, self.encoder)?;
        let problem = match &question {
            Question::Open(prompt) if prompt.is_empty() => {
                Some("the prompt has no tokens".to_owned())
            }
            Question::Open(prompt) => self.too_long(prompt),
            Question::Choice { .. } => None,
        };
        match problem {
            None => Ok(question),
            Some(problem) => {
                let fix = "lower --max-tokens, or change the row";
                Err(field_problem("row", problem, fix).into())
            }
        }
    }

    fn prompt(&self, text: &str, as_conversation: bool) -> Result<Question> {
        let prompt = if as_conversation {
            let messages = [Message::new(Role::User, text)];
            self.encoder.prompt_tokens(&messages, &[])?
        } else {
            self.encoder.plain_prompt_tokens(text)?
        };
        if prompt.is_empty() {
            bail!(Problem::usage("--prompt has no tokens"));
        }
        match self.too_long(&prompt) {
            None => Ok(Question::Open(prompt)),
            Some(problem) => {
                Err(Problem::usage(format!("--prompt: {problem}; lower --max-tokens")).into())
            }
        }
    }

    /// A prompt that is answered by one of `choices`, read as a row with them is.
    fn choice(&self, prompt: &str, choices: &[String]) -> Result<Question> {
        let row = serde_json::json!({"prompt": prompt, "choices": choices});
        let row = parse_question(row.to_string().as_bytes()).map_err(|problems| {
            let problems = problems.iter().map(|p| p.to_string()).collect::<Vec<_>>();
            Problem::usage(format!("--choices: {}", problems.join("; ")))
        })?;
        Ok(self.of_row(&row)?)
    }

    fn too_long(&self, prompt: &[u32]) -> Option<String> {
        (prompt.len() > self.room).then(|| {
            format!(
                "{} tokens, and --max-tokens {} more do not fit into the model's {}",
                prompt.len(),
                self.max_tokens,
                self.encoder.options().max_seq_length
            )
        })
    }
}

fn describe(given: &Given, who: &str) -> String {
    let answer = &given.answer;
    let mut text = given
        .line
        .map_or_else(String::new, |line| format!("{line}: "));
    text.push_str(match answer.abstain {
        Some(true) => "(no answer)",
        _ => answer.text.trim(),
    });
    text.push_str(&format!("\n  {}", how_sure(answer, who)));
    for choice in &answer.choices {
        let spread = choice
            .std
            .map_or_else(String::new, |std| format!(" +- {std:.3}"));
        let name = choice.text.trim();
        text.push_str(&format!("\n  {:.3}{spread}  {name}", choice.probability));
    }
    if let Some(found) = &answer.uncertainty {
        text.push_str(&format!(
            "\n  entropy {:.4} nats = {:.4} within one of them + {:.4} between them",
            found.predictive_entropy, found.expected_entropy, found.mutual_information,
        ));
    }
    text
}

/// How sure an answer is, in words; `who` was asked, draws or adapters.
pub(super) fn how_sure(answer: &Answer, who: &str) -> String {
    let p = answer.p_correct;
    let word = match p {
        0.95.. => "very sure",
        0.8.. => "sure",
        0.5.. => "not sure",
        _ => "guessing",
    };
    let mut text = match answer.abstain {
        Some(true) => format!(
            "too unsure to answer: {:.1} % likely to be right",
            100.0 * p
        ),
        _ => format!("{word}: {:.1} % likely to be right", 100.0 * p),
    };
    if !answer.calibrated {
        text.push_str(" by its own account; no calibration holds for it");
    }
    if let Some(found) = &answer.uncertainty {
        let n = found.draws;
        let agreeing = (found.agreement * n as f64).round() as usize;
        text.push_str(&match agreeing == n {
            true => format!("; all {n} {who} say the same"),
            false => format!("; {agreeing} of {n} {who} say the same"),
        });
    }
    text
}
