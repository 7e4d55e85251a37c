//! White space at the beginning of an answer, which mistral.rs 0.8.1 cuts off.
//!
//! A streamed answer loses that of its first piece, a whole answer all of it. A continued text needs it: it separates words, and it
//! is the indentation of code. The tokens that come along with log-probabilities still have it.

use mistralrs_core::ResponseLogprob;

/// The text of a token as it is, none if it is not known.
pub(crate) fn token_text(token: &ResponseLogprob) -> Option<&str> {
    std::str::from_utf8(token.bytes.as_deref()?).ok()
}

/// `text` with the white space that its first `tokens` began with.
///
/// Where the tokens do not lead to the text, as with tokenizers that put a space before every text, it stays as it is.
pub(crate) fn restore<'a>(text: &str, tokens: impl IntoIterator<Item = &'a str>) -> String {
    let mut opening = String::new();
    for token in tokens {
        let rest = token.trim_start();
        opening.push_str(&token[..token.len() - rest.len()]);
        if !rest.is_empty() {
            // A character that the token holds a part of is shown as U+FFFD.
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
