//! Files that are not what they should be, recognised by their first bytes: what it is instead, and what to do.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::Error;
use crate::problem::Problem;

/// First bytes that are looked at.
const HEAD: usize = 1 << 12;
/// Characters of a text that a message shows.
const SHOWN: usize = 80;
/// Fewer characters than these say nothing.
const LEAST_TEXT: usize = 8;
/// A file of Python's pickle or of PyTorch: what to do instead of reading it.
pub(crate) const UNPICKLE: &str = "write it again in Python: safetensors.torch.save_file(torch.load(FILE, map_location=\"cpu\", weights_only=True), NEW_FILE)";

/// What a file is, by its first bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// No byte at all.
    Empty,
    /// Zeros only: space that was reserved and never filled.
    Zeros,
    /// Git LFS' stand-in for a file of this many bytes.
    LfsPointer(Option<u64>),
    /// git-annex' stand-in for a file.
    AnnexPointer,
    /// An HTML page.
    Html,
    /// Another XML document, such as a storage's refusal.
    Xml,
    /// A JSON object.
    Json,
    /// UTF-16 text.
    Utf16,
    /// Other text.
    Text,
    /// A zip archive that `torch.save` wrote.
    PyTorch,
    /// A bare pickle.
    Pickle,
    /// NumPy's `.npy` or `.npz`.
    Numpy,
    /// HDF5, as Keras writes it.
    Hdf5,
    /// An archive or a compressed file.
    Archive,
    /// A safetensors file.
    Safetensors,
    /// A GGUF file.
    Gguf,
    /// A model or an adapter in llama.cpp's formats of before August 2023.
    OldGgml,
    /// Nothing known.
    Unknown,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "an empty file",
            Self::Zeros => "zeros only",
            Self::LfsPointer(Some(size)) => {
                return write!(
                    f,
                    "a Git LFS pointer, which stands for a file of {size} bytes"
                );
            }
            Self::LfsPointer(None) => "a Git LFS pointer",
            Self::AnnexPointer => "a git-annex pointer",
            Self::Html => "an HTML page",
            Self::Xml => "an XML document",
            Self::Json => "JSON",
            Self::Utf16 => "UTF-16 text",
            Self::Text => "text",
            Self::PyTorch => "a PyTorch file, which holds a pickle",
            Self::Pickle => "a pickle",
            Self::Numpy => "a NumPy file",
            Self::Hdf5 => "an HDF5 file",
            Self::Archive => "an archive or a compressed file",
            Self::Safetensors => "a safetensors file",
            Self::Gguf => "a GGUF file",
            Self::OldGgml => "a file of llama.cpp from before GGUF",
            Self::Unknown => "nothing known",
        })
    }
}

impl FileKind {
    /// By the first bytes of a file, a few thousand of them or all.
    ///
    /// ```
    /// use monteclora_converters::foreign::FileKind;
    /// let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n";
    /// assert_eq!(FileKind::of(pointer), FileKind::LfsPointer(Some(1234)));
    /// assert_eq!(FileKind::of(b"<!DOCTYPE html>"), FileKind::Html);
    /// ```
    pub fn of(head: &[u8]) -> Self {
        let head = &head[..head.len().min(HEAD)];
        if head.is_empty() {
            return Self::Empty;
        }
        if head.iter().all(|byte| *byte == 0) {
            return Self::Zeros;
        }
        const MAGIC: [(&[u8], FileKind); 16] = [
            (b"lmgg", FileKind::OldGgml),
            (b"fmgg", FileKind::OldGgml),
            (b"tjgg", FileKind::OldGgml),
            (b"algg", FileKind::OldGgml),
            (b"GGUF", FileKind::Gguf),
            (b"\x93NUMPY", FileKind::Numpy),
            (b"\x89HDF\r\n\x1a\n", FileKind::Hdf5),
            (b"\x1f\x8b", FileKind::Archive),
            (b"\x28\xb5\x2f\xfd", FileKind::Archive),
            (b"\xfd7zXZ\0", FileKind::Archive),
            (b"7z\xbc\xaf\x27\x1c", FileKind::Archive),
            (b"BZh", FileKind::Archive),
            (b"Rar!", FileKind::Archive),
            (b"\xff\xfe", FileKind::Utf16),
            (b"\xfe\xff", FileKind::Utf16),
            (b"/annex/objects/", FileKind::AnnexPointer),
        ];
        if let Some((_, kind)) = MAGIC.iter().find(|(magic, _)| head.starts_with(magic)) {
            return kind.clone();
        }
        if head.starts_with(b"PK\x03\x04") {
            let holds = |name: &[u8]| head.windows(name.len()).any(|window| window == name);
            return match (holds(b"data.pkl"), holds(b".npy")) {
                (true, _) => Self::PyTorch,
                (_, true) => Self::Numpy,
                _ => Self::Archive,
            };
        }
        // Protocols 2 to 5; the version is followed by an opcode.
        if let [0x80, 2..=5, _, ..] = head {
            return Self::Pickle;
        }
        if let Some((length, rest)) = head.split_first_chunk::<8>()
            && u64::from_le_bytes(*length) <= 100_000_000
            && rest.first() == Some(&b'{')
        {
            return Self::Safetensors;
        }
        Self::of_text(head)
    }

    /// By the first bytes of the file at `path`. What is no regular file is not opened, since a pipe would wait for its writer.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        if !std::fs::metadata(path)?.is_file() {
            return Ok(Self::Unknown);
        }
        let mut head = Vec::with_capacity(HEAD);
        File::open(path)?.take(HEAD as u64).read_to_end(&mut head)?;
        Ok(Self::of(&head))
    }

    fn of_text(head: &[u8]) -> Self {
        // ASCII characters in UTF-16 without a mark: every second byte is zero.
        let zeros = |first: usize| head.iter().skip(first).step_by(2).all(|byte| *byte == 0);
        if head.len() >= 4 && (zeros(0) || zeros(1)) {
            return Self::Utf16;
        }
        let Some(text) = text_of(head) else {
            return Self::Unknown;
        };
        let text = text.trim_start();
        let lower = text.get(..64).unwrap_or(text).to_ascii_lowercase();
        if text.starts_with("version https://git-lfs") || text.starts_with("version http://git-") {
            let size = text.lines().find_map(|line| line.strip_prefix("size "));
            return Self::LfsPointer(size.and_then(|size| size.trim().parse().ok()));
        }
        match text.as_bytes().first() {
            Some(b'{') => Self::Json,
            Some(b'<') if lower.starts_with("<?xml") && !text.contains("<html") => Self::Xml,
            Some(b'<') if lower.starts_with("<!doctype") || text.contains("<html") => Self::Html,
            Some(b'<')
                if ["<head", "<body", "<!--"]
                    .iter()
                    .any(|tag| lower.starts_with(tag)) =>
            {
                Self::Html
            }
            _ if text.len() < LEAST_TEXT => Self::Unknown,
            _ => Self::Text,
        }
    }

    /// What to do about a file of this kind where another was expected.
    fn fix(&self) -> &'static str {
        match self {
            Self::Empty | Self::Zeros => {
                "fetch or save it again: this is what an interrupted download or a full disk leaves"
            }
            Self::LfsPointer(_) => {
                "run `git lfs pull` in the clone, or fetch it with `hf download`"
            }
            Self::AnnexPointer => "run `git annex get` for it",
            Self::Html | Self::Xml => {
                "fetch the file itself, such as with `hf download`: its address on the Hub holds /resolve/, not /blob/, and a gated \
                 repository needs a token"
            }
            Self::Json | Self::Text => {
                "fetch the file again: this may be a server's answer that was saved in its place"
            }
            Self::Utf16 => "save it as UTF-8",
            Self::PyTorch | Self::Pickle => UNPICKLE,
            Self::Numpy | Self::Hdf5 => "save the tensors as safetensors",
            Self::Archive => "unpack it first",
            Self::Safetensors => "give it a name that ends in .safetensors",
            Self::Gguf => "give it a name that ends in .gguf",
            Self::OldGgml => "convert what it was made from again, with a llama.cpp of today",
            Self::Unknown => "fetch or save it again",
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::Empty | Self::Zeros => "empty-file",
            Self::LfsPointer(_) | Self::AnnexPointer => "lfs-pointer",
            Self::Html | Self::Xml | Self::Json | Self::Text => "not-weights",
            Self::Utf16 => "utf-16",
            Self::PyTorch | Self::Pickle => "pickle",
            _ => "other-format",
        }
    }
}

/// The problem of the file at `path`, which begins with `head` and is not `wanted` ("a safetensors file"); none if nothing is
/// recognised, or if it looks like what is wanted and is only damaged.
pub fn not_wanted(path: &Path, head: &[u8], wanted: &str) -> Option<Problem> {
    let kind = FileKind::of(head);
    let name = kind.to_string();
    if kind == FileKind::Unknown || name == wanted {
        return None;
    }
    let mut message = format!("{name}, not {wanted}");
    if let FileKind::Html | FileKind::Xml | FileKind::Json | FileKind::Text = kind {
        message += &format!("; it begins \"{}\"", beginning(head));
    }
    if let FileKind::PyTorch | FileKind::Pickle = kind {
        message += "; a pickle runs code when it is read, so it is not read";
    }
    let at = format!("`{}`", path.display());
    Some(Problem::new(kind.code(), at, message, kind.fix()))
}

/// [`not_wanted`] as an error, or else `other`.
pub(crate) fn refusal(
    path: &Path,
    head: &[u8],
    wanted: &str,
    other: impl FnOnce() -> Error,
) -> Error {
    not_wanted(path, head, wanted).map_or_else(other, Error::from)
}

/// `head` as text, without what was cut off in the middle of a character; none if it is no text.
fn text_of(head: &[u8]) -> Option<&str> {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let is_text = |c: char| !c.is_control() || c.is_ascii_whitespace();
    text.chars().all(is_text).then_some(text)
}

/// The first words of a text, on one line.
fn beginning(head: &[u8]) -> String {
    let text = text_of(&head[..head.len().min(HEAD)]).unwrap_or_default();
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut shown: String = words.chars().take(SHOWN).collect();
    if shown.len() < words.len() {
        shown += "...";
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_recognised_by_their_first_bytes() {
        let safetensors = [&2u64.to_le_bytes()[..], b"{}"].concat();
        for (head, expected) in [
            (&b""[..], FileKind::Empty),
            (&[0; 64], FileKind::Zeros),
            (
                b"version https://git-lfs.github.com/spec/v1\noid x\n",
                FileKind::LfsPointer(None),
            ),
            (b"/annex/objects/MD5E-s1--0\n", FileKind::AnnexPointer),
            (b"\n<!doctype HTML><title>Sign in</title>", FileKind::Html),
            (b"<html lang=\"en\">", FileKind::Html),
            (
                b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>",
                FileKind::Xml,
            ),
            (b"{\"error\": \"Entry not found\"}", FileKind::Json),
            (b"Entry not found", FileKind::Text),
            (b"{\0\"\0a\0\"\0", FileKind::Utf16),
            (b"\xff\xfe{\0", FileKind::Utf16),
            (b"PK\x03\x04 archive/data.pkl", FileKind::PyTorch),
            (b"PK\x03\x04 layers.0.lora_a.npy", FileKind::Numpy),
            (b"PK\x03\x04 a.txt", FileKind::Archive),
            (b"\x80\x02}q\0.", FileKind::Pickle),
            (b"\x1f\x8b\x08", FileKind::Archive),
            (b"GGUF\x03\0\0\0", FileKind::Gguf),
            (b"algg\x01\0\0\0", FileKind::OldGgml),
            (&safetensors, FileKind::Safetensors),
            (b"\x01\xff\xc3\x02", FileKind::Unknown),
        ] {
            assert_eq!(
                FileKind::of(head),
                expected,
                "{:?}",
                String::from_utf8_lossy(head)
            );
        }
        // A character that is cut at the end does not make a text something else.
        assert_eq!(
            FileKind::of(&"a naïve text".as_bytes()[..10]),
            FileKind::Text
        );
        assert_eq!(FileKind::of(&"access: ï".as_bytes()[..9]), FileKind::Text);
    }

    #[test]
    fn a_problem_says_what_it_is_where_and_what_to_do() {
        let path = Path::new("a/adapter_model.safetensors");
        let problem = |head: &[u8]| not_wanted(path, head, "a safetensors file");
        let page = problem(b"<!DOCTYPE html>\n<title>Sign  in</title>").expect("a page");
        assert_eq!(page.code, "not-weights");
        assert!(
            page.message
                .contains("begins \"<!DOCTYPE html> <title>Sign in"),
            "{page}"
        );
        assert!(page.fix.contains("hf download"));
        let pickle = problem(b"\x80\x02}q\0.").expect("a pickle");
        assert!(pickle.to_string().contains("runs code") && pickle.fix.contains("save_file"));
        // What looks like the right thing is damaged in another way, and what is unknown is called nothing.
        assert_eq!(problem(&[&9u64.to_le_bytes()[..], b"{"].concat()), None);
        assert_eq!(problem(b"\x01\xff\xc3\x02"), None);
    }
}
