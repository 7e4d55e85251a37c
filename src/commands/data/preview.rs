//! `data preview`: shows rows as the model reads them, and marks the trained text.

use std::io::IsTerminal;

use anyhow::Result;
use monteclora_converters::Error;
use serde_json::json;

use super::{Request, title};
use crate::cli::{ColorArg, DataPreviewArgs};
use crate::commands::{bad_data, print, print_json};
use crate::data::{Encoder, Example, RowProblem, Source};

/// How trained text is marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marks {
    /// Bold on green, for a terminal.
    Color,
    /// Brackets that are rare in text, for a file or a pipe.
    Brackets,
}

impl Marks {
    fn new(color: ColorArg) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let color = match color {
            ColorArg::Always => true,
            ColorArg::Never => false,
            ColorArg::Auto => {
                std::io::stdout().is_terminal()
                    && !set("NO_COLOR")
                    && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
            }
        };
        if color { Self::Color } else { Self::Brackets }
    }

    /// Marks trained text, each line separately, since pagers reset the colour at the end of a line.
    fn trained(self, text: &str) -> String {
        match self {
            Self::Brackets => format!("⟦{text}⟧"),
            Self::Color => text
                .split('\n')
                .map(|line| match line {
                    "" => String::new(),
                    line => format!("\x1b[1;30;42m{line}\x1b[0m"),
                })
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }
}

pub(in crate::commands) fn run(args: &DataPreviewArgs) -> Result<()> {
    let request = Request::new(&args.source)?;
    let (encoder, limit) = request.measuring_encoder()?;
    let marks = Marks::new(args.color);
    let mut shown = Vec::new();
    let mut n_bad = 0;
    for (path, split) in &request.sources {
        let source = Source::open(path, *split)?;
        let rows: Vec<usize> = if args.lines.is_empty() {
            (0..source.n_rows().min(args.rows)).collect()
        } else {
            (0..source.n_rows())
                .filter(|idx| args.lines.contains(&source.place(*idx).1))
                .collect()
        };
        if rows.is_empty() {
            return Err(bad_data(format!(
                "{}: no row begins in line {}",
                title(path, *split),
                args.lines
                    .iter()
                    .map(usize::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            )));
        }
        for row_idx in rows {
            let (file, line) = source.place(row_idx);
            let (format, examples) = match encoded(&source, row_idx, &request, &encoder)? {
                Ok(found) => found,
                Err(problems) => {
                    n_bad += 1;
                    for problem in problems {
                        print_or_keep(args.json, &mut shown, &problem)?;
                    }
                    continue;
                }
            };
            for (part, example) in examples.iter().enumerate() {
                let n_tokens = example.input_ids.len();
                if args.json {
                    shown.push(json!({
                        "path": file, "line": line, "part": part, "format": format,
                        "n_tokens": n_tokens, "n_trained": example.n_trained(),
                        "overlong": n_tokens > limit,
                        "input_ids": example.input_ids, "loss_mask": example.loss_mask,
                        "segments": segments(&encoder, example)?
                            .into_iter()
                            .map(|(text, trained)| json!({"text": text, "trained": trained}))
                            .collect::<Vec<_>>(),
                    }));
                    continue;
                }
                let of = match examples.len() {
                    1 => String::new(),
                    n => format!(", example {} of {n}", part + 1),
                };
                let long = if n_tokens > limit {
                    format!(", more than max_seq_length {limit}")
                } else {
                    String::new()
                };
                let mut text = format!(
                    "{}:{line}: {format}{of}, {n_tokens} tokens{long}, {} trained\n",
                    file.display(),
                    example.n_trained()
                );
                if args.tokens {
                    text.push_str(&token_table(&encoder, example)?);
                } else {
                    for (piece, trained) in segments(&encoder, example)? {
                        text.push_str(&if trained {
                            marks.trained(&piece)
                        } else {
                            piece
                        });
                    }
                }
                print(&text)?;
                print("")?;
            }
        }
    }
    if args.json {
        print_json(&json!({ "rows": shown }))?;
    }
    if n_bad > 0 {
        return Err(bad_data(format!(
            "{n_bad} of the rows shown cannot be used"
        )));
    }
    Ok(())
}

fn print_or_keep(
    keep: bool,
    shown: &mut Vec<serde_json::Value>,
    problem: &RowProblem,
) -> Result<()> {
    if keep {
        shown.push(json!({ "problem": problem }));
        return Ok(());
    }
    print(&problem.to_string())
}

type Encoded = (&'static str, Vec<Example>);

fn encoded(
    source: &Source,
    row_idx: usize,
    request: &Request,
    encoder: &Encoder,
) -> Result<Result<Encoded, Vec<RowProblem>>, Error> {
    let (path, line) = source.place(row_idx);
    let problems = match request.schema.parse(&source.row_bytes(row_idx)?) {
        Ok((format, row)) => match encoder.encode_row(&row) {
            Ok(encoded) => return Ok(Ok((format.name(), encoded.examples))),
            Err(error) => vec![request.schema.fault_of_row(error)?],
        },
        Err(problems) => problems,
    };
    let at_row = |problem| RowProblem::new(path, line, problem);
    Ok(Err(problems.into_iter().map(at_row).collect()))
}

/// The text as segments of trained and untrained tokens, special tokens included.
fn segments(encoder: &Encoder, example: &Example) -> Result<Vec<(String, bool)>, Error> {
    let mut runs: Vec<(Vec<u32>, bool)> = Vec::new();
    for (idx, &id) in example.input_ids.iter().enumerate() {
        // The first token has no predecessor and is never predicted.
        let trained = idx > 0 && example.loss_mask[idx];
        match runs.last_mut() {
            Some((run, same)) if *same == trained => run.push(id),
            _ => runs.push((vec![id], trained)),
        }
    }
    runs.into_iter()
        .map(|(run, trained)| Ok((encoder.tokenizer().decode(&run, false)?, trained)))
        .collect()
}

/// One token per line: index, id, a star if it is trained, and its text.
fn token_table(encoder: &Encoder, example: &Example) -> Result<String, Error> {
    let mut table = String::new();
    for (idx, &id) in example.input_ids.iter().enumerate() {
        let mark = if idx > 0 && example.loss_mask[idx] {
            '*'
        } else {
            ' '
        };
        let text = encoder.tokenizer().decode(&[id], false)?;
        table.push_str(&format!("{idx:>6} {id:>7} {mark} {text:?}\n"));
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_end_with_their_line() {
        assert_eq!(Marks::Brackets.trained("a\nb"), "⟦a\nb⟧");
        assert_eq!(
            Marks::Color.trained("a\n\nb"),
            "\x1b[1;30;42ma\x1b[0m\n\n\x1b[1;30;42mb\x1b[0m"
        );
    }
}
