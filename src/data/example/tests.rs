//! Properties of the loss mask with several kinds of templates, and every refusal.

use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::*;
use crate::data::{
    error::fault_of_row,
    rows::parse_row,
    test_support::{LLAMA3_LIKE, NO_SYSTEM, THINKING, model_with_template, tiny_llama},
};

mod templates;

const OPTIONS: EncodeOptions = EncodeOptions {
    train_on: TrainOn::Assistant,
    apply_chat_template: true,
    max_seq_length: 4096,
    overlong: Overlong::Error,
    remedies: Remedies::Keys,
};

fn encoder_at(dir: &std::path::Path, options: EncodeOptions) -> Encoder {
    let tokenizer = Tokenizer::from_dir(dir).expect("tokenizer");
    let template = ChatTemplate::from_dir(dir, None, UNIX_EPOCH).expect("template");
    Encoder::new(tokenizer, template, options)
}

fn chatml(options: EncodeOptions) -> Encoder {
    encoder_at(&tiny_llama(), options)
}

fn encoder(template: &str, with_bos: bool, options: EncodeOptions) -> Encoder {
    let dir = model_with_template(template, with_bos);
    encoder_at(dir.path(), options)
}

fn row(json: &str) -> Row {
    parse_row(json.as_bytes(), None).expect("a good row").1
}

fn examples(encoder: &Encoder, json: &str) -> Vec<Example> {
    encoder.encode_row(&row(json)).expect("encodes").examples
}

/// The trained tokens as text, one string per run of trained tokens.
fn trained(encoder: &Encoder, example: &Example) -> Vec<String> {
    assert_eq!(example.input_ids.len(), example.loss_mask.len());
    let mut runs: Vec<Vec<u32>> = Vec::new();
    let mut before = false;
    for (&id, &now) in example.input_ids.iter().zip(&example.loss_mask) {
        match runs.last_mut() {
            Some(run) if now && before => run.push(id),
            _ if now => runs.push(vec![id]),
            _ => {}
        }
        before = now;
    }
    runs.iter()
        .map(|run| encoder.tokenizer().decode(run, false).expect("decodes"))
        .collect()
}

fn text(encoder: &Encoder, ids: &[u32]) -> String {
    encoder.tokenizer().decode(ids, false).expect("decodes")
}

fn problem(encoder: &Encoder, json: &str) -> String {
    let error = encoder.encode_row(&row(json)).expect_err("refused");
    fault_of_row(error)
        .expect("a problem of the row")
        .to_string()
}

const TWO_TURNS: &str = r#"{"messages":[{"role":"system","content":"S"},{"role":"user","content":"U1"},
    {"role":"assistant","content":"A1"},{"role":"user","content":"U2"},{"role":"assistant","content":"A2"}]}"#;

#[test]
fn train_on_chooses_the_turns() {
    for (train_on, expected) in [
        (TrainOn::Assistant, vec!["A1<|im_end|>", "A2<|im_end|>"]),
        (TrainOn::LastAssistant, vec!["A2<|im_end|>"]),
        (TrainOn::Completion, vec!["A2<|im_end|>"]),
    ] {
        let encoder = chatml(EncodeOptions {
            train_on,
            ..OPTIONS
        });
        let examples = examples(&encoder, TWO_TURNS);
        assert_eq!(examples.len(), 1);
        assert_eq!(trained(&encoder, &examples[0]), expected, "{train_on:?}");
    }
    let encoder = chatml(EncodeOptions {
        train_on: TrainOn::All,
        ..OPTIONS
    });
    let example = &examples(&encoder, TWO_TURNS)[0];
    assert!(example.loss_mask.iter().all(|trained| *trained));
    assert_eq!(example.n_trained(), example.input_ids.len() - 1);
}

#[test]
fn completion_is_all_that_follows_the_last_user_turn() {
    let encoder = chatml(EncodeOptions {
        train_on: TrainOn::Completion,
        ..OPTIONS
    });
    let json = r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"call"},
        {"role":"tool","content":"result"},{"role":"assistant","content":"A"}]}"#;
    assert_eq!(
        trained(&encoder, &examples(&encoder, json)[0]),
        ["call<|im_end|>", "A<|im_end|>"]
    );
}

#[test]
fn weight_zero_is_context() {
    let encoder = chatml(OPTIONS);
    let json = r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"bad","weight":0},
        {"role":"user","content":"U"},{"role":"assistant","content":"good"}]}"#;
    assert_eq!(
        trained(&encoder, &examples(&encoder, json)[0]),
        ["good<|im_end|>"]
    );
}

#[test]
fn answers_equal_to_the_prompt_are_not_confused_with_it() {
    let encoder = chatml(OPTIONS);
    let json = r#"{"messages":[{"role":"user","content":"<|im_start|>assistant\nyes<|im_end|>"},{"role":"assistant","content":"yes"}]}"#;
    let example = &examples(&encoder, json)[0];
    assert_eq!(trained(&encoder, example), ["yes<|im_end|>"]);
    let n = example.loss_mask.iter().filter(|trained| **trained).count();
    assert!(
        example.loss_mask[example.loss_mask.len() - 1 - n..]
            .iter()
            .any(|trained| *trained)
    );
    assert!(
        !example.loss_mask[..example.loss_mask.len() - 1 - n]
            .iter()
            .any(|trained| *trained)
    );
}

#[test]
fn beginning_of_text_is_what_the_template_prints() {
    // The template prints the BOS token, and the tokenizer would add it.
    let both = encoder(LLAMA3_LIKE, true, OPTIONS);
    let example = &examples(&both, TWO_TURNS)[0];
    assert_eq!(example.input_ids.iter().filter(|id| **id == 259).count(), 1);
    assert_eq!(example.input_ids[0], 259);
    assert_eq!(trained(&both, example), ["A1<|im_end|>", "A2<|im_end|>"]);
    // The template does not print the BOS token: a conversation has none, bare text has one.
    let chatml_text =
        std::fs::read_to_string(tiny_llama().join("chat_template.jinja")).expect("fixture");
    let added = encoder(&chatml_text, true, OPTIONS);
    let example = &examples(&added, TWO_TURNS)[0];
    assert_eq!(example.input_ids[0], 1);
    assert_eq!(trained(&added, example), ["A1<|im_end|>", "A2<|im_end|>"]);
    let prompt = added
        .prompt_tokens(&[Message::new(Role::User, "U")], &[])
        .expect("encodes");
    assert!(!prompt.contains(&259));
    // Neither the template nor the tokenizer adds one.
    assert_eq!(examples(&chatml(OPTIONS), TWO_TURNS)[0].input_ids[0], 1);
    assert_eq!(added.plain_prompt_tokens("U").expect("encodes")[0], 259);
}

#[test]
fn a_template_that_rewrites_earlier_turns_gives_an_example_a_turn() {
    let thinking = encoder(THINKING, false, OPTIONS);
    let found = examples(&thinking, TWO_TURNS);
    assert_eq!(found.len(), 2);
    let block = "<think>\n\n</think>\n\n";
    assert_eq!(
        trained(&thinking, &found[0]),
        [format!("{block}A1<|im_end|>")]
    );
    assert_eq!(
        trained(&thinking, &found[1]),
        [format!("{block}A2<|im_end|>")]
    );
    // The second example shows the first answer as the model sees it at that turn.
    assert!(text(&thinking, &found[1].input_ids).contains("<|im_start|>assistant\nA1<|im_end|>"));
    let last = encoder(
        THINKING,
        false,
        EncodeOptions {
            train_on: TrainOn::LastAssistant,
            ..OPTIONS
        },
    );
    assert_eq!(examples(&last, TWO_TURNS), found[1..]);
}

#[test]
fn a_generation_prompt_that_is_no_prefix_is_refused() {
    let opened = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}";
    assert_eq!(
        problem(&encoder(opened, false, OPTIONS), TWO_TURNS),
        "messages[2]: the chat template does not begin this turn with its generation prompt, so the trained tokens cannot be told; \
         give a template that does with --chat-template, or set data.train_on = \"all\""
    );
    let all = encoder(
        opened,
        false,
        EncodeOptions {
            train_on: TrainOn::All,
            ..OPTIONS
        },
    );
    assert_eq!(examples(&all, TWO_TURNS).len(), 1);
}

#[test]
fn a_template_that_raises_blames_the_row() {
    let message = problem(&encoder(NO_SYSTEM, true, OPTIONS), TWO_TURNS);
    assert!(
        message.starts_with("messages: the chat template refuses the conversation: Conversation roles must alternate")
            && message.ends_with("; correct the row, or give another template with --chat-template"),
        "{message}"
    );
    let good = encoder(NO_SYSTEM, true, OPTIONS);
    let json = r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":"A"}]}"#;
    let example = &examples(&good, json)[0];
    assert_eq!(
        text(&good, &example.input_ids),
        "<s>[INST] U [/INST]A<|im_end|>"
    );
    assert_eq!(trained(&good, example), ["A<|im_end|>"]);
}

#[test]
fn prompt_rows_with_and_without_the_template() {
    let json = r#"{"prompt":"P:","completion":" yes"}"#;
    let chat = chatml(OPTIONS);
    let example = &examples(&chat, json)[0];
    assert_eq!(
        text(&chat, &example.input_ids),
        "<|im_start|>user\nP:<|im_end|>\n<|im_start|>assistant\n yes<|im_end|>\n"
    );
    assert_eq!(trained(&chat, example), [" yes<|im_end|>"]);
    let plain = encoder(
        LLAMA3_LIKE,
        true,
        EncodeOptions {
            apply_chat_template: false,
            ..OPTIONS
        },
    );
    let example = &examples(&plain, json)[0];
    assert_eq!(text(&plain, &example.input_ids), "<s>P: yes<|im_end|>");
    assert_eq!(trained(&plain, example), [" yes<|im_end|>"]);
    assert_eq!(
        example.input_ids[1..3],
        plain.tokenizer().encode("P:", false).expect("encodes")
    );
    assert_eq!(
        problem(&plain, r#"{"prompt":"P","completion":""}"#),
        "completion: has no tokens; expected the text to learn"
    );
}

#[test]
fn text_rows_train_everything() {
    let encoder = chatml(OPTIONS);
    let example = &examples(&encoder, r#"{"text":"abc"}"#)[0];
    assert_eq!(text(&encoder, &example.input_ids), "abc<|im_end|>");
    assert_eq!(example.n_trained(), 3);
}

#[test]
fn overlong_rows_are_refused_dropped_or_cut() {
    let json = r#"{"prompt":"123","completion":"4567"}"#; // 8 tokens with the end.
    let options = EncodeOptions {
        apply_chat_template: false,
        max_seq_length: 5,
        ..OPTIONS
    };
    let with = |overlong| {
        chatml(EncodeOptions {
            overlong,
            ..options
        })
    };
    assert_eq!(
        problem(&with(Overlong::Error), json),
        "row: 8 tokens, more than max_seq_length 5; raise data.max_seq_length, or set data.overlong to \"drop\" or \"truncate\""
    );
    let dropped = with(Overlong::Drop)
        .encode_row(&row(json))
        .expect("encodes");
    assert_eq!(
        (
            dropped.examples.len(),
            dropped.n_dropped,
            dropped.n_truncated
        ),
        (0, 1, 0)
    );
    let cut = with(Overlong::Truncate)
        .encode_row(&row(json))
        .expect("encodes");
    assert_eq!((cut.n_dropped, cut.n_truncated), (0, 1));
    assert_eq!(cut.examples[0].loss_mask, [false, false, false, true, true]);
    let longer = r#"{"prompt":"123456","completion":"7"}"#;
    assert_eq!(
        problem(&with(Overlong::Truncate), longer),
        "completion: no token to train on in the first 5 of 8 tokens; raise data.max_seq_length, or set data.overlong = \"drop\""
    );
}

#[test]
fn rows_that_train_nothing_are_refused() {
    let encoder = chatml(OPTIONS);
    assert_eq!(
        problem(&encoder, r#"{"messages":[{"role":"user","content":"U"}]}"#),
        "messages: no assistant turn to train on; add one, or set data.train_on = \"all\""
    );
    let nothing =
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    assert_eq!(
        problem(
            &super::tests::encoder(nothing, false, OPTIONS),
            r#"{"messages":[{"role":"user","content":"U"},{"role":"assistant","content":""}]}"#
        ),
        "messages: no token to train on; add an answer, or set data.train_on = \"all\""
    );
}

#[test]
fn a_model_without_a_template_says_so() {
    let tokenizer = Tokenizer::from_dir(&tiny_llama()).expect("tokenizer");
    let encoder = Encoder::new(tokenizer, None, OPTIONS);
    let error = encoder.encode_row(&row(TWO_TURNS)).expect_err("refused");
    let error = fault_of_row(error).expect_err("the model's fault");
    assert!(
        error
            .to_string()
            .starts_with("the model has no chat template; ")
    );
    assert_eq!(monteclora_converters::exit_code(&error, |_| None), 2);
    assert!(encoder.encode_row(&row(r#"{"text":"abc"}"#)).is_ok());
}

#[test]
fn choices_share_the_prompt() {
    let json = r#"{"prompt":"P:","completion":" no","choices":[" yes"," no"]}"#;
    for apply_chat_template in [true, false] {
        let encoder = chatml(EncodeOptions {
            apply_chat_template,
            ..OPTIONS
        });
        let row = row(json);
        let set = encoder
            .choice_tokens(&row)
            .expect("encodes")
            .expect("has choices");
        let prompt = encoder.row_prompt(&row).expect("encodes");
        let mut texts = Vec::new();
        for choice in &set.choices {
            assert_eq!(&choice.tokens[..choice.n_prompt], &prompt[..]);
            texts.push(text(&encoder, &choice.tokens[choice.n_prompt..]));
        }
        assert_eq!(
            (texts, set.answer),
            (vec![" yes".to_owned(), " no".to_owned()], 1)
        );
    }
}

/// With empty messages, only the end token is trained.
#[test]
fn empty_messages_train_the_end_token() {
    let encoder = chatml(OPTIONS);
    let json = r#"{"messages":[{"role":"user","content":""},{"role":"assistant","content":""}]}"#;
    let found = examples(&encoder, json);
    assert_eq!(found.len(), 1);
    assert_eq!(trained(&encoder, &found[0]), ["<|im_end|>"]);
    let prompt = encoder.row_prompt(&row(json)).expect("encodes");
    assert_eq!(found[0].input_ids[..prompt.len()], prompt[..]);
    assert!(found[0].loss_mask[prompt.len()]);
}

#[test]
fn weight_zero_is_never_trained() {
    let encoder = chatml(EncodeOptions {
        train_on: TrainOn::All,
        ..OPTIONS
    });
    let json = r#"{"messages":[{"role":"user","content":"U","weight":0},{"role":"assistant","content":"A"}]}"#;
    assert_eq!(
        trained(&encoder, &examples(&encoder, json)[0]),
        ["<|im_start|>assistant\nA<|im_end|>\n"]
    );
}

#[test]
fn a_conversational_prompt_is_context() {
    let json = r#"{"prompt":[{"role":"user","content":"U"},{"role":"assistant","content":"no"},{"role":"user","content":"V"}],
        "completion":[{"role":"assistant","content":"yes"}]}"#;
    for (train_on, expected) in [
        (TrainOn::Assistant, "yes<|im_end|>"),
        (TrainOn::All, "<|im_start|>assistant\nyes<|im_end|>\n"),
    ] {
        let encoder = chatml(EncodeOptions {
            train_on,
            ..OPTIONS
        });
        assert_eq!(
            trained(&encoder, &examples(&encoder, json)[0]),
            [expected],
            "{train_on:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// For any messages, the trained tokens are the answers with their end tokens, the prompt for generation is the
    /// part before the last answer, and the text is the template's.
    #[test]
    fn trained_tokens_are_the_answers(
        pairs in prop::collection::vec(("[ -~\n\u{e9}\u{6f22}\u{1f980}]{0,12}", "[ -~\n\u{e9}\u{6f22}\u{1f980}]{0,12}"), 1..4),
        system in prop::option::of("[a-z ]{0,6}"),
        llama in any::<bool>(),
    ) {
        let encoder = if llama { encoder(LLAMA3_LIKE, true, OPTIONS) } else { chatml(OPTIONS) };
        let mut messages: Vec<Message> = system.iter().map(|text| Message::new(Role::System, text.as_str())).collect();
        let mut answers = Vec::new();
        for (user, assistant) in &pairs {
            messages.push(Message::new(Role::User, user.as_str()));
            messages.push(Message::new(Role::Assistant, assistant.as_str()));
            let said = if llama { assistant.trim() } else { assistant };
            answers.push(format!("{said}<|im_end|>"));
        }
        let row = Row { content: RowContent::Conversation { messages: messages.clone(), tools: vec![] }, choices: None, variables: serde_json::Map::new(), notes: crate::data::Notes::default() };
        let found = encoder.encode_row(&row).expect("encodes").examples;
        prop_assert_eq!(found.len(), 1);
        prop_assert_eq!(trained(&encoder, &found[0]), answers);
        let whole = encoder.template().expect("has one").render(&messages, &[], false).expect("renders");
        prop_assert_eq!(text(&encoder, &found[0].input_ids), whole);
        let prompt = encoder.row_prompt(&row).expect("encodes");
        prop_assert_eq!(&found[0].input_ids[..prompt.len()], &prompt[..]);
        prop_assert!(found[0].loss_mask[prompt.len()]);
    }
}

const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\
{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}";
