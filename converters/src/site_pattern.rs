//! `rank_pattern` and `alpha_pattern`: keys prepared once, then asked for every module.

use indexmap::IndexMap;

use crate::config::Pattern;
use crate::error::{Error, Result};

/// Most keys of one pattern table, and most of them that are true expressions: each is tried on each module.
const MAX_KEYS: usize = 1 << 16;
const MAX_EXPRESSIONS: usize = 1 << 10;

/// A table of values by pattern; the first key, in file order, that matches a module's path or the end of it after a
/// dot gives the module's value.
pub(crate) struct SitePatterns<'a, T>(Vec<(Key<'a>, T)>);

/// A key as it is matched.
enum Key<'a> {
    /// Names and dots alone, which is what tools write: characters, `None` for any one.
    Plain(Vec<Option<u8>>),
    Expression(Box<Pattern<'a>>),
}

impl<'a, T: Copy> SitePatterns<'a, T> {
    pub(crate) fn new(setting: &'static str, table: &'a IndexMap<String, T>) -> Result<Self> {
        let mut n_expressions = 0;
        let mut rows = Vec::with_capacity(table.len().min(MAX_KEYS));
        for (key, value) in table {
            let prepared = match plain(key) {
                Some(characters) => Key::Plain(characters),
                None => {
                    n_expressions += 1;
                    let pattern = Pattern::new(setting, key, &format!("^(.*\\.)?({key})$"))?;
                    Key::Expression(Box::new(pattern))
                }
            };
            if rows.len() == MAX_KEYS || n_expressions > MAX_EXPRESSIONS {
                let message = format!(
                    "{} keys; at most {MAX_KEYS} names and {MAX_EXPRESSIONS} regular expressions are read: put several modules into one expression",
                    table.len()
                );
                return Err(Error::setting(setting, message));
            }
            rows.push((prepared, *value));
        }
        Ok(Self(rows))
    }

    /// The module's value, if a key matches.
    pub(crate) fn find(&self, module: &str) -> Result<Option<T>> {
        for (key, value) in &self.0 {
            if key.matches(module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// The places in the table of keys that match none of `modules`.
    pub(crate) fn unused(&self, modules: &[&str]) -> Result<Vec<usize>> {
        let mut unused = Vec::new();
        for (idx, (key, _)) in self.0.iter().enumerate() {
            let mut is_used = false;
            for module in modules {
                is_used = is_used || key.matches(module)?;
            }
            if !is_used {
                unused.push(idx);
            }
        }
        Ok(unused)
    }
}

impl Key<'_> {
    fn matches(&self, module: &str) -> Result<bool> {
        match self {
            Self::Plain(characters) => Ok(ends_in(module.as_bytes(), characters)),
            Self::Expression(pattern) => pattern.is_match(module),
        }
    }
}

/// The characters of a key without operators other than the dot, escaped or not.
fn plain(key: &str) -> Option<Vec<Option<u8>>> {
    let mut characters = Vec::with_capacity(key.len());
    let mut bytes = key.bytes();
    while let Some(byte) = bytes.next() {
        characters.push(match byte {
            b'\\' => Some(bytes.next().filter(|escaped| *escaped == b'.')?),
            b'.' => None,
            b'_' | b'-' => Some(byte),
            _ if byte.is_ascii_alphanumeric() => Some(byte),
            _ => return None,
        });
    }
    Some(characters)
}

/// Whether the characters are all of an ASCII module path, or the end of it after a dot.
fn ends_in(module: &[u8], characters: &[Option<u8>]) -> bool {
    let Some(start) = module.len().checked_sub(characters.len()) else {
        return false;
    };
    (start == 0 || module[start - 1] == b'.')
        && module[start..]
            .iter()
            .zip(characters)
            .all(|(found, wanted)| wanted.is_none_or(|wanted| wanted == *found))
}

#[cfg(test)]
mod tests {
    use fancy_regex::Regex;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn plain_keys_match_as_their_expression(
            key in "(q|k|\\.|\\\\\\.|_|1){0,6}",
            module in "[qk._1]{0,8}",
        ) {
            let characters = plain(&key).expect("no operator");
            let regex = Regex::new(&format!("^(.*\\.)?({key})$")).expect("an expression");
            prop_assert_eq!(ends_in(module.as_bytes(), &characters), regex.is_match(&module).expect("simple"));
        }
    }

    #[test]
    fn thousands_of_names_are_quick_and_more_expressions_are_refused() {
        let names: IndexMap<String, usize> = (0..20_000)
            .map(|n| (format!("model\\.layers\\.{n}\\.q_proj"), n))
            .collect();
        let patterns = SitePatterns::new("rank_pattern", &names).expect("plain");
        let found = patterns.find("model.layers.19999.q_proj").expect("plain");
        assert_eq!(found, Some(19_999));
        let expressions: IndexMap<String, usize> =
            (0..2_000).map(|n| (format!("(a|{n})+"), n)).collect();
        assert!(SitePatterns::new("rank_pattern", &expressions).is_err());
    }
}
