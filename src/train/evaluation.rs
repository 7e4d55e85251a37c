//! Evaluation on held-out rows: loss, perplexity and token accuracy of an adapter.

use monteclora_adapters::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::metrics::EvalRecord;
use crate::data::{Batch, BatchOptions, Batches, Cursor, Dataset};
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
/// was set before the end of the data.
pub(super) fn evaluate(
    model: &Decoder,
    adapter: &ActiveAdapter,
    data: &Dataset,
    batch_size: usize,
    interrupt: &AtomicBool,
) -> Result<Option<EvalRecord>> {
    let began = Instant::now();
    let options = BatchOptions {
        batch_size: batch_size.max(1),
        pack_tokens: None,
        shuffle_seed: None,
    };
    let mut batches = Batches::new(data, options, Cursor::default());
    let (mut total, mut tokens, mut correct) = (0.0, 0usize, 0usize);
    for to_do in (0..batches.n_batches()).rev() {
        let batch = batches.next_batch()?;
        let loss = model.evaluate(&sequences(&batch), &batch.targets, adapter)?;
        total += loss.total();
        tokens += loss.nll.len();
        correct += loss.correct.iter().filter(|c| **c).count();
        if to_do > 0 && interrupt.load(Ordering::Relaxed) {
            return Ok(None);
        }
    }
    let loss = total / tokens.max(1) as f64;
    Ok(Some(EvalRecord {
        step: 0,
        epoch: 0.0,
        loss,
        perplexity: loss.exp(),
        token_accuracy: correct as f64 / tokens.max(1) as f64,
        rows: data.len(),
        seconds: began.elapsed().as_secs_f64(),
        wall_s: 0.0,
    }))
}
