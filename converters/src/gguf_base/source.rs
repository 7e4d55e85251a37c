//! The GGUF file as this import sees it: typed metadata and row-major shapes.

use std::collections::BTreeMap;

use crate::tensors::blocks::BlockFormat;
use crate::tensors::ggml_type::{ggml_block, ggml_type_name};
use crate::tensors::gguf::{GgufArray, GgufFile, GgufTensor, GgufValue};

impl GgufFile {
    pub(super) fn has(&self, key: &str) -> bool {
        self.metadata().contains_key(key)
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.metadata().get(key)?.as_str()
    }

    pub(super) fn boolean(&self, key: &str) -> Option<bool> {
        self.metadata().get(key)?.as_bool()
    }

    pub(super) fn integer(&self, key: &str) -> Option<u64> {
        self.metadata().get(key)?.as_u64()
    }

    /// A number; what was stored as a float32 is read as the shortest decimal that denotes it, so that 1e-5 stays 1e-5.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        let value = self.metadata().get(key)?.as_f64()?;
        let narrow = value as f32;
        if f64::from(narrow) == value {
            narrow.to_string().parse().ok()
        } else {
            Some(value)
        }
    }

    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        self.metadata().get(key)?.as_strings()
    }

    /// Whole numbers, of which those beyond `i64` count as -1.
    pub(super) fn integers(&self, key: &str) -> Option<Vec<i64>> {
        match self.metadata().get(key)? {
            GgufValue::Array(GgufArray::Signed(values)) => Some(values.clone()),
            GgufValue::Array(GgufArray::Unsigned(values)) => {
                let signed = values
                    .iter()
                    .map(|value| i64::try_from(*value).unwrap_or(-1));
                Some(signed.collect())
            }
            _ => None,
        }
    }

    pub(super) fn floats(&self, key: &str) -> Option<&[f64]> {
        match self.metadata().get(key)? {
            GgufValue::Array(GgufArray::Float(values)) => Some(values),
            _ => None,
        }
    }

    /// Whether the first block has a bias for the projection that llama.cpp calls `name`.
    pub(super) fn has_bias(&self, name: &str) -> bool {
        self.tensor(&format!("blk.0.{name}.bias")).is_some()
    }

    /// How many tensors have which block format.
    pub(super) fn block_formats(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for tensor in self.names().filter_map(|name| self.tensor(name)) {
            let name = BlockFormat::find(tensor.ggml_type)
                .map_or_else(|| ggml_type_name(tensor.ggml_type), |f| f.name.to_owned());
            *counts.entry(name).or_default() += 1;
        }
        counts
    }
}

impl GgufTensor<'_> {
    /// Dimensions, outermost first.
    pub(crate) fn dims(&self) -> Vec<usize> {
        self.shape.iter().rev().copied().collect()
    }

    /// Whether its blocks can be dequantised.
    pub(super) fn is_readable(&self) -> bool {
        BlockFormat::find(self.ggml_type).is_some()
    }

    /// Whether it is a vector in blocks of several elements, which cannot be reordered by rows.
    pub(super) fn is_vector_of_blocks(&self) -> bool {
        let is_block = ggml_block(self.ggml_type).is_none_or(|(elements, _)| elements != 1);
        self.shape.len() == 1 && is_block
    }

    /// The values of a float32 tensor.
    pub(super) fn floats(&self) -> Option<Vec<f32>> {
        let (values, rest) = self.bytes.as_chunks::<4>();
        (self.ggml_type == 0 && rest.is_empty()).then(|| {
            values
                .iter()
                .map(|value| f32::from_le_bytes(*value))
                .collect()
        })
    }
}
