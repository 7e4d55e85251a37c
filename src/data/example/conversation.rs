//! The tokens of a conversation and its loss mask, from the turns' places in the rendered text or from the template's
//! markers.

use std::ops::Range;

use monteclora_converters::Error;

use super::{ALL, Encoder, Example, TrainOn, ids, refuse};
use crate::data::{
    printed::refuse_unprinted,
    rows::{Message, Role},
    template::{Beside, ChatTemplate},
    tokenizer::SpannedToken,
};

impl Encoder {
    /// Encodes a conversation as at least one example.
    pub(super) fn conversation(
        &self,
        messages: &[Message],
        beside: Beside<'_>,
        train_on: TrainOn,
    ) -> Result<Vec<Example>, Error> {
        let template = self.chat_template()?;
        refuse_unprinted(template, messages, beside)?;
        let asks_in_vain = |message: &Message| {
            message.must_train() && message.role() != Role::Assistant && train_on != TrainOn::All
        };
        if let Some(turn) = messages.iter().position(asks_in_vain) {
            let problem = "says that a turn is trained that is not the assistant's";
            let fix = self.or_set("remove `train`, `training` or `loss` there", ALL);
            return refuse(format!("messages[{turn}]"), problem, fix);
        }
        if train_on == TrainOn::All {
            return Ok(vec![self.whole_conversation(template, messages, beside)?]);
        }
        let trained: Vec<usize> = trained_turns(messages, train_on).collect();
        let marks = template.marks_generation(!beside.tools.is_empty());
        if let (true, Some(&last)) = (marks, trained.last()) {
            let (text, ranges) = marked_turns(template, &messages[..=last], beside, &trained)?;
            return Ok(vec![self.masked(&text, &ranges, true)?]);
        }
        let mut turns = Vec::new();
        for turn in trained {
            let prompt = template.render_with(&messages[..turn], beside, true)?.text;
            let text = template
                .render_with(&messages[..=turn], beside, false)?
                .text;
            if !text.starts_with(&prompt) {
                return refuse(
                    format!("messages[{turn}]"),
                    "the chat template does not begin this turn with its generation prompt, so the trained tokens cannot be told",
                    self.or_set("give a template that does with --chat-template", ALL),
                );
            }
            turns.push((prompt.len()..text.len(), text));
        }
        // The text of the last trained turn is enough: what follows it carries no loss.
        let Some((_, whole)) = turns.last() else {
            if last(Role::Assistant, messages).is_some_and(|last| !messages[last].trained()) {
                let problem =
                    "no assistant turn to train on: the row says that they are not trained";
                return refuse("messages", problem, "leave the row out");
            }
            return refuse(
                "messages",
                "no assistant turn to train on",
                self.or_set("add one", ALL),
            );
        };
        if turns.iter().all(|(_, text)| whole.starts_with(text)) {
            let ranges: Vec<_> = turns.iter().map(|(range, _)| range.clone()).collect();
            return Ok(vec![self.masked(whole, &ranges, false)?]);
        }
        turns
            .iter()
            .map(|(range, text)| self.masked(text, std::slice::from_ref(range), false))
            .collect()
    }

    /// Trains every token except those of messages that must not be trained.
    fn whole_conversation(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        beside: Beside<'_>,
    ) -> Result<Example, Error> {
        let text = template.render_with(messages, beside, false)?.text;
        let mut context = Vec::new();
        for idx in (0..messages.len()).filter(|idx| !messages[*idx].trained()) {
            let before = match idx {
                0 => String::new(),
                _ => template.render_with(&messages[..idx], beside, false)?.text,
            };
            let with = template.render_with(&messages[..=idx], beside, false)?.text;
            if !text.starts_with(&with) || !with.starts_with(&before) {
                return refuse(
                    format!("messages[{idx}]"),
                    "a later message changes how the chat template prints this one, so the tokens without weight cannot be told",
                    self.or_set("remove the weight", "train_on = \"assistant\""),
                );
            }
            context.push(before.len()..with.len());
        }
        let tokens = self.tokenizer.encode_spans(&text)?;
        let is_context = |token| context.iter().any(|range| covers(range, token));
        Ok(Example {
            loss_mask: tokens.iter().map(|token| !is_context(token)).collect(),
            input_ids: ids(tokens),
        })
    }

    /// Tokenises a rendered conversation and trains the tokens of the byte ranges. Each range is trained up to its
    /// end-of-turn token, or to its end if `whole` is set.
    fn masked(&self, text: &str, ranges: &[Range<usize>], whole: bool) -> Result<Example, Error> {
        let tokens = self.tokenizer.encode_spans(text)?;
        let mut loss_mask = vec![false; tokens.len()];
        for range in ranges {
            let inside: Vec<usize> = (0..tokens.len())
                .filter(|&idx| covers(range, &tokens[idx]))
                .collect();
            let end_of_turn = inside
                .iter()
                .rposition(|&idx| self.tokenizer.is_special(tokens[idx].id))
                .filter(|&position| {
                    let after = tokens[inside[position]].bytes.end.min(range.end);
                    text[after..range.end].trim().is_empty()
                });
            let end_of_turn = end_of_turn.filter(|_| !whole);
            let n_kept = end_of_turn.map_or(inside.len(), |position| position + 1);
            for &idx in &inside[..n_kept] {
                loss_mask[idx] = true;
            }
        }
        Ok(Example {
            input_ids: ids(tokens),
            loss_mask,
        })
    }
}

/// The text up to the last of the `trained` turns, and the ranges that the template's generation markers mark in these
/// turns. A marker belongs to the turn that adds it. If every answer is trained, all markers are taken.
fn marked_turns(
    template: &ChatTemplate,
    messages: &[Message],
    beside: Beside<'_>,
    trained: &[usize],
) -> Result<(String, Vec<Range<usize>>), Error> {
    let rendered = template.render_with(messages, beside, false)?;
    let answers = (0..messages.len()).filter(|idx| messages[*idx].role() == Role::Assistant);
    let answers: Vec<usize> = answers.collect();
    let mut ranges = Vec::new();
    if answers == trained {
        ranges.clone_from(&rendered.generation);
    } else {
        let mut n_before = 0;
        for turn in answers {
            let until = template.render_with(&messages[..=turn], beside, false)?;
            let n_until = until.generation.len();
            if n_until < n_before || n_until > rendered.generation.len() {
                return refuse(
                    format!("messages[{turn}]"),
                    "a later message changes what the chat template's generation markers mark, so the turns cannot be told apart",
                    "train every answer (train_on = \"assistant\"), or give a template without generation markers with --chat-template",
                );
            }
            if trained.contains(&turn) {
                ranges.extend_from_slice(&rendered.generation[n_before..n_until]);
            }
            n_before = n_until;
        }
    }
    if ranges.iter().all(Range::is_empty) {
        return refuse(
            "messages",
            "the chat template's generation markers mark nothing of it",
            "correct the template, or give another one with --chat-template",
        );
    }
    Ok((rendered.text, ranges))
}

/// Whether a token holds text of the range. A token that begins before the range and reaches into it counts, because it
/// holds part of the answer. Byte-level tokenizers report white space as an empty span at its end.
pub(super) fn covers(range: &Range<usize>, token: &SpannedToken) -> bool {
    let Range { start, end } = token.bytes;
    end > range.start && (start < range.end || end == range.end)
}

pub(super) fn last(role: Role, messages: &[Message]) -> Option<usize> {
    messages.iter().rposition(|message| message.role() == role)
}

/// The assistant turns that carry loss, in order.
fn trained_turns(messages: &[Message], train_on: TrainOn) -> impl Iterator<Item = usize> {
    let first = match train_on {
        TrainOn::Assistant | TrainOn::All => 0,
        TrainOn::LastAssistant => last(Role::Assistant, messages).unwrap_or(messages.len()),
        TrainOn::Completion => last(Role::User, messages).map_or(0, |user| user + 1),
    };
    (first..messages.len())
        .filter(|&idx| messages[idx].role() == Role::Assistant && messages[idx].trained())
}
