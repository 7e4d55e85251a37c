//! Tests of columns beside the turns and keys within them: each is used, refused by name, or counted.

use super::*;

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
            let said = ["weight", "train", "training", "loss"];
            assert!(
                !messages[1]
                    .fields()
                    .keys()
                    .any(|key| said.contains(&&key[..]))
            );
            (messages[1].trained(), messages[1].must_train())
        })
    };
    for (turn, expected) in [
        (r#""weight":0"#, (false, false)),
        (r#""weight":1.0"#, (true, false)),
        (r#""train":false"#, (false, false)),
        (r#""training":0"#, (false, false)),
        (r#""loss":true"#, (true, true)),
        (r#""masked":false,"trainable":1"#, (true, false)),
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
    for row in [
        r#"{"messages":[{"rolle":"user","content":"q"}]}"#,
        r#"{"messages":[{"role":"user","Content":"q"}]}"#,
        r#"{"conversations":[{"from":"human","valeu":"q"}]}"#,
        r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","argumnets":{"a":1}}}]}]}"#,
    ] {
        let problems = parse(row).expect_err("misspelt");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].message.contains("did you mean"), "{problems:?}");
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
           {"role":"assistant","content":"a","reasoning_content":"r","refusal":null,"tool_calls":[{"index":0,"function":{"name":"f"}}]}]}"#,
    )
    .expect("a good row");
    assert_eq!(row.notes.unread, ["messages[].content[].cache_control"]);
    assert_eq!(
        row.notes.for_template,
        [
            "messages[].name",
            "messages[].mood",
            "messages[].tool_calls[].index",
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
        r#""weight":"1.0","training":"true","kto_tag":true"#,
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
            r#""label":"False""#,
            "label: false marks an answer to avoid (KTO), which is not supported; remove the rows whose label is false",
        ),
        (
            r#""reasoning":"because""#,
            "reasoning: is a part of the answer that nothing reads; write the row as messages, with `reasoning_content` in the assistant turn, or remove the column",
        ),
        (
            r#""systemPrompt":"x""#,
            "systemPrompt: is context that nothing reads; name it: `fields = { system = \"systemPrompt\" }` under [data] of run.toml, or `--field system=systemPrompt` for the data commands; or remove the column",
        ),
        (
            r#""train_on_inputs":true"#,
            "train_on_inputs: says what is trained, and is not supported; choose with train_on for all rows, and remove the column",
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
    // Beside a bare text no column is context, and numbers about a row do not control training.
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
fn a_table_by_columns_is_one_report() {
    for row in [
        r#"{"prompt":{"0":"a","1":"b"},"completion":{"0":"c","1":"d"}}"#,
        r#"{"prompt":["a","b"],"completion":["c","d"]}"#,
        r#"{"text":["a","b"]}"#,
    ] {
        let problems = parse(row).expect_err("refused");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].message.contains("a table by columns"),
            "{problems:?}"
        );
    }
}

#[test]
fn numbers_that_cannot_be_kept_are_refused_where_they_count() {
    let call = r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":{"id":123456789012345678901234567890}}}]}]}"#;
    assert_eq!(
        first(call),
        "messages[0].tool_calls[0].function.arguments.id: 123456789012345678901234567890 is too long to be kept exactly; write it as a string"
    );
    let text = r#"{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{\"id\": 123456789012345678901234567890}"}}]}]}"#;
    let found = first(text);
    assert!(
        found.contains("arguments: the number 123456789012345678901234567890 in it is too long"),
        "{found}"
    );
    let call = r#"{"conversations":[{"from":"function_call","value":{"name":"f","arguments":{"id":123456789012345678901234567890}}}]}"#;
    let found = first(call);
    assert!(found.contains("is too long to be kept exactly"), "{found}");
    let beside = r#"{"prompt":"a","completion":"b","prompt_id":123456789012345678901234567890}"#;
    parse(beside).expect("nothing reads prompt_id");
    // Digits in a string are not a number, and a long number in a column that nothing reads does no harm.
    let row = r#"{"text":"123456789012345678901234567890","id":123456789012345678901234567890}"#;
    assert_eq!(parse(row).expect("a good row").1.notes.unread, ["id"]);
    parse(r#"{"messages":[{"role":"user","content":"q"}],"tools":[{"max":18446744073709551615,"min":-9223372036854775808,"x":1.5e300}]}"#).expect("exact");
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

#[test]
fn turns_and_roles_of_other_programs_are_told_with_their_names_here() {
    for (row, expected) in [
        (
            r#"{"messages":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}"#,
            "--field conversations=messages",
        ),
        (
            r#"{"messages":[{"role":"developer","content":"q"},{"role":"assistant","content":"a"}]}"#,
            r#"unknown role "developer"; expected system, user, assistant or tool; write "system" in its place"#,
        ),
        (
            r#"{"query":"q","response":"a","history":[["x","y"]]}"#,
            "--field instruction=query --field output=response",
        ),
    ] {
        let problems = parse_row(row.as_bytes(), None).expect_err("refused");
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].to_string().contains(expected),
            "{}",
            problems[0]
        );
    }
}
