//! Evaluation on held-out rows: loss, perplexity and token accuracy of an adapter.

use monteclora_adapters::Result;
use std::time::Instant;

use super::metrics::EvalRecord;
use crate::data::{Batch, BatchOptions, Batches, Cursor, Dataset};
use crate::model::{ActiveAdapter, Decoder, Segment, Sequences};

/// The decoder's view of a batch.
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

/// Loss, perplexity and token accuracy of `adapter` over all rows of `data`, in the file's order, as long as `go_on`, which
/// is told the rows of every batch, is true; whether it came to the end of the data.
pub(super) fn evaluate_while(
    model: &Decoder,
    adapter: &ActiveAdapter,
    data: &Dataset,
    batch_size: usize,
    mut go_on: impl FnMut(usize) -> bool,
) -> Result<(EvalRecord, bool)> {
    let began = Instant::now();
    let options = BatchOptions {
        batch_size: batch_size.max(1),
        pack_tokens: None,
        shuffle_seed: None,
    };
    let mut batches = Batches::new(data, options, Cursor::default());
    let (mut total, mut tokens, mut correct) = (0.0, 0usize, 0usize);
    let mut to_do = batches.n_batches();
    while to_do > 0 {
        let batch = batches.next_batch()?;
        let loss = model.evaluate(&sequences(&batch), &batch.targets, adapter)?;
        total += loss.total();
        tokens += loss.nll.len();
        correct += loss.correct.iter().filter(|c| **c).count();
        to_do -= 1;
        if !go_on(batch.segments.len()) {
            break;
        }
    }
    let loss = total / tokens.max(1) as f64;
    let record = EvalRecord {
        step: 0,
        epoch: 0.0,
        loss,
        perplexity: loss.exp(),
        token_accuracy: correct as f64 / tokens.max(1) as f64,
        rows: data.len(),
        seconds: began.elapsed().as_secs_f64(),
        wall_s: 0.0,
    };
    Ok((record, to_do == 0))
}
