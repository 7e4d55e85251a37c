//! Exchanges an adapter for another one while four clients ask: none of them gets an error, or half an answer of each.
//!
//! ```text
//! cargo run --release -p mistralrs-monteclora --example swap -- models/SmolLM2-135M-Instruct out-v1 out-v2 "I was charged twice."
//! ```

use std::collections::BTreeSet;
use std::io::{Write, stdout};
use std::path::Path;

use futures::future::try_join_all;
use mistralrs_monteclora::mistralrs::{RequestBuilder, TextMessageRole};
use mistralrs_monteclora::{MonteCloraModel, MonteCloraModelBuilder};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, old, new, question] = &arguments[..] else {
        anyhow::bail!("usage: swap BASE_DIRECTORY OLD_ADAPTER NEW_ADAPTER QUESTION");
    };
    let adapters = [old.as_ref(), new.as_ref()];
    run(base.as_ref(), adapters, question, &mut stdout()).await
}

/// Writes how many answers there were, and the different texts among them.
pub(crate) async fn run(
    base: &Path,
    [old, new]: [&Path; 2],
    question: &str,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let model = MonteCloraModelBuilder::new(base)
        .with_adapter("triage", old)
        .without_base()
        .build()
        .await?;
    let clients = try_join_all((0..4).map(|_| six_answers(&model, question)));
    let swap = async { anyhow::Ok(model.swap_adapter("triage", new).await?) };
    let (answers, ()) = tokio::try_join!(clients, swap)?;
    let mut answers: Vec<String> = answers.into_iter().flatten().collect();
    // From here on there is the new adapter alone.
    answers.push(ask(&model, question).await?);
    writeln!(out, "{} answers, none lost", answers.len())?;
    let texts: BTreeSet<&String> = answers.iter().collect();
    writeln!(out, "{} different texts:", texts.len())?;
    texts
        .iter()
        .try_for_each(|text| writeln!(out, "- {text}"))?;
    Ok(())
}

async fn six_answers(model: &MonteCloraModel, question: &str) -> anyhow::Result<Vec<String>> {
    let mut answers = Vec::new();
    for _ in 0..6 {
        answers.push(ask(model, question).await?);
    }
    Ok(answers)
}

async fn ask(model: &MonteCloraModel, question: &str) -> anyhow::Result<String> {
    let request = RequestBuilder::new()
        .add_message(TextMessageRole::User, question)
        .set_sampler_max_len(64);
    let answer = model.send_chat_request(request).await?;
    let choice = answer.choices.into_iter().next();
    Ok(choice
        .and_then(|choice| choice.message.content)
        .unwrap_or_default())
}
