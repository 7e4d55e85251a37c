//! Runs the examples of this crate unchanged.

use super::super::{servable, servable_too};
use super::{alone, on_runtime};

#[expect(dead_code, reason = "its main is not called")]
#[path = "../../../examples/chat.rs"]
mod chat;
#[expect(dead_code, reason = "its main is not called")]
#[path = "../../../examples/stream.rs"]
mod stream;
#[expect(dead_code, reason = "its main is not called")]
#[path = "../../../examples/swap.rs"]
mod swap;
#[expect(dead_code, reason = "its main is not called")]
#[path = "../../../examples/two_aliases.rs"]
mod two_aliases;

#[test]
fn a_question_is_answered_whole_and_as_a_stream() {
    let case = servable();
    let expected = alone(&case, Some(&case.adapter), &["Why?"]).remove(0);
    on_runtime(async {
        let (base, adapter) = (&case.base, &case.adapter);
        let (mut whole, mut streamed) = (Vec::new(), Vec::new());
        let answer = chat::run(base, adapter, "Why?", &mut whole);
        answer.await.expect("answered");
        let answer = stream::run(base, adapter, "Why?", &mut streamed);
        answer.await.expect("answered");
        for shown in [whole, streamed] {
            let shown = String::from_utf8(shown).expect("text");
            assert!(shown.starts_with(&expected), "{shown}");
            assert!(shown.ends_with('\n'), "{shown}");
        }
    });
}

#[test]
fn two_aliases_answer_side_by_side() {
    let (case, other) = (servable(), servable_too());
    let expected = [&case.adapter, &other.adapter]
        .map(|adapter| alone(&case, Some(adapter), &["Why?"]).remove(0));
    let mut shown = Vec::new();
    let adapters = [&*case.adapter, &*other.adapter];
    let run = two_aliases::run(&case.base, adapters, "Why?", &mut shown);
    on_runtime(run).expect("answered");
    let shown = String::from_utf8(shown).expect("text");
    for (alias, answer) in ["first", "second"].iter().zip(expected) {
        assert!(shown.contains(&format!("{alias}: {answer}")), "{shown}");
    }
}

#[test]
fn a_swap_under_load_answers_every_question() {
    let (case, other) = (servable(), servable_too());
    let mut shown = Vec::new();
    let adapters = [&*case.adapter, &*other.adapter];
    let run = swap::run(&case.base, adapters, "Why?", &mut shown);
    on_runtime(run).expect("answered");
    let shown = String::from_utf8(shown).expect("text");
    assert!(shown.contains("25 answers, none lost"), "{shown}");
    assert!(shown.contains("2 different texts"), "{shown}");
}
