//! White space at the beginning of an answer, which mistral.rs 0.8.1 removes.
//!
//! A streamed answer loses the white space of its first piece, a whole answer all of it. A continued text needs it: it
//! separates words, and it is the indentation of code. The tokens in the log-probabilities still have it.

use mistralrs_core::ResponseLogprob;

/// The text of a token; none if it is not valid UTF-8 or not known.
pub(crate) fn token_text(token: &ResponseLogprob) -> Option<&str> {
    std::str::from_utf8(token.bytes.as_deref()?).ok()
}

/// Adds to `text` the white space at the beginning of its first `tokens`.
///
/// If the tokens do not match the text, as with tokenizers that put a space before every text, `text` stays unchanged.
pub(crate) fn restore<'a>(text: &str, tokens: impl IntoIterator<Item = &'a str>) -> String {
    let mut opening = String::new();
    for token in tokens {
        let rest = token.trim_start();
        opening.push_str(&token[..token.len() - rest.len()]);
        if !rest.is_empty() {
            // A character of which the token holds only a part is shown as U+FFFD.
            let known = rest.trim_end_matches('\u{fffd}');
            return if text.is_empty() || text.starts_with(known) {
                opening + text
            } else {
                text.to_owned()
            };
        }
    }
    opening + text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_comes_back_and_nothing_else() {
        for (text, tokens, whole) in [
            ("Paris.", vec![" Paris", "."], " Paris."),
            (
                "return x",
                vec!["\n", "    ", "return", " x"],
                "\n    return x",
            ),
            ("x  y", vec!["x", "  ", "y"], "x  y"),
            ("", vec![" ", "\n"], " \n"),
            ("", vec!["\n", "</s>"], "\n"),
            (
                "\u{1f600}!",
                vec![" \u{fffd}", "\u{fffd}", "!"],
                " \u{1f600}!",
            ),
            ("Paris", vec!["Paris"], "Paris"),
            ("Paris", vec![" London"], "Paris"),
            ("Paris", vec![], "Paris"),
        ] {
            assert_eq!(restore(text, tokens), whole);
        }
    }
}
