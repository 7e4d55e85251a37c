//! Jobs that a posterior draw answers. The scorer's decoder computes them on the shared base; a draw has no engine.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use mistralrs_core::CustomLogitsProcessor;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{JobEnd, Plan, PromptScores, RowScores, Said, Worker};
use crate::scoring::{ScoreError, Scorer};
use crate::server::answers::Piece;
use crate::server::logprobs::TokenScore;
use crate::server::registry::Scored;
use crate::server::steps::Steps;
use crate::server::vocabulary::Vocabulary;

impl Worker {
    /// Waits for one of the places that limit simultaneous work on the shared base. Returns the scorer and the place,
    /// or how the job ends if the wait fails.
    async fn place(&self) -> Result<(&Scored, OwnedSemaphorePermit), JobEnd> {
        // A draw is served only if there is a scorer.
        let scored = self.job.lease.scored.as_ref();
        let scored = scored.ok_or_else(|| self.end(JobEnd::Failed))?;
        let place = Semaphore::acquire_owned(scored.base.places.clone());
        let place = tokio::select! {
            biased;
            () = self.client.closed() => return Err(self.job.left()),
            end = self.overdue() => return Err(self.end(end)),
            place = place => place.map_err(|_| JobEnd::Failed)?,
        };
        Ok((scored, place))
    }

    fn failed(&self, cause: &str) -> JobEnd {
        tracing::error!(cause, "a posterior draw could not answer");
        self.end(JobEnd::Failed)
    }

    pub(super) async fn score_by_draw(
        &self,
        draw: usize,
        scores: Arc<PromptScores>,
    ) -> Result<Vec<TokenScore>, JobEnd> {
        let (scored, place) = self.place().await?;
        let held = (self.job.lease.clone(), place, self.admission.places());
        let work = scored.run("scoring", held, move |scorer| {
            let mut rows = RowScores::of(&scores);
            let outcome = scorer.prompt_logits(draw, &scores.tokens, &mut |row| rows.push(row));
            outcome.map_err(|error| error.to_string())?;
            rows.whole()
        });
        let computed = work.await.map_err(|error| error.to_string()).flatten();
        computed.map_err(|cause| self.failed(&cause))
    }

    pub(super) async fn generate_by_draw(&self, idx: usize, plan: &Plan, draw: usize) -> JobEnd {
        let (scored, place) = match self.place().await {
            Ok(found) => found,
            Err(end) => return end,
        };
        let held = (self.job.lease.clone(), place, self.admission.places());
        let (sender, mut pieces) = unbounded_channel();
        let writer = Writer {
            steps: plan.steps.clone(),
            vocabulary: self.job.lease.tokens.vocabulary.clone(),
            max_tokens: plan.max_tokens,
            streaming: self.streaming,
            sender,
        };
        let tokens = plan.tokens.clone();
        let work = scored.run("answering", held, move |scorer| {
            writer.write(scorer, draw, &tokens)
        });
        tokio::pin!(work);
        let (mut is_awaited, mut end) = (true, JobEnd::Finished);
        loop {
            tokio::select! {
                biased;
                Some(piece) = pieces.recv() => if is_awaited {
                    self.tell(Ok((idx, Some(Said::Draw(piece)))));
                },
                outcome = &mut work => {
                    // The last pieces may still be in the channel.
                    while let Ok(piece) = pieces.try_recv() {
                        if is_awaited {
                            self.tell(Ok((idx, Some(Said::Draw(piece)))));
                        }
                    }
                    return match outcome.map(|outcome| outcome.map_err(|e| e.to_string())) {
                        Ok(Ok(())) => end,
                        Ok(Err(cause)) => self.failed(&cause),
                        Err(error) => self.failed(&error.to_string()),
                    };
                }
                () = self.client.closed(), if is_awaited => {
                    is_awaited = false;
                    end = end.max(self.job.left());
                    plan.steps.cancel();
                }
                overdue = self.overdue(), if is_awaited => {
                    is_awaited = false;
                    end = self.end(overdue);
                    plan.steps.cancel();
                    // The process is about to end.
                    if overdue == JobEnd::Stopped {
                        return end;
                    }
                }
            }
        }
    }
}

/// Generates an answer token by token.
struct Writer {
    steps: Arc<Steps>,
    vocabulary: Arc<Vocabulary>,
    max_tokens: usize,
    streaming: bool,
    sender: UnboundedSender<Piece>,
}

impl Writer {
    /// Sends a piece. The receiver may be gone, which is not an error.
    fn say(&self, text: String, finish_reason: Option<&str>) {
        let _ = self
            .sender
            .send(Piece::of(text, finish_reason.map(str::to_owned)));
    }

    fn write(&self, scorer: &dyn Scorer, draw: usize, prompt: &[u32]) -> Result<(), ScoreError> {
        let failed = |error: candle_core::Error| ScoreError::Failed(error.to_string());
        let mut text = scorer.continuation(draw, prompt)?;
        let mut context = prompt.to_vec();
        let (mut whole, mut bytes) = (String::new(), Vec::new());
        let reason = loop {
            let logits = Tensor::new(text.logits()?, &Device::Cpu).map_err(failed)?;
            let row = self.steps.apply(&logits, &context);
            let row: Vec<f32> = row.and_then(|row| row.to_vec1()).map_err(failed)?;
            let Some(token) = most_likely(&row) else {
                return Err(ScoreError::Failed("no logit is a number".to_owned()));
            };
            if self.steps.ends(token) || self.steps.is_cancelled() {
                break "stop";
            }
            context.push(token);
            bytes.extend(self.vocabulary.text_bytes(token));
            let more = whole_text(&mut bytes);
            match self.streaming {
                true if !more.is_empty() => self.say(more, None),
                true => {}
                false => whole.push_str(&more),
            }
            if context.len() - prompt.len() >= self.max_tokens {
                break "length";
            }
            text.push(token)?;
        };
        self.say(whole, Some(reason));
        Ok(())
    }
}

/// The token with the largest finite logit; the first of several.
fn most_likely(row: &[f32]) -> Option<u32> {
    let finite = (0u32..).zip(row).filter(|(_, logit)| logit.is_finite());
    let best = finite.reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map(|(token, _)| token)
}

/// Takes the complete characters from the front of `bytes`. Invalid bytes become U+FFFD; the incomplete beginning of a
/// character stays.
fn whole_text(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(rest) => {
                text.push_str(rest);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
                match error.error_len() {
                    Some(n) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        bytes.drain(..valid + n);
                    }
                    None => {
                        bytes.drain(..valid);
                        return text;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_come_whole_and_what_is_none_is_shown_as_such() {
        let mut bytes = "a\u{e9}".as_bytes()[..2].to_vec();
        assert_eq!(whole_text(&mut bytes), "a");
        bytes.push(0xa9);
        assert_eq!(whole_text(&mut bytes), "\u{e9}");
        bytes.extend([b'x', 0xff, b'y', 0xf0, 0x9f]);
        assert_eq!(whole_text(&mut bytes), "x\u{fffd}y");
        assert_eq!(bytes, [0xf0, 0x9f]);
    }

    #[test]
    fn of_equal_logits_the_first_is_taken_and_of_none_nothing() {
        assert_eq!(most_likely(&[1.0, 3.0, 3.0, f32::NAN]), Some(1));
        assert_eq!(most_likely(&[f32::NEG_INFINITY]), None);
    }
}
