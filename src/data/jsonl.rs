//! A JSON Lines file on disk: line offsets and hash; lines are read when asked for.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Mutex,
};

use sha2::{Digest, Sha256};

use super::error::DataError;

/// Where one line that is not blank lies.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset: u64,
    n_bytes: u32,
    line: u32,
}

/// An indexed JSON Lines file. Memory is 16 bytes a row, whatever the rows hold.
///
/// Blank lines, a byte order mark and CR LF ends are accepted.
#[derive(Debug)]
pub struct JsonlFile {
    path: PathBuf,
    file: Mutex<File>,
    spans: Vec<Span>,
    sha256: String,
}

impl JsonlFile {
    /// Reads the file once for line offsets and hash.
    ///
    /// # Errors
    /// [`DataError::Read`], [`DataError::Empty`], and [`DataError::JsonArray`] if the first character is `[`.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let read_error = |source| DataError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(read_error)?;
        if file.metadata().map_err(read_error)?.is_dir() {
            return Err(read_error(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut hasher = Sha256::new();
        let mut spans = Vec::new();
        let mut buffer = Vec::new();
        let mut offset = 0u64;
        let mut line = 0u32;
        loop {
            buffer.clear();
            let n_read = reader.read_until(b'\n', &mut buffer).map_err(read_error)?;
            if n_read == 0 {
                break;
            }
            hasher.update(&buffer);
            line = line.saturating_add(1);
            let mark = if offset == 0 && buffer.starts_with(b"\xef\xbb\xbf") {
                3
            } else {
                0
            };
            let content = buffer[mark..].trim_ascii_end();
            if !content.trim_ascii_start().is_empty() {
                if spans.is_empty() && content.trim_ascii_start()[0] == b'[' {
                    return Err(DataError::JsonArray {
                        path: path.to_owned(),
                    });
                }
                let n_bytes = u32::try_from(content.len()).map_err(|_| {
                    read_error(io::Error::other(format!(
                        "line {line} is longer than 4 GiB"
                    )))
                })?;
                spans.push(Span {
                    offset: offset + mark as u64,
                    n_bytes,
                    line,
                });
            }
            offset += n_read as u64;
        }
        if spans.is_empty() {
            return Err(DataError::Empty {
                path: path.to_owned(),
            });
        }
        let sha256 = hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(reader.into_inner()),
            spans,
            sha256,
        })
    }

    /// The file, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of rows (lines that are not blank).
    pub fn n_rows(&self) -> usize {
        self.spans.len()
    }

    /// SHA-256 of the file's bytes, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The line number of a row, from 1.
    pub fn line_number(&self, row_idx: usize) -> usize {
        self.spans[row_idx].line as usize
    }

    /// The bytes of a row.
    ///
    /// # Errors
    /// [`DataError::Read`]; [`DataError::Changed`] if the file became shorter.
    pub fn row_bytes(&self, row_idx: usize) -> Result<Vec<u8>, DataError> {
        let span = self.spans[row_idx];
        let mut bytes = vec![0; span.n_bytes as usize];
        // A poisoned lock only means that another reader panicked; the position is set anew below.
        let mut file = self
            .file
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(span.offset))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => DataError::Changed {
                    path: self.path.clone(),
                    line: span.line as usize,
                },
                _ => DataError::Read {
                    path: self.path.clone(),
                    source,
                },
            })?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::test_support::write_temp;

    #[test]
    fn rows_keep_their_line_numbers() {
        let (_dir, path) = write_temp("\u{feff}{\"a\":1}\r\n\n  \n{\"b\":\"é\"}");
        let file = JsonlFile::open(&path).expect("opens");
        assert_eq!(file.n_rows(), 2);
        assert_eq!((file.line_number(0), file.line_number(1)), (1, 4));
        assert_eq!(
            file.row_bytes(1).expect("reads"),
            "{\"b\":\"é\"}".as_bytes()
        );
        assert_eq!(file.row_bytes(0).expect("reads"), b"{\"a\":1}");
    }

    #[test]
    fn hash_is_of_the_bytes() {
        let (_dir, path) = write_temp("{}\n");
        // printf '{}\n' | sha256sum
        assert_eq!(
            JsonlFile::open(&path).expect("opens").sha256(),
            "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
        );
    }

    #[test]
    fn unusable_files_are_refused() {
        let missing = JsonlFile::open(Path::new("no/such.jsonl")).expect_err("missing");
        assert_eq!(
            missing.to_string(),
            "cannot read `no/such.jsonl`; give the path of a JSON Lines file"
        );
        assert_eq!(missing.exit_code(), 3);
        let (_dir, path) = write_temp(" \n\n");
        assert!(matches!(
            JsonlFile::open(&path),
            Err(DataError::Empty { .. })
        ));
        let (_dir, path) = write_temp("[\n{\"a\":1}\n]\n");
        assert!(matches!(
            JsonlFile::open(&path),
            Err(DataError::JsonArray { .. })
        ));
        let dir = tempfile::tempdir().expect("temporary directory");
        assert!(matches!(
            JsonlFile::open(dir.path()),
            Err(DataError::Read { .. })
        ));
    }

    #[test]
    fn a_file_cut_short_is_noticed() {
        let (_dir, path) = write_temp("{\"a\":1}\n{\"b\":2}\n");
        let file = JsonlFile::open(&path).expect("opens");
        std::fs::write(&path, "{\"a\":1}\n").expect("writes");
        assert!(matches!(
            file.row_bytes(1),
            Err(DataError::Changed { line: 2, .. })
        ));
    }
}
