//! Checks whether engines answer: with a first token before a model is served, and with a short question for each
//! readiness check.

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

/// Time in which an idle engine must answer a question.
const QUESTION: Duration = Duration::from_secs(2);

/// Maximum age of a result that several readiness checks share. Anybody may check, so checks must be cheap.
const FRESH: Duration = Duration::from_millis(500);

/// Number of leases of a generation without requests while its engine answers a question. One belongs to the table, one
/// to the caller, one to the question; one is kept until the engine has answered.
const WITHOUT_WORK: usize = 4;

/// The time and the names of the silent engines of the last check.
#[derive(Default)]
pub(super) struct Readiness(tokio::sync::Mutex<Option<(Instant, Vec<String>)>>);

/// The last question to an engine.
#[derive(Default)]
pub(crate) struct Pulse(Mutex<Option<Question>>);

#[derive(Clone)]
struct Question {
    asked: Instant,
    /// Whether the engine answered; none until this is known.
    outcome: watch::Receiver<Option<bool>>,
}

impl Registry {
    /// Public names of the served models whose engine does not answer.
    ///
    /// An engine that is working on an answer has until `limit` for its current step.
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
    /// Returns an error if there is no token within `limit`, or if the engine fails.
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

    /// Asks the engine a question with a quick answer; after a panic, asks for a token.
    async fn ask(self: &Arc<Self>, limit: Duration) -> Result<()> {
        let input = self.input()?;
        if !self.slot().is_proved() {
            return self.prove(limit).await;
        }
        let text = Either::Right("?".to_owned());
        let question = |response| plain_tokenization(text, response);
        // The content of the answer does not matter.
        match tokenize(input, question, self.clone()).await {
            Err(error) if self.has_ended() => Err(error),
            _ => Ok(()),
        }
    }

    /// The question that the engine is answering, or a new one.
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
            // The callers may have gone away.
            let _ = sender.send(Some(outcome.is_ok()));
        });
        let asked = Instant::now();
        last.insert(Question { asked, outcome }).clone()
    }
}

async fn is_alive(lease: Lease, limit: Duration) -> bool {
    // A request or this question restarts the engine, but the caller learns that it had ended.
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
