//! Evaluation on held-out rows: loss, perplexity and token accuracy of an adapter.

use monteclora_adapters::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::metrics::EvalRecord;
use crate::data::{Batch, BatchOptions, Dataset, epoch_plan};
use crate::distributed::{Communicator, balanced};
use crate::model::{ActiveAdapter, Decoder, Segment, Sequences};

/// The sequences of a batch, as the decoder reads them.
pub(crate) fn sequences(batch: &Batch) -> Sequences {
    Sequences {
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        segments: batch
            .segments
            .iter()
            .map(|(start, len)| Segment {
                query_start: *start,
                query_len: *len,
                key_start: *start,
                key_len: *len,
            })
            .collect(),
    }
}

/// Loss, perplexity and token accuracy of `adapter` over all rows of `data`, in the file's order. `None` if `interrupt`
/// of any rank was set before the end of the data. The rows are divided among `ranks`.
pub(super) fn evaluate(
    model: &Decoder,
    adapter: &ActiveAdapter,
    data: &Dataset,
    batch_size: usize,
    interrupt: &AtomicBool,
    ranks: &dyn Communicator,
) -> Result<Option<EvalRecord>> {
    let began = Instant::now();
    let options = BatchOptions {
        batch_size: batch_size.max(1),
        pack_tokens: None,
        shuffle_seed: None,
    };
    let batches = epoch_plan(&data.lengths(), &options, 0);
    let (mut total, mut tokens, mut correct) = (0.0, 0usize, 0usize);
    let mut is_interrupted = false;
    let lengths: Vec<usize> = batches
        .iter()
        .map(|examples| examples.iter().map(|row| data.n_tokens(*row)).sum())
        .collect();
    let rank_of = balanced(&lengths, ranks.size());
    let own = batches
        .iter()
        .zip(rank_of)
        .filter(|(_, rank)| *rank == ranks.rank());
    let mut own = own.map(|(examples, _)| examples).peekable();
    while let Some(examples) = own.next() {
        let batch = data.batch(examples)?;
        let loss = model.evaluate(&sequences(&batch), &batch.targets, adapter)?;
        total += loss.total();
        tokens += loss.nll.len();
        correct += loss.correct.iter().filter(|c| **c).count();
        if own.peek().is_some() && interrupt.load(Ordering::Relaxed) {
            is_interrupted = true;
            break;
        }
    }
    if ranks.any(is_interrupted) {
        return Ok(None);
    }
    let [total, tokens, correct] = ranks.sums([total, tokens as f64, correct as f64]);
    let loss = total / tokens.max(1.0);
    Ok(Some(EvalRecord {
        step: 0,
        epoch: 0.0,
        loss,
        perplexity: loss.exp(),
        token_accuracy: correct / tokens.max(1.0),
        rows: data.len(),
        seconds: began.elapsed().as_secs_f64(),
        wall_s: 0.0,
    }))
}
