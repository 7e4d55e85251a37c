//! The rows of one split of a data set: a file, the files of a directory, or those of a data set on the Hub.

mod listing;

use std::path::{Path, PathBuf};

use monteclora_converters::Error;
use sha2::{Digest, Sha256};

use self::listing::{Found, files};
pub use self::listing::{directory_has, splits};
use super::row_file::RowFile;

/// Part of a data set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Split {
    /// Trained on.
    #[default]
    Train,
    /// Looked at while training.
    Valid,
    /// Looked at afterwards.
    Test,
}

impl Split {
    /// All splits, in the order of use.
    pub const ALL: [Self; 3] = [Self::Train, Self::Valid, Self::Test];

    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Valid => "valid",
            Self::Test => "test",
        }
    }

    /// The split that a word in a file's name stands for. Follows Hugging Face's words.
    pub(super) fn from_word(word: &str) -> Option<Self> {
        match word.to_ascii_lowercase().as_str() {
            "train" | "training" => Some(Self::Train),
            "valid" | "validation" | "val" | "dev" => Some(Self::Valid),
            "test" | "testing" | "eval" | "evaluation" => Some(Self::Test),
            _ => None,
        }
    }
}

/// The rows of one or several files, one after the other.
#[derive(Debug)]
pub struct Source {
    name: PathBuf,
    revision: Option<String>,
    unread: Vec<String>,
    files: Vec<RowFile>,
    /// The index of each file's first row, then the number of all rows.
    starts: Vec<usize>,
}

impl Source {
    /// Opens the rows of `split` in `name`: a file (for any split), a directory,
    /// `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`, or a bare `ORG/NAME` if no local path has this name.
    ///
    /// # Errors
    /// As [`RowFile::open`]. Also returns an error if the files of the split are ambiguous or cannot be fetched.
    pub fn open(name: &Path, split: Split) -> Result<Self, Error> {
        let Found {
            paths,
            unread,
            revision,
        } = files(name, split)?;
        let files = paths
            .iter()
            .map(|path| RowFile::open(path))
            .collect::<Result<Vec<_>, _>>()?;
        let mut starts = vec![0];
        for file in &files {
            starts.push(starts[starts.len() - 1] + file.n_rows());
        }
        Ok(Self {
            name: name.to_owned(),
            revision,
            unread,
            files,
            starts,
        })
    }

    /// The name of the source, as given.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Files of a directory or data set that may hold rows but belong to no split.
    pub fn unread_files(&self) -> &[String] {
        &self.unread
    }

    /// The commit, for a data set on the Hub.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// The number of rows.
    pub fn n_rows(&self) -> usize {
        self.starts[self.files.len()]
    }

    /// SHA-256 of the file's bytes. For several files, SHA-256 of their hexadecimal hashes, each followed by a newline.
    pub fn sha256(&self) -> String {
        if let [file] = &self.files[..] {
            return file.sha256().to_owned();
        }
        let hashes = self.files.iter().map(|file| format!("{}\n", file.sha256()));
        format!("{:x}", Sha256::digest(hashes.collect::<String>()))
    }

    /// The file and line of a row.
    pub fn place(&self, row_idx: usize) -> (&Path, usize) {
        let (file, idx) = self.locate(row_idx);
        (file.path(), file.line_number(idx))
    }

    /// The bytes of a row.
    ///
    /// # Errors
    /// As [`RowFile::row_bytes`].
    pub fn row_bytes(&self, row_idx: usize) -> Result<Vec<u8>, Error> {
        let (file, idx) = self.locate(row_idx);
        file.row_bytes(idx)
    }

    fn locate(&self, row_idx: usize) -> (&RowFile, usize) {
        let file_idx = self.starts.partition_point(|start| *start <= row_idx) - 1;
        (&self.files[file_idx], row_idx - self.starts[file_idx])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_several_files_follow_each_other() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let write = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).expect("writes");
        };
        write("train-0.jsonl", "{\"a\":0}\n\n{\"a\":1}\n");
        write("train-1.jsonl", "{\"a\":2}\n");
        write("valid.json", "[{\"a\":3}]");
        let source = Source::open(dir.path(), Split::Train).expect("opens");
        assert_eq!(source.n_rows(), 3);
        assert_eq!(source.row_bytes(2).expect("reads"), b"{\"a\":2}");
        assert_eq!(source.place(1), (&*dir.path().join("train-0.jsonl"), 3));
        assert_eq!(source.place(2), (&*dir.path().join("train-1.jsonl"), 1));
        assert_eq!(source.sha256().len(), 64);
        assert_eq!(
            splits(dir.path()).expect("lists"),
            [Split::Train, Split::Valid]
        );
        assert!(directory_has(dir.path(), Split::Valid));
        assert!(!directory_has(dir.path(), Split::Test));
        let error = Source::open(dir.path(), Split::Test).expect_err("none");
        assert!(
            error
                .to_string()
                .contains("no test rows: it holds train-0.jsonl"),
            "{error}"
        );
        write("more.jsonl", "{\"a\":4}");
        write("old.csv", "a\n4\n");
        write("README.txt", "about");
        std::fs::create_dir_all(dir.path().join("sub/deep")).expect("creates");
        write("sub/deep/train.jsonl", "{\"a\":5}");
        let source = Source::open(dir.path(), Split::Train).expect("opens");
        assert_eq!(
            source.unread_files(),
            ["more.jsonl", "old.csv", "sub/deep/"]
        );
        let valid = Source::open(dir.path(), Split::Valid).expect("opens");
        assert_eq!(valid.row_bytes(0).expect("reads"), b"{\"a\":3}");
    }
}
