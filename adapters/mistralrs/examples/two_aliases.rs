//! Two adapters on one base, side by side in one process, asked at the same time.
//!
//! ```text
//! cargo run --release -p mistralrs-monteclora --example two_aliases -- models/SmolLM2-135M-Instruct out-a out-b "I was charged twice."
//! ```

use std::io::{Write, stdout};
use std::path::Path;

use mistralrs_monteclora::mistralrs::{RequestBuilder, TextMessageRole};
use mistralrs_monteclora::{MonteCloraModel, MonteCloraModelBuilder};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, first, second, question] = &arguments[..] else {
        anyhow::bail!(
            "usage: two_aliases BASE_DIRECTORY ADAPTER_DIRECTORY ADAPTER_DIRECTORY QUESTION"
        );
    };
    let adapters = [first.as_ref(), second.as_ref()];
    run(base.as_ref(), adapters, question, &mut stdout()).await
}

/// Writes what each alias, and the base, answers.
pub(crate) async fn run(
    base: &Path,
    adapters: [&Path; 2],
    question: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    // Each is a copy of the base in memory, with an engine of its own.
    let model = MonteCloraModelBuilder::new(base)
        .with_name("base")
        .with_adapter("first", adapters[0])
        .with_adapter("second", adapters[1])
        .build()
        .await?;
    let (base, first, second) = tokio::try_join!(
        ask(&model, "base", question),
        ask(&model, "first", question),
        ask(&model, "second", question),
    )?;
    writeln!(out, "base: {base}\nfirst: {first}\nsecond: {second}")?;
    Ok(())
}

async fn ask(model: &MonteCloraModel, alias: &str, question: &str) -> anyhow::Result<String> {
    let request = RequestBuilder::new()
        .add_message(TextMessageRole::User, question)
        .set_sampler_max_len(64);
    let answer = model
        .send_chat_request_with_model(request, Some(alias))
        .await?;
    let choice = answer.choices.into_iter().next();
    Ok(choice
        .and_then(|choice| choice.message.content)
        .unwrap_or_default())
}
