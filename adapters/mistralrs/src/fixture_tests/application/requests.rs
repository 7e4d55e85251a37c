//! Tests which requests of an application are accepted and which are refused.

use std::collections::HashMap;
use std::fs;

use either::Either;
use mistralrs::error::Error as SdkError;
use mistralrs::{
    Constraint, Function, SamplingParams, StopTokens, TextMessageRole, TextMessages, Tool,
    ToolChoice, ToolType, schemars,
};

use super::super::conversations::TOOLS;
use super::super::servable;
use super::{SHORT, asked, builder, model, on_runtime, read, text};
use crate::{MonteCloraModelBuilder, prompt_logits};

#[test]
fn stop_texts_and_token_biases_do_what_they_say() {
    on_runtime(async {
        let model = model().await;
        let whole = model.send_chat_request(asked("Why?")).await.expect("one");
        let whole = text(&whole).to_owned();
        let characters: Vec<char> = whole.chars().collect();
        let stop: String = characters[4..6].iter().collect();
        let before = whole.split(&stop).next().expect("the beginning");
        let request = || asked("Why?").set_sampler_stop_toks(StopTokens::Seqs(vec![stop.clone()]));
        let answer = model.send_chat_request(request()).await.expect("one");
        assert_eq!(text(&answer), before);
        assert_eq!(answer.choices[0].finish_reason, "stop");
        assert!(answer.usage.completion_tokens < SHORT);
        let (streamed, reason) = read(&model, request(), "tuned").await;
        assert_eq!((&*streamed, &*reason), (before, "stop"));

        let x = model.tokenize(Either::Right("x".to_owned()), None, false, false, None);
        let x = x.await.expect("tokens");
        let bias = HashMap::from([(x[0], 1000.0)]);
        let biased = asked("Why?").set_sampler_logits_bias(bias);
        let answer = model.send_chat_request(biased).await.expect("one");
        assert_eq!(text(&answer), "x".repeat(SHORT));
        assert_eq!(answer.choices[0].finish_reason, "length");
        // A top-p of 0 leaves one token; mistral.rs alone would ignore it.
        let mut params = SamplingParams::neutral();
        (params.top_p, params.max_len) = (Some(0.0), Some(SHORT));
        let narrow = asked("Why?").set_sampling(params);
        let answer = model.send_chat_request(narrow).await.expect("one");
        assert_eq!(text(&answer), whole);
    });
}

#[test]
fn a_tool_that_must_be_called_is_called() {
    let digit = serde_json::json!({"type": "object", "properties": {"digit": {"enum": [1, 2]}},
        "required": ["digit"], "additionalProperties": false});
    let parameters = serde_json::from_value(digit).expect("an object");
    let tool = Tool {
        tp: ToolType::Function,
        function: Function {
            name: "count".to_owned(),
            description: None,
            parameters: Some(parameters),
        },
    };
    on_runtime(async {
        let model = builder(&servable())
            .with_chat_template(TOOLS)
            .build()
            .await
            .expect("loaded");
        let request = |choice| {
            asked("Why?")
                .set_tools(vec![tool.clone()])
                .set_tool_choice(choice)
                .set_sampler_max_len(200)
        };
        let forced = request(ToolChoice::Tool(tool.clone()));
        let answer = model.send_chat_request(forced).await.expect("one");
        let choice = &answer.choices[0];
        assert_eq!(choice.finish_reason, "tool_calls");
        let call = &choice.message.tool_calls.as_ref().expect("a call")[0].function;
        assert_eq!(call.name, "count");
        assert!(call.arguments.contains("digit"), "{}", call.arguments);
        let both = request(ToolChoice::Tool(tool.clone()))
            .set_constraint(Constraint::Regex("a".to_owned()));
        let error = model.send_chat_request(both).await.expect_err("two forms");
        assert!(matches!(error, SdkError::RequestValidation(_)), "{error}");

        // The template sees a call of an earlier turn in the form that it reads.
        let past = asked("Why?")
            .add_message_with_tool_call(
                TextMessageRole::Assistant,
                "",
                choice.message.tool_calls.clone().expect("a call"),
            )
            .add_tool_message("2", "call-1");
        let answer = model.send_chat_request(past).await.expect("one");
        let without = asked("Why?").add_tool_message("2", "call-1");
        let without = model.send_chat_request(without).await.expect("one");
        let more = answer.usage.prompt_tokens - without.usage.prompt_tokens;
        assert!(more > "count".len() + "assistant: ".len(), "{more} tokens");
    });
}

#[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
#[schemars(deny_unknown_fields)]
struct Ticket {
    urgent: bool,
}

#[test]
fn structured_output_ends_with_the_models_own_token() {
    on_runtime(async {
        let model = model().await;
        let ticket = asked("Why?").set_sampler_max_len(200);
        let ticket: Ticket = model.generate_structured(ticket).await.expect("a ticket");
        let schema = schemars::schema_for!(Ticket);
        let schema = serde_json::to_value(schema).expect("a schema");
        for constraint in [
            Constraint::JsonSchema(schema),
            Constraint::Regex(r#"\{"urgent": (true|false)\}"#.to_owned()),
            Constraint::Lark("start: \"{\\\"urgent\\\": true}\"".to_owned()),
        ] {
            let request = || {
                asked("Why?")
                    .set_sampler_max_len(200)
                    .set_constraint(constraint.clone())
            };
            let answer = model.send_chat_request(request()).await.expect("one");
            assert_eq!(answer.choices[0].finish_reason, "stop");
            let read_again: Ticket = serde_json::from_str(text(&answer)).expect("a ticket");
            let (streamed, reason) = read(&model, request(), "tuned").await;
            assert_eq!((&*streamed, &*reason), (text(&answer), "stop"));
            if matches!(constraint, Constraint::JsonSchema(_)) {
                assert_eq!(read_again.urgent, ticket.urgent);
            }
        }
        let wrong = asked("Why?").set_constraint(Constraint::Lark("start: start".to_owned()));
        let error = model
            .send_chat_request(wrong)
            .await
            .expect_err("no grammar");
        assert!(matches!(error, SdkError::RequestValidation(_)), "{error}");
        let answer = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_eq!(answer.usage.completion_tokens, SHORT);
    });
}

#[test]
fn a_conversation_that_the_template_refuses_harms_nothing() {
    let template = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}{% if messages[0].content == 'slice' %}{{ strftime_now('%Q') }}{% endif %}";
    on_runtime(async {
        let built = builder(&servable()).with_chat_template(template);
        let model = built.build().await.expect("loaded");
        let two = asked("Why?").add_message(TextMessageRole::User, "How?");
        let error = model.send_chat_request(two).await.expect_err("two");
        assert!(error.to_string().contains("one at a time"), "{error}");
        // A date in a format that does not exist: mistral.rs alone panics, or prints it unchanged.
        let odd = model.send_chat_request(asked("slice")).await;
        assert!(odd.is_ok() || matches!(odd, Err(SdkError::RequestValidation(_))));
        let answer = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_eq!(answer.usage.completion_tokens, SHORT);
    });
}

#[test]
fn raw_logits_and_tokens_are_those_of_the_prompt() {
    let case = servable();
    on_runtime(async {
        let model = model().await;
        let messages = TextMessages::new().add_message(TextMessageRole::User, "Why?");
        let ids = model.tokenize(Either::Left(messages.clone()), None, true, true, None);
        let ids = ids.await.expect("tokens");
        let (chunks, tokens) = model.send_raw_chat_request(messages).await.expect("logits");
        assert_eq!(tokens, ids);
        let text = model.detokenize(ids.clone(), false).await.expect("text");
        assert!(text.contains("Why?"), "{text}");
        let expected = std::thread::spawn(move || prompt_logits(&case.loader(), &[ids]))
            .join()
            .expect("no panic")
            .expect("logits");
        let mut found = Vec::new();
        for chunk in chunks {
            let chunk = chunk.flatten_all().and_then(|chunk| chunk.to_vec1::<f32>());
            found.extend(chunk.expect("numbers"));
        }
        assert_eq!(found, expected[0]);
    });
}

#[test]
fn what_would_have_no_effect_is_refused_by_name() {
    on_runtime(async {
        let model = model().await;
        for (request, word) in [
            (
                asked("?").set_adapters(vec!["tuned".to_owned()]),
                "set_adapters",
            ),
            (asked("?").set_sampler_n_choices(2), "n_choices"),
            (
                asked("?").with_web_search_options(Default::default()),
                "web search",
            ),
            (
                asked("?").set_sampler_stop_toks(StopTokens::Seqs(vec![String::new()])),
                "stop text",
            ),
        ] {
            let error = model.send_chat_request(request).await.expect_err(word);
            assert!(
                matches!(&error, SdkError::RequestValidation(message) if message.contains(word)),
                "{error}"
            );
        }
        let tool = Tool {
            tp: ToolType::Function,
            function: Function {
                name: "count".to_owned(),
                description: None,
                parameters: None,
            },
        };
        let unseen = model.send_chat_request(asked("?").set_tools(vec![tool]));
        let error = unseen.await.expect_err("no place for tools").to_string();
        assert!(error.contains("with_chat_template"), "{error}");
        let unknown = model.send_chat_request_with_model(asked("?"), Some("nobody"));
        let error = unknown.await.expect_err("no such model").to_string();
        assert!(error.contains("nobody"), "{error}");
    });
}

#[test]
fn a_model_without_a_template_says_how_to_give_it_one() {
    let (case, _copy) = servable().on_changed_base(|base| {
        fs::remove_file(base.join("chat_template.jinja")).expect("removed");
    });
    on_runtime(async {
        let bare = MonteCloraModelBuilder::new(&case.base)
            .with_name("bare")
            .with_force_cpu();
        let model = bare.clone().build().await.expect("loaded");
        let messages = || TextMessages::new().add_message(TextMessageRole::User, "Why?");
        let chat = model.chat("Why?").await.map(|_| ());
        let tokens = model.tokenize(Either::Left(messages()), None, true, true, None);
        for refused in [chat, tokens.await.map(|_| ())] {
            let error = refused.expect_err("no template").to_string();
            assert!(error.contains("with_chat_template"), "{error}");
        }
        let plain = model.tokenize(Either::Right("Why?".to_owned()), None, true, true, None);
        assert_eq!(plain.await.expect("tokens").len(), 4);

        let literal = "{% for message in messages %}{{ message.content }}{% endfor %}>";
        let model = bare.with_chat_template(literal).build().await.expect("one");
        let tokens = model.tokenize(Either::Left(messages()), None, true, true, None);
        let text = model.detokenize(tokens.await.expect("tokens"), false).await;
        assert_eq!(text.expect("text"), "Why?>");
        // Without a limit, the answer continues to the last of the model's positions.
        let answer = model.send_chat_request(messages()).await.expect("one");
        assert_eq!(answer.choices[0].finish_reason, "length");
        assert_eq!(answer.usage.total_tokens, 512);
    });
}

#[test]
fn what_cannot_be_built_is_named_before_anything_is_loaded() {
    let case = servable();
    let hub = MonteCloraModelBuilder::new("HuggingFaceTB/SmolLM2-135M-Instruct");
    let alone = MonteCloraModelBuilder::new(&case.base).with_force_cpu();
    for (builder, word) in [
        (hub, "hf download"),
        (alone.clone().without_base(), "without_base"),
        (
            builder(&case).with_adapter("tuned", &case.adapter),
            "two models",
        ),
        (
            builder(&case).with_adapter("base", &case.adapter),
            "two models",
        ),
        (builder(&case).with_adapter("../up", &case.adapter), "../up"),
        (builder(&case).with_adapter("gone", "no/such"), "gone"),
        (builder(&case).with_default_model("nobody"), "nobody"),
        (builder(&case).with_max_num_seqs(0), "max_num_seqs"),
        (builder(&case).with_dtype(crate::ModelDType::BF16), "bf16"),
        (
            builder(&case).with_jinja_explicit("no/such.jinja"),
            "no/such.jinja",
        ),
    ] {
        let error = on_runtime(builder.build()).err().expect(word).to_string();
        assert!(error.contains(word), "{error}");
    }
    let model = on_runtime(alone.build()).expect("loaded");
    assert_eq!(model.list_models().expect("names"), ["tiny-llama"]);
}
