//! The fingerprint of a base model: tells two base models apart without reading them whole.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use monteclora_converters::ModelFiles;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Number of bytes at each end of a weight file that go into the fingerprint.
const SAMPLE: usize = 1 << 20;

/// Files beside the weights that change what a base answers.
const CONVERSATION_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// SHA-256 over the base's configuration, tokenizer, template, the names, types and shapes of its tensors, and both
/// ends of every weight file. Reading tens of gigabytes whole would take as long as loading them.
pub(super) fn base_fingerprint(files: &ModelFiles) -> Result<String> {
    let mut hasher = Sha256::new();
    for (key, value) in files.config() {
        hasher.update(format!("{key}={value}\n"));
    }
    for name in CONVERSATION_FILES {
        match fs::read(files.dir().join(name)) {
            Ok(bytes) => {
                hasher.update(format!("{name} {}\n", bytes.len()));
                hasher.update(bytes);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &files.dir().join(name))(error)),
        }
    }
    for name in files.names() {
        hasher.update(format!("{name} {:?}\n", files.info(name)));
    }
    for path in files.files() {
        let (length, ends) = both_ends(path).map_err(Error::io("read", path))?;
        hasher.update(length.to_le_bytes());
        hasher.update(ends);
    }
    Ok(format!("{:x}", hasher.finalize()))
}

/// Returns the length of a file, and its first and last [`SAMPLE`] bytes.
fn both_ends(path: &Path) -> std::io::Result<(u64, Vec<u8>)> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    let sample = SAMPLE as u64;
    let mut ends = Vec::new();
    (&mut file).take(sample).read_to_end(&mut ends)?;
    file.seek(SeekFrom::Start(length.saturating_sub(sample)))?;
    file.take(sample).read_to_end(&mut ends)?;
    Ok((length, ends))
}
