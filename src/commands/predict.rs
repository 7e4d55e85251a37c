//! `predict`: answers, with their probability and the uncertainty of the posterior.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::{Error, Problem, Problems, shell_word};
use serde::{Deserialize, Serialize};

use super::chat::require_temperature;
use super::opened::{Opened, Request, require_positive};
use super::{in_a_line, print, print_json};
use crate::cli::PredictArgs;
use crate::data::{
    Encoder, Findings, Message, Role, Row, RowProblem, Source, fault_of_row, field_problem,
    findings_of_question, parse_question, splits,
};
use crate::distributed::world;
use crate::eval::abstention::Abstention;
use crate::eval::calibration::{Applicable, Judged, Scaling};
use crate::eval::{Answer, Answerer, LengthNormalisation, Question, Uncertainty};
use crate::model::{ActiveAdapter, GenerationSettings};
use crate::progress;
use crate::speech::Speech;

#[derive(Debug, Serialize)]
struct Report {
    answers: Vec<Given>,
    /// Confidence below which no answer is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    threshold: Option<f64>,
}

/// An answer and its row.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Given {
    /// The row's line, or index, in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    /// The last user turn, or the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    question: Option<String>,
    #[serde(flatten)]
    answer: Answer,
}

pub(super) fn run(args: &PredictArgs) -> Result<()> {
    require_positive(&[("--max-tokens", args.max_tokens)])?;
    require_temperature(args.temperature)?;
    if args.data.is_some() {
        // clap does not check the requirements of a flag if --data is given instead of --prompt.
        let given = [
            (
                "--system",
                args.system.is_some(),
                "put a system turn into the rows",
            ),
            (
                "--temperature",
                args.temperature != 0.0,
                "ask with --prompt",
            ),
            (
                "--choices",
                !args.choices.is_empty(),
                "put `choices` into the rows",
            ),
        ];
        if let Some((flag, _, fix)) = given.iter().find(|(_, is_given, _)| *is_given) {
            bail!(Problem::usage(format!(
                "{flag} is for --prompt, and --data is given; {fix}"
            )));
        }
    }
    let request = Request {
        model: &args.model,
        adapters: &args.adapter,
        posterior_samples: args.posterior_samples,
        scoring: &args.scoring,
    };
    let opened = Opened::new(&request, |config| config.max_position_embeddings)?;
    let applicable = opened.calibration(&args.adapter)?;
    let calibration = applicable.clone().asked(opened.draws());
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
        Some(prompt) => {
            let system = args.system.as_deref();
            vec![reader.prompt(prompt, system, opened.applies_chat_template)?]
        }
        None => Vec::new(),
    };
    let kinds = Kinds {
        judged: calibration.as_ref().map(|(judged, _)| *judged),
        abstains: args.abstain,
        applicable: &applicable,
        warned: Cell::new(false),
    };
    kinds.check(&alone, None)?;
    let system = args
        .system
        .as_deref()
        .filter(|_| opened.applies_chat_template);
    let knows = alone.is_empty() || kinds.knows(system, None)?;

    if let Some(source) = &source {
        let options = (args.max_tokens, args.scoring.batch_size, threshold);
        opened.require_same(source.sha256(), options)?;
    }
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
    let given = |line, question, answer| Given {
        line,
        question,
        answer,
    };
    let mut report = Report {
        answers: Vec::new(),
        threshold,
    };
    // Questions that the calibration does not apply to are answered without it.
    let unscaled = Answerer {
        calibration: None,
        generation: answerer.generation.clone(),
        ..answerer
    };
    let about = |knows| if knows { &answerer } else { &unscaled };
    let streams = !args.json && std::io::stdout().is_terminal();
    match alone.as_slice() {
        [] => {}
        [Question::Open(prompt)] if streams || args.temperature > 0.0 => {
            let answer = spoken(about(knows), prompt, args, streams)?;
            report
                .answers
                .push(given(None, args.prompt.clone(), answer));
        }
        alone => {
            let answers = about(knows).answer(alone)?.into_iter();
            let answers = answers.map(|answer| given(None, args.prompt.clone(), answer));
            report.answers.extend(answers);
        }
    }
    if let Some(source) = &source {
        let bar = progress::items("questions", source.n_rows() as u64);
        let rows: Vec<usize> = (0..source.n_rows()).collect();
        let ranks = world();
        let own = rows
            .chunks(batch_size)
            .skip(ranks.rank())
            .step_by(ranks.size());
        let mut found: Vec<(usize, Given)> = Vec::new();
        for rows in own {
            let asked = rows
                .iter()
                .map(|row| {
                    // A row that was valid in the first check may have changed since.
                    let sound = reader.question(source, *row)?;
                    sound.map_err(|found| Error::from(Problems::from_iter(found)))
                })
                .collect::<Result<Vec<_>, Error>>()?;
            let (asked, questions): (Vec<Row>, Vec<Question>) = asked.into_iter().unzip();
            kinds.check(&questions, Some((source, rows[0])))?;
            let knows = rows.iter().zip(&asked);
            let knows = knows.map(|(row, asked)| kinds.knows(asked.system(), Some((source, *row))));
            let knows = knows.collect::<Result<Vec<bool>>>()?;
            let mut answers: Vec<Option<Answer>> = vec![None; rows.len()];
            for is_known in [true, false] {
                let at: Vec<usize> = (0..rows.len())
                    .filter(|at| knows[*at] == is_known)
                    .collect();
                let of: Vec<Question> = at.iter().map(|at| questions[*at].clone()).collect();
                for (at, answer) in at.into_iter().zip(about(is_known).answer(&of)?) {
                    answers[at] = Some(answer);
                }
            }
            for ((row, asked), answer) in rows.iter().zip(&asked).zip(answers.into_iter().flatten())
            {
                let question = asked.question().map(str::to_owned);
                let line = Some(source.place(*row).1);
                found.push((*row, given(line, question, answer)));
            }
            bar.inc(rows.len() as u64);
        }
        bar.finish_and_clear();
        let mut all = ranks.gather(found)?.concat();
        all.sort_by_key(|(row, _)| *row);
        report.answers = all.into_iter().map(|(_, given)| given).collect();
    }
    if args.json {
        return print_json(&report);
    }
    let who = if args.adapter.len() > 1 {
        "adapters"
    } else {
        "draws"
    };
    let was_shown = streams && matches!(alone.as_slice(), [Question::Open(_)]);
    let mut lines: Vec<String> = report
        .answers
        .iter()
        .map(
            |given| match was_shown && given.answer.abstain != Some(true) {
                true => format!("  {}", beside(&given.answer, who)),
                false => describe(given, who),
            },
        )
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

/// Checks whether the calibration applies to the questions.
struct Kinds<'a> {
    judged: Option<Judged>,
    abstains: bool,
    applicable: &'a Applicable,
    /// Whether the user knows that rows have another system message.
    warned: Cell<bool>,
}

impl Kinds<'_> {
    /// Whether the calibration was made on rows with this system message. If not, logs a warning, or with `--abstain`
    /// returns an error.
    fn knows(&self, system: Option<&str>, at: Option<(&Source, usize)>) -> Result<bool> {
        if self.judged.is_none() || self.applicable.knows_system(system) {
            return Ok(true);
        }
        let at = at.map_or("the question".to_owned(), |(source, row)| {
            let (path, line) = source.place(row);
            format!("{}:{line}", path.display())
        });
        let message = "the calibration was made on rows with another system message";
        if self.abstains {
            let fix = "ask with that system message (--system, or a system turn in the row), or leave --abstain out";
            return Err(Problem::new("other-system", at, message, fix)
                .exit(2)
                .into());
        }
        if !self.warned.replace(true) {
            tracing::warn!(
                "{at}: {message}; no temperature is applied to it, nor to other rows of that kind"
            );
        }
        Ok(false)
    }

    /// Checks that the calibration is for the same kind of answer as `questions`. If not, logs a warning, or with
    /// `--abstain` returns an error. `at` is the row of the first question.
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
            shell_word(args.model.named()),
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

/// A target error that the calibration's rows may reach after they missed their own target: the least bound on these
/// rows, rounded up.
fn reachable(off: &Abstention) -> f64 {
    let least = off
        .error_bound
        .unwrap_or(off.least_bound)
        .max(off.least_bound);
    ((100.0 * least).ceil() / 100.0).clamp(0.01, 0.99)
}

/// Reads rows and prompts as questions.
struct Reader<'a> {
    encoder: &'a Encoder,
    /// Largest number of tokens of a prompt.
    room: usize,
    max_tokens: usize,
}

impl Reader<'_> {
    /// Opens the rows and checks all of them, so that problems are reported before the first answer.
    fn checked(&self, data: &Path) -> Result<Source> {
        let split = splits(data)?.last().copied().unwrap_or_default();
        let source = Source::open(data, split)?;
        let mut problems = Problems::default();
        let mut findings = Findings::default();
        for row in 0..source.n_rows() {
            match self.question(&source, row)? {
                Ok((asked, _)) => {
                    let (_, line) = source.place(row);
                    findings.add(line, findings_of_question(&asked, self.encoder));
                }
                Err(found) => found.into_iter().for_each(|p| problems.push(p.into())),
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

    /// Reads a row and its question, or the problems of the row.
    fn question(
        &self,
        source: &Source,
        row: usize,
    ) -> Result<Result<(Row, Question), Vec<RowProblem>>, Error> {
        let (path, line) = source.place(row);
        let at_row = |problem| RowProblem::new(path, line, problem);
        let problems = match parse_question(&source.row_bytes(row)?) {
            Ok(row) => match self.of_row(&row) {
                Ok(question) => return Ok(Ok((row, question))),
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

    fn prompt(&self, text: &str, system: Option<&str>, as_conversation: bool) -> Result<Question> {
        let prompt = if as_conversation {
            let system = system.map(|text| Message::new(Role::System, text));
            let asked = Message::new(Role::User, text);
            let messages: Vec<Message> = system.into_iter().chain([asked]).collect();
            self.encoder.prompt_tokens(&messages, &[])?
        } else {
            if system.is_some() {
                bail!(Problem::usage(
                    "--system needs a conversation, and the prompt is taken as it is, without a chat template"
                ));
            }
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

    /// A prompt with `choices` as a question, with the same rules as for a row of a file.
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

/// Answers a prompt, and shows the text during generation if `streams`.
fn spoken(
    answerer: &Answerer<'_>,
    prompt: &[u32],
    args: &PredictArgs,
    streams: bool,
) -> Result<Answer> {
    let speech = Speech {
        max_new_tokens: args.max_tokens,
        stop_tokens: answerer.generation.stop_tokens.clone(),
        temperature: args.temperature,
        seed: args.scoring.seed,
    };
    // An answer that may be withheld is not shown before its confidence is known.
    let shows = streams && !args.abstain;
    let mut out = std::io::stdout();
    let model = (answerer.decoder, answerer.mean);
    let found = speech.answer(model, answerer.tokenizer, prompt, &|| true, &mut |text| {
        if shows {
            // Errors are ignored: the reader of a closed pipe needs no text.
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        }
    })?;
    if shows {
        print("")?;
    }
    // The calibration is for greedy answers only.
    let calibration = answerer.calibration.filter(|_| args.temperature == 0.0);
    let judging = Answerer {
        calibration,
        generation: answerer.generation.clone(),
        ..*answerer
    };
    let said = judging.about(&[prompt.to_vec()], &[found.generation])?;
    said.into_iter()
        .next()
        .context("one answer to one question")
}

/// A question in one line, cut if it is too long.
fn shortened(question: &str) -> String {
    const MOST: usize = 160;
    let line = in_a_line(question);
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

fn describe(given: &Given, who: &str) -> String {
    let answer = &given.answer;
    let mut text = String::new();
    if let Some(line) = given.line {
        let question = given.question.as_deref().unwrap_or_default();
        text.push_str(&format!("{line}: {}\n", shortened(question)));
    }
    text.push_str(match answer.abstain {
        Some(true) => "(no answer)",
        _ => answer.text.trim(),
    });
    text.push_str(&format!("\n  {}", beside(answer, who)));
    text
}

/// The lines about an answer: confidence, choices and uncertainty.
fn beside(answer: &Answer, who: &str) -> String {
    let mut text = how_sure(answer);
    for choice in &answer.choices {
        let spread = choice
            .std
            .map_or_else(String::new, |std| format!(" +- {std:.3}"));
        let name = choice.text.trim();
        text.push_str(&format!("\n  {:.3}{spread}  {name}", choice.probability));
    }
    if let Some(found) = &answer.uncertainty {
        text.push_str(&format!(
            "\n  {}; entropy {:.4} nats = {:.4} within one of them + {:.4} between them",
            agreement(found, who),
            found.predictive_entropy,
            found.expected_entropy,
            found.mutual_information,
        ));
    }
    text
}

/// The number of draws, or adapters, that give the answer, in words. Agreement does not mean that the answer is right.
pub(super) fn agreement(found: &Uncertainty, who: &str) -> String {
    let n = found.draws;
    let agreeing = (found.agreement * n as f64).round() as usize;
    match agreeing == n {
        true => format!("all {n} {who} say the same"),
        false => format!("{agreeing} of {n} {who} say the same"),
    }
}

/// The confidence of an answer, in words. Without a calibration, it is unknown how often such answers are right.
pub(super) fn how_sure(answer: &Answer) -> String {
    let p = answer.p_correct;
    let percent = format!("{:.1} %", 100.0 * p);
    if answer.truncated {
        return "cut at the most tokens that were allowed: it is not known how sure the whole answer would be".to_owned();
    }
    if answer.abstain == Some(true) {
        return format!("too unsure to answer: {percent} likely to be right");
    }
    if !answer.calibrated {
        return match answer.choices.is_empty() {
            true => {
                format!("not calibrated: {percent} is the model's probability of exactly this text")
            }
            false => format!("not calibrated: the model gives it {percent}"),
        };
    }
    let word = match p {
        0.95.. => "very sure",
        0.8.. => "sure",
        0.5.. => "not sure",
        _ => "guessing",
    };
    format!("{word}: {percent} likely to be right")
}
