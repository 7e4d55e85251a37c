//! Passes a request to an engine and stays with it until its end, even if the application stops waiting.

use std::sync::Arc;

use mistralrs::error::{Error as SdkError, Result as SdkResult};
use mistralrs::{MistralRs, Request, Response};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{
    Receiver, Sender, UnboundedReceiver, UnboundedSender, channel, unbounded_channel,
};

use super::request::{Prepared, Wanted};
use super::served::Served;
use crate::server::steps::Steps;

/// Number of responses that an engine may be ahead of the task that takes them.
const CHANNEL_SIZE: usize = 1024;

/// Sends a request to the engine of `served` when its turn comes, and returns the engine's responses.
///
/// If the future or the receiver is dropped, the answer ends at its next token. The turn ends when the engine is done
/// with the request.
pub(super) async fn send(
    host: &MistralRs,
    served: &Served,
    prepared: Prepared,
) -> SdkResult<UnboundedReceiver<Response>> {
    let turn = match prepared.wanted {
        // An engine stops if one batch holds both a request for raw logits and a request for an answer.
        Wanted::RawLogits => served.all_turns().await?,
        Wanted::Answer | Wanted::Stream => served.turn().await?,
    };
    let engine = host.get_sender(Some(&served.name))?;
    let (sender, responses) = channel(CHANNEL_SIZE);
    let mut request = prepared.request;
    request.id = host.next_request_id();
    request.response = sender;
    let (client, receiver) = unbounded_channel();
    let worker = Worker {
        engine,
        client,
        steps: prepared.steps,
        _turn: turn,
    };
    // A separate task: the caller may go away at any time, and the engine must always find a receiver.
    tokio::spawn(worker.run(Request::Normal(Box::new(request)), responses));
    Ok(receiver)
}

struct Worker {
    engine: Sender<Request>,
    client: UnboundedSender<Response>,
    steps: Arc<Steps>,
    _turn: OwnedSemaphorePermit,
}

impl Worker {
    /// Passes on the engine's responses until the last one, and cancels an answer that the client no longer waits for.
    async fn run(self, request: Request, mut responses: Receiver<Response>) {
        let mut is_awaited = true;
        if self.engine.send(request).await.is_ok() {
            loop {
                tokio::select! {
                    biased;
                    response = responses.recv() => match response {
                        // The client may be gone.
                        Some(response) => drop(self.client.send(response)),
                        None => break,
                    },
                    () = self.client.closed(), if is_awaited => {
                        is_awaited = false;
                        self.steps.cancel();
                    }
                }
            }
        }
        // An engine that ends early, by a panic, closes its input before its answers.
        if self.engine.is_closed() {
            let stopped = SdkError::Channel("the engine stopped before the answer's end".into());
            drop(self.client.send(Response::InternalError(stopped.into())));
        }
    }
}
