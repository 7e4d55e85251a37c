//! The GGUF file as this import sees it: typed metadata, row-major shapes and the block formats that can be dequantised.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use monteclora_converters::{GgufArray, GgufFile, GgufValue};

use super::ImportError;

/// An opened GGUF file.
#[derive(Debug)]
pub(super) struct Source {
    file: GgufFile,
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub(super) struct SourceTensor<'a> {
    /// Slowest dimension first, GGUF's order reversed.
    pub(super) shape: Vec<usize>,
    /// Raw blocks.
    pub(super) bytes: &'a [u8],
    ggml_type: u32,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, ImportError> {
        let file = GgufFile::open(path)?;
        Ok(Self { file })
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    fn value(&self, key: &str) -> Option<&GgufValue> {
        self.file.metadata().get(key)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.file.metadata().contains_key(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.file.metadata().keys().map(String::as_str)
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.value(key)?.as_str()
    }

    pub(super) fn boolean(&self, key: &str) -> Option<bool> {
        self.value(key)?.as_bool()
    }

    pub(super) fn integer(&self, key: &str) -> Option<u64> {
        self.value(key)?.as_u64()
    }

    /// A number; what was stored as a float32 is read as the shortest decimal that denotes it, so that 1e-5 stays 1e-5.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        let value = self.value(key)?.as_f64()?;
        let narrow = value as f32;
        if f64::from(narrow) == value {
            narrow.to_string().parse().ok()
        } else {
            Some(value)
        }
    }

    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        self.value(key)?.as_strings()
    }

    /// Whole numbers, of which those beyond `i64` count as -1.
    pub(super) fn integers(&self, key: &str) -> Option<Vec<i64>> {
        match self.value(key)? {
            GgufValue::Array(GgufArray::Signed(values)) => Some(values.clone()),
            GgufValue::Array(GgufArray::Unsigned(values)) => Some(
                values
                    .iter()
                    .map(|value| i64::try_from(*value).unwrap_or(-1))
                    .collect(),
            ),
            _ => None,
        }
    }

    pub(super) fn floats(&self, key: &str) -> Option<&[f64]> {
        match self.value(key)? {
            GgufValue::Array(GgufArray::Float(values)) => Some(values),
            _ => None,
        }
    }

    pub(super) fn n_tensors(&self) -> usize {
        self.file.names().count()
    }

    pub(super) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.file.names()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<SourceTensor<'_>> {
        let tensor = self.file.tensor(name)?;
        Some(SourceTensor::new(
            tensor.shape,
            tensor.bytes,
            tensor.ggml_type,
        ))
    }

    /// How many tensors have which block format.
    pub(super) fn block_formats(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for tensor in self.file.names().filter_map(|name| self.file.tensor(name)) {
            let name = match block_format(tensor.ggml_type) {
                Some(dtype) => format!("{dtype:?}"),
                None => format!("type {}", tensor.ggml_type),
            };
            *counts.entry(name).or_default() += 1;
        }
        counts
    }
}

impl<'a> SourceTensor<'a> {
    /// A tensor with its dimensions in GGUF's order.
    pub(super) fn new(dimensions: &[usize], bytes: &'a [u8], ggml_type: u32) -> Self {
        Self {
            shape: dimensions.iter().rev().copied().collect(),
            bytes,
            ggml_type,
        }
    }

    /// The block format, if it can be dequantised.
    pub(super) fn block_format(&self) -> Option<GgmlDType> {
        block_format(self.ggml_type)
    }

    /// Why this tensor cannot be dequantised, or not be reordered by rows, if it cannot.
    pub(super) fn unreadable(&self, by_row: bool) -> Option<String> {
        let Some(dtype) = self.block_format() else {
            return Some(format!("ggml type {} is not supported", self.ggml_type));
        };
        (by_row && self.shape.len() == 1 && dtype.block_size() != 1)
            .then(|| format!("a vector in {dtype:?} blocks cannot be reordered"))
    }

    /// The values of a float32 tensor.
    pub(super) fn floats(&self) -> Option<Vec<f32>> {
        let (values, rest) = self.bytes.as_chunks::<4>();
        (self.block_format() == Some(GgmlDType::F32) && rest.is_empty()).then(|| {
            values
                .iter()
                .map(|value| f32::from_le_bytes(*value))
                .collect()
        })
    }
}

/// ggml's type numbers; Q8_1 and Q8_K are intermediate forms that no file stores.
pub(super) fn block_format(ggml_type: u32) -> Option<GgmlDType> {
    Some(match ggml_type {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}
