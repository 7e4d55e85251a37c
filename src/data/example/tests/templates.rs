//! Chat templates: generation markers, the recorded texts of transformers, variables.

use super::*;

#[test]
fn generation_markers_say_what_is_trained_of_the_chosen_turns() {
    for (train_on, expected) in [
        (TrainOn::Assistant, vec!["A1<|im_end|>", "A2<|im_end|>"]),
        (TrainOn::LastAssistant, vec!["A2<|im_end|>"]),
        (TrainOn::Completion, vec!["A2<|im_end|>"]),
    ] {
        let options = EncodeOptions {
            train_on,
            ..OPTIONS
        };
        let encoder = encoder(MARKED, false, options);
        let examples = examples(&encoder, TWO_TURNS);
        assert_eq!(examples.len(), 1);
        assert_eq!(trained(&encoder, &examples[0]), expected, "{train_on:?}");
    }
    let encoder = encoder(MARKED, false, OPTIONS);
    let weighted = r#"{"messages":[{"role":"user","content":"U1"},{"role":"assistant","content":"A1","weight":0},
        {"role":"user","content":"U2"},{"role":"assistant","content":"A2"}]}"#;
    let examples = examples(&encoder, weighted);
    assert_eq!(trained(&encoder, &examples[0]), ["A2<|im_end|>"]);
    let all = EncodeOptions {
        train_on: TrainOn::All,
        ..OPTIONS
    };
    let encoder = super::encoder(MARKED, false, all);
    let whole = super::examples(&encoder, TWO_TURNS);
    assert!(whole[0].loss_mask.iter().all(|trained| *trained));
    let nothing = MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgeneration %}",
        "{% endgeneration %}{{ m.content }}<|im_end|>",
    );
    assert_eq!(
        problem(&super::encoder(&nothing, false, OPTIONS), TWO_TURNS),
        "messages: the chat template's generation markers mark nothing of it; correct the template, or give another one with --chat-template"
    );
}

/// Texts, prompts and marked ranges equal those of transformers 5.17 for the recorded template cases.
#[test]
fn cases_of_templates_have_the_text_of_transformers() {
    let own = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let root = std::env::var_os("MONTECLORA_CASES");
    let root = root.map_or_else(|| own.join("cases"), std::path::PathBuf::from);
    let recorded = std::fs::read(own.join("chat_template_texts.json")).expect("recorded");
    let recorded: Value = serde_json::from_slice(&recorded).expect("JSON");
    let mut n_rows = 0;
    for (name, expected) in recorded.as_object().expect("an object") {
        let case = root.join("training").join(name);
        let Ok(rows) = std::fs::read_to_string(case.join("rows.jsonl")) else {
            continue;
        };
        let read = |file: &str| std::fs::read_to_string(case.join(file)).ok();
        let dir = model_with_template(
            read("t.jinja").as_deref().unwrap_or("{{ messages }}"),
            false,
        );
        if let Some(tool_use) = read("additional_chat_templates_tool_use.jinja") {
            let more = dir.path().join("additional_chat_templates");
            std::fs::create_dir(&more).expect("created");
            std::fs::write(more.join("tool_use.jinja"), tool_use).expect("written");
        }
        let encoder = encoder_at(dir.path(), OPTIONS);
        for (line, expected) in rows.lines().zip(expected.as_array().expect("a list")) {
            n_rows += 1;
            let row = row(line);
            let RowContent::Conversation { messages, tools } = &row.content else {
                panic!("{name}: no conversation")
            };
            let render = |end: usize, opens| {
                let template = encoder.template().expect("has one");
                let text = template.render(&messages[..end], tools, opens);
                text.expect("renders")
            };
            let n = messages.len();
            assert_eq!(
                render(n, false),
                expected["text"].as_str().expect("a text"),
                "{name}"
            );
            assert_eq!(
                render(n - 1, true),
                expected["prompt"].as_str().expect("a text"),
                "{name}"
            );
            if name == "template-without-tools" {
                let said = problem(&encoder, line);
                assert!(
                    said.starts_with(
                        "tools, messages[1].tool_calls: the chat template does not print them"
                    ),
                    "{said}"
                );
                continue;
            }
            let examples = encoder.encode_row(&row).expect("encodes").examples;
            let whole = expected["text"].as_str().expect("a text").trim_end();
            assert_eq!(
                text(&encoder, &examples[0].input_ids).trim_end(),
                whole,
                "{name}"
            );
            let trained = trained(&encoder, &examples[0]);
            match expected["generation"].as_array() {
                Some(marked) => {
                    assert_eq!(Value::from(trained), Value::from(marked.clone()), "{name}")
                }
                None => assert!(
                    trained.last().expect("trains").ends_with("<|im_end|>"),
                    "{name}"
                ),
            }
        }
    }
    assert!(n_rows > 0, "no case was found");
}

#[test]
fn variables_of_the_run_and_of_the_row_reach_the_template() {
    let template = "{% if mood is defined %}{{ mood }}:{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let dir = model_with_template(template, false);
    let of = |variables: &Value| {
        let variables = variables.as_object().expect("an object").clone();
        Encoder::with_variables(dir.path(), None, variables, OPTIONS).expect("loads")
    };
    let begin = |encoder: &Encoder, more: &str| {
        let row = format!(
            r#"{{"messages":[{{"role":"user","content":"U"}},{{"role":"assistant","content":"A"}}]{more}}}"#
        );
        let prompt = encoder.row_prompt(&super::row(&row)).expect("a prompt");
        let example = &super::examples(encoder, &row)[0];
        assert!(example.input_ids.starts_with(&prompt));
        let whole = text(encoder, &example.input_ids);
        whole
            .split("<|im_start|>")
            .next()
            .expect("a text")
            .to_owned()
    };
    let sad = r#","chat_template_kwargs":{"mood":"sad"}"#;
    let none = of(&serde_json::json!({}));
    assert_eq!(
        (begin(&none, ""), begin(&none, sad)),
        (String::new(), "sad:".to_owned())
    );
    let glad = of(&serde_json::json!({"mood": "glad"}));
    assert_eq!(
        (begin(&glad, ""), begin(&glad, sad)),
        ("glad:".to_owned(), "sad:".to_owned())
    );
}
