//! Compares the speed of a base with that of the same base and an adapter merged into it, alternately in one process.
//!
//! ```text
//! cargo run --release -p mistralrs-monteclora --example throughput -- models/SmolLM2-135M-Instruct out 4 32 64 6
//! ```
//!
//! Arguments: base, adapter, requests at a time, tokens of each prompt, tokens of each answer, rounds. Every answer has exactly
//! that many tokens, so that both do the same work. One JSON object goes to standard output.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use mistralrs_core::{
    AddModelConfig, DefaultSchedulerMethod, EngineConfig, MistralRs, MistralRsBuilder,
    NormalRequest, Request, RequestMessage, Response, SamplingParams, SchedulerConfig,
};
use mistralrs_monteclora::MonteCloraLoader;
use serde_json::json;

/// What each round asks of a model.
#[derive(Clone, Copy)]
struct Load {
    n_requests: NonZeroUsize,
    n_prompt: usize,
    n_answer: usize,
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the figures are the program's result")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, adapter, n_requests, n_prompt, n_answer, n_rounds] = arguments.as_slice() else {
        anyhow::bail!("usage: throughput BASE ADAPTER REQUESTS PROMPT_TOKENS ANSWER_TOKENS ROUNDS");
    };
    let load = Load {
        n_requests: n_requests.parse()?,
        n_prompt: n_prompt.parse()?,
        n_answer: n_answer.parse()?,
    };
    let n_rounds: usize = n_rounds.parse()?;
    let loaders = [
        MonteCloraLoader::builder(base, "base").build()?,
        MonteCloraLoader::builder(base, "adapted")
            .adapter(adapter)
            .build()?,
    ];
    let host = start(loaders, load.n_requests).await?;
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..=n_rounds {
        for (name, rates) in ["base", "adapted"].into_iter().zip(&mut rates) {
            let start = Instant::now();
            let n_tokens = ask(&host, name, load, round).await?;
            let rate = n_tokens as f64 / start.elapsed().as_secs_f64();
            // The first round warms caches and threads up.
            if round > 0 {
                rates.push(rate);
            }
        }
    }
    let [base_median, adapted_median] = [median(&rates[0]), median(&rates[1])];
    println!(
        "{}",
        json!({
            "requests": load.n_requests, "prompt_tokens": load.n_prompt, "answer_tokens": load.n_answer,
            "base_tokens_per_second": rates[0], "adapted_tokens_per_second": rates[1],
            "base_median": base_median, "adapted_median": adapted_median,
            "ratio": adapted_median / base_median,
        })
    );
    Ok(())
}

/// One host with an engine for each loader. They do not stop at the end-of-turn token.
async fn start(
    loaders: [MonteCloraLoader; 2],
    n_requests: NonZeroUsize,
) -> anyhow::Result<Arc<MistralRs>> {
    let schedule = || SchedulerConfig::DefaultScheduler {
        method: DefaultSchedulerMethod::Fixed(n_requests),
    };
    let load = |loader: MonteCloraLoader| tokio::task::spawn_blocking(move || loader.load());
    let [base, adapted] = loaders;
    let name = adapted.name().to_owned();
    let host = MistralRsBuilder::new(load(base).await??, schedule(), false, None)
        .with_disable_eos_stop(true)
        .with_no_prefix_cache(true)
        .build()
        .await;
    let engine = AddModelConfig::new(EngineConfig {
        disable_eos_stop: true,
        no_prefix_cache: true,
        ..EngineConfig::default()
    });
    host.add_model(name, load(adapted).await??, schedule(), engine)
        .await
        .map_err(anyhow::Error::msg)?;
    Ok(host)
}

/// Sends all requests of a round at once, and returns the number of tokens generated when the last is answered.
async fn ask(host: &MistralRs, model: &str, load: Load, round: usize) -> anyhow::Result<usize> {
    let mut receivers = Vec::new();
    for idx in 0..load.n_requests.get() {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        // Ids that every vocabulary has, different in every prompt.
        let prompt =
            (0..load.n_prompt).map(|at| (300 + 7 * at + 31 * idx + 131 * round) as u32 % 2000);
        let sampling = SamplingParams {
            temperature: Some(0.0),
            max_len: Some(load.n_answer),
            ..SamplingParams::neutral()
        };
        let request = NormalRequest::new_simple(
            RequestMessage::CompletionTokens(prompt.collect()),
            sampling,
            sender,
            host.next_request_id(),
            None,
            None,
        );
        host.get_sender(Some(model))?
            .send(Request::Normal(Box::new(request)))
            .await?;
        receivers.push(receiver);
    }
    let mut n_tokens = 0;
    for mut receiver in receivers {
        match receiver.recv().await {
            Some(Response::CompletionDone(done)) => n_tokens += done.usage.completion_tokens,
            Some(Response::ValidationError(error) | Response::InternalError(error)) => {
                anyhow::bail!("refused: {error}")
            }
            _ => anyhow::bail!("no answer"),
        }
    }
    anyhow::ensure!(
        n_tokens == load.n_requests.get() * load.n_answer,
        "{n_tokens} tokens were generated instead of {} times {}",
        load.n_requests,
        load.n_answer
    );
    Ok(n_tokens)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
