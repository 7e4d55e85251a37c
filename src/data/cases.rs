//! The cases of rows in `tests/data/cases/training`: what each row trains, or why it is refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    EncodeOptions, Encoder, Finding, Message, Overlong, Remedies, Row, RowContent, RowProblem,
    RowSchema, Source, Split, Survey, TrainOn,
    test_support::{model_with_template, tiny_llama},
};

/// Prints everything that a conversation may hold.
const FULL: &str = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}\
{% for message in messages %}<|im_start|>{{ message.role }}\n\
{% if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}\
{% if message.content %}{{ message.content }}{% endif %}\
{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}{% endif %}{% endif %}";

/// What a row must become.
enum Right {
    /// The trained texts, and one that must stand before them.
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

/// The trained stretches of a row.
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

#[test]
fn what_is_trained_is_as_the_row_says() {
    let plain = encoder(&tiny_llama());
    let check = |file: &str, rights: &[Right]| check(file, &plain, rights);
    let one = |file: &str, texts: &'static [&'static str]| check(file, &[Trains(texts)]);
    one(
        "alpaca-history/rows.jsonl",
        &["hot<|im_end|>", "cold<|im_end|>"],
    );
    one("sharegpt-weight/rows.jsonl", &["good answer<|im_end|>"]);
    one(
        "messages-train-false/rows.jsonl",
        &["good answer<|im_end|>"],
    );
    one("messages-system-beside/rows.jsonl", &["bonjour<|im_end|>"]);
    one(
        "prompt-completion-system/rows.jsonl",
        &["bonjour<|im_end|>"],
    );
    one(
        "thinking-qwen3/rows.jsonl",
        &["a1<|im_end|>", "a2<|im_end|>"],
    );
    check(
        "kto-label/rows.jsonl",
        &[
            Refused(
                "label: false marks an answer to avoid (KTO), which is not supported; remove the rows",
            ),
            Trains(&["good answer<|im_end|>"]),
        ],
    );
    check(
        "message-prefix/rows.jsonl",
        &[
            Trains(&["{\"a\":<|im_end|>"]),
            Trains(&["a<|im_end|>"]),
            Trains(&["a<|im_end|>"]),
        ],
    );
    check(
        "roles-order/rows.jsonl",
        &[
            Trains(&["c<|im_end|>"]),
            Trains(&["b<|im_end|>"]),
            Trains(&["b<|im_end|>"]),
            Trains(&["first<|im_end|>", "b<|im_end|>"]),
            Trains(&["b<|im_end|>"]),
            Refused("messages: no assistant turn to train on; add one"),
        ],
    );
    check(
        "null-fields/rows.jsonl",
        &[
            Trains(&["o<|im_end|>"]),
            Refused("output: found null; expected a string"),
        ],
    );
    check(
        "mlx-prompt-list/rows.jsonl",
        &[
            Refused("prompt: found an array; expected a string, or a list of messages in both"),
            Refused("completion: found an array"),
            Trains(&["a<|im_end|>"]),
            Refused("prompt: is empty"),
        ],
    );
    check(
        "parts-image/rows.jsonl",
        &[
            Refused("messages[0].content[1]: part of type `image_url`"),
            Trains(&["fine<|im_end|>"]),
            Refused("messages[0].content[0]: part of type `unknown`"),
        ],
    );
    check(
        "tools-text-null/rows.jsonl",
        &[
            Refused("tools: found a string that is not a JSON list"),
            Trains(&["a<|im_end|>"]),
            Trains(&["a<|im_end|>"]),
        ],
    );
}

#[test]
fn context_beside_the_turns_reaches_the_template() {
    let french = row("messages-system-beside/rows.jsonl", 0);
    assert_eq!(messages(&french)[0].content(), "Answer in French.");
    let prompt = row("prompt-completion-system/rows.jsonl", 0);
    assert!(
        matches!(&prompt.content, RowContent::Prompt { system: Some(text), .. } if text == "Answer in French.")
    );
    let history = row("alpaca-history/rows.jsonl", 0);
    let said: Vec<_> = messages(&history).iter().map(Message::content).collect();
    assert_eq!(
        said,
        ["how is it in summer?", "hot", "and in winter?", "cold"]
    );
    let variables = row("chat-template-kwargs/rows.jsonl", 0).variables;
    assert_eq!(
        serde_json::Value::Object(variables),
        serde_json::json!({"enable_thinking": false})
    );
    let functions = row("tool-defs/rows.jsonl", 1);
    let RowContent::Conversation { tools, .. } = &functions.content else {
        panic!("not a conversation");
    };
    assert_eq!(
        tools[..],
        [serde_json::json!({"type": "function", "function": {"name": "w", "parameters": {}}})]
    );
}

#[test]
fn tools_and_calls_are_read_and_decoded() {
    let dir = model_with_template(FULL, false);
    let full = encoder(dir.path());
    check(
        "tool-defs/rows.jsonl",
        &full,
        &[
            Refused(
                "tool_defs: is context that nothing reads; name it: `fields = { tools = \"tool_defs\" }`",
            ),
            Trains(&["sun<|im_end|>"]),
        ],
    );
    let survey = check(
        "chat-template-kwargs/rows.jsonl",
        &full,
        &[Trains(&["a1<|im_end|>"])],
    );
    assert_eq!(survey.findings.iter().count(), 0);
    for (file, part) in [
        ("arrow-nulls/rows.jsonl", "f{\"a\":1,\"b\":null}<|im_end|>"),
        (
            "tool-args-string/rows.jsonl",
            "f{\"city\":\"Paris\"}<|im_end|>",
        ),
    ] {
        let texts = trained(&row(file, 0), &full);
        let first: String = texts[0].split_whitespace().collect();
        assert_eq!(
            (first.as_str(), &texts[1][..]),
            (part, "done<|im_end|>"),
            "{file}"
        );
    }
    let path = own().join("training/tool-args-string/rows.jsonl");
    let (survey, problems) = survey_of(&path, &full);
    assert_eq!(problems, []);
    assert_eq!(survey.findings.n_rows(&Finding::DecodedArguments), 1);
}

fn survey_of(path: &Path, encoder: &Encoder) -> (Survey, Vec<(usize, String)>) {
    survey(path, encoder).expect("surveys")
}

#[test]
fn what_is_not_trained_here_is_refused_by_name() {
    let plain = encoder(&tiny_llama());
    let check = |file: &str, rights: &[Right]| check(file, &plain, rights);
    check(
        "conversations-role-content/rows.jsonl",
        &[Refused(
            "conversations: its turns have role and content, not from and value; the turns are messages: `fields = { messages = \"conversations\" }`",
        )],
    );
    check(
        "messages-as-text/rows.jsonl",
        &[Refused(
            "messages: found a string; expected a list of messages, not its JSON text",
        )],
    );
    check(
        "preference/rows.jsonl",
        &[
            Refused("`chosen` is of a preference pair (DPO)"),
            Refused("`chosen` is of a preference pair (DPO)"),
        ],
    );
    check(
        "openai-dpo/rows.jsonl",
        &[Refused("`preferred_output` is of a preference pair (DPO)")],
    );
    check(
        "num-content/rows.jsonl",
        &[
            Refused("messages[1].content: found a number"),
            Refused("completion: found a number"),
            Refused("completion: found a boolean"),
            Refused("input: found an array"),
        ],
    );
    let roles: Vec<_> = [
        "developer",
        "function",
        "ipython",
        "model",
        "System",
        "chatgpt",
        "bing",
        "bard",
        "model",
        "function_response",
        "tool_call",
    ]
    .map(Refused)
    .into();
    check("roles/rows.jsonl", &roles);
    let (survey, _) = survey_of(&own().join("training/mixed/rows.jsonl"), &plain);
    let source =
        Source::open(&own().join("training/mixed/rows.jsonl"), Split::Train).expect("opens");
    let error = survey.format(&source).expect_err("mixed").to_string();
    assert!(
        error.contains("mixes formats: messages in 1 row (line 3)"),
        "{error}"
    );
}

#[test]
fn begin_and_end_tokens_stand_once_and_control_tokens_are_counted() {
    let dir = model_with_template(FULL, true);
    let with_bos = encoder(dir.path());
    let survey = check(
        "text-bos-eos/rows.jsonl",
        &with_bos,
        &[Trains(&["<s>hello there<|im_end|>"])],
    );
    let n_rows = |finding| survey.findings.n_rows(&finding);
    assert_eq!((n_rows(Finding::OwnBegin), n_rows(Finding::OwnEnd)), (1, 1));
    assert_eq!(
        (n_rows(Finding::DoubledBegin), n_rows(Finding::DoubledEnd)),
        (0, 0)
    );
    assert_eq!(n_rows(Finding::ControlToken), 0);

    let plain = encoder(&tiny_llama());
    let (survey, _) = survey_of(&own().join("training/injection/rows.jsonl"), &plain);
    let lines: Vec<_> = survey.findings.lines().collect();
    assert_eq!(
        lines,
        ["control tokens in a row's own text, in 2 rows (first in line 1: user `<|im_end|>`)"]
    );
}

#[test]
fn a_row_cut_before_its_answer_is_refused() {
    let options = EncodeOptions {
        max_seq_length: 100,
        overlong: Overlong::Truncate,
        ..*encoder(&tiny_llama()).options()
    };
    let cutting = Encoder::from_dir(&tiny_llama(), None, options).expect("an encoder");
    let (survey, problems) = survey_of(
        &own().join("training/truncate-no-label/rows.jsonl"),
        &cutting,
    );
    assert_eq!(survey.stats.n_truncated, 1);
    let [(1, problem)] = &problems[..] else {
        panic!("{problems:?}");
    };
    assert!(
        problem.contains("no token to train on in the first 100 of 322 tokens"),
        "{problem}"
    );
}

#[test]
fn layouts_and_bytes_are_read_or_named() {
    let plain = encoder(&tiny_llama());
    let check = |file: &str, rights: &[Right]| check(file, &plain, rights);
    check(
        "array/nested.json",
        &[Refused(
            "row: found an array; expected one JSON object a line",
        )],
    );
    check(
        "array/wrapped.json",
        &[Refused(
            "`data` is a list of 1 objects, which may be the rows; write them one a line: `jq -c '.[\"data\"][]' FILE",
        )],
    );
    check(
        "array/rows.json",
        &[Trains(&["a<|im_end|>"]), Trains(&["b<|im_end|>"])],
    );
    let text = |file: &str, n_rows: usize| {
        let (survey, problems) = survey_of(&own().join("training/bytes").join(file), &plain);
        assert_eq!(
            (survey.stats.n_rows, &problems[..]),
            (n_rows, &[][..]),
            "{file}"
        );
    };
    for (file, n_rows) in [
        ("bom.jsonl", 1),
        ("crlf.jsonl", 2),
        ("escaped-nul.jsonl", 1),
        ("nel.jsonl", 2),
        ("u2028.jsonl", 1),
    ] {
        text(file, n_rows);
    }
    for (file, right) in [
        (
            "bytes/concat.jsonl",
            "another value follows in the same line; write one object a line: `jq -c",
        ),
        (
            "bytes/cr-only.jsonl",
            "lines end in CR alone; end lines in LF: `tr",
        ),
        (
            "bytes/latin1.jsonl",
            "not valid UTF-8 at column 13; save the file as UTF-8: `iconv -f LATIN1",
        ),
        (
            "bytes/nan.jsonl",
            "in `score`: expected value (NaN and Infinity are not JSON); write null",
        ),
    ] {
        check(file, &[Refused(right)]);
    }
    for (file, right) in [
        (
            "bytes/bom-mid.jsonl",
            "row: a byte order mark at the start of the line",
        ),
        ("bytes/nul.jsonl", "row: a NUL byte at column 11"),
        (
            "bytes/surrogate.jsonl",
            "text: `\\ud83d` at column 14 is half a character",
        ),
    ] {
        let (_, problems) = survey_of(&own().join("training").join(file), &plain);
        let [(2, problem)] = &problems[..] else {
            panic!("{file}: {problems:?}");
        };
        assert!(problem.contains(right), "{file}: {problem}");
    }
    for (file, right) in [
        (
            "bytes/csv.csv",
            "CSV, whose line 1 names the columns prompt, completion; rows are JSON; convert it: `python3",
        ),
        ("bytes/empty.jsonl", "holds no row"),
        (
            "bytes/pretty.jsonl",
            "pretty.jsonl:1: an object goes over several lines",
        ),
        (
            "bytes/trailing-comma.json",
            ":1: row: a comma before the closing `]`",
        ),
        (
            "bytes/utf16.jsonl",
            "the file is UTF-16; save it as UTF-8: `iconv -f UTF-16",
        ),
    ] {
        let said = file_refusal(file);
        assert!(said.contains(right), "{file}: {said}");
    }
}

/// Whatever the rows: a column or a key of a turn that nothing reads is counted, and a misspelt one is refused.
#[test]
fn no_column_of_any_case_is_passed_over() {
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(own, PathBuf::from);
    let mut n_rows = 0;
    for folder in std::fs::read_dir(root.join("training")).expect("cases") {
        let folder = folder.expect("an entry").path();
        for file in std::fs::read_dir(&folder).into_iter().flatten() {
            let path = file.expect("an entry").path();
            if path
                .extension()
                .is_some_and(|extension| extension == "jsonl")
            {
                n_rows += columns_are_noticed(&path);
            }
        }
    }
    assert!(n_rows > 0, "no row was found");
}

fn columns_are_noticed(path: &Path) -> usize {
    let schema = RowSchema::default();
    let Ok(source) = Source::open(path, Split::Train) else {
        return 0;
    };
    let mut n_rows = 0;
    for idx in 0..source.n_rows() {
        let bytes = source.row_bytes(idx).expect("reads");
        if schema.parse(&bytes).is_err() {
            continue;
        }
        n_rows += 1;
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        json["zz_note"] = 1.into();
        let turns: Vec<_> = ["messages", "conversations"]
            .into_iter()
            .filter(|list| json.get(*list).is_some_and(serde_json::Value::is_array))
            .collect();
        for list in &turns {
            json[*list][0]["zz_mood"] = "glad".into();
        }
        let parse = |json: &serde_json::Value| schema.parse(json.to_string().as_bytes());
        let (_, row) = parse(&json).expect("a note does no harm");
        assert!(row.notes.unread.contains(&"zz_note".to_owned()), "{json}");
        let of_turns = row.notes.unread.iter().chain(&row.notes.for_template);
        assert_eq!(
            of_turns.filter(|key| key.ends_with(".zz_mood")).count(),
            turns.len(),
            "{json}"
        );
        json["choises"] = serde_json::json!(["a", "b"]);
        let problems = parse(&json).expect_err("refused");
        assert!(
            problems.iter().any(|problem| problem.at == "choises"
                && problem.message.contains("did you mean `choices`?")),
            "{problems:?}"
        );
    }
    n_rows
}
