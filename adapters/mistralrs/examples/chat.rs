//! Loads a base model with an adapter merged in, inside mistral.rs, and answers one question.
//!
//! ```text
//! cargo run --release -p mistralrs-monteclora --example chat -- models/SmolLM2-135M-Instruct out "I was charged twice."
//! ```
//!
//! The loader is an ordinary mistral.rs `Loader`: what it returns goes into `MistralRsBuilder` like any other model.

use std::num::NonZeroUsize;

use mistralrs_core::{
    DefaultSchedulerMethod, MistralRsBuilder, NormalRequest, Request, RequestMessage, Response,
    SamplingParams, SchedulerConfig,
};
use mistralrs_monteclora::MonteCloraLoader;

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the answer is the program's result")]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(base), Some(adapter), Some(question)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        anyhow::bail!("usage: chat BASE_DIRECTORY ADAPTER_DIRECTORY QUESTION");
    };
    let loader = MonteCloraLoader::builder(base, "assistant")
        .adapter(adapter)
        .progress(true)
        .build()?;
    let pipeline = tokio::task::spawn_blocking(move || loader.load()).await??;
    let scheduler = SchedulerConfig::DefaultScheduler {
        method: DefaultSchedulerMethod::Fixed(NonZeroUsize::MIN),
    };
    let host = MistralRsBuilder::new(pipeline, scheduler, false, None)
        .build()
        .await;

    let (sender, mut receiver) = tokio::sync::mpsc::channel(1);
    let turn = [("role", "user"), ("content", question.as_str())]
        .map(|(key, text)| (key.to_owned(), either::Either::Left(text.to_owned())));
    let request = NormalRequest::new_simple(
        RequestMessage::Chat {
            messages: vec![turn.into_iter().collect()],
            enable_thinking: None,
            reasoning_effort: None,
        },
        SamplingParams {
            // 0 is greedy; without a temperature mistral.rs samples at 1.
            temperature: Some(0.0),
            max_len: Some(128),
            ..SamplingParams::neutral()
        },
        sender,
        host.next_request_id(),
        None,
        None,
    );
    host.get_sender(None)?
        .send(Request::Normal(Box::new(request)))
        .await?;
    match receiver.recv().await {
        Some(Response::Done(done)) => {
            for choice in done.choices {
                println!("{}", choice.message.content.unwrap_or_default());
            }
            Ok(())
        }
        Some(Response::ValidationError(error) | Response::InternalError(error)) => {
            anyhow::bail!("refused: {error}")
        }
        Some(Response::ModelError(message, _)) => anyhow::bail!("failed: {message}"),
        _ => anyhow::bail!("no answer"),
    }
}
