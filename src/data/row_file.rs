//! One file of rows on disk: the place and checksum of each row, and the file's hash. Rows are read on demand.

mod foreign;
#[cfg(feature = "parquet")]
mod parquet;
mod spans;
mod table;

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use flate2::read::MultiGzDecoder;
use monteclora_converters::Error;
use sha2::{Digest, Sha256};

use self::spans::{Span, index};
use super::error::{bad_data, changed, not_unpacked, unreadable};

/// An indexed file of rows. It takes 24 bytes of memory per row, independent of the row's size.
///
/// JSON Lines (blank lines, a byte order mark and CR LF ends are accepted) and JSON arrays are read in place. Gzip and
/// Parquet files are unpacked once into an unnamed temporary file.
#[derive(Debug)]
pub struct RowFile {
    path: PathBuf,
    file: Mutex<File>,
    spans: Vec<Span>,
    sha256: String,
}

impl RowFile {
    /// Reads the file once to find its rows and compute its hash.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or unpacked, holds no row, or is a malformed array, or if it is a
    /// Parquet file and this build cannot read those.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read_error = unreadable(path);
        let unpack_error = not_unpacked(path);
        let file = File::open(path).map_err(&read_error)?;
        if file.metadata().map_err(&read_error)?.is_dir() {
            return Err(read_error(io::ErrorKind::IsADirectory.into()));
        }
        let (mut file, packed_hash) = match packing(path, &file).map_err(&read_error)? {
            Packing::None => (file, None),
            Packing::Gzip => {
                let mut spool = tempfile::tempfile().map_err(&unpack_error)?;
                let mut reader = Hashing::new(file);
                io::copy(&mut MultiGzDecoder::new(&mut reader), &mut spool)
                    .map_err(&unpack_error)?;
                (spool, Some(reader.finish().map_err(&read_error)?))
            }
            Packing::Parquet => {
                let reader = Hashing::new(file.try_clone().map_err(&read_error)?);
                let hash = reader.finish().map_err(&read_error)?;
                let mut spool = tempfile::tempfile().map_err(&unpack_error)?;
                write_parquet_rows(path, file, &mut spool)?;
                (spool, Some(hash))
            }
        };
        foreign::refuse(path, &mut file, &read_error)?;
        file.rewind().map_err(&read_error)?;
        let mut reader = Hashing::new(&mut file);
        let spans = index(BufReader::with_capacity(1 << 20, &mut reader), path)?;
        let sha256 = reader.finish().map_err(&read_error)?;
        if spans.is_empty() {
            let path = path.display();
            return Err(bad_data(
                "empty",
                format!(
                    "`{path}` holds no row; expected one JSON object per line, or an array of them"
                ),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            spans,
            sha256: packed_hash.unwrap_or(sha256),
        })
    }

    /// The path of the file, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of rows.
    pub fn n_rows(&self) -> usize {
        self.spans.len()
    }

    /// SHA-256 of the file's bytes, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The line in which a row begins, from 1. In a Parquet file, the number of the row.
    pub fn line_number(&self, row_idx: usize) -> usize {
        self.spans[row_idx].line as usize
    }

    /// The bytes of a row.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if the row changed since it was indexed.
    pub fn row_bytes(&self, row_idx: usize) -> Result<Vec<u8>, Error> {
        let span = self.spans[row_idx];
        let mut bytes = vec![0; span.n_bytes as usize];
        // A poisoned lock only means that another reader panicked; the position is set anew.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file
            .seek(SeekFrom::Start(span.offset))
            .and_then(|_| file.read_exact(&mut bytes));
        drop(file);
        match read {
            Ok(()) if span.is_of(&bytes) => Ok(bytes),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                Err(unreadable(&self.path)(error))
            }
            _ => Err(changed(&self.path, span.line as usize)),
        }
    }
}

enum Packing {
    None,
    Gzip,
    Parquet,
}

/// How a file is packed. The first bytes decide, so that a wrong extension does no harm; otherwise `.parquet` does.
fn packing(path: &Path, mut file: &File) -> io::Result<Packing> {
    let mut magic = Vec::new();
    file.take(4).read_to_end(&mut magic)?;
    file.rewind()?;
    let extension = path.extension().unwrap_or_default();
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Packing::Gzip,
        b"PAR1" => Packing::Parquet,
        _ if extension.eq_ignore_ascii_case("parquet") => Packing::Parquet,
        _ => Packing::None,
    })
}

#[cfg(feature = "parquet")]
use self::parquet::write_json_lines as write_parquet_rows;

#[cfg(not(feature = "parquet"))]
fn write_parquet_rows(path: &Path, _file: File, _out: &mut File) -> Result<(), Error> {
    Err(monteclora_converters::Problem::usage(format!(
        "`{}` is a Parquet file, and this build cannot read those; build with `--features parquet`, or convert it to JSON Lines",
        path.display()
    ))
    .into())
}

/// A reader that hashes the bytes that it reads.
struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
        }
    }

    /// Reads to the end, and returns the hash of all bytes.
    fn finish(mut self) -> io::Result<String> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(format!("{:x}", self.hasher.finalize()))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n_read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n_read]);
        Ok(n_read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::data::test_support::write_temp;

    #[test]
    fn rows_keep_their_line_numbers() {
        let (_dir, path) = write_temp("\u{feff}{\"a\":1}\r\n\n  \n{\"b\":\"é\"}");
        let file = RowFile::open(&path).expect("opens");
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
        let (dir, path) = write_temp("{}\n");
        // printf '{}\n' | sha256sum
        let hash = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356";
        assert_eq!(RowFile::open(&path).expect("opens").sha256(), hash);
        // For a packed file, the hash is that of the packed bytes.
        let packed = dir.path().join("train.jsonl.gz");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder
            .write_all(b"{\"a\":1}\n\n{\"a\":2}\n")
            .expect("packs");
        let bytes = encoder.finish().expect("packs");
        std::fs::write(&packed, &bytes).expect("writes");
        let file = RowFile::open(&packed).expect("opens");
        assert_eq!((file.n_rows(), file.line_number(1)), (2, 3));
        assert_eq!(file.row_bytes(1).expect("reads"), b"{\"a\":2}");
        let expected = format!("{:x}", Sha256::digest(&bytes));
        assert_eq!(file.sha256(), expected);
        std::fs::write(&packed, &bytes[..bytes.len() - 6]).expect("writes");
        let error = RowFile::open(&packed).expect_err("cut short");
        assert!(
            error
                .to_string()
                .contains("cannot be unpacked into a temporary file"),
            "{error}"
        );
    }

    #[test]
    fn unusable_files_are_refused() {
        let missing = RowFile::open(Path::new("no/such.jsonl")).expect_err("missing");
        assert_eq!(
            missing.to_string(),
            "cannot read `no/such.jsonl`; give the path of a data file: No such file or directory (os error 2)"
        );
        assert_eq!(monteclora_converters::exit_code(&missing, |_| None), 3);
        let (_dir, path) = write_temp(" \n\n");
        let dir = tempfile::tempdir().expect("temporary directory");
        for (path, part) in [
            (
                path.as_path(),
                "holds no row; expected one JSON object per line",
            ),
            (dir.path(), "give the path of a data file: is a directory"),
        ] {
            let error = RowFile::open(path).expect_err("refused").to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_file_cut_short_or_edited_is_noticed() {
        let (_dir, path) = write_temp("{\"a\":1}\n{\"b\":2}\n");
        let file = RowFile::open(&path).expect("opens");
        std::fs::write(&path, "{\"a\":2}\n").expect("writes");
        for (row, line) in [(0, 1), (1, 2)] {
            let error = file.row_bytes(row).expect_err("changed").to_string();
            let expected = format!(
                "{}:{line}: the file changed after it was checked; start again",
                path.display()
            );
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn a_deleted_file_can_still_be_read() {
        let (_dir, path) = write_temp("{\"a\":1}\n");
        let file = RowFile::open(&path).expect("opens");
        std::fs::remove_file(&path).expect("removes");
        assert_eq!(file.row_bytes(0).expect("reads"), b"{\"a\":1}");
    }

    #[cfg(not(feature = "parquet"))]
    #[test]
    fn parquet_without_the_feature_says_so() {
        let (_dir, path) = write_temp("PAR1");
        let error = RowFile::open(&path).expect_err("no reader");
        assert!(error.to_string().contains("--features parquet"), "{error}");
    }
}
