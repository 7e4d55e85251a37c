//! `parity --chat`: compares the rendered text of conversations, as it is trained and served here, with mistral.rs's
//! own.

use std::path::Path;

use anyhow::{Result, bail};
use mistralrs_monteclora::{AskedConversation, own_differences, own_texts};
use monteclora_converters::jinja::recorded_variables;
use monteclora_converters::{ConversationSettings, ModelFiles, Problem};
use serde::Serialize;

use crate::cli::ParityArgs;
use crate::commands::show;
use crate::data::{Asked, EncodeOptions, Encoder, RowProblem, Source, parse_question, splits};
use crate::hub;
use crate::provenance::{read_fitting, warn_of_conversation};

/// Conversations with and without a system message, tools, tool calls, thoughts and content parts.
const BUILT_IN: &str = include_str!("conversations.jsonl");

/// Number of characters that are shown before and after a difference.
const SHOWN: (usize, usize) = (30, 50);

/// The report of `parity --chat`.
#[derive(Debug, Serialize)]
struct Report {
    conversations: usize,
    equal: usize,
    /// Known differences of mistral.rs for this template.
    known: Vec<&'static str>,
    differences: Vec<Difference>,
}

/// A conversation with different texts.
#[derive(Debug, Serialize)]
struct Difference {
    /// Line of the file, from 1.
    line: usize,
    /// Index of the first different character. `None` if one side refuses the conversation.
    at: Option<usize>,
    ours: Written,
    mistralrs: Written,
}

/// The rendered text, or the reason of a refusal.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Written {
    Text(String),
    Refused(String),
}

pub(super) fn run(args: &ParityArgs) -> Result<()> {
    let base = hub::locate(args.model.id()?, &args.model.options.hub())?;
    let template = args.model.options.chat_template.as_deref();
    let options = EncodeOptions::whole(true, usize::MAX);
    if let Some(path) = &args.adapter {
        read_fitting(path, &ModelFiles::open(&base.dir)?)?;
        let settings = ConversationSettings {
            template,
            prompts_as_chats: None,
        };
        warn_of_conversation(path, &base.dir, settings)?;
    }
    let variables = args
        .adapter
        .as_deref()
        .map(recorded_variables)
        .transpose()?;
    let variables = variables.unwrap_or_default();
    let encoder = Encoder::with_variables(&base.dir, template, variables, options)?;
    let Some(source) = encoder.template().map(|template| template.content()) else {
        bail!(Problem::usage(
            "the model has no chat template; give one with --chat-template"
        ));
    };
    let asked = match &args.data {
        Some(path) => from_file(path, &encoder)?,
        None => built_in(&encoder)?,
    };
    if asked.is_empty() {
        bail!(Problem::usage("--data: no row is a conversation"));
    }
    let conversations: Vec<AskedConversation> = asked
        .iter()
        .map(|(_, asked)| AskedConversation {
            messages: asked.messages.clone(),
            tools: asked.tools.clone(),
        })
        .collect();
    let theirs = own_texts(&base.dir, template, &conversations)?;
    let n = asked.len();
    let differences: Vec<Difference> = asked
        .into_iter()
        .zip(theirs)
        .filter_map(|((line, asked), theirs)| difference(line, asked.text, theirs))
        .collect();
    let report = Report {
        conversations: n,
        equal: n - differences.len(),
        known: own_differences(&source),
        differences,
    };
    show(args.json, &report, || describe(&report))
}

fn built_in(encoder: &Encoder) -> Result<Vec<(usize, Asked)>> {
    let rows = BUILT_IN.lines().enumerate();
    let asked = rows.map(|(idx, line)| {
        let row = parse_question(line.as_bytes()).map_err(|problems| {
            let problem = problems.into_iter().next();
            problem.unwrap_or_else(|| Problem::usage("a built-in conversation is none"))
        })?;
        Ok(encoder.asked(&row)?.map(|asked| (idx + 1, asked)))
    });
    asked.filter_map(Result::transpose).collect()
}

fn from_file(path: &Path, encoder: &Encoder) -> Result<Vec<(usize, Asked)>> {
    let split = splits(path)?.last().copied().unwrap_or_default();
    let source = Source::open(path, split)?;
    let mut asked = Vec::new();
    for row_idx in 0..source.n_rows() {
        let (file, line) = source.place(row_idx);
        let row = parse_question(&source.row_bytes(row_idx)?).map_err(|problems| {
            let found = problems.into_iter();
            let found = found.map(|problem| Problem::from(RowProblem::new(file, line, problem)));
            monteclora_converters::Problems::from_iter(found)
        })?;
        asked.extend(encoder.asked(&row)?.map(|asked| (line, asked)));
    }
    Ok(asked)
}

fn difference(
    line: usize,
    ours: Result<String, String>,
    theirs: Result<String, String>,
) -> Option<Difference> {
    let at = match (&ours, &theirs) {
        (Ok(ours), Ok(theirs)) if ours == theirs => return None,
        (Ok(ours), Ok(theirs)) => {
            let same = ours.chars().zip(theirs.chars());
            Some(same.take_while(|(a, b)| a == b).count())
        }
        // If both refuse the conversation, neither has a text to compare.
        (Err(_), Err(_)) => return None,
        _ => None,
    };
    let written = |text: Result<String, String>| match text {
        Ok(text) => Written::Text(text),
        Err(reason) => Written::Refused(reason),
    };
    Some(Difference {
        line,
        at,
        ours: written(ours),
        mistralrs: written(theirs),
    })
}

fn describe(report: &Report) -> String {
    let Report {
        conversations,
        equal,
        known,
        differences,
    } = report;
    let mut text = format!("{equal} of {conversations} conversations are written alike\n");
    for found in differences {
        let at = found
            .at
            .map_or(String::new(), |at| format!(", character {at}"));
        text.push_str(&format!("line {}{at}\n", found.line));
        for (name, written) in [("ours", &found.ours), ("mistral.rs", &found.mistralrs)] {
            text.push_str(&match written {
                Written::Text(whole) => format!("  {name:<10} {:?}\n", around(whole, found.at)),
                Written::Refused(reason) => format!("  {name:<10} refused: {reason}\n"),
            });
        }
    }
    for difference in known {
        text.push_str(&format!("mistral.rs 0.8.1: {difference}\n"));
    }
    text
}

fn around(text: &str, at: Option<usize>) -> String {
    let at = at.unwrap_or_default();
    let begin = at.saturating_sub(SHOWN.0);
    text.chars()
        .skip(begin)
        .take(at - begin + SHOWN.1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_shown() {
        let text = |text: &str| Ok(text.to_owned());
        assert!(difference(1, text("same"), text("same")).is_none());
        assert!(difference(1, Err("a".to_owned()), Err("b".to_owned())).is_none());
        let found = difference(2, text("[{\"a\": 1}]é"), text("[{\"a\":1}]é")).expect("differs");
        assert_eq!((found.line, found.at), (2, Some(6)));
        let report = Report {
            conversations: 3,
            equal: 1,
            known: vec!["`x` is 1"],
            differences: vec![
                found,
                difference(3, text("a"), Err("no tools".to_owned())).expect("differs"),
            ],
        };
        assert_eq!(
            describe(&report),
            "1 of 3 conversations are written alike\nline 2, character 6\n  ours       \"[{\\\"a\\\": 1}]é\"\n  mistral.rs \"[{\\\"a\\\":1}]é\"\n\
             line 3\n  ours       \"a\"\n  mistral.rs refused: no tools\nmistral.rs 0.8.1: `x` is 1\n"
        );
    }
}
