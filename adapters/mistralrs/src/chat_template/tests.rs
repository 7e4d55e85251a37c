use super::*;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn compiled(source: &str) -> ChatTemplate {
    named(&json!(source)).expect("valid")
}

fn named(template: &Value) -> Result<ChatTemplate, Vec<Problem>> {
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    let tokens = tokens.as_object().expect("an object").clone();
    ChatTemplate::compile("chat_template.jinja", template, tokens)
}

fn messages(list: Value) -> Vec<Map<String, Value>> {
    serde_json::from_value(list).expect("messages")
}

fn conversation(content: &str, end: End) -> Conversation {
    Conversation {
        messages: messages(json!([
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": content},
        ])),
        end,
        ..Conversation::default()
    }
}

fn rendered(template: &ChatTemplate, content: &str, end: End) -> Result<String, Refusal> {
    template.render(&conversation(content, end))
}

/// Shapes of the templates of common families, from their `tokenizer_config.json`.
const FAMILIES: [(&str, &str); 6] = [
    ("SmolLM2", CHATML),
    (
        "Llama 3",
        include_str!("../../../../tests/reference/llama3-like.jinja"),
    ),
    (
        "Qwen 3",
        include_str!("../../../../tests/reference/qwen3-like.jinja"),
    ),
    (
        "Mistral",
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}\
         {% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    ),
    (
        "Gemma",
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}{{ '<start_of_turn>' + role + '\n' \
         + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    (
        "Phi 3",
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}\
         {{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
];

/// A continued conversation is the closed conversation up to the end of its last message.
#[test]
fn the_last_message_is_continued_where_it_ends() {
    for (family, source) in FAMILIES {
        let template = compiled(source);
        for content in ["Because", "Because of 1 < 2", "é {{ x }} {% y %}", "Why?"] {
            let closed = rendered(&template, content, End::Closed).expect("renders");
            let open = rendered(&template, content, End::Open).expect("renders");
            assert!(
                closed.starts_with(&open),
                "{family}: {open:?} of {closed:?}"
            );
            assert!(open.ends_with(content), "{family}: {open:?}");
        }
        // White space at the end is kept if the template keeps it.
        let spaced = rendered(&template, "Because ", End::Open).expect("renders");
        let keeps = rendered(&template, "Because ", End::Closed)
            .expect("renders")
            .contains("Because ");
        assert_eq!(spaced.ends_with("Because "), keeps, "{family}: {spaced:?}");
        let empty = rendered(&template, "", End::Open).expect("renders");
        assert!(
            rendered(&template, "", End::Closed)
                .expect("renders")
                .starts_with(&empty)
        );
    }
    for hides in [
        "{{ messages[0].content }}",
        "{{ messages[1].content | upper }}",
    ] {
        let refusal = rendered(&compiled(hides), "Because", End::Open).expect_err("refused");
        assert!(refusal.0.contains("cannot be continued"), "{refusal:?}");
    }
}

#[test]
fn the_end_is_an_opening_or_none() {
    let template = compiled(CHATML);
    let closed = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n";
    assert_eq!(
        rendered(&template, "So.", End::Closed).as_deref(),
        Ok(closed)
    );
    let opened = format!("{closed}<|im_start|>assistant\n");
    assert_eq!(rendered(&template, "So.", End::Opening), Ok(opened));
}

#[test]
fn named_templates_serve_conversations_with_and_without_tools() {
    let list = json!([
        {"name": "tool_use", "template": "{{ tools | tojson }}"}, {"name": "default", "template": "{{ bos_token }}plain"},
        {"name": "rag", "template": "{% broken"},
    ]);
    let template = named(&list).expect("valid");
    assert!(template.takes_tools());
    let mut conversation = conversation("x", End::Closed);
    assert_eq!(template.render(&conversation).as_deref(), Ok("<s>plain"));
    conversation.tools = vec![json!({"a": "<it's>"})];
    assert_eq!(
        template.render(&conversation).as_deref(),
        Ok(r#"[{"a": "<it's>"}]"#)
    );
    for (wrong, at) in [
        (
            json!([{"name": "tool_use", "template": "x"}]),
            "chat_template.jinja",
        ),
        (json!([{"name": "default"}]), "chat_template.jinja"),
        (
            json!([{"name": "default", "template": "{% x"}]),
            "chat_template.jinja: default",
        ),
        (json!(3), "chat_template.jinja"),
        (json!("a\n{% for %}"), "chat_template.jinja"),
    ] {
        let problems = named(&wrong).expect_err("refused");
        assert_eq!(
            (problems[0].at.as_str(), problems[0].exit),
            (at, 4),
            "{wrong}"
        );
    }
    let problem = named(&json!("a\n{% for %}"))
        .expect_err("refused")
        .remove(0);
    assert!(problem.message.contains("line 2"), "{}", problem.message);
}

#[test]
fn whether_tools_are_shown_is_known() {
    for (source, takes) in [
        (CHATML, false),
        ("{% if tools %}x{% endif %}", true),
        (
            "{% if not tools is defined %}{% set tools = none %}{% endif %}",
            true,
        ),
        ("{% set tools = tools or [] %}{{ tools }}", true),
        ("{% if xml_tools %}x{% endif %}", false),
        ("You have tools. {{ messages }}", false),
    ] {
        assert_eq!(compiled(source).takes_tools(), takes, "{source}");
    }
}

#[test]
fn variables_are_those_of_the_request_or_of_the_run_or_none() {
    let template = compiled(
        "{{ enable_thinking }} {{ reasoning_effort }} {{ day }} {{ eos_token }}{{ date_string }}",
    );
    let mut conversation = conversation("x", End::Closed);
    assert_eq!(template.render(&conversation).as_deref(), Ok("   </s>"));
    let trained_with = json!({"enable_thinking": true, "day": "Monday"});
    let template = template.with_variables(trained_with.as_object().expect("an object").clone());
    assert_eq!(
        template.render(&conversation).as_deref(),
        Ok("True  Monday </s>")
    );
    for (name, value) in [
        ("enable_thinking", json!(false)),
        ("day", json!([1, {"a": null}])),
    ] {
        conversation.variables.insert(name.to_owned(), value);
    }
    let text = template.render(&conversation).expect("renders");
    assert_eq!(text, "False  [1, {'a': None}] </s>");
}

/// mistral.rs renders the last of these templates in its engine, where they end the engine.
#[test]
fn odd_templates_and_odd_messages_are_refused_and_no_panic() {
    let sources = [
        CHATML,
        "",
        "{{ messages[7].content.x.y }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages | tojson(indent=-3) }}",
        "{{ messages | tojson(indent=99999999999) }}",
        "{{ messages | tojson(indent='x', ensure_ascii=false) }}",
        "{{ raise_exception | tojson }}",
        "{{ raise_exception(3) }}{{ raise_exception() }}",
        "{{ strftime_now('%Q') }}",
        "{{ strftime_now(1) }}",
        "{{ range(100000000000) }}",
        "{{ messages | map(attribute='content') | join | nonsense }}",
        "{{ undefined_function() }}",
        // minijinja 2.24 panics here on an empty text.
        "{{ messages[0]['content'][5:-100:-1] }}",
        "{{ 1 // 0 }}{{ 1 % 0 }}{{ 'a' * 100000000000 }}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{{ messages[0].content.split(messages[0].role)[0].strip().title().nonsense() }}",
        "{{ namespace(a=1).b.c }}",
    ];
    let mut depth = json!("x");
    for _ in 0..120 {
        depth = json!([depth]);
    }
    let lists = [
        json!([]),
        json!([{}]),
        json!([{"role": "user"}]),
        json!([{"role": "", "content": ""}]),
        json!([{"role": "\u{0}", "content": "é\u{1f600}{{ x }}{% y %}"}]),
        json!([{"role": null, "content": [1, {"a": depth}]}]),
        json!([{"role": 1e300, "content": -0.0, "tool_calls": {"a": []}}]),
    ];
    let (mut n_rendered, mut n_refused) = (0, 0);
    for source in sources {
        let template = compiled(source);
        for list in &lists {
            for end in [End::Opening, End::Closed, End::Open] {
                let conversation = Conversation {
                    messages: messages(list.clone()),
                    tools: vec![json!(null), depth.clone()],
                    end,
                    ..Conversation::default()
                };
                match template.render(&conversation) {
                    Ok(_) => n_rendered += 1,
                    Err(Refusal(reason)) => {
                        assert!(!reason.is_empty());
                        n_refused += 1;
                    }
                }
            }
        }
    }
    assert!(
        n_rendered > 20 && n_refused > 200,
        "{n_rendered}, {n_refused}"
    );
}
