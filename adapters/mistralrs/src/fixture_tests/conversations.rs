//! Tests of conversations: an engine gets the same tokens as from mistral.rs itself; models without a template; invalid
//! templates.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use either::Either;
use mistralrs_core::{DefaultSchedulerMethod, MistralRsBuilder, SchedulerConfig};
use serde_json::{Value, json};

use super::serving::{Running, chat, events, parse, toml_for};
use super::{Case, servable};
use crate::engine::plain_tokenization;
use crate::quirks_0_8::abandoned_requests::tokenize;
use crate::{AskedConversation, ChatMessage, Engine, MonteCloraLoader, own_texts};

/// The base model with `template` as its own template.
pub(crate) fn with_template(template: &str) -> (Case, tempfile::TempDir) {
    servable().on_changed_base(|dir| {
        fs::write(dir.join("chat_template.jinja"), template).expect("written");
    })
}

fn without_template() -> (Case, tempfile::TempDir) {
    servable().on_changed_base(|dir| {
        for name in ["chat_template.jinja", "chat_template.json"] {
            let _ = fs::remove_file(dir.join(name));
        }
        let path = dir.join("tokenizer_config.json");
        let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
        let mut config: Value = serde_json::from_str(&text).expect("valid");
        config
            .as_object_mut()
            .expect("an object")
            .remove("chat_template");
        fs::write(path, config.to_string()).expect("written");
    })
}

/// A template that shows tools, tool calls and tool outputs.
pub(crate) const TOOLS: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

#[test]
fn an_engine_gets_the_tokens_that_mistralrs_makes_itself() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference");
    let read = |name: &str| fs::read_to_string(reference.join(name)).expect("readable");
    let conversation = [
        ChatMessage::new("system", "Be brief."),
        ChatMessage::new("user", " Why <b>1 < 2</b>? é "),
        ChatMessage::new("assistant", "So.\n"),
        ChatMessage::new("user", "And {{ x }}?"),
    ];
    let messages = || {
        let fields = conversation.iter().map(|message| {
            let fields = [("role", &message.role), ("content", &message.content)];
            let fields = fields.map(|(key, text)| (key.to_owned(), Either::Left(text.clone())));
            fields.into_iter().collect()
        });
        fields.collect()
    };
    for template in [
        // The base has no begin token, and transformers prints nothing for an undefined variable.
        read("llama3-like.jinja").replace("bos_token", "'<s>'"),
        read("qwen3-like.jinja"),
        "\n\n  {% for m in messages %}\n  {{ m.content }} {% if m.role == 'user' %}\nx{% endif %}\n{% endfor %}{{ bos_token }}\n".to_owned(),
        "{% for m in messages[::-1] %}{{ m.content.strip().upper() }}{% endfor %}".to_owned(),
    ] {
        let (case, _dir) = with_template(&template);
        let loader = MonteCloraLoader::builder(&case.base, "base").build().expect("sound");
        let engine = Engine::start(&loader).expect("loads");
        let ours = engine.tokenize_chat(&conversation).expect("tokens");
        engine.shut_down().expect("stops");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let theirs = runtime.expect("a runtime").block_on(async {
            let method = DefaultSchedulerMethod::Fixed(NonZeroUsize::MIN);
            let schedule = SchedulerConfig::DefaultScheduler { method };
            let pipeline = loader.load().expect("loads");
            let host = MistralRsBuilder::new(pipeline, schedule, false, None).build().await;
            let request = |response| plain_tokenization(Either::Left(messages()), response);
            tokenize(host.get_sender(None).expect("an engine"), request, ()).await.expect("tokens")
        });
        assert_eq!(ours, theirs, "{template}");
        assert!(!ours.is_empty());
    }
}

#[test]
fn the_text_that_mistralrs_alone_would_write_is_its_own() {
    let (case, _dir) = with_template(
        "{% if enable_thinking %}T {% endif %}{% for m in messages %}{{ m.role }}{{ m.content | tojson }}{% endfor %}{{ tools | tojson if tools }}",
    );
    let message = |content: &str| {
        let message = json!({"role": "user", "content": content, "weight": 1});
        message.as_object().expect("an object").clone()
    };
    let tool =
        json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let asked = |content: &str, tools: Vec<Value>| AskedConversation {
        messages: vec![message(content)],
        tools,
    };
    let asked = [
        asked("a < b", vec![]),
        asked("a", vec![tool]),
        asked("a", vec![json!({"name": 3})]),
    ];
    let texts = own_texts(&case.base, None, &asked).expect("loads");
    assert_eq!(texts[0].as_deref(), Ok("T user\"a \\u003c b\""));
    let with_tool = texts[1].as_deref().expect("a text");
    assert!(with_tool.contains("\"name\":\"f\""), "{with_tool}");
    let refused = texts[2].as_deref().expect_err("no tool");
    assert!(refused.contains("does not take the tools"), "{refused}");
}

#[test]
fn a_model_without_a_template_continues_texts_and_refuses_conversations() {
    let (case, _dir) = without_template();
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    for stream in [false, true] {
        let refused = parse(
            server.post("/v1/chat/completions", &chat("tuned", stream)),
            400,
        );
        assert_eq!(refused["error"]["param"], "messages");
        let message = refused["error"]["message"].as_str().expect("a text");
        assert!(
            message.contains("--chat-template") && message.contains("serve.toml"),
            "{message}"
        );
    }
    let text = json!({"model": "tuned", "prompt": "Why", "max_tokens": 3, "temperature": 0});
    let answer = parse(server.post("/v1/completions", &text), 200);
    let expected = answer["choices"][0]["text"].as_str().expect("a text");
    server.finish().expect("a clean stop");

    let loader = MonteCloraLoader::builder(&case.base, "tuned").adapter(&case.adapter);
    let engine = Engine::start(&loader.build().expect("sound")).expect("loads");
    let continued = engine.complete("Why", 3).expect("answered");
    assert_eq!(continued.text, expected.trim_start());
    assert_eq!(
        answer["usage"]["completion_tokens"],
        continued.token_ids.len()
    );
    assert_eq!(answer["usage"]["prompt_tokens"], continued.prompt_tokens);
    let error = engine
        .ask(&[ChatMessage::new("user", "Why?")], 3)
        .expect_err("refused");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("--chat-template"), "{error}");
    engine.shut_down().expect("stops");
}

#[test]
fn a_template_that_is_none_refuses_the_load() {
    let refuse = |case: &Case, template: Option<&Path>, place: &str| {
        let loader = MonteCloraLoader::builder(&case.base, "base")
            .chat_template(template.map(Path::to_owned));
        let loader = loader.build().expect("sound");
        for error in [loader.check().err(), loader.load().err()] {
            let error = error.expect("refused");
            assert_eq!(error.exit_code(), 4, "{error}");
            assert!(error.problems()[0].at.ends_with(place), "{error}");
            assert!(
                error.to_string().contains("line 2 of the template"),
                "{error}"
            );
        }
    };
    let broken = "{{ messages }}\n{% for m in %}{% endfor %}";
    let (case, dir) = with_template(broken);
    refuse(&case, None, "chat_template.jinja");
    let own = dir.path().join("mine.jinja");
    fs::write(&own, broken).expect("written");
    refuse(&servable(), Some(&own), "mine.jinja");
    let (case, _dir) = servable().on_changed_base(|dir| {
        let _ = fs::remove_file(dir.join("chat_template.jinja"));
        let list = json!({"chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": broken}]});
        fs::write(dir.join("tokenizer_config.json"), list.to_string()).expect("written");
    });
    refuse(
        &case,
        None,
        "tokenizer_config.json: chat_template: tool_use",
    );
}

#[test]
fn tools_need_a_template_that_shows_them() {
    let tool =
        json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    let mut asked = chat("tuned", false);
    asked["tools"] = json!([tool]);
    let (case, _dir) = with_template("{% for m in messages %}{{ m.content }}{% endfor %}");
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    for choice in [json!("auto"), json!("required"), json!("none")] {
        asked["tool_choice"] = choice;
        let refused = parse(server.post("/v1/chat/completions", &asked), 400);
        assert_eq!(refused["error"]["param"], "tools");
    }
    let mut none = chat("tuned", false);
    (none["tools"], none["tool_choice"]) = (json!([]), json!("none"));
    parse(server.post("/v1/chat/completions", &none), 200);
    server.finish().expect("a clean stop");

    // Leaves room for the answer within the few positions of the tiny model.
    let compact = TOOLS.replace("tools | tojson", "tools | tojson(separators=(',', ':'))");
    let (case, _dir) = with_template(&compact);
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    let n_prompt = |body: &Value| {
        let answer = parse(server.post("/v1/chat/completions", body), 200);
        answer["usage"]["prompt_tokens"].as_u64().expect("counted")
    };
    super::requests::a_call_that_must_be_made_is_made(&server);
    asked["tool_choice"] = json!("auto");
    assert!(
        n_prompt(&asked) > n_prompt(&none) + 20,
        "the model sees the tool"
    );
    server.finish().expect("a clean stop");
}

/// The text generated after a prefix is the text generated after the same tokens.
#[test]
fn an_answer_continues_the_last_message() {
    let (case, _dir) = with_template(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    );
    let (server, _dir) = Running::start(&toml_for(&case, ""));
    let text = |stream: bool, body: &Value| {
        let mut body = body.clone();
        body["stream"] = json!(stream);
        let response = server.post("/v1/chat/completions", &body);
        if !stream {
            let answer = parse(response, 200);
            let n_prompt = answer["usage"]["prompt_tokens"].as_u64();
            return (
                answer["choices"][0]["message"]["content"]
                    .as_str()
                    .expect("a text")
                    .to_owned(),
                n_prompt,
            );
        }
        let chunks = events(response);
        let pieces = chunks.iter().filter_map(|data| {
            let chunk: Value = serde_json::from_str(data).ok()?;
            Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned())
        });
        (pieces.collect(), None)
    };
    let plain = json!({"model": "tuned", "temperature": 0, "max_tokens": 12, "prompt": "[user]Why?[end][assistant]Because"});
    let plain = parse(server.post("/v1/completions", &plain), 200);
    let expected = plain["choices"][0]["text"].as_str().expect("a text");
    let n_frame = server_frame(&case);
    for (key, prefix) in [("prefix", true), ("continue_final_message", false)] {
        let mut body = chat("tuned", false);
        let mut last = json!({"role": "assistant", "content": "Because"});
        if prefix {
            last["prefix"] = json!(true);
        } else {
            body[key] = json!(true);
            body["add_generation_prompt"] = json!(false);
        }
        body["messages"] = json!([{"role": "user", "content": "Why?"}, last]);
        let (whole, n_prompt) = text(false, &body);
        assert_eq!(
            n_prompt.expect("counted") + n_frame,
            plain["usage"]["prompt_tokens"].as_u64().expect("counted")
        );
        if n_frame == 0 {
            assert_eq!(whole, expected.trim_end_matches('\u{fffd}'), "{key}");
        }
        assert_eq!(text(true, &body).0, whole, "{key}");
    }
    server.finish().expect("a clean stop");
}

/// Number of tokens that the tokenizer of `case` puts around plain text, but not around a conversation.
fn server_frame(case: &Case) -> u64 {
    let frame = crate::chat_files::text_frame(&case.base).expect("readable");
    (frame.prefix.len() + frame.suffix.len()) as u64
}
