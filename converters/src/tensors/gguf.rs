//! Reads GGUF: metadata and locations of tensors, checked and bounded; the data stays mapped.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::foreign;
use crate::problem::Problem;
use crate::tensors::dtype::DType;
use crate::tensors::ggml_type::{REQUANTISE, ggml_block, ggml_type_is_named, ggml_type_name};
use crate::tensors::safetensors_file::map_file;
use crate::tensors::tensor::{Tensor, element_count};

/// Limits on metadata entries, on tensors, and on array elements in total. Counts come from the file, so nothing is
/// allocated only because a count says so.
const MAX_ENTRIES: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_NAME_BYTES: u64 = 1 << 12;
const MAX_ELEMENTS: u64 = 1 << 22;
/// ggml's own limit.
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// One metadata value; integers and floats are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// u8, u16, u32 or u64.
    Unsigned(u64),
    /// i8, i16, i32 or i64.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A flag.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values of one type.
    Array(GgufArray),
}

/// An array of metadata values.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufArray {
    /// u8, u16, u32 or u64.
    Unsigned(Vec<u64>),
    /// i8, i16, i32 or i64.
    Signed(Vec<i64>),
    /// f32 or f64.
    Float(Vec<f64>),
    /// Flags.
    Bool(Vec<bool>),
    /// UTF-8 texts.
    String(Vec<String>),
}

impl GgufValue {
    /// The value as a count: an unsigned or non-negative signed integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// The value as a number, integers included.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The flag.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// The text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    /// The texts of an array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Self::Array(GgufArray::String(values)) => Some(values),
            _ => None,
        }
    }
}

/// A tensor of a GGUF file.
#[derive(Clone, Copy)]
pub struct GgufTensor<'a> {
    /// ggml's number for the element type; see [`crate::ggml_block`].
    pub ggml_type: u32,
    /// Dimensions in GGUF's order, innermost first: `[in, out]` for a linear weight.
    pub shape: &'a [usize],
    /// The data, in quantised blocks if the type has them.
    pub bytes: &'a [u8],
}

impl fmt::Debug for GgufTensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GgufTensor(type {}, {:?})", self.ggml_type, self.shape)
    }
}

/// A GGUF file (version 2 or 3, little-endian) whose structure has been checked and whose data is mapped.
///
/// The file must not be changed while it is open.
#[derive(Debug, Clone)]
pub struct GgufFile {
    path: PathBuf,
    version: u32,
    map: Arc<Mmap>,
    metadata: IndexMap<String, GgufValue>,
    tensors: IndexMap<String, Info>,
}

#[derive(Debug, Clone)]
struct Info {
    ggml_type: u32,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl GgufFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// Returns `not-found` if there is no such file; `malformed`, naming key or tensor, if it is truncated, its counts
    /// are impossible, or a tensor does not lie in the file; `block_format` if a tensor has blocks that are not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = map_file(path)?;
        let refuse = |message: String| Error::malformed(path, message);
        let mut cursor = Cursor {
            path,
            bytes: &map,
            at: 0,
            n_elements: 0,
        };
        if !map.starts_with(b"GGUF") {
            let other = || refuse("not a GGUF file".into());
            return Err(foreign::refusal(path, &map, "a GGUF file", other));
        }
        cursor.take(4, "the magic")?;
        let version = cursor.u32("the version")?;
        if !matches!(version, 2 | 3) {
            let hint = if version.swap_bytes() <= 3 {
                " (big-endian)"
            } else {
                ""
            };
            if version > 0xFFFF && hint.is_empty() {
                return Err(refuse(format!(
                    "{version} stands where the version of GGUF is expected: the file is damaged; fetch or make it again"
                )));
            }
            return Err(refuse(format!(
                "GGUF version {version}{hint}; versions 2 and 3, little-endian, are read"
            )));
        }
        let n_tensors = cursor.count(MAX_TENSORS, "tensors")?;
        let n_entries = cursor.count(MAX_ENTRIES, "metadata entries")?;
        let mut metadata = IndexMap::new();
        for _ in 0..n_entries {
            let key = cursor.name("a metadata key")?;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(kind, &key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(refuse(format!("metadata key `{key}` occurs twice")));
            }
        }
        let headers = (0..n_tensors)
            .map(|_| cursor.tensor())
            .collect::<Result<Vec<_>>>()?;
        let alignment = alignment(path, &metadata)?;
        let data_start = (cursor.at as u64).next_multiple_of(alignment);
        let tensors = lay_out(path, headers, data_start, alignment, map.len() as u64)?;
        Ok(Self {
            path: path.to_path_buf(),
            version,
            map: Arc::new(map),
            metadata,
            tensors,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Metadata in file order.
    pub fn metadata(&self) -> &IndexMap<String, GgufValue> {
        &self.metadata
    }

    /// Tensor names in file order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        let info = self.tensors.get(name)?;
        Some(GgufTensor {
            ggml_type: info.ggml_type,
            shape: &info.shape,
            bytes: &self.map[info.range.clone()],
        })
    }

    /// Returns the mapped file, and the byte range of the data of the tensor called `name`.
    pub(crate) fn region(&self, name: &str) -> Option<(Arc<Mmap>, Range<usize>)> {
        let range = self.tensors.get(name)?.range.clone();
        Some((Arc::clone(&self.map), range))
    }

    /// Size of the file in bytes.
    pub(crate) fn n_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Returns the tensor called `name` with a shape of the same number of elements, outermost first; its data stays
    /// mapped. `None` if there is no such tensor or its size differs.
    pub(crate) fn mapped(&self, name: &str, dtype: DType, shape: &[usize]) -> Option<Tensor> {
        let range = self.tensors.get(name)?.range.clone();
        let n_bytes = element_count(shape)?.checked_mul(dtype.size())?;
        let map = Arc::clone(&self.map);
        (n_bytes == range.len())
            .then(|| Tensor::from_map(dtype, shape.into(), map, range.start, range.len()))
    }
}

fn alignment(path: &Path, metadata: &IndexMap<String, GgufValue>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) => value
            .as_u64()
            .filter(|value| value.is_power_of_two() && (1..=1 << 16).contains(value))
            .ok_or_else(|| Error::malformed(path, format!("general.alignment is {value:?}"))),
    }
}

/// The refusal of a type whose block layout is unknown. A type without a name may be a sign of damage.
fn unread_type(at: String, ggml_type: u32) -> Problem {
    let code = match ggml_type_is_named(ggml_type) {
        true => "block_format",
        false => "malformed",
    };
    let message = format!(
        "is of {}: such blocks are not read",
        ggml_type_name(ggml_type)
    );
    Problem::new(code, at, message, REQUANTISE)
}

/// A tensor's name and the contents of its header.
struct Header {
    name: String,
    shape: Vec<u64>,
    ggml_type: u32,
    offset: u64,
}

/// Checks that every tensor lies in the file, aligned, and that none overlaps another.
fn lay_out(
    path: &Path,
    headers: Vec<Header>,
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<IndexMap<String, Info>> {
    let mut tensors = IndexMap::with_capacity(headers.len());
    let mut ranges = BTreeSet::new();
    for header in headers {
        let wrong = |message: String| {
            Error::malformed(path, format!("tensor `{}`: {message}", header.name))
        };
        let (block, block_bytes) = ggml_block(header.ggml_type).ok_or_else(|| {
            let at = format!("`{}`: tensor `{}`", path.display(), header.name);
            unread_type(at, header.ggml_type)
        })?;
        let n_values = header
            .shape
            .iter()
            .try_fold(1u64, |product, dim| product.checked_mul(*dim));
        let row = header.shape.first().copied().unwrap_or(1);
        if row % block as u64 != 0 {
            return Err(wrong(format!(
                "rows of {row} elements are no multiple of the block of {block}"
            )));
        }
        let n_bytes = n_values
            .and_then(|n| (n / block as u64).checked_mul(block_bytes as u64))
            .ok_or_else(|| wrong(format!("shape {:?} overflows", header.shape)))?;
        if header.offset % alignment != 0 {
            return Err(wrong(format!(
                "offset {} is not aligned to {alignment}",
                header.offset
            )));
        }
        let start = data_start.checked_add(header.offset);
        let range = start.and_then(|start| Some((start, start.checked_add(n_bytes)?)));
        let Some((start, end)) = range.filter(|(_, end)| *end <= file_len) else {
            return Err(wrong(format!(
                "{n_bytes} bytes at offset {} lie beyond the end of the file: it is cut short, fetch or copy it again",
                header.offset
            )));
        };
        // Everything fits usize because the file is mapped.
        let too_large = || wrong("too large for this machine".to_owned());
        let as_usize = |value: u64| usize::try_from(value).map_err(|_| too_large());
        let info = Info {
            ggml_type: header.ggml_type,
            shape: header
                .shape
                .iter()
                .map(|dim| as_usize(*dim))
                .collect::<Result<_>>()?,
            range: as_usize(start)?..as_usize(end)?,
        };
        if n_bytes > 0 {
            ranges.insert((start, end));
        }
        if tensors.insert(header.name.clone(), info).is_some() {
            return Err(wrong("occurs twice".to_owned()));
        }
    }
    let n_filled = tensors
        .values()
        .filter(|info| !info.range.is_empty())
        .count();
    let overlaps = ranges
        .iter()
        .zip(ranges.iter().skip(1))
        .any(|(left, right)| left.1 > right.0);
    if overlaps || ranges.len() != n_filled {
        return Err(Error::malformed(path, "tensors overlap"));
    }
    Ok(tensors)
}

/// A position in the header; every read is checked against the end.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    n_elements: u64,
}

impl<'a> Cursor<'a> {
    fn refuse<T>(&self, message: String) -> Result<T> {
        Err(Error::malformed(self.path, message))
    }

    fn take(&mut self, n_bytes: u64, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(n_bytes).ok().and_then(|n| rest.get(..n)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => self.refuse(format!(
                "ends inside {what}: {n_bytes} bytes announced, {} left; it is cut short, fetch or copy it again",
                rest.len()
            )),
        }
    }

    fn word<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut word = [0; N];
        word.copy_from_slice(self.take(N as u64, what)?);
        Ok(word)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.word(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.word(what)?))
    }

    fn count(&mut self, max: u64, what: &str) -> Result<u64> {
        let count = self.u64(what)?;
        if count > max {
            return self.refuse(format!("announces {count} {what}; at most {max} are read"));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let n_bytes = self.u64(what)?;
        self.text(n_bytes, what)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let n_bytes = self.count(MAX_NAME_BYTES, &format!("bytes of {what}"))?;
        self.text(n_bytes, what)
    }

    fn text(&mut self, n_bytes: u64, what: &str) -> Result<String> {
        let bytes = self.take(n_bytes, what)?;
        let text = std::str::from_utf8(bytes)
            .map_err(|_| Error::malformed(self.path, format!("{what} is not UTF-8")))?;
        Ok(text.to_owned())
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<GgufValue> {
        Ok(match kind {
            0 | 2 | 4 | 10 => GgufValue::Unsigned(self.unsigned(kind, key)?),
            1 | 3 | 5 | 11 => GgufValue::Signed(self.signed(kind, key)?),
            6 | 12 => GgufValue::Float(self.float(kind, key)?),
            7 => GgufValue::Bool(self.flag(key)?),
            8 => GgufValue::String(self.string(key)?),
            9 => GgufValue::Array(self.array(key)?),
            _ => return self.refuse(format!("`{key}`: value type {kind} is not read")),
        })
    }

    fn array(&mut self, key: &str) -> Result<GgufArray> {
        let kind = self.u32(key)?;
        let n = self.count(MAX_ELEMENTS, key)?;
        self.n_elements += n;
        if self.n_elements > MAX_ELEMENTS {
            return self.refuse(format!(
                "`{key}`: more than {MAX_ELEMENTS} array elements in all"
            ));
        }
        let each = 0..n;
        Ok(match kind {
            0 | 2 | 4 | 10 => GgufArray::Unsigned(
                each.map(|_| self.unsigned(kind, key))
                    .collect::<Result<_>>()?,
            ),
            1 | 3 | 5 | 11 => GgufArray::Signed(
                each.map(|_| self.signed(kind, key))
                    .collect::<Result<_>>()?,
            ),
            6 | 12 => GgufArray::Float(each.map(|_| self.float(kind, key)).collect::<Result<_>>()?),
            7 => GgufArray::Bool(each.map(|_| self.flag(key)).collect::<Result<_>>()?),
            8 => GgufArray::String(each.map(|_| self.string(key)).collect::<Result<_>>()?),
            _ => return self.refuse(format!("`{key}`: value type {kind} is not read")),
        })
    }

    fn unsigned(&mut self, kind: u32, key: &str) -> Result<u64> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.word(key)?).into(),
            2 => u16::from_le_bytes(self.word(key)?).into(),
            4 => self.u32(key)?.into(),
            _ => self.u64(key)?,
        })
    }

    fn signed(&mut self, kind: u32, key: &str) -> Result<i64> {
        Ok(match kind {
            1 => i8::from_le_bytes(self.word(key)?).into(),
            3 => i16::from_le_bytes(self.word(key)?).into(),
            5 => i32::from_le_bytes(self.word(key)?).into(),
            _ => i64::from_le_bytes(self.word(key)?),
        })
    }

    fn float(&mut self, kind: u32, key: &str) -> Result<f64> {
        Ok(match kind {
            6 => f32::from_le_bytes(self.word(key)?).into(),
            _ => f64::from_le_bytes(self.word(key)?),
        })
    }

    fn flag(&mut self, key: &str) -> Result<bool> {
        match self.word(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => self.refuse(format!("`{key}`: {other} is not a flag")),
        }
    }

    fn tensor(&mut self) -> Result<Header> {
        let name = self.name("a tensor's name")?;
        let n_dims = self.u32(&name)?;
        if n_dims > MAX_DIMS {
            return self.refuse(format!(
                "tensor `{name}`: {n_dims} dimensions; at most {MAX_DIMS} are read"
            ));
        }
        let shape = (0..n_dims)
            .map(|_| self.u64(&name))
            .collect::<Result<_>>()?;
        Ok(Header {
            shape,
            ggml_type: self.u32(&name)?,
            offset: self.u64(&name)?,
            name,
        })
    }
}

#[cfg(test)]
mod tests;
