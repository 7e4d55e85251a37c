//! Tests engines that are kept while models change, and engines that end, hang and work.

use tokio::sync::mpsc::error::TryRecvError;

use super::*;
use crate::quirks_0_8::late_step;

/// An engine continues for one step after it has given raw logits; a model that leaves it has finished that step.
#[test]
fn an_engine_is_idle_after_its_last_step() {
    let site = Site::new();
    run(async {
        let registry = Registry::load(&site.config("", &[])).await.expect("loaded");
        let mut n_at_work = 0;
        for n_questions in [0, late_step::QUESTIONS].repeat(20) {
            let lease = registry.lease(Some("base")).expect("served");
            let (request, mut receiver) = request(|request| request.return_raw_logits = true);
            let input = lease.input().expect("it runs");
            input.send(request).await.expect("it takes requests");
            let answer = receiver.recv().await.expect("it answers");
            let is_raw = matches!(answer, mistralrs_core::Response::Raw { .. });
            assert!(is_raw, "something else than logits");
            let ask = move || Ok(lease.slot().is_idle(n_questions));
            assert!(blocking(ask).await.expect("asked"));
            // A sequence that is gone has dropped its response sender.
            let end = loop {
                match receiver.try_recv() {
                    Ok(_) => continue,
                    Err(end) => break end,
                }
            };
            let is_at_work = end == TryRecvError::Empty;
            n_at_work += usize::from(is_at_work);
            assert!(!is_at_work || n_questions == 0, "it is still at it");
            // The engine must always find a receiver.
            while receiver.recv().await.is_some() {}
        }
        assert!(n_at_work > 0, "there is no late step any more");
    });
}

/// Makes a request for the next token after one token, modified by `change`, and the receiver of its answer.
fn request(
    change: impl FnOnce(&mut mistralrs_core::NormalRequest),
) -> (
    mistralrs_core::Request,
    tokio::sync::mpsc::Receiver<mistralrs_core::Response>,
) {
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    let prompt = mistralrs_core::RequestMessage::CompletionTokens(vec![3]);
    let params = mistralrs_core::SamplingParams::deterministic();
    let mut request =
        mistralrs_core::NormalRequest::new_simple(prompt, params, sender, 0, None, None);
    change(&mut request);
    let request = mistralrs_core::Request::Normal(Box::new(request));
    (request, receiver)
}

/// A load whose engine does not answer is refused. The served models and the memory stay as before, and the next load
/// works.
#[test]
fn a_model_whose_engine_does_not_answer_is_not_announced() {
    let site = Site::new();
    run(async {
        let config = site.config("", &[("a", "one")]);
        let mut registry = Registry::load(&config).await.expect("loaded");
        let (before, in_use) = (served(&registry), registry.in_use());
        let (one, two) = (site.path("one"), site.path("two"));
        let limit = std::mem::replace(&mut registry.host.first_answer, Duration::from_millis(50));
        registry.host.hinder = Some(|lease| {
            let model = lease.slot().model().shared().clone();
            Box::new(model.try_lock_owned().expect("an idle engine"))
        });
        for (name, source) in [("a", &two), ("b", &one)] {
            let error = registry.load_adapter(load(name, source)).await;
            let error = error.err().expect("refused");
            assert_eq!(error.code(), code::ENGINE_UNAVAILABLE, "{error}");
            assert!(error.to_string().contains("did not answer"), "{error}");
        }
        assert_eq!(served(&registry), before);
        engines(&registry, in_use.0).await;
        assert_eq!(registry.in_use(), in_use);
        registry.host.first_answer = limit;
        registry.host.hinder = None;
        let lease = registry.load_adapter(load("a", &two)).await;
        assert_ne!(lease.expect("loaded").hash, before[1].2);
    });
}

/// `/readyz` reports the real state of engines that have ended, that hang, and that work.
#[test]
fn engines_that_do_not_answer_are_named() {
    let site = Site::new();
    let limit = Duration::from_secs(60);
    run(async {
        let config = site.config("", &[("a", "one"), ("b", "two")]);
        let registry = Registry::load(&config).await.expect("loaded");
        let none: [&str; 0] = [];
        let told = async || {
            // Longer than the time for which a result is repeated.
            tokio::time::sleep(Duration::from_millis(600)).await;
            registry.silent(limit).await
        };
        assert_eq!(told().await, none);

        let a = registry.lease(Some("a")).expect("served");
        panic_in(&a).await;
        let metrics = crate::server::metrics::Metrics::new();
        let text = metrics.render(&registry.list(), registry.in_use());
        let text = text.expect("text");
        assert!(text.contains("\nmonteclora_ended_engines 1\n"), "{text}");
        assert_eq!(told().await, ["a"], "it had ended");
        let start = Instant::now();
        while !told().await.is_empty() {
            assert!(start.elapsed() < Duration::from_secs(20), "it stays away");
        }
        assert!(!a.has_ended() && a.slot().is_proved());
        a.prove(limit).await.expect("it answers again");
        drop(a);

        let b = registry.lease(Some("b")).expect("served");
        let model = b.slot().model().shared().clone();
        drop(b);
        let hung = model.lock().await;
        assert_eq!(told().await, ["b"], "it hangs");
        let at_work = registry.lease(Some("b"));
        assert_eq!(told().await, none, "its step may take so long");
        assert_eq!(
            registry.silent(Duration::ZERO).await,
            none,
            "said a moment ago"
        );
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(registry.silent(Duration::from_secs(1)).await, ["b"]);
        drop((hung, at_work));
        assert_eq!(told().await, none);
    });
}

/// Makes the engine of `lease` panic, and waits for its end.
async fn panic_in(lease: &Lease) {
    struct Panic;
    impl mistralrs_core::CustomLogitsProcessor for Panic {
        fn apply(
            &self,
            _: &candle_core::Tensor,
            _: &[u32],
        ) -> candle_core::Result<candle_core::Tensor> {
            panic!("as the test has it");
        }
    }
    let (request, mut receiver) =
        request(|request| request.logits_processors = Some(vec![Arc::new(Panic)]));
    let input = lease.input().expect("it runs");
    input.send(request).await.expect("it takes requests");
    assert!(receiver.recv().await.is_none(), "it says nothing");
    let start = Instant::now();
    while !lease.has_ended() {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
