//! The code in a template's braces, cut into its tokens.

/// The words that stand in no bracket, with the index of their token.
pub(super) fn words_outside<'a>(tokens: &[&'a str]) -> Vec<(usize, &'a str)> {
    let mut depth = 0_usize;
    let mut words = Vec::new();
    for (idx, token) in tokens.iter().enumerate() {
        match *token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            token if depth == 0 => words.push((idx, token)),
            _ => {}
        }
    }
    words
}

/// The index of what closes the bracket at `open`.
pub(super) fn closing(tokens: &[&str], open: usize) -> usize {
    let mut depth = 0_usize;
    for (idx, token) in tokens.iter().enumerate().skip(open) {
        match *token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => {
                depth -= 1;
                if depth == 0 {
                    return idx;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// What stands between the colons of a slice.
pub(super) fn parts<'a, 'b>(tokens: &'a [&'b str]) -> Vec<&'a [&'b str]> {
    let colons: Vec<usize> = words_outside(tokens)
        .into_iter()
        .filter_map(|(idx, word)| (word == ":").then_some(idx))
        .collect();
    let mut parts = Vec::new();
    let mut begin = 0;
    for colon in colons {
        parts.push(&tokens[begin..colon]);
        begin = colon + 1;
    }
    parts.push(&tokens[begin..]);
    parts
}

/// Texts, words, white space, and single signs.
pub(super) fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code;
    while let Some(c) = rest.chars().next() {
        let n = match c {
            '\'' | '"' => text_length(rest, c),
            c if c.is_whitespace() => rest
                .find(|c: char| !c.is_whitespace())
                .unwrap_or(rest.len()),
            c if c.is_alphanumeric() || c == '_' => rest
                .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        let (token, after) = rest.split_at(n);
        tokens.push(token);
        rest = after;
    }
    tokens
}

/// The length of the quoted text at the begin of `code`, quotes included.
fn text_length(code: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in code.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    code.len()
}

/// The length of the code up to `end`, which does not count within texts and braces.
pub(super) fn code_length(code: &str, end: &str) -> usize {
    let mut at = 0;
    let mut depth = 0_usize;
    while at < code.len() {
        let rest = &code[at..];
        if depth == 0 && rest.starts_with(end) {
            return at;
        }
        let Some(c) = rest.chars().next() else { break };
        at += match c {
            '\'' | '"' => text_length(rest, c),
            c => c.len_utf8(),
        };
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    code.len()
}

/// The word or sign that ends behind white space, `""` for none.
pub(super) fn last_of<'a>(tokens: &[&'a str]) -> &'a str {
    let mut tokens = tokens.iter().rev();
    tokens
        .find(|token| !token.trim().is_empty())
        .copied()
        .unwrap_or_default()
}

/// Words after which an operand begins.
const OPERATORS: [&str; 9] = ["and", "elif", "else", "for", "if", "in", "is", "not", "or"];

/// Whether a token ends an operand, so that `[` after it is a subscript and `+` an addition.
pub(super) fn ends_operand(token: &str) -> bool {
    let is_end = |c: char| c.is_alphanumeric() || "_)]}'\"".contains(c);
    !OPERATORS.contains(&token) && token.ends_with(is_end)
}

/// The number of tokens of the operand at the begin: a name, text or group with what hangs on it.
pub(super) fn operand_length(tokens: &[&str]) -> usize {
    let blank = |token: &&str| token.trim().is_empty();
    let mut at = tokens.iter().take_while(|token| blank(token)).count();
    match tokens.get(at) {
        Some(&("(" | "[" | "{")) => at = closing(tokens, at) + 1,
        _ => at += 1,
    }
    loop {
        let gap = tokens
            .iter()
            .skip(at)
            .take_while(|token| blank(token))
            .count();
        match tokens.get(at + gap) {
            Some(&("(" | "[")) => at = closing(tokens, at + gap) + 1,
            Some(&("." | "|")) => {
                let skipped = tokens.iter().skip(at + gap + 1);
                at += gap + 2 + skipped.take_while(|token| blank(token)).count();
            }
            _ => return at.min(tokens.len()),
        }
    }
}
