//! Tests of every format and of every problem of a row, with the exact messages.

use monteclora_converters::Problem;

use super::*;

mod beside;

fn parse(text: &str) -> Result<(RowFormat, Row), Vec<Problem>> {
    parse_row(text.as_bytes(), None)
}

/// The first problem as `field: problem; fix`.
fn first(text: &str) -> String {
    parse(text).expect_err("refused")[0].to_string()
}

fn turns(text: &str) -> Vec<(Role, String)> {
    let (_, row) = parse(text).expect("a good row");
    let RowContent::Conversation { messages, .. } = row.content else {
        panic!("not a conversation");
    };
    messages
        .iter()
        .map(|message| (message.role(), message.content().to_owned()))
        .collect()
}

#[test]
fn formats_are_told_by_their_keys() {
    for (text, format) in [
        (
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            RowFormat::Messages,
        ),
        (
            r#"{"prompt":"a","completion":"b","id":3}"#,
            RowFormat::PromptCompletion,
        ),
        (r#"{"instruction":"a","output":"b"}"#, RowFormat::Alpaca),
        (
            r#"{"conversations":[{"from":"human","value":"a"}]}"#,
            RowFormat::Sharegpt,
        ),
        (r#"{"text":"a"}"#, RowFormat::Text),
    ] {
        assert_eq!(parse(text).expect("a good row").0, format, "{text}");
    }
}

#[test]
fn alpaca_and_sharegpt_become_conversations() {
    assert_eq!(
        turns(r#"{"instruction":"Add.","input":"1 2","output":"3","system":"S"}"#),
        [
            (Role::System, "S".to_owned()),
            (Role::User, "Add.\n\n1 2".to_owned()),
            (Role::Assistant, "3".to_owned())
        ]
    );
    assert_eq!(
        turns(
            r#"{"system":"S","conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}"#
        ),
        [
            (Role::System, "S".to_owned()),
            (Role::User, "a".to_owned()),
            (Role::Assistant, "b".to_owned())
        ]
    );
}

#[test]
fn parts_weights_and_tool_calls() {
    let (_, row) = parse(
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
           {"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f"}}],"weight":0}],"tools":[{"x":1}]}"#,
    )
    .expect("a good row");
    let RowContent::Conversation { messages, tools } = row.content else {
        panic!("not a conversation");
    };
    assert_eq!(messages[0].content(), "ab");
    assert!(messages[0].trained() && !messages[1].trained());
    assert!(messages[1].fields().contains_key("tool_calls"));
    assert!(!messages[1].fields().contains_key("weight"));
    assert_eq!(tools.len(), 1);
}

#[test]
fn every_problem_of_a_row_is_reported() {
    let problems = parse(
        r#"{"messages":[{"role":"asistant","content":"a"},{"role":"user"},{"content":3},7]}"#,
    )
    .expect_err("refused");
    let fields: Vec<_> = problems.iter().map(|problem| &problem.at[..]).collect();
    assert_eq!(
        fields,
        [
            "messages[0].role",
            "messages[1].content",
            "messages[2].role",
            "messages[2].content",
            "messages[3]"
        ]
    );
}

#[test]
fn messages_say_what_where_and_the_fix() {
    for (text, expected) in [
        (
            r#"{"messages":[{"role":"asistant","content":"a"}]}"#,
            "messages[0].role: unknown role \"asistant\"; expected system, user, assistant or tool",
        ),
        (
            r#"{"messages":[]}"#,
            "messages: is empty; expected at least one message",
        ),
        (
            r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
            "messages[0].content[0]: part of type `image_url`; only {\"type\": \"text\", \"text\": ...} can be trained",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a","weight":0.5}]}"#,
            "messages[0].weight: found 0.5; expected 0 or 1",
        ),
        (
            r#"{"prompt":"a","completion":3}"#,
            "completion: found a number; expected a string",
        ),
        (
            r#"{"prompt":[{}],"completion":"a"}"#,
            "prompt: found an array; expected a string, or a list of messages in both prompt and completion",
        ),
        (
            r#"{"prompt":"a"}"#,
            "row: no known format has the keys `prompt`; expected messages, prompt and completion, instruction and output, conversations, or text",
        ),
        (
            r#"{"conversations":[{"from":"alien","value":"a"}]}"#,
            "conversations[0].from: unknown role \"alien\"; expected system, human, gpt or tool (also user, assistant, function_call, observation)",
        ),
        (
            r#"[1]"#,
            "row: found an array; expected one JSON object per line",
        ),
        (
            r#"{"a" 1}"#,
            "row: not valid JSON at column 6, in `a`: expected `:`; expected one JSON object per line",
        ),
    ] {
        assert_eq!(first(text), expected);
    }
}

#[test]
fn choices_find_the_answer() {
    let answer = |text: &str| {
        parse(text)
            .expect("a good row")
            .1
            .choices
            .expect("choices")
            .answer
    };
    assert_eq!(
        answer(r#"{"prompt":"p","completion":" b","choices":[" a"," b"]}"#),
        1
    );
    assert_eq!(
        answer(r#"{"prompt":"p","completion":"x","choices":["a","b"],"answer":0}"#),
        0
    );
    assert_eq!(
        first(r#"{"prompt":"p","completion":"x","choices":["a","b"]}"#),
        "choices: none of them is the row's answer; expected the completion among them, or `answer` with its index from 0"
    );
    assert_eq!(
        first(r#"{"prompt":"p","completion":"x","choices":["a"]}"#),
        "choices: is not a list of answers; expected at least two strings"
    );
}

#[test]
fn a_row_of_choices_need_not_repeat_its_answer() {
    let content = |text: &str| parse(text).expect("a good row").1.content;
    for answer in ["1", "\" b\""] {
        let row = format!(r#"{{"prompt":"p","choices":[" a"," b"],"answer":{answer}}}"#);
        assert_eq!(
            content(&row),
            RowContent::Prompt {
                system: None,
                prompt: "p".to_owned(),
                completion: " b".to_owned(),
                tools: Vec::new()
            }
        );
    }
    let row = r#"{"messages":[{"role":"user","content":"q"}],"choices":["a","b"],"answer":0}"#;
    let RowContent::Conversation { messages, .. } = content(row) else {
        panic!("a conversation");
    };
    assert_eq!(
        (messages.len(), messages[1].role(), messages[1].content()),
        (2, Role::Assistant, "a")
    );
    assert_eq!(
        first(r#"{"prompt":"p","choices":["a","b"],"answer":2}"#),
        "answer: found 2, which is none of the choices; expected the index of the right choice, from 0, or its text"
    );
    assert!(
        first(r#"{"prompt":"p","choices":["a","b"],"answr":0}"#)
            .starts_with("answer: is missing (did you mean it by `answr`?)")
    );
    assert_eq!(
        first(r#"{"prompt":"p","choices":["a","b"]}"#),
        "answer: is missing; expected the index of the right choice, from 0, or its text"
    );
}

#[test]
fn sharegpt_tool_calls_are_the_assistants() {
    let (_, row) = parse(
        r#"{"tools":"[{\"name\":\"f\"}]","conversations":[{"from":"human","value":"a"},{"from":"function_call","value":"{\"name\":\"f\",\"arguments\":{\"x\":1}}"},{"from":"observation","value":"2"},{"from":"gpt","value":"two"}]}"#,
    )
    .expect("a good row");
    let RowContent::Conversation { messages, tools } = row.content else {
        panic!("not a conversation");
    };
    assert_eq!(tools, [serde_json::json!({"name": "f"})]);
    assert_eq!(messages[1].role(), Role::Assistant);
    assert_eq!(
        messages[1].fields()["tool_calls"],
        serde_json::json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}])
    );
    assert_eq!(messages[2].role(), Role::Tool);
    assert_eq!(
        first(r#"{"conversations":[{"from":"function_call","value":"f(1)"}]}"#),
        "conversations[0].value: is not a function call; expected {\"name\": ..., \"arguments\": ...} as a string"
    );
}

#[test]
fn fields_of_other_names() {
    let names = [("prompt", "question"), ("completion", "answer")]
        .map(|(field, name)| (field.to_owned(), name.to_owned()));
    let names = FieldNames::try_from(indexmap::IndexMap::from(names)).expect("good");
    let read = |text: &str| parse_named_row(text.as_bytes(), None, &names);
    let (format, row) = read(r#"{"question":"q","answer":"a"}"#).expect("a good row");
    assert_eq!(format, RowFormat::PromptCompletion);
    assert_eq!(
        row.content,
        RowContent::Prompt {
            system: None,
            prompt: "q".to_owned(),
            completion: "a".to_owned(),
            tools: Vec::new()
        }
    );
    let problems = read(r#"{"question":"q","answer":3}"#).expect_err("refused");
    assert_eq!(problems[0].at, "answer");
}
