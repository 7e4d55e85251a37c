//! Tests of adapters that are loaded, swapped and unloaded while requests are answered.

use std::time::Duration;

use super::super::{servable, servable_too};
use super::{Gate, alone, asked, builder, long, model, on_runtime, read, text};

#[test]
fn a_swap_lets_what_has_begun_finish_and_gives_the_rest_the_new_weights() {
    let (case, other) = (servable(), servable_too());
    let old = alone(&case, Some(&case.adapter), &["Why?"]).remove(0);
    let new = alone(&case, Some(&other.adapter), &["Why?"]).remove(0);
    assert_ne!(old, new);
    on_runtime(async {
        let model = model().await;
        let gate = Gate::new(false);
        let held = asked("Why?").add_logits_processor(gate.clone());
        let held = read(&model, held, "tuned");
        let swap = async {
            gate.reached.notified().await;
            let swap = model.swap_adapter("tuned", &other.adapter);
            tokio::pin!(swap);
            // The new adapter is loaded meanwhile, and the swap waits for the running answer.
            let limit = Duration::from_millis(500);
            let early = tokio::time::timeout(limit, &mut swap).await;
            early.expect_err("an answer is on its way");
            let base = model.send_chat_request_with_model(asked("Why?"), Some("base"));
            base.await.expect("the other engine goes on");
            let waiting = model.send_chat_request_with_model(asked("Why?"), Some("tuned"));
            let (swap, waiting, ()) = tokio::join!(swap, waiting, async { gate.open() });
            swap.expect("swapped");
            text(&waiting.expect("answered")).to_owned()
        };
        let ((begun, _), after) = tokio::join!(held, swap);
        assert_eq!((begun, after), (old.clone(), new.clone()));

        for (adapter, expected) in [(&case.adapter, &old), (&other.adapter, &new)] {
            model.swap_adapter("tuned", adapter).await.expect("swapped");
            let answer = model.send_chat_request(asked("Why?")).await.expect("one");
            assert_eq!(text(&answer), expected);
        }
        // A swap that fails changes nothing.
        let failed = model.swap_adapter("tuned", "no/such").await;
        failed.expect_err("nothing to load");
        let base = model.swap_adapter("base", &case.adapter).await;
        base.expect_err("not an adapter");
        let inner = model.into_inner();
        let answer = inner.send_chat_request_with_model(asked("Why?"), Some("tuned"));
        assert_eq!(text(&answer.await.expect("one")), new);
    });
}

#[test]
fn swaps_under_load_lose_no_answer() {
    let (case, other) = (servable(), servable_too());
    let old = alone(&case, Some(&case.adapter), &["Why?"]).remove(0);
    let new = alone(&case, Some(&other.adapter), &["Why?"]).remove(0);
    on_runtime(async {
        let model = model().await;
        let clients = futures::future::join_all((0..8).map(|client| {
            let (model, expected) = (&model, [old.as_str(), new.as_str()]);
            async move {
                for round in 0..6 {
                    let answer = match (client + round) % 3 {
                        0 => read(model, asked("Why?"), "tuned").await.0,
                        1 => {
                            let stream = model.stream_chat_request(long()).await;
                            drop(stream.expect("begun").next().await);
                            continue;
                        }
                        _ => {
                            let answer = model.send_chat_request(asked("Why?")).await;
                            text(&answer.expect("answered")).to_owned()
                        }
                    };
                    assert!(expected.contains(&&*answer), "{answer}");
                }
            }
        }));
        let swaps = async {
            for adapter in [&other.adapter, &case.adapter, &other.adapter] {
                model.swap_adapter("tuned", adapter).await.expect("swapped");
            }
        };
        tokio::join!(clients, swaps);
        let answer = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_eq!(text(&answer), new);
    });
}

#[test]
fn adapters_come_and_go() {
    let (case, other) = (servable(), servable_too());
    let second = alone(&case, Some(&other.adapter), &["Why?"]).remove(0);
    on_runtime(async {
        let model = builder(&case).without_base().build().await.expect("one");
        assert_eq!(model.list_models().expect("names"), ["tuned"]);
        let last = model.unload_adapter("tuned").await;
        last.expect_err("nothing else is served");
        let taken = model.load_adapter("tuned", &other.adapter).await;
        taken.expect_err("the name is taken");
        let load = model.load_adapter("second", &other.adapter);
        load.await.expect("loaded");
        let answer = model.send_chat_request_with_model(asked("Why?"), Some("second"));
        assert_eq!(text(&answer.await.expect("one")), second);

        let gate = Gate::new(false);
        let held = asked("Why?").add_logits_processor(gate.clone());
        let held = read(&model, held, "tuned");
        let unload = async {
            gate.reached.notified().await;
            let unload = model.unload_adapter("tuned");
            tokio::pin!(unload);
            let limit = Duration::from_millis(50);
            let early = tokio::time::timeout(limit, &mut unload).await;
            early.expect_err("an answer is on its way");
            let gone = model.send_chat_request_with_model(asked("Why?"), Some("tuned"));
            gone.await.expect_err("it is gone for new requests");
            gate.open();
            unload.await.expect("its memory is free");
        };
        let ((begun, _), ()) = tokio::join!(held, unload);
        assert!(!begun.is_empty());
        let answer = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_eq!((text(&answer), &*answer.model), (&*second, "second"));
        model.unload_adapter("tuned").await.expect_err("not there");
    });
}
