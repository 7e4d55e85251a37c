//! Whether engines answer: a first token before a model is served, and a short question whenever somebody wants to know.

use std::sync::Arc;
use std::time::{Duration, Instant};

use either::Either;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::Registry;
use super::engine::{Generation, Lease};
use crate::engine::{engine_error, plain_tokenization};
use crate::error::{Error, Result};
use crate::quirks_0_8::abandoned_requests::tokenize;

/// How long an engine without work may take to answer a question.
const QUESTION: Duration = Duration::from_secs(2);

/// How old an answer may be that is given to several who ask: anybody may ask.
const FRESH: Duration = Duration::from_millis(500);

/// Leases of a generation that no request has, while its engine is at a question: the table's, that of whoever asks, that of the question and the
/// one that is kept until the engine has answered it.
const WITHOUT_WORK: usize = 4;

/// Who did not answer when last asked.
#[derive(Default)]
pub(super) struct Readiness(tokio::sync::Mutex<Option<(Instant, Vec<String>)>>);

/// The last question to an engine.
#[derive(Default)]
pub(crate) struct Pulse(Mutex<Option<Question>>);

#[derive(Clone)]
struct Question {
    asked: Instant,
    /// Whether the engine answered, once that is known.
    outcome: watch::Receiver<Option<bool>>,
}

impl Registry {
    /// Public names of what is served and whose engine does not answer.
    ///
    /// One that is at work on an answer has until `limit` for the step it is at.
    pub(crate) async fn silent(&self, limit: Duration) -> Vec<String> {
        let mut last = self.readiness.0.lock().await;
        match &*last {
            Some((when, names)) if when.elapsed() < FRESH => return names.clone(),
            _ => {}
        }
        let asked = self.list().into_iter().map(|lease| async move {
            let name = lease.name.clone();
            (!is_alive(lease, limit).await).then_some(name)
        });
        let names = futures::future::join_all(asked).await;
        let names: Vec<String> = names.into_iter().flatten().collect();
        *last = Some((Instant::now(), names.clone()));
        names
    }
}

impl Generation {
    /// Waits for the engine's first token.
    ///
    /// # Errors
    /// If there is none within `limit`, or the engine fails.
    pub(super) async fn prove(self: &Arc<Self>, limit: Duration) -> Result<()> {
        let turn = self.turns.take(false).await.map_err(engine_error)?;
        let held = (self.clone(), turn);
        match tokio::time::timeout(limit, self.slot().probe(held)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Engine(format!("no answer within {limit:?}"))),
        }
    }

    /// Whether its engine has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.slot().has_ended()
    }

    /// Asks the engine something that is quickly answered; after a panic, for a token.
    async fn ask(self: &Arc<Self>, limit: Duration) -> Result<()> {
        let input = self.input()?;
        if !self.slot().is_proved() {
            return self.prove(limit).await;
        }
        let text = Either::Right("?".to_owned());
        let question = |response| plain_tokenization(text, response);
        // What it answers does not matter.
        match tokenize(input, question, self.clone()).await {
            Err(error) if self.has_ended() => Err(error),
            _ => Ok(()),
        }
    }

    /// The question that the engine is at, or a new one.
    fn question(self: &Arc<Self>, limit: Duration) -> Question {
        let mut last = self.pulse.0.lock();
        if let Some(question) = last.as_ref().filter(|last| last.outcome.borrow().is_none()) {
            return question.clone();
        }
        let (sender, outcome) = watch::channel(None);
        let lease = self.clone();
        tokio::spawn(async move {
            let outcome = lease.ask(limit).await;
            if let Err(error) = &outcome {
                tracing::error!(name = lease.name, %error, "an engine does not answer");
            }
            drop(lease);
            // Those who asked may have gone.
            let _ = sender.send(Some(outcome.is_ok()));
        });
        let asked = Instant::now();
        last.insert(Question { asked, outcome }).clone()
    }
}

async fn is_alive(lease: Lease, limit: Duration) -> bool {
    // A request, or this question, starts it again; but whoever asks is told that it had ended.
    let had_ended = lease.has_ended();
    let mut question = lease.question(limit);
    if had_ended {
        return false;
    }
    let answered = question.outcome.wait_for(Option::is_some);
    match tokio::time::timeout(QUESTION, answered).await {
        Ok(Ok(outcome)) => *outcome == Some(true),
        Ok(Err(_)) => false,
        Err(_) => Arc::strong_count(&lease) > WITHOUT_WORK && question.asked.elapsed() < limit,
    }
}
