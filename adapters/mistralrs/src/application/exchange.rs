//! A request in an engine's hands until its end, whether or not the application waits for it.

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

/// Responses an engine may be ahead of the task that takes them.
const CHANNEL_SIZE: usize = 1024;

/// Gives a request to the engine of `served` when its turn has come, and returns what the engine says.
///
/// Dropping the future or the receiver ends the answer at its next token; the turn is over when the engine is done with it.
pub(super) async fn send(
    host: &MistralRs,
    served: &Served,
    prepared: Prepared,
) -> SdkResult<UnboundedReceiver<Response>> {
    let turn = match prepared.wanted {
        // An engine that has them in one batch with answers stops.
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
    // A task of its own: the caller may go at any time, and the engine must find a receiver whenever it answers.
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
    /// Passes on what the engine says until it says no more; what nobody waits for any longer is made to end.
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
        // An engine that ends on its way, by a panic, lets go of its input before its answers.
        if self.engine.is_closed() {
            let stopped = SdkError::Channel("the engine stopped before the answer's end".into());
            drop(self.client.send(Response::InternalError(stopped.into())));
        }
    }
}
