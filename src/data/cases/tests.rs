//! The expected result of every test row.

use super::*;

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
            "row: found an array; expected one JSON object per line",
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

#[test]
fn every_case_is_named_here() {
    let mut n_cases = 0;
    for folder in std::fs::read_dir(own().join("training")).expect("cases") {
        let folder = folder.expect("an entry").file_name();
        let name = folder.into_string().expect("a name");
        let elsewhere = ["template-", "base-", "config-"];
        if !elsewhere.iter().any(|start| name.starts_with(start)) {
            n_cases += 1;
            let this = include_str!("tests.rs");
            assert!(this.contains(&format!("{name}/")), "{name} is not tested");
        }
    }
    assert!(n_cases > 0, "no case was found");
}
