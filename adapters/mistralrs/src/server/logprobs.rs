//! Log-probabilities: natural logarithms of the model's own distribution, before temperature, penalties, filters and
//! grammars.

use serde_json::{Map, Value, json};

use super::vocabulary::Vocabulary;

/// Maximum number of alternatives per token, as in OpenAI's API.
pub(crate) const MOST_ALTERNATIVES: usize = 20;

/// Value for a token with probability 0, as in vLLM: JSON has no infinity.
const RULED_OUT: f32 = -9999.0;

/// A token, its log-probability, and the most probable tokens at its position.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenScore {
    pub(crate) token: u32,
    /// Natural logarithm; none for the first token of a prompt, because nothing precedes it.
    pub(crate) logprob: Option<f32>,
    /// The most probable tokens; of equal ones, the lowest token id first.
    pub(crate) top: Vec<(u32, f32)>,
}

impl TokenScore {
    /// Computes the score of `token` from the `logits` before it: log softmax, summed in float64.
    #[expect(clippy::cast_possible_truncation, reason = "logits are f32 themselves")]
    pub(crate) fn new(logits: &[f32], token: u32, n_top: usize) -> Self {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| f64::from(logit - highest).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let shift = f64::from(highest) + total.ln();
        let logprob = |logit: f32| ((f64::from(logit) - shift) as f32).max(RULED_OUT);
        let at = |token: u32| usize::try_from(token).ok().and_then(|at| logits.get(at));
        let top = largest(logits, n_top).into_iter();
        Self {
            token,
            logprob: at(token).map(|logit| logprob(*logit)),
            top: top.map(|(token, logit)| (token, logprob(logit))).collect(),
        }
    }

    /// Makes the score of the first token of a prompt.
    pub(crate) fn first(token: u32) -> Self {
        Self {
            token,
            logprob: None,
            top: Vec::new(),
        }
    }
}

/// The `n` largest of `values` with their positions, largest first.
fn largest(values: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut found: Vec<(u32, f32)> = Vec::with_capacity(n + 1);
    for (idx, value) in (0u32..).zip(values.iter().copied()) {
        if found.len() == n && found.last().is_none_or(|(_, least)| value <= *least) {
            continue;
        }
        let place = found.partition_point(|(_, other)| *other >= value);
        found.insert(place, (idx, value));
        found.truncate(n);
    }
    found
}

/// A score in the form that clients see.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    score: TokenScore,
    text: String,
    bytes: Vec<u8>,
    top: Vec<(String, Vec<u8>, f32)>,
    /// Number of characters that the token adds to the text.
    n_characters: usize,
}

impl Shown {
    fn new(vocabulary: &Vocabulary, score: TokenScore) -> Self {
        let shown = |token: u32| {
            let bytes = vocabulary.bytes(token);
            (String::from_utf8_lossy(&bytes).into_owned(), bytes)
        };
        let (text, bytes) = shown(score.token);
        let added = vocabulary.text_bytes(score.token);
        let top = score.top.iter().map(|(token, logprob)| {
            let (text, bytes) = shown(*token);
            (text, bytes, *logprob)
        });
        Self {
            top: top.collect(),
            n_characters: String::from_utf8_lossy(&added).chars().count(),
            text,
            bytes,
            score,
        }
    }
}

/// Assigns scores to the pieces of a text. A score belongs to the piece that shows the first byte of its token.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    /// Number of scores that were shown.
    n_shown: usize,
    /// Number of bytes of the text before the token of the next score.
    start: usize,
    /// Number of bytes of the text so far.
    length: usize,
    /// Whether leading white space of an answer is cut from its text.
    trimmed: bool,
}

impl Cursor {
    pub(crate) fn new(trimmed: bool) -> Self {
        Self {
            trimmed,
            ..Self::default()
        }
    }

    /// The scores that belong to the next `n_bytes` of the text.
    pub(crate) fn advance(
        &mut self,
        vocabulary: &Vocabulary,
        scores: &[TokenScore],
        n_bytes: usize,
    ) -> Vec<Shown> {
        self.length += n_bytes;
        let mut shown = Vec::new();
        while let Some(score) = scores
            .get(self.n_shown)
            .filter(|_| self.start < self.length)
        {
            self.take(vocabulary, score, &mut shown);
        }
        shown
    }

    /// The remaining scores of a finished answer, up to the token that ends it. With `with_end`, they include that
    /// token.
    pub(crate) fn finish(
        &mut self,
        vocabulary: &Vocabulary,
        scores: &[TokenScore],
        ends: impl Fn(u32) -> bool,
        with_end: bool,
    ) -> Vec<Shown> {
        let mut shown = Vec::new();
        while let Some(score) = scores.get(self.n_shown) {
            let is_end = ends(score.token);
            if !is_end || with_end {
                self.take(vocabulary, score, &mut shown);
            }
            if is_end {
                break;
            }
        }
        shown
    }

    fn take(&mut self, vocabulary: &Vocabulary, score: &TokenScore, shown: &mut Vec<Shown>) {
        let added = vocabulary.text_bytes(score.token);
        let is_opening = self.trimmed && self.start == 0;
        self.start += match is_opening {
            true => added.trim_ascii_start().len(),
            false => added.len(),
        };
        self.n_shown += 1;
        shown.push(Shown::new(vocabulary, score.clone()));
    }
}

/// Formats scores as `choices[].logprobs` of a chat.
pub(crate) fn for_chat(shown: &[Shown]) -> Value {
    json!({"content": entries(shown), "refusal": null})
}

/// Formats one entry per token.
pub(crate) fn entries(shown: &[Shown]) -> Vec<Value> {
    let entry = |text: &str, bytes: &[u8], logprob: Option<f32>| json!({"token": text, "logprob": logprob, "bytes": bytes});
    let content = shown.iter().map(|token| {
        let mut content = entry(&token.text, &token.bytes, token.score.logprob);
        let top = token
            .top
            .iter()
            .map(|(text, bytes, logprob)| entry(text, bytes, Some(*logprob)));
        content["top_logprobs"] = top.collect();
        content
    });
    content.collect()
}

/// The text of a token where it serves as a name. Incomplete characters have no text and are shown by their bytes, as
/// in OpenAI.
fn spelled(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let bytes = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
            format!("bytes:{}", bytes.collect::<String>())
        }
    }
}

/// Formats scores as `choices[].logprobs` of a completion. `offset` is the number of characters before them; it is
/// advanced.
pub(crate) fn for_completion(shown: &[Shown], offset: &mut usize) -> Value {
    let mut offsets = Vec::new();
    let mut top = Vec::new();
    for token in shown {
        offsets.push(*offset);
        *offset += token.n_characters;
        top.push(token.score.logprob.map(|logprob| {
            let mut entries = Map::new();
            let alternatives = token
                .top
                .iter()
                .map(|(_, bytes, logprob)| (bytes, *logprob));
            // Several tokens may have the same text; the most probable one counts.
            for (bytes, logprob) in alternatives.chain([(&token.bytes, logprob)]) {
                entries.entry(spelled(bytes)).or_insert(json!(logprob));
            }
            entries
        }));
    }
    json!({
        "tokens": shown.iter().map(|token| spelled(&token.bytes)).collect::<Vec<_>>(),
        "token_logprobs": shown.iter().map(|token| token.score.logprob).collect::<Vec<_>>(),
        "top_logprobs": top,
        "text_offset": offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::tests::two_ends;
    use super::*;

    #[test]
    fn scores_are_natural_logarithms_of_the_distribution() {
        let logits: Vec<f32> = [0.1f32, 0.6, 0.25, 0.05]
            .iter()
            .map(|p| p.ln() + 3.0)
            .collect();
        let score = TokenScore::new(&logits, 2, 2);
        let near = |found: f32, p: f32| assert!((found - p.ln()).abs() < 1e-6, "{found}");
        near(score.logprob.expect("in the vocabulary"), 0.25);
        let tokens: Vec<u32> = score.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, [1, 2]);
        near(score.top[0].1, 0.6);
        let ruled_out = TokenScore::new(&[0.0, f32::NEG_INFINITY], 1, 0);
        assert_eq!(ruled_out.logprob, Some(-9999.0));
        assert!(ruled_out.top.is_empty());
    }

    #[test]
    fn the_largest_are_found_in_order() {
        let values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0];
        assert_eq!(
            largest(&values, 4),
            [(5, 9.0), (7, 6.0), (4, 5.0), (8, 5.0)]
        );
        assert_eq!(largest(&values, 20).len(), values.len());
        assert!(largest(&values, 0).is_empty());
    }

    fn scores(text: &str) -> Vec<TokenScore> {
        // The vocabulary has a token for each printable character from id 2 on, then space and line feed.
        let token = |c: char| match c {
            ' ' => 96,
            c => u32::from(c) - u32::from('!') + 2,
        };
        text.chars()
            .map(|c| TokenScore {
                token: token(c),
                logprob: Some(-1.0),
                top: vec![(token(c), -1.0)],
            })
            .collect()
    }

    fn texts(shown: &[Shown]) -> String {
        shown.iter().map(|token| token.text.as_str()).collect()
    }

    #[test]
    fn each_score_goes_along_with_its_text() {
        let vocabulary = two_ends(&[1]);
        let mut all = scores("  abc");
        all.push(TokenScore::first(1));
        let mut cursor = Cursor::new(true);
        assert_eq!(texts(&cursor.advance(&vocabulary, &all, 1)), "  a");
        assert_eq!(texts(&cursor.advance(&vocabulary, &all, 0)), "");
        assert_eq!(texts(&cursor.advance(&vocabulary, &all, 2)), "bc");
        assert_eq!(
            texts(&cursor.finish(&vocabulary, &all, |token| token == 1, false)),
            ""
        );

        let mut cursor = Cursor::new(false);
        assert_eq!(texts(&cursor.advance(&vocabulary, &all, 3)), "  a");
        assert_eq!(
            texts(&cursor.finish(&vocabulary, &all, |token| token == 1, true)),
            "bc<|im_end|>"
        );
    }

    #[test]
    fn parts_of_a_character_are_told_by_their_bytes() {
        assert_eq!(spelled("é".as_bytes()), "é");
        assert_eq!(spelled(&[0xe3, 0x81]), "bytes:\\xe3\\x81");
    }

    #[test]
    fn both_forms_have_what_clients_read() {
        let vocabulary = two_ends(&[1]);
        let mut cursor = Cursor::new(false);
        let mut all = vec![TokenScore::first(2)];
        all.extend(scores("ab"));
        let shown = cursor.finish(&vocabulary, &all, |_| false, false);
        let chat = for_chat(&shown[1..]);
        assert_eq!(chat["content"][0]["token"], "a");
        assert_eq!(chat["content"][0]["bytes"], json!([97]));
        assert_eq!(chat["content"][1]["top_logprobs"][0]["token"], "b");
        let mut offset = 5;
        let completion = for_completion(&shown, &mut offset);
        assert_eq!(completion["token_logprobs"], json!([null, -1.0, -1.0]));
        assert_eq!(
            completion["top_logprobs"],
            json!([null, {"a": -1.0}, {"b": -1.0}])
        );
        assert_eq!((&completion["text_offset"], offset), (&json!([5, 6, 7]), 8));
    }
}
