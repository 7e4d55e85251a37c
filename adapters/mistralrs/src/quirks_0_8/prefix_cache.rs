//! The prefix cache of mistral.rs 0.8.1: the turn after a truncated answer is computed with one key and value missing.

use monteclora_converters::MISTRALRS;

/// The reason why `prefix_cache_n` must be 0.
pub(crate) fn refusal() -> String {
    format!(
        "must be 0: with the prefix cache of {MISTRALRS} the turn after an answer that was cut short is wrong, and on a CPU it grows without limit"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::engine::{Engine, GreedyRecorder};
    use crate::fixture_tests::servable;
    use mistralrs_core::{RequestMessage, Response};

    /// The raw logits at the last of `tokens`.
    fn last_logits(engine: &Engine, tokens: &[u32]) -> Vec<f32> {
        let prompt = RequestMessage::CompletionTokens(tokens.to_vec());
        let answer = engine.exchange(prompt, |request| request.return_raw_logits = true);
        let Response::Raw { logits_chunks, .. } = answer.expect("an answer") else {
            panic!("no logits");
        };
        let last = logits_chunks.last().expect("logits");
        let n_tokens = last.elem_count() / last.dims().last().expect("a shape");
        let rows = last.reshape((n_tokens, ())).expect("whole rows");
        let mut rows = rows.to_vec2::<f32>().expect("32-bit");
        rows.pop().expect("a row")
    }

    /// mistral.rs stores the cache of an answer under all of its tokens, although the last token was never computed. If
    /// this test fails, a later version is correct, and the prefix cache can be supported.
    #[test]
    fn the_prefix_cache_of_mistralrs_loses_the_last_token_of_an_answer() {
        let loader = servable().loader();
        let engine = Engine::launch(&loader, true).expect("loads");
        let prompt: Vec<u32> = (3..13).collect();
        let recorder = Arc::new(GreedyRecorder::default());
        let answer = engine.exchange(
            RequestMessage::CompletionTokens(prompt.clone()),
            |request| {
                request.sampling_params.max_len = Some(4);
                request.logits_processors = Some(vec![recorder.clone()]);
            },
        );
        answer.expect("an answer");
        let next_turn = [prompt, recorder.take(), vec![3, 4]].concat();
        let cached = last_logits(&engine, &next_turn);
        engine.shut_down().expect("stops");

        let engine = Engine::start(&loader).expect("loads");
        let right = last_logits(&engine, &next_turn);
        engine.shut_down().expect("stops");
        let difference = |(a, b): (&f32, &f32)| (a - b).abs();
        let largest = cached
            .iter()
            .zip(&right)
            .map(difference)
            .fold(0.0, f32::max);
        assert!(largest > 0.01, "{largest}: the prefix cache is right now");
    }
}
