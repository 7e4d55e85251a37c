//! `eval`: base and posterior mean side by side on a data file.

use anyhow::Result;
use monteclora_converters::{Adapter, ModelFiles};
use serde::Serialize;

use super::{device, print, print_json, require_f32, require_fit};
use crate::cli::EvalArgs;
use crate::data::{Dataset, EncodeOptions, Overlong, TrainOn};
use crate::hub;
use crate::model::{ActiveAdapter, Decoder, ModelConfig};
use crate::session;
use crate::train::{evaluate, metrics::EvalRecord};

/// Scores of one model on the rows.
#[derive(Debug, Clone, Serialize)]
struct Scores {
    loss: f64,
    perplexity: f64,
    token_accuracy: f64,
}

impl From<EvalRecord> for Scores {
    fn from(record: EvalRecord) -> Self {
        Self {
            loss: record.loss,
            perplexity: record.perplexity,
            token_accuracy: record.token_accuracy,
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    rows: usize,
    base: Scores,
    #[serde(skip_serializing_if = "Option::is_none")]
    mean: Option<Scores>,
}

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    require_f32(args.model.options.dtype)?;
    let adapter = args
        .adapter
        .as_ref()
        .map(|path| Adapter::read(path))
        .transpose()?;
    let base = hub::locate(&args.model.model_id, &args.model.options.hub())?;
    let config = ModelConfig::read(&base.dir)?;
    if let Some(adapter) = &adapter {
        require_fit(adapter, &ModelFiles::open(&base.dir)?)?;
    }
    let options = EncodeOptions {
        train_on: TrainOn::Assistant,
        apply_chat_template: !args.no_chat_template,
        max_seq_length: args
            .max_seq_length
            .unwrap_or(config.max_position_embeddings.min(1024)),
        overlong: Overlong::Error,
    };
    let encoder = session::encoder(
        &base.dir,
        args.model.options.chat_template.as_deref(),
        options,
    )?;
    encoder.tokenizer().check_vocab(config.vocab_size)?;
    let data = Dataset::open(&args.data, None, encoder)?;
    let decoder = Decoder::load(&base.dir, &device(args.model.options.cpu)?)?;
    let mean = match &adapter {
        Some(adapter) => {
            let active = ActiveAdapter::from_adapter(adapter, &config, decoder.device())?;
            Some(evaluate(&decoder, &active, &data, args.batch_size)?.into())
        }
        None => None,
    };
    let report = Report {
        rows: data.len(),
        base: evaluate(&decoder, &ActiveAdapter::default(), &data, args.batch_size)?.into(),
        mean,
    };
    if args.json {
        return print_json(&report);
    }
    let mut text = format!(
        "{} rows\n{:<16} {:>10} {:>12} {:>16}\n",
        report.rows, "", "loss", "perplexity", "token accuracy"
    );
    let scores = [
        ("base", Some(&report.base)),
        ("posterior mean", report.mean.as_ref()),
    ];
    for (name, scores) in scores
        .into_iter()
        .filter_map(|(name, s)| s.map(|s| (name, s)))
    {
        text.push_str(&format!(
            "{name:<16} {:>10.4} {:>12.3} {:>16.4}\n",
            scores.loss, scores.perplexity, scores.token_accuracy
        ));
    }
    print(&text)
}
