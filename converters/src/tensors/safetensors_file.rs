//! Reads safetensors: the header is checked strictly, the data stays mapped.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::foreign;
use crate::json;
use crate::problem::Problem;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::{Tensor, element_count};

/// Largest header that is read, the limit of the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Maximum number of dimensions of a tensor.
const MAX_DIMS: usize = 16;
/// Limits on the tensors and the metadata entries of a file, and on the length of a name. They bound the memory that a
/// header costs, whatever its own length.
const MAX_TENSORS: usize = 1 << 18;
const MAX_METADATA: usize = 1 << 14;
const MAX_NAME_BYTES: usize = 1 << 12;
const LIMITS: json::Limits = json::Limits {
    values: 16 * MAX_TENSORS,
    keys: 2 * MAX_TENSORS,
    key_bytes: MAX_NAME_BYTES,
};
const TRUNCATED: &str = "it is cut short; fetch or copy it again";
/// Keys that an entry may have.
const FIELDS: [&str; 3] = ["dtype", "shape", "data_offsets"];

/// A safetensors file whose header has been checked and whose data is mapped, not read.
///
/// The header must describe the file exactly: every byte of data belongs to one tensor, no key occurs twice, and each
/// tensor's range has the size of its shape. The file must not be changed while it is open.
#[derive(Debug, Clone)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Arc<Mmap>,
    tensors: BTreeMap<String, Info>,
    metadata: BTreeMap<String, String>,
}

/// Type, shape and range of one tensor; the range is in bytes of the file.
#[derive(Debug, Clone)]
struct Info {
    dtype: DType,
    shape: Arc<[usize]>,
    start: usize,
    len: usize,
}

impl SafetensorsFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// Returns `not-found` if there is no such file; `malformed`, naming file and tensor, if it is truncated or its
    /// header is wrong.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = map_file(path)?;
        let n_bytes = map.len() as u64;
        let refuse = |message: String| Err(Error::malformed(path, message));
        let foreign = |message: String| {
            let malformed = || Error::malformed(path, message);
            Err(foreign::refusal(
                path,
                &map,
                "a safetensors file",
                malformed,
            ))
        };
        let Some((length, _)) = map.split_first_chunk::<8>() else {
            return foreign(format!("not a safetensors file: only {n_bytes} bytes"));
        };
        let header_len = u64::from_le_bytes(*length);
        let what = format!("header of {header_len} bytes");
        if header_len > MAX_HEADER_BYTES {
            return foreign(format!("{what}; at most {MAX_HEADER_BYTES} are read"));
        }
        if header_len > n_bytes - 8 {
            return foreign(format!("{what} in a file of {n_bytes}: {TRUNCATED}"));
        }
        let data_start = usize::try_from(header_len + 8)
            .map_err(|_| Error::malformed(path, "header too long for this machine"))?;
        let header_bytes = &map[8..data_start];
        if header_bytes.first() != Some(&b'{') {
            return foreign("the header does not start with `{`".to_owned());
        }
        let header = std::str::from_utf8(header_bytes)
            .map_err(|_| Error::malformed(path, "the header is not UTF-8"))?;
        let header: Header =
            json::parse(header, LIMITS).map_err(|source| Error::json(path, &source))?;
        if header.entries.len() > MAX_TENSORS {
            return refuse(format!(
                "more than {MAX_TENSORS} tensors; split the file into shards"
            ));
        }
        let metadata = texts(path, header.metadata)?;
        let tensors = check_layout(path, header.entries, data_start, map.len())?;
        Ok(Self {
            path: path.to_path_buf(),
            map: Arc::new(map),
            tensors,
            metadata,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor called `name`; its data stays mapped.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        let info = self.tensors.get(name)?;
        Some(Tensor::from_map(
            info.dtype,
            Arc::clone(&info.shape),
            Arc::clone(&self.map),
            info.start,
            info.len,
        ))
    }

    /// Element type and shape of the tensor called `name`.
    pub fn info(&self, name: &str) -> Option<(DType, &[usize])> {
        self.tensors
            .get(name)
            .map(|info| (info.dtype, &*info.shape))
    }

    /// The free-form `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Maps a regular file. The file type is checked before opening, because opening a pipe would wait for its writer.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let read_error = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => Error::not_found(path, "there is no such file"),
        _ => Error::io("read", path)(source),
    };
    if !std::fs::metadata(path).map_err(read_error)?.is_file() {
        return Err(Error::malformed(path, "not a regular file"));
    }
    let file = File::open(path).map_err(read_error)?;
    // SAFETY: the mapping is read-only; the documentation of the public types asks that the file not be changed.
    unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))
}

/// Checks that the entries tile the data section, and returns their locations in the file.
fn check_layout(
    path: &Path,
    entries: BTreeMap<String, TensorInfo>,
    data_start: usize,
    file_len: usize,
) -> Result<BTreeMap<String, Info>> {
    let mut entries: Vec<(String, TensorInfo)> = entries.into_iter().collect();
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut expected_start = 0;
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let refuse = |message: String| {
            let message = format!("tensor `{name}`: {message}");
            Err(Error::malformed(path, message))
        };
        let (start, end) = entry.data_offsets;
        let shape = entry.shape;
        if shape.len() > MAX_DIMS {
            return refuse(format!("more than {MAX_DIMS} dimensions"));
        }
        let Some(dtype) = DType::from_name(&entry.dtype.to_string()) else {
            return refuse(format!("unknown element type `{}`", entry.dtype));
        };
        let Some(n_bytes) = element_count(&shape).and_then(|n| n.checked_mul(dtype.size())) else {
            return refuse(format!("shape {shape:?} overflows"));
        };
        if end.checked_sub(start) != Some(n_bytes) {
            return refuse(format!(
                "{dtype} {shape:?} takes {n_bytes} bytes but its offsets are {start}..{end}"
            ));
        }
        if start != expected_start {
            let what = match start < expected_start {
                true => "overlaps another tensor",
                false => "leaves bytes that belong to no tensor",
            };
            return refuse(format!("starts at {start}, which {what}"));
        }
        expected_start = end;
        let info = Info {
            dtype,
            shape: shape.into(),
            start: data_start + start,
            len: n_bytes,
        };
        tensors.insert(name, info);
    }
    let n_data = file_len - data_start;
    if expected_start != n_data {
        let what = match n_data < expected_start {
            true => TRUNCATED,
            false => "bytes were added to it",
        };
        let message = format!(
            "the header describes {expected_start} bytes of data but the file has {n_data}: {what}"
        );
        return Err(Error::malformed(path, message));
    }
    Ok(tensors)
}

/// Returns the entries of `__metadata__`. The format requires texts, and every reader refuses other values; null means
/// no entries.
fn texts(path: &Path, metadata: Value) -> Result<BTreeMap<String, String>> {
    const FIX: &str =
        "save it again with texts: save_file(tensors, FILE, metadata={\"format\": \"pt\"})";
    let metadata = match metadata {
        Value::Null => return Ok(BTreeMap::new()),
        Value::Object(entries) if entries.len() > MAX_METADATA => {
            let message = format!("more than {MAX_METADATA} entries of metadata");
            return Err(Error::malformed(path, message));
        }
        Value::Object(entries) => entries,
        _ => {
            let message = "not a table of texts, as the format wants it; no reader of safetensors takes the file";
            let problem = Problem::new("metadata", "__metadata__", message, FIX);
            return Err(Error::refused(path, vec![problem]));
        }
    };
    let mut texts = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, value) in metadata {
        match value {
            Value::String(text) => {
                texts.insert(key, text);
            }
            other => {
                let shown: String = other.to_string().chars().take(32).collect();
                let message = format!(
                    "{shown} is not a text, as the format wants it; no reader of safetensors takes the file"
                );
                problems.push(Problem::new(
                    "metadata",
                    format!("__metadata__.{key}"),
                    message,
                    FIX,
                ));
            }
        }
    }
    Error::refuse_any(path, problems)?;
    Ok(texts)
}

/// The header as written; the entries are read by the reference implementation's types.
#[derive(Default)]
struct Header {
    metadata: Value,
    entries: BTreeMap<String, TensorInfo>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a safetensors header")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        while let Some(name) = access.next_key::<String>()? {
            if name == "__metadata__" {
                header.metadata = access.next_value()?;
                continue;
            }
            let refuse = |message: String| A::Error::custom(format!("tensor `{name}`: {message}"));
            let fields: Map<String, Value> =
                access.next_value().map_err(|e| refuse(e.to_string()))?;
            if let Some(field) = fields
                .keys()
                .find(|field| !FIELDS.contains(&field.as_str()))
            {
                return Err(refuse(format!("unknown field `{field}`")));
            }
            if let Some(Value::String(dtype)) = fields.get("dtype")
                && DType::from_name(dtype).is_none()
            {
                let shown: String = dtype.chars().take(32).collect();
                return Err(refuse(format!("unknown element type `{shown}`")));
            }
            let entry = TensorInfo::deserialize(Value::Object(fields));
            let entry = entry.map_err(|error| refuse(error.to_string()))?;
            header.entries.insert(name, entry);
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open_bytes(bytes: &[u8]) -> Result<SafetensorsFile> {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        std::fs::write(file.path(), bytes).expect("writable");
        SafetensorsFile::open(file.path())
    }

    fn with_header(header: &str, data: &[u8]) -> Result<SafetensorsFile> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        open_bytes(&bytes)
    }

    /// Also those that the format's reference knows and nothing here can read.
    #[test]
    fn an_unknown_element_type_is_named() {
        for dtype in ["XX", "f32", "F8_E4M3FNUZ", "F4"] {
            let header =
                format!(r#"{{"a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,1]}}}}"#);
            let error = with_header(&header, &[0]).expect_err(dtype).to_string();
            let expected = format!("tensor `a`: unknown element type `{dtype}`");
            assert!(error.contains(&expected), "{error}");
        }
    }

    #[test]
    fn an_honest_file_is_read_even_if_unaligned() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        let file = with_header(header, &[7, 0, 0, 128, 63]).expect("honest");
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(file.metadata()["format"], "pt");
        assert_eq!(file.info("b"), Some((DType::F32, &[1][..])));
        assert_eq!(
            file.get("b").expect("there").to_f32().expect("float"),
            [1.0]
        );
        assert!(file.get("c").is_none());
    }

    #[test]
    fn headers_that_lie_are_refused_and_named() {
        let entry =
            |offsets: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}"#);
        let cases = [
            (format!(r#"{{"a":{}}}"#, entry("[0,8]")), 8, "`a`"),
            (
                format!(r#"{{"a":{},"b":{}}}"#, entry("[0,4]"), entry("[2,6]")),
                8,
                "overlaps",
            ),
            (
                format!(r#"{{"a":{},"b":{}}}"#, entry("[0,4]"), entry("[8,12]")),
                12,
                "no tensor",
            ),
            (format!(r#"{{"a":{}}}"#, entry("[4,0]")), 4, "`a`"),
            (
                format!(r#"{{"a":{}}}"#, entry("[0,4]")),
                3,
                "the file has 3",
            ),
            (
                format!(r#"{{"a":{}}}"#, entry("[0,4]")),
                5,
                "the file has 5",
            ),
            (
                format!(r#"{{"a":{},"a":{}}}"#, entry("[0,4]"), entry("[0,4]")),
                4,
                "occurs twice",
            ),
            (
                r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#.into(),
                4,
                "F99",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,4]}}"#
                    .into(),
                4,
                "overflows",
            ),
            (
                format!(
                    r#"{{"a":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#,
                    "1,".repeat(40)
                ),
                4,
                "dimensions",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#.into(),
                4,
                "unknown field",
            ),
            (
                format!(
                    r#"{{"__metadata__":{}1{}}}"#,
                    "[".repeat(9000),
                    "]".repeat(9000)
                ),
                0,
                "",
            ),
            ("[]".into(), 0, "start with"),
        ];
        for (header, n_data, expected) in cases {
            let error = with_header(&header, &vec![0; n_data]).expect_err(&header);
            let text = format!(
                "{error} {:?}",
                std::error::Error::source(&error).map(ToString::to_string)
            );
            assert!(text.contains(expected), "{header}: {text}");
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_never_panic(changes in prop::collection::vec((0usize..200, any::<u8>()), 1..4)) {
            let header = r#"{"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([7, 0, 0, 128, 63]);
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            if let Ok(file) = open_bytes(&bytes) {
                for name in file.names() {
                    let tensor = file.get(name).expect("listed");
                    prop_assert_eq!(tensor.bytes().len(), tensor.n_elements() * tensor.dtype().size());
                }
            }
        }
    }

    #[test]
    fn what_a_header_can_cost_is_bounded() {
        let entry = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
        let many: Vec<String> = (0..=MAX_TENSORS)
            .map(|n| format!(r#""{n}":{entry}"#))
            .collect();
        let notes: Vec<String> = (0..=MAX_METADATA).map(|n| format!(r#""{n}":"""#)).collect();
        let cases = [
            (format!("{{{}}}", many.join(",")), "shards"),
            (
                format!(r#"{{"__metadata__":{{{}}}}}"#, notes.join(",")),
                "entries of metadata",
            ),
            (
                format!(r#"{{"{}":{entry}}}"#, "x".repeat(MAX_NAME_BYTES + 1)),
                "a name of",
            ),
            (
                r#"{"__metadata__":{"a":"x","a":"y"}}"#.to_owned(),
                "occurs twice",
            ),
            (
                r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(),
                "occurs twice",
            ),
        ];
        for (header, expected) in cases {
            let error = with_header(&header, &[]).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn truncated_and_oversized_headers_are_refused() {
        assert!(open_bytes(&[]).is_err());
        assert!(open_bytes(&[1, 2, 3]).is_err());
        assert!(open_bytes(&u64::MAX.to_le_bytes()).is_err());
        assert!(open_bytes(&50u64.to_le_bytes()).is_err());
        let missing = SafetensorsFile::open("/nonexistent/file.safetensors").expect_err("missing");
        assert!(missing.is_not_found());
    }
}
