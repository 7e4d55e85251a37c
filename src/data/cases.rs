//! The test rows in `tests/data/cases/training`: what each row trains, or why it is refused.

mod law;
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    EncodeOptions, Encoder, Finding, Message, Overlong, Remedies, Row, RowContent, RowProblem,
    RowSchema, Source, Split, Survey, TrainOn,
    test_support::{model_with_template, tiny_llama},
};

/// A chat template that prints everything that a conversation may hold.
const FULL: &str = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}\
{% for message in messages %}<|im_start|>{{ message.role }}\n\
{% if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}\
{% if message.content %}{{ message.content }}{% endif %}\
{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}{% endif %}{% endif %}";

/// The expected result of a row.
enum Right {
    /// The trained texts.
    Trains(&'static [&'static str]),
    /// A part of the refusal, after file and line.
    Refused(&'static str),
}
use Right::{Refused, Trains};

fn own() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/cases")
}

fn encoder(dir: &Path) -> Arc<Encoder> {
    let options = EncodeOptions {
        train_on: TrainOn::Assistant,
        apply_chat_template: true,
        max_seq_length: 4000,
        overlong: Overlong::Error,
        remedies: Remedies::Keys,
    };
    Encoder::from_dir(dir, None, options).expect("an encoder")
}

/// A survey of one file with every problem as `LINE: FIELD: ...`.
fn survey(path: &Path, encoder: &Encoder) -> Result<(Survey, Vec<(usize, String)>), String> {
    let said = |error: monteclora_converters::Error| error.to_string();
    let source = Source::open(path, Split::Train).map_err(said)?;
    let mut problems = Vec::new();
    let schema = RowSchema::default();
    let keep = |found: RowProblem| {
        let RowProblem {
            line,
            field,
            problem,
            fix,
            ..
        } = found;
        problems.push((line, format!("{field}: {problem}; {fix}")));
    };
    let survey = Survey::take(&source, &schema, Some(encoder), keep).map_err(said)?;
    Ok((survey, problems))
}

/// The trained texts of a row, one per run of trained tokens.
fn trained(row: &Row, encoder: &Encoder) -> Vec<String> {
    let encoded = encoder.encode_row(row).expect("encodes");
    let mut found = Vec::new();
    for example in encoded.examples {
        let ids: Vec<_> = example.input_ids.iter().zip(&example.loss_mask).collect();
        for stretch in ids.chunk_by(|(_, left), (_, right)| left == right) {
            if *stretch[0].1 {
                let ids: Vec<u32> = stretch.iter().map(|(id, _)| **id).collect();
                found.push(encoder.tokenizer().decode(&ids, false).expect("decodes"));
            }
        }
    }
    found
}

fn check(file: &str, encoder: &Encoder, rights: &[Right]) -> Survey {
    let path = own().join("training").join(file);
    let source = Source::open(&path, Split::Train).expect("opens");
    let (survey, problems) = survey(&path, encoder).expect("surveys");
    assert_eq!(source.n_rows(), rights.len(), "{file}");
    for (idx, right) in rights.iter().enumerate() {
        let (_, line) = source.place(idx);
        let of_row: Vec<_> = problems.iter().filter(|(at, _)| *at == line).collect();
        match right {
            Trains(texts) => {
                assert!(of_row.is_empty(), "{file}:{line}: {of_row:?}");
                let bytes = source.row_bytes(idx).expect("reads");
                let (_, row) = RowSchema::default().parse(&bytes).expect("a good row");
                assert_eq!(trained(&row, encoder), *texts, "{file}:{line}");
            }
            Refused(part) => assert!(
                of_row.iter().any(|(_, text)| text.contains(part)),
                "{file}:{line}: {of_row:?} does not say {part}"
            ),
        }
    }
    survey
}

fn row(file: &str, idx: usize) -> Row {
    let path = own().join("training").join(file);
    let source = Source::open(&path, Split::Train).expect("opens");
    let bytes = source.row_bytes(idx).expect("reads");
    RowSchema::default().parse(&bytes).expect("a good row").1
}

fn messages(row: &Row) -> &[Message] {
    match &row.content {
        RowContent::Conversation { messages, .. } => messages,
        other => panic!("not a conversation: {other:?}"),
    }
}

/// The message of a file that is refused as a whole.
fn file_refusal(file: &str) -> String {
    let path = own().join("training").join(file);
    let error = Source::open(&path, Split::Train).expect_err("refused");
    assert_eq!(
        monteclora_converters::exit_code(&error, |_| None),
        3,
        "{file}"
    );
    error.to_string()
}

fn survey_of(path: &Path, encoder: &Encoder) -> (Survey, Vec<(usize, String)>) {
    survey(path, encoder).expect("surveys")
}
