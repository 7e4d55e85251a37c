//! Bearer keys: read from a file or the environment, held as SHA-256, compared in constant time.

use std::fmt;
use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::error::{Error, Result};

/// Environment variable with keys for inference, separated by commas or white space.
pub(crate) const API_KEYS_VARIABLE: &str = "MONTECLORA_API_KEYS";

/// Environment variable with keys for administration, in the same form.
pub(crate) const ADMIN_KEYS_VARIABLE: &str = "MONTECLORA_ADMIN_KEYS";

/// A set of keys; it holds only their hashes.
#[derive(Clone, Default)]
pub struct KeySet(Vec<[u8; 32]>);

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySet({} keys)", self.0.len())
    }
}

impl KeySet {
    /// Reads one key per line, plain or `sha256:<hex>`; empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] for a malformed line or a file without a key, and [`Error::Io`] if the file cannot be
    /// read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let bad = |message: String| Error::config(path, message);
        let mut keys = Self::default();
        for (idx, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            keys.add(line)
                .map_err(|message| bad(format!("line {}: {message}", idx + 1)))?;
        }
        if keys.is_empty() {
            return Err(bad("holds no key; write one a line".to_owned()));
        }
        Ok(keys)
    }

    /// Reads keys that are separated by commas or white space; errors name `source` as their origin.
    ///
    /// # Errors
    /// Returns [`Error::Problem`] for a malformed hash.
    pub fn parse_list(source: &str, text: &str) -> Result<Self> {
        let mut keys = Self::default();
        let items = text.split(|c: char| c == ',' || c.is_whitespace());
        for (idx, item) in items.filter(|item| !item.is_empty()).enumerate() {
            keys.add(item)
                .map_err(|message| Error::setting(source, format!("key {}: {message}", idx + 1)))?;
        }
        Ok(keys)
    }

    /// Reads the keys of the file `path`, if given, and of the environment variable `variable`, if set.
    pub(crate) fn gather(path: Option<&Path>, variable: &str) -> Result<Self> {
        let mut keys = path.map_or_else(|| Ok(Self::default()), Self::read)?;
        match std::env::var(variable) {
            Ok(text) => keys.0.extend(Self::parse_list(variable, &text)?.0),
            Err(std::env::VarError::NotPresent) => {}
            Err(std::env::VarError::NotUnicode(_)) => {
                return Err(Error::setting(variable, "is not valid UTF-8"));
            }
        }
        Ok(keys)
    }

    /// Adds a key, plain or `sha256:<hex>`. The error message does not repeat the key.
    fn add(&mut self, text: &str) -> Result<(), String> {
        let key = match text.strip_prefix("sha256:") {
            None => hash(text),
            Some(hex) => parse_hex(hex)
                .ok_or_else(|| "expected 64 hexadecimal digits after `sha256:`".to_owned())?,
        };
        self.0.push(key);
        Ok(())
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the set contains `key`. The time does not depend on which key matches or how many characters of it
    /// match.
    pub fn holds(&self, key: &str) -> bool {
        let presented = hash(key);
        let found = self.0.iter().fold(Choice::from(0), |found, known| {
            found | known.ct_eq(&presented)
        });
        found.into()
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
    fn a_list_is_separated_by_commas_and_white_space_and_a_bad_hash_is_not_repeated() {
        let keys = KeySet::parse_list("KEYS", "one, two\nthree,,").expect("three keys");
        assert_eq!(keys.0.len(), 3);
        for key in ["one", "two", "three"] {
            assert!(keys.holds(key));
        }
        assert!(KeySet::parse_list("KEYS", " , ").expect("none").is_empty());
        let error = KeySet::parse_list("KEYS", "a sha256:secret").expect_err("malformed");
        assert!(error.to_string().contains("key 2") && !error.to_string().contains("secret"));
    }

    #[test]
    fn a_file_without_keys_or_with_a_bad_hash_is_refused() {
        assert!(read("# nothing\n").is_err());
        assert!(read("sha256:12").is_err());
        assert!(read(&format!("sha256:{}", "g".repeat(64))).is_err());
    }
}
