//! Asks a base model with an adapter one question.
//!
//! ```text
//! cargo run --release -p mistralrs-monteclora --example chat -- models/SmolLM2-135M-Instruct out "I was charged twice."
//! ```

use std::io::{Write, stdout};
use std::path::Path;

use mistralrs_monteclora::MonteCloraModelBuilder;
use mistralrs_monteclora::mistralrs::{RequestBuilder, TextMessageRole};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, question] = &arguments[..] else {
        anyhow::bail!("usage: chat BASE_DIRECTORY ADAPTER_DIRECTORY QUESTION");
    };
    run(base.as_ref(), adapter.as_ref(), question, &mut stdout()).await
}

/// Writes the answer, and how long it is.
pub(crate) async fn run(
    base: &Path,
    adapter: &Path,
    question: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let model = MonteCloraModelBuilder::new(base)
        .with_adapter("assistant", adapter)
        .without_base() // the adapter alone answers: one copy of the weights
        .build()
        .await?;
    // Greedy, as nothing else is said; `set_sampler_temperature` and its like change that.
    let request = RequestBuilder::new()
        .add_message(TextMessageRole::User, question)
        .set_sampler_max_len(128);
    let answer = model.send_chat_request(request).await?;
    for choice in &answer.choices {
        writeln!(
            out,
            "{}",
            choice.message.content.as_deref().unwrap_or_default()
        )?;
        let n_tokens = answer.usage.completion_tokens;
        writeln!(out, "({n_tokens} tokens, {})", choice.finish_reason)?;
    }
    Ok(())
}
