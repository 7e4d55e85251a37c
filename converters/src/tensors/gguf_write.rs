//! Writes GGUF version 3: streaming and aligned; equal input gives equal bytes.

use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::write_file;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

const ALIGNMENT: usize = 32;

/// A metadata value of the types that adapters need.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Entry {
    U32(u32),
    F32(f32),
    Text(String),
}

/// The float types that both safetensors and GGUF have, with ggml's numbers.
const FLOATS: [(DType, u32); 3] = [(DType::F32, 0), (DType::F16, 1), (DType::BF16, 30)];

/// ggml's number for a float type.
pub(crate) fn ggml_type(dtype: DType) -> Option<u32> {
    let mut known = FLOATS.iter();
    known.find_map(|(known, number)| (*known == dtype).then_some(*number))
}

/// The float type with this ggml number.
pub(crate) fn dtype_of(ggml_type: u32) -> Option<DType> {
    let mut known = FLOATS.iter();
    known.find_map(|(dtype, number)| (*number == ggml_type).then_some(*dtype))
}

/// Writes metadata and matrices in the given order. A tensor's shape is outermost first, as everywhere in this crate;
/// GGUF stores it reversed.
pub(crate) fn write_gguf(
    path: &Path,
    metadata: &[(&str, Entry)],
    tensors: &[(String, Tensor)],
) -> Result<()> {
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut header, key);
        match value {
            Entry::U32(value) => {
                header.extend(4u32.to_le_bytes());
                header.extend(value.to_le_bytes());
            }
            Entry::F32(value) => {
                header.extend(6u32.to_le_bytes());
                header.extend(value.to_le_bytes());
            }
            Entry::Text(value) => {
                header.extend(8u32.to_le_bytes());
                put_text(&mut header, value);
            }
        }
    }
    let mut offset = 0usize;
    for (name, tensor) in tensors {
        let kind = ggml_type(tensor.dtype()).ok_or_else(|| {
            Error::tensor(name, format!("{} has no place in GGUF", tensor.dtype()))
        })?;
        put_text(&mut header, name);
        header.extend((tensor.shape().len() as u32).to_le_bytes());
        for dim in tensor.shape().iter().rev() {
            header.extend((*dim as u64).to_le_bytes());
        }
        header.extend(kind.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        offset += tensor.n_bytes().next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    write_file(path, |writer| {
        let mut put = |bytes: &[u8]| writer.write_all(bytes).map_err(Error::io("write", path));
        put(&header)?;
        for (_, tensor) in tensors {
            let n_bytes = tensor.n_bytes();
            put(&tensor.bytes())?;
            put(&[0; ALIGNMENT][..n_bytes.next_multiple_of(ALIGNMENT) - n_bytes])?;
        }
        Ok(())
    })
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
