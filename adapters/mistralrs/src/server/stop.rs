//! Stop texts: cuts an answer at the first stop text, whatever the pieces of the text, and tells the engine to stop.

use std::sync::Arc;

use tokenizers::Tokenizer;

/// Cuts text at the first stop text, and holds back text that may begin a stop text.
#[derive(Default)]
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Returns the text that may be shown after `delta`, and whether a stop text was reached.
    pub(crate) fn push(&mut self, delta: &str) -> (String, bool) {
        self.held.push_str(delta);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(position) = first {
            self.held.truncate(position);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self
            .stops
            .iter()
            .flat_map(|stop| {
                let ends = stop.char_indices().skip(1).map(|(end, _)| end);
                ends.filter(|end| self.held.ends_with(&stop[..*end]))
            })
            .max()
            .unwrap_or(0);
        let shown = self.held.len() - keep;
        (self.held.drain(..shown).collect(), false)
    }

    /// Returns the text that was held back when the answer ended.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    pub(crate) fn cut(stops: &[String], text: &str) -> (String, bool) {
        let mut filter = Self::new(stops.to_vec());
        let (mut shown, stopped) = filter.push(text);
        if !stopped {
            shown.push_str(&filter.finish());
        }
        (shown, stopped)
    }
}

/// `text` without an incomplete character at its end, whose bytes show as U+FFFD. A stream holds an incomplete
/// character back too.
pub(crate) fn whole_characters(text: &str) -> &str {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER)
}

/// Detects that an answer contains a stop text. It only ends the generation; other code cuts the exact text that
/// clients see.
pub(crate) struct StopWatch {
    texts: Vec<String>,
    /// Stop texts that are special tokens, and so are not part of the decoded text.
    tokens: Vec<u32>,
    tokenizer: Arc<Tokenizer>,
    /// Number of tokens that are decoded to find the longest text; each token has at least one byte.
    width: usize,
}

impl StopWatch {
    /// Makes a watch for `texts`; none if there are no texts.
    pub(crate) fn new(texts: &[String], tokenizer: &Arc<Tokenizer>) -> Option<Self> {
        let longest = texts.iter().map(String::len).max()?;
        let is_special = |token: &u32| {
            let text = tokenizer.decode(&[*token], true);
            text.is_ok_and(|text| text.is_empty())
        };
        let tokens = texts.iter().filter_map(|text| tokenizer.token_to_id(text));
        Some(Self {
            texts: texts.to_vec(),
            tokens: tokens.filter(is_special).collect(),
            tokenizer: tokenizer.clone(),
            width: longest + 4,
        })
    }

    pub(crate) fn reached(&self, answer: &[u32]) -> bool {
        let Some(last) = answer.last() else {
            return false;
        };
        let tail = &answer[answer.len().saturating_sub(self.width)..];
        self.tokens.contains(last)
            || self
                .tokenizer
                .decode(tail, true)
                .is_ok_and(|text| self.texts.iter().any(|stop| text.contains(stop)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_shown_in_full_up_to_the_first_stop_however_it_is_cut() {
        let stops = vec!["END".to_owned(), "é.".to_owned()];
        let cases = [
            ("abc", "abc"),
            ("aENbEN", "aENbEN"),
            ("xENDyé.", "x"),
            ("aé.END", "a"),
            ("éé", "éé"),
        ];
        for (text, expected) in cases {
            for size in 1..=text.chars().count() {
                let characters: Vec<char> = text.chars().collect();
                let mut filter = StopFilter::new(stops.clone());
                let mut shown = String::new();
                let mut stopped = false;
                for piece in characters.chunks(size) {
                    let (part, stop) = filter.push(&piece.iter().collect::<String>());
                    shown.push_str(&part);
                    stopped = stop;
                    if stop {
                        break;
                    }
                }
                if !stopped {
                    shown.push_str(&filter.finish());
                }
                assert_eq!(shown, expected, "{text} in pieces of {size}");
            }
            assert_eq!(StopFilter::cut(&stops, text).0, expected);
        }
    }

    #[test]
    fn without_stop_texts_nothing_is_held_back() {
        let mut filter = StopFilter::default();
        assert_eq!(filter.push("abc"), ("abc".to_owned(), false));
    }
}
