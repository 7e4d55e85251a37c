//! Every format read and every problem of a row, word for word.

use monteclora_converters::Problem;

use super::*;

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
            "row: found an array; expected one JSON object a line",
        ),
        (
            r#"{"a" 1}"#,
            "row: not valid JSON at column 6, in `a`: expected `:`; expected one JSON object a line",
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

#[test]
fn turns_say_whether_they_are_trained() {
    let trained = |turn: &str| {
        let row = format!(
            r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":"a",{turn}}}]}}"#
        );
        parse(&row).map(|(_, row)| {
            let RowContent::Conversation { messages, .. } = row.content else {
                panic!("not a conversation");
            };
            let fields: Vec<_> = messages[1].fields().keys().cloned().collect();
            assert_eq!(fields, ["role", "content"]);
            (messages[1].trained(), messages[1].must_train())
        })
    };
    for (turn, expected) in [
        (r#""weight":0"#, (false, false)),
        (r#""weight":1.0"#, (true, false)),
        (r#""train":false"#, (false, false)),
        (r#""training":0"#, (false, false)),
        (r#""loss":true"#, (true, true)),
        (r#""train":null,"weight":null"#, (true, false)),
        (r#""train":false,"weight":0"#, (false, false)),
    ] {
        assert_eq!(trained(turn).expect("a good row"), expected, "{turn}");
    }
    for (turn, expected) in [
        (
            r#""train":true,"weight":0"#,
            "messages[1].train: says that the turn is trained, and `weight` that it is not; keep one of them",
        ),
        (
            r#""train":"no""#,
            "messages[1].train: found \"no\"; expected true or false",
        ),
        (
            r#""weight":2"#,
            "messages[1].weight: found 2; expected 0 or 1",
        ),
        (
            r#""loss_mask":[1,0]"#,
            "messages[1].loss_mask: says what is trained, and is not supported; a turn is trained or not: write `\"train\": false` or `\"weight\": 0` beside it, or remove the key",
        ),
        (
            r#""wieght":0"#,
            "messages[1].wieght: nothing reads it (did you mean `weight`?); rename or remove the key",
        ),
        (
            r#""images":["x.png"]"#,
            "messages[1].images: is not text; only text can be trained; remove it, or leave the row out",
        ),
    ] {
        let problems = trained(turn).expect_err("refused");
        assert_eq!(problems[0].to_string(), expected);
    }
    assert_eq!(
        first(
            r#"{"conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a","weight":0.5}]}"#
        ),
        "conversations[1].weight: found 0.5; expected 0 or 1"
    );
}

#[test]
fn keys_of_turns_are_kept_for_the_template_or_counted() {
    let (_, row) = parse(
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"q","cache_control":{"type":"x"}}],"name":"Bob","mood":"glad"},
           {"role":"assistant","content":"a","reasoning_content":"r","refusal":null}]}"#,
    )
    .expect("a good row");
    assert_eq!(row.notes.unread, ["messages[].content[].cache_control"]);
    assert_eq!(
        row.notes.for_template,
        [
            "messages[].name",
            "messages[].mood",
            "messages[].reasoning_content"
        ]
    );
    let (_, row) = parse(
        r#"{"conversations":[{"from":"human","value":"q","mood":"glad"},{"from":"gpt","value":"a","reasoning_content":"r"}]}"#,
    )
    .expect("a good row");
    assert_eq!(row.notes.unread, ["conversations[].mood"]);
    let RowContent::Conversation { messages, .. } = row.content else {
        panic!("not a conversation");
    };
    assert_eq!(messages[1].fields()["reasoning_content"], "r");
}

#[test]
fn context_is_read_or_refused() {
    const PROMPT: &str = r#""prompt":"p","completion":"c""#;
    let with = |rest: &str| format!("{{{PROMPT},{rest}}}");
    for rest in [
        r#""system":"""#,
        r#""system":null"#,
        r#""tools":[],"functions":null,"history":[],"images":[]"#,
        r#""weight":1,"train":true,"label":true"#,
        r#""chat_template_kwargs":"{\"enable_thinking\": false}""#,
        r#""documents":[{"title":"t","text":"d"}]"#,
        r#""system":[{"type":"text","text":"S"}]"#,
    ] {
        let (_, row) = parse(&with(rest)).expect("a good row");
        assert_eq!(row.notes.unread, [""; 0], "{rest}");
    }
    for (rest, expected) in [
        (
            r#""history":[["a","b"]]"#,
            "history: is context that nothing reads; write earlier turns as messages",
        ),
        (
            r#""context":"x""#,
            "context: is context that nothing reads; write it into the prompt, or remove the column",
        ),
        (
            r#""system_prompt":"x""#,
            "system_prompt: is context that nothing reads; name it: `fields = { system = \"system_prompt\" }` under [data] of run.toml, or `--field system=system_prompt` for the data commands; or remove the column",
        ),
        (
            r#""images":["x.png"]"#,
            "images: is not text; only text can be trained; remove the column, or leave the row out",
        ),
        (
            r#""weight":0.5"#,
            "weight: says what is trained, and is not supported; rows have no weights: leave out rows of weight 0, repeat rows that count more, and remove the column",
        ),
        (
            r#""reward":0.5"#,
            "reward: says what is trained, and is not supported; keep the rows whose answers are to be learnt, and remove the column",
        ),
        (
            r#""rejected":"bad""#,
            "rejected: is of a preference pair (DPO), which is not supported; write the better answer alone, and remove the column",
        ),
        (
            r#""labels":[1,2]"#,
            "labels: says what is trained, and is not supported; rows are tokenised and masked here: remove the column, and choose with train_on or with `\"train\": false` beside a turn",
        ),
        (
            r#""lable":false"#,
            "lable: nothing reads this column (did you mean `label`?); rename or remove it",
        ),
        (
            r#""Tools":[{"name":"f"}]"#,
            "Tools: nothing reads this column (did you mean `tools`?); rename or remove it",
        ),
        (
            r#""enable_thinking":false"#,
            "enable_thinking: is for the chat template, which does not get it from here; write `\"chat_template_kwargs\": {\"enable_thinking\": false}`",
        ),
        (
            r#""chat_template_kwargs":"no""#,
            "chat_template_kwargs: is neither an object nor the JSON text of one; expected the template's variables by name",
        ),
        (
            r#""chat_template_kwargs":{"tools":[]}"#,
            "chat_template_kwargs.tools: is not for a row to say here; remove it",
        ),
        (
            r#""tools":[1]"#,
            "tools[0]: found a number; expected the description of a tool: an object",
        ),
        (
            r#""tools":[{"name":"f"}],"functions":[{"name":"f"}]"#,
            "functions: stands beside `tools`, which says the same; keep one of them",
        ),
    ] {
        assert_eq!(first(&with(rest)), expected);
    }
    // Beside a bare text nothing is context, and numbers about a row are no training.
    let (_, row) =
        parse(r#"{"text":"t","context":"x","label":0,"score":0.5,"id":1}"#).expect("a good row");
    assert_eq!(row.notes.unread, ["context", "label", "score", "id"]);
    let system = r#"{"system":"S","messages":[{"role":"system","content":"T"},{"role":"user","content":"q"}]}"#;
    assert_eq!(
        first(system),
        "system: stands beside a system turn that says something else; keep one of them"
    );
    assert_eq!(turns(&system.replace('T', "S")).len(), 2);
}

#[test]
fn earlier_turns_of_alpaca_are_pairs_or_their_text() {
    for history in [r#"[["a","b"]]"#, r#""[[\"a\",\"b\"]]""#] {
        let row = format!(r#"{{"instruction":"i","output":"o","history":{history}}}"#);
        let said: Vec<_> = turns(&row).into_iter().map(|(_, text)| text).collect();
        assert_eq!(said, ["a", "b", "i", "o"]);
    }
    assert_eq!(
        first(r#"{"instruction":"i","output":"o","history":[["a"]]}"#),
        "history[0]: is no pair of texts; expected a list of earlier turns, each [user, assistant]"
    );
}

#[test]
fn arguments_of_calls_are_decoded_or_refused() {
    let row = |arguments: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"q"}},{{"role":"assistant","content":null,"tool_calls":[{{"function":{{"name":"f","arguments":{arguments}}}}}]}}]}}"#
        )
    };
    for (arguments, expected, n_decoded) in [
        (r#""{\"b\": 1, \"a\": 2}""#, r#"{"b":1,"a":2}"#, 1),
        (r#""""#, "{}", 1),
        (r#"{"a":1}"#, r#"{"a":1}"#, 0),
    ] {
        let (_, row) = parse(&row(arguments)).expect("a good row");
        let RowContent::Conversation { messages, .. } = &row.content else {
            panic!("not a conversation");
        };
        let found = &messages[1].fields()["tool_calls"][0]["function"]["arguments"];
        assert_eq!(
            (found.to_string().as_str(), row.notes.n_decoded_arguments),
            (expected, n_decoded)
        );
    }
    for (arguments, part) in [
        (
            r#""city=Paris""#,
            "messages[1].tool_calls[0].function.arguments: found text that is not JSON",
        ),
        (
            r#""[1]""#,
            "arguments: found the JSON text of an array; write the object itself, or its JSON text",
        ),
        (r#""{\"a\":1,\"a\":2}""#, "key `a` occurs twice"),
    ] {
        let found = first(&row(arguments));
        assert!(found.contains(part), "{found}");
    }
    let old = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":null,"function_call":{"name":"f","arguments":"{}"}}]}"#;
    let (_, row) = parse(old).expect("a good row");
    let RowContent::Conversation { messages, .. } = &row.content else {
        panic!("not a conversation");
    };
    assert_eq!(
        messages[1].fields()["tool_calls"],
        serde_json::json!([{"type": "function", "function": {"name": "f", "arguments": {}}}])
    );
}

#[test]
fn rows_of_no_format_say_what_would_make_them_one() {
    for (row, part) in [
        (
            r#"{"mesages":[{"role":"user","content":"a"}]}"#,
            "did you mean `messages` for `mesages`?; rename the key",
        ),
        (
            r#"{"question":"q","answer":"a"}"#,
            "`fields = { prompt = \"question\", completion = \"answer\" }` under [data] of run.toml, or `--field prompt=question --field completion=answer`",
        ),
        (
            r#"{"instruction":"q","context":"","response":"a"}"#,
            "`--field output=response`",
        ),
        (
            r#"{"dialog":[{"role":"user","content":"a"}]}"#,
            "`--field messages=dialog`",
        ),
        (
            r#"{"turns":[{"from":"human","value":"a"}]}"#,
            "`--field conversations=turns`",
        ),
        (r#"{"content":"a document"}"#, "`--field text=content`"),
        (
            r#"{"version":1,"rows":[{"text":"a"}]}"#,
            "`rows` is a list of 1 objects, which may be the rows; write them one a line: `jq -c '.[\"rows\"][]'",
        ),
        (
            r#"{"input_ids":[1,2]}"#,
            "the row is tokenised already; give the text instead",
        ),
        (
            r#"{"prompt":"p","chosen":"a","rejected":"b"}"#,
            "`chosen` is of a preference pair (DPO), which is not supported",
        ),
    ] {
        let found = first(row);
        assert!(found.contains(part), "{found}");
    }
}

#[test]
fn a_question_may_hold_what_is_for_training() {
    for row in [
        r#"{"prompt":"p","chosen":"a","rejected":"b"}"#,
        r#"{"prompt":"p","completion":"c","label":false,"reward":1,"weight":0}"#,
    ] {
        let asked = parse_question(row.as_bytes()).expect("a question");
        assert!(asked.notes.unread.len() >= 2, "{:?}", asked.notes);
    }
    for row in [
        r#"{"prompt":"p","context":"x"}"#,
        r#"{"prompt":"p","choises":["a","b"]}"#,
    ] {
        parse_question(row.as_bytes()).expect_err("context and misspelt columns are refused");
    }
}
