//! Tests of the plugin as an application uses it.

mod examples;
mod requests;
mod swaps;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;
use mistralrs::{
    ChatCompletionResponse, CustomLogitsProcessor, RequestBuilder, RequestLike, Response,
    TextMessageRole,
};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use super::{Case, servable};
use crate::{ChatMessage, Engine, MonteCloraLoader, MonteCloraModel, MonteCloraModelBuilder};

/// Number of tokens of a short answer.
const SHORT: usize = 12;

/// Number of tokens that an answer at temperature 2 reaches.
const LONG: usize = 400;

/// A builder with the base `base` and the adapter `tuned`.
fn builder(case: &Case) -> MonteCloraModelBuilder {
    MonteCloraModelBuilder::new(&case.base)
        .with_name("base")
        .with_adapter("tuned", &case.adapter)
        .with_force_cpu()
}

fn on_runtime<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new()
        .expect("a runtime")
        .block_on(future)
}

async fn model() -> MonteCloraModel {
    builder(&servable()).build().await.expect("loaded")
}

fn asked(question: &str) -> RequestBuilder {
    RequestBuilder::new()
        .add_message(TextMessageRole::User, question)
        .set_sampler_max_len(SHORT)
}

fn long() -> RequestBuilder {
    asked("Why?")
        .set_sampling(mistralrs::SamplingParams::neutral())
        .set_sampler_temperature(2.0)
        .set_sampler_max_len(LONG)
}

/// The answers of a separate engine with `adapter`, or with the base.
fn alone(case: &Case, adapter: Option<&std::path::Path>, questions: &[&str]) -> Vec<String> {
    let mut loader = MonteCloraLoader::builder(&case.base, "alone");
    if let Some(adapter) = adapter {
        loader = loader.adapter(adapter);
    }
    let engine = Engine::start(&loader.build().expect("sound")).expect("started");
    let answer = |question: &&str| {
        let messages = [ChatMessage::new("user", *question)];
        engine.ask(&messages, SHORT).expect("answered").text
    };
    let answers = questions.iter().map(answer).collect();
    engine.shut_down().expect("stopped");
    answers
}

fn text(response: &ChatCompletionResponse) -> &str {
    response.choices[0]
        .message
        .content
        .as_deref()
        .expect("text")
}

/// The text of a stream and its finish reason.
async fn read(model: &MonteCloraModel, request: impl RequestLike, name: &str) -> (String, String) {
    let mut stream = model
        .stream_chat_request_with_model(request, Some(name))
        .await
        .expect("begun");
    let (mut text, mut reasons) = (String::new(), Vec::new());
    while let Some(response) = stream.next().await {
        let Response::Chunk(chunk) = response else {
            panic!("no chunk");
        };
        text.push_str(
            chunk.choices[0]
                .delta
                .content
                .as_deref()
                .unwrap_or_default(),
        );
        reasons.extend(chunk.choices[0].finish_reason.clone());
    }
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    (text, reasons.remove(0))
}

/// Counts the tokens of an answer, and blocks its engine at the second token until the gate is opened.
struct Gate {
    n_tokens: AtomicUsize,
    reached: Notify,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn new(is_open: bool) -> Arc<Self> {
        Arc::new(Self {
            n_tokens: AtomicUsize::new(0),
            reached: Notify::new(),
            is_open: Mutex::new(is_open),
            opened: Condvar::new(),
        })
    }

    fn open(&self) {
        *self.is_open.lock() = true;
        self.opened.notify_all();
    }

    fn n_tokens(&self) -> usize {
        self.n_tokens.load(Ordering::SeqCst)
    }
}

impl CustomLogitsProcessor for Gate {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        if self.n_tokens.fetch_add(1, Ordering::SeqCst) == 1 {
            self.reached.notify_one();
            let mut is_open = self.is_open.lock();
            self.opened.wait_while(&mut is_open, |is_open| !*is_open);
        }
        Ok(logits.clone())
    }
}

#[test]
fn each_name_answers_as_its_own_engine_would_however_many_ask() {
    let case = servable();
    // Prompts of equal length, which mistral.rs would put into one batch.
    let questions = ["Why?", "Who?", "Now?", "How?", "Yes?", "Not?"];
    let base = alone(&case, None, &questions);
    let tuned = alone(&case, Some(&case.adapter), &questions);
    assert_ne!(base, tuned);
    on_runtime(async {
        let model = model().await;
        assert_eq!(model.list_models().expect("names"), ["base", "tuned"]);
        let asks = questions.iter().flat_map(|question| {
            ["base", "tuned"].map(|name| {
                let request = asked(question);
                model.send_chat_request_with_model(request, Some(name))
            })
        });
        let answers = futures::future::join_all(asks).await;
        let answers: Vec<_> = answers
            .into_iter()
            .map(|answer| text(&answer.expect("answered")).to_owned())
            .collect();
        let expected: Vec<String> = base
            .into_iter()
            .zip(tuned)
            .flat_map(|(base, tuned)| [base, tuned])
            .collect();
        assert_eq!(answers, expected);
    });
}

#[test]
fn the_only_adapter_answers_where_no_name_is_given_and_streams_are_whole_answers() {
    let case = servable();
    let tuned = alone(&case, Some(&case.adapter), &["Why?"]).remove(0);
    on_runtime(async {
        let model = model().await;
        let default = model.get_default_model_id().expect("told");
        assert_eq!(default.as_deref(), Some("tuned"));
        let answer = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_eq!((text(&answer), &*answer.model), (&*tuned, "tuned"));
        let (streamed, reason) = read(&model, asked("Why?"), "tuned").await;
        assert_eq!(
            (streamed, &reason),
            (tuned.clone(), &answer.choices[0].finish_reason)
        );
        model.set_default_model_id("base").expect("known");
        let other = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_ne!(text(&other), tuned);

        // `into_inner` gives the model of `mistralrs` itself, with the same answers.
        let inner = model.into_inner();
        let answer = inner.send_chat_request_with_model(asked("Why?"), Some("tuned"));
        assert_eq!(text(&answer.await.expect("one")), tuned);
    });
}

#[test]
fn what_is_dropped_ends_and_harms_nothing() {
    let case = servable();
    let tuned = alone(&case, Some(&case.adapter), &["Why?"]).remove(0);
    on_runtime(async {
        let model = model().await;
        for is_stream in [true, false, true, false] {
            let gate = Gate::new(true);
            let request = long().add_logits_processor(gate.clone());
            if is_stream {
                let mut stream = model.stream_chat_request(request).await.expect("begun");
                assert!(matches!(stream.next().await, Some(Response::Chunk(_))));
            } else {
                tokio::select! {
                    _ = model.send_chat_request(request) => panic!("{LONG} tokens came at once"),
                    () = gate.reached.notified() => {}
                }
            }
            let answer = model.send_chat_request(asked("Why?")).await.expect("one");
            assert_eq!(text(&answer), tuned);
            let n_tokens = gate.n_tokens();
            assert!(n_tokens < LONG / 2, "it went on to {n_tokens} tokens");
        }
        // Requests that never got a turn.
        let gate = Gate::new(false);
        let held = model
            .stream_chat_request(long().add_logits_processor(gate.clone()))
            .await
            .expect("begun");
        gate.reached.notified().await;
        for _ in 0..3 {
            let waiting = model.send_chat_request(asked("Why?"));
            let limit = std::time::Duration::from_millis(10);
            tokio::time::timeout(limit, waiting)
                .await
                .expect_err("no turn");
        }
        drop(held);
        gate.open();
        let answer = model.send_chat_request(asked("Why?")).await.expect("one");
        assert_eq!(text(&answer), tuned);
    });
}

#[test]
fn a_turn_lends_the_model_and_keeps_others_away() {
    on_runtime(async {
        let model = model().await;
        let turn = model.turn(Some("base")).await.expect("a turn");
        let waiting = model.send_chat_request_with_model(asked("Why?"), Some("base"));
        tokio::pin!(waiting);
        let limit = std::time::Duration::from_millis(50);
        let early = tokio::time::timeout(limit, &mut waiting).await;
        early.expect_err("it is not its turn");
        let lent = turn.send_chat_request_with_model(asked("Why?"), Some("base"));
        let lent = lent.await.expect("answered");
        drop(turn);
        assert_eq!(text(&waiting.await.expect("answered")), text(&lent));
        assert!(model.turn(Some("nobody")).await.is_err());
    });
}
