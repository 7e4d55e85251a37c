//! Bearer keys: read from a file, held as SHA-256, compared in constant time.

use std::fmt;
use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// A set of keys, of which only the hashes are held.
#[derive(Clone, Default)]
pub struct KeySet(Vec<[u8; 32]>);

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySet({} keys)", self.0.len())
    }
}

impl KeySet {
    /// Reads one key a line, plain or `sha256:<hex>`; empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`Error::Config`] for a malformed line, or a file without a key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let bad = |message: String| Error::Config {
            path: path.to_path_buf(),
            message,
        };
        let mut keys = Vec::new();
        for (idx, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            keys.push(match line.strip_prefix("sha256:") {
                None => hash(line),
                Some(hex) => parse_hex(hex).ok_or_else(|| {
                    bad(format!(
                        "line {}: expected 64 hexadecimal digits after `sha256:`",
                        idx + 1
                    ))
                })?,
            });
        }
        if keys.is_empty() {
            return Err(bad("holds no key; write one a line".to_owned()));
        }
        Ok(Self(keys))
    }

    pub(crate) fn read_optional(path: Option<&Path>) -> Result<Self> {
        path.map_or_else(|| Ok(Self::default()), Self::read)
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of the set. The time does not depend on which, or on how much of it is right.
    pub fn holds(&self, key: &str) -> bool {
        let presented = hash(key);
        self.0.iter().fold(false, |found, known| {
            let difference = known
                .iter()
                .zip(&presented)
                .fold(0, |sum, (a, b)| sum | (a ^ b));
            found | (std::hint::black_box(difference) == 0)
        })
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (idx, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * idx..2 * idx + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<KeySet> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("keys.txt");
        fs::write(&path, text).expect("written");
        KeySet::read(&path)
    }

    #[test]
    fn plain_and_hashed_keys_open_and_others_do_not() {
        let hashed: String = hash("hashed")
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let keys = read(&format!("# comment\n plain \n\nsha256:{hashed}\n")).expect("two keys");
        assert!(keys.holds("plain") && keys.holds("hashed"));
        for wrong in ["", "plai", "plainn", "# comment", hashed.as_str()] {
            assert!(!keys.holds(wrong), "{wrong:?} must not open");
        }
        assert!(!format!("{keys:?}").contains("plain"));
    }

    #[test]
    fn a_file_without_keys_or_with_a_bad_hash_is_refused() {
        assert!(read("# nothing\n").is_err());
        assert!(read("sha256:12").is_err());
        assert!(read(&format!("sha256:{}", "g".repeat(64))).is_err());
    }
}
