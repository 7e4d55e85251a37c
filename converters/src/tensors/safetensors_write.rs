//! Writes safetensors: streaming; equal input gives equal bytes.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::files::write_file;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::{Tensor, element_count};

/// Name, type and shape of a tensor that is about to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

/// Writes tensors as one safetensors file: wider element types first (which keeps them aligned), then by name;
/// metadata sorted. The bytes depend on the arguments alone.
///
/// The file is written to a temporary sibling, synced and renamed, so an interrupted write leaves `path` as it was.
///
/// # Errors
/// Returns an error if a name occurs twice or the file cannot be written.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let mut by_name = BTreeMap::new();
    for (name, tensor) in tensors {
        if by_name.contains_key(&name) {
            let message = format!("tensor `{name}` given twice");
            return Err(Error::malformed(path, message));
        }
        by_name.insert(name, tensor);
    }
    write_file(path, |writer| {
        write_tensors(path, writer, &by_name, metadata)
    })
}

/// Writes header and data of whole tensors, as [`write_safetensors`] does.
pub(crate) fn write_tensors(
    path: &Path,
    writer: &mut impl Write,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let slots = tensors.iter().map(|(name, tensor)| Slot {
        name: name.clone(),
        dtype: tensor.dtype(),
        shape: tensor.shape().to_vec(),
    });
    stream(path, writer, slots.collect(), metadata, |slot, out| {
        let bytes = tensors.get(&slot.name).map(Tensor::bytes);
        out.write_all(&bytes.unwrap_or_default())
            .map_err(Error::io("write", path))
    })
}

/// Counts the written bytes, so that a tensor can be neither too short nor too long.
struct Counted<'a, W> {
    inner: &'a mut W,
    n_bytes: usize,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.n_bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes header and data; `produce` writes the bytes of one tensor at a time, in file order.
pub(crate) fn stream(
    path: &Path,
    writer: &mut impl Write,
    mut slots: Vec<Slot>,
    metadata: &BTreeMap<String, String>,
    mut produce: impl FnMut(&Slot, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    slots.sort_by_cached_key(|slot| (Reverse(slot.dtype.size()), slot.name.clone()));
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0usize;
    let mut lengths = Vec::with_capacity(slots.len());
    for slot in &slots {
        let end = element_count(&slot.shape)
            .and_then(|n| n.checked_mul(slot.dtype.size()))
            .and_then(|n_bytes| offset.checked_add(n_bytes))
            .ok_or_else(|| {
                Error::malformed(path, format!("tensor `{}` is too large", slot.name))
            })?;
        header.insert(
            slot.name.clone(),
            json!({"dtype": slot.dtype.name(), "shape": slot.shape, "data_offsets": [offset, end]}),
        );
        lengths.push(end - offset);
        offset = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // The data section starts on a multiple of eight bytes.
    text.resize(text.len().next_multiple_of(8), b' ');
    writer
        .write_all(&(text.len() as u64).to_le_bytes())
        .and_then(|()| writer.write_all(&text))
        .map_err(Error::io("write", path))?;
    for (slot, length) in slots.iter().zip(lengths) {
        let mut counted = Counted {
            inner: writer,
            n_bytes: 0,
        };
        produce(slot, &mut counted)?;
        let n_bytes = counted.n_bytes;
        if n_bytes != length {
            let message = format!("{n_bytes} bytes written where {length} were announced");
            return Err(Error::tensor(&slot.name, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tensors::safetensors_file::SafetensorsFile;

    fn tensors() -> impl Strategy<Value = BTreeMap<String, Tensor>> {
        let dtype = prop_oneof![
            Just(DType::F32),
            Just(DType::BF16),
            Just(DType::F64),
            Just(DType::U8),
            Just(DType::I64)
        ];
        let tensor =
            (dtype, prop::collection::vec(0usize..4, 0..3)).prop_flat_map(|(dtype, shape)| {
                let n_bytes = shape.iter().product::<usize>() * dtype.size();
                prop::collection::vec(any::<u8>(), n_bytes).prop_map(move |bytes| {
                    Tensor::from_bytes(dtype, &shape, bytes).expect("sized to fit")
                })
            });
        prop::collection::btree_map("[a-z.\"\\\\é]{1,8}", tensor, 0..6)
    }

    proptest! {
        #[test]
        fn read_inverts_write_for_us_and_for_the_reference(
            tensors in tensors(),
            metadata in prop::collection::btree_map("[a-z]{1,4}", "\\PC{0,6}", 0..3),
        ) {
            let dir = tempfile::tempdir().expect("temporary directory");
            let path = dir.path().join("x.safetensors");
            write_safetensors(&path, tensors.clone(), &metadata).expect("written");
            let file = SafetensorsFile::open(&path).expect("well formed");
            prop_assert_eq!(file.metadata(), &metadata);
            let read: BTreeMap<String, Tensor> = file
                .names()
                .map(|name| (name.to_owned(), file.get(name).expect("listed")))
                .collect();
            prop_assert_eq!(&read, &tensors);

            let bytes = std::fs::read(&path).expect("readable");
            let reference = safetensors::SafeTensors::deserialize(&bytes).expect("well formed");
            prop_assert_eq!(reference.len(), tensors.len());
            for (name, tensor) in &tensors {
                let view = reference.tensor(name).expect("listed");
                prop_assert_eq!(view.data(), &*tensor.bytes());
                prop_assert_eq!(view.shape(), tensor.shape());
            }
            let again = dir.path().join("y.safetensors");
            write_safetensors(&again, tensors.into_iter().rev(), &metadata).expect("written");
            prop_assert_eq!(std::fs::read(&again).expect("readable"), bytes);
        }
    }
}
