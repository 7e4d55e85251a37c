//! Shows an answer while it is generated.
//!
//! ```text
//! cargo run --release -p mistralrs-monteclora --example stream -- models/SmolLM2-135M-Instruct out "I was charged twice."
//! ```

use std::io::{Write, stdout};
use std::path::Path;

use mistralrs_monteclora::MonteCloraModelBuilder;
use mistralrs_monteclora::mistralrs::{RequestBuilder, Response, TextMessageRole};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, question] = &arguments[..] else {
        anyhow::bail!("usage: stream BASE_DIRECTORY ADAPTER_DIRECTORY QUESTION");
    };
    run(base.as_ref(), adapter.as_ref(), question, &mut stdout()).await
}

/// Writes the answer piece by piece, then why it ended.
pub(crate) async fn run(
    base: &Path,
    adapter: &Path,
    question: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let model = MonteCloraModelBuilder::new(base)
        .with_adapter("assistant", adapter)
        .without_base()
        .build()
        .await?;
    let request = RequestBuilder::new()
        .add_message(TextMessageRole::User, question)
        .set_sampler_max_len(128);
    let mut stream = model.stream_chat_request(request).await?;
    // To leave the loop early is allowed: dropping the stream ends the answer.
    while let Some(response) = stream.next().await {
        let Response::Chunk(chunk) = response else {
            return Err(anyhow::anyhow!("the answer broke off"));
        };
        for choice in &chunk.choices {
            write!(
                out,
                "{}",
                choice.delta.content.as_deref().unwrap_or_default()
            )?;
            out.flush()?;
            if let Some(reason) = &choice.finish_reason {
                writeln!(out, " ({reason})")?;
            }
        }
    }
    Ok(())
}
