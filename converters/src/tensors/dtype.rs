//! Element types, by their safetensors names.

use std::fmt;

use half::{bf16, f16};

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the definition")]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

/// Every type and its safetensors name.
const NAMES: [(DType, &str); 15] = [
    (DType::F64, "F64"),
    (DType::F32, "F32"),
    (DType::F16, "F16"),
    (DType::BF16, "BF16"),
    (DType::F8E4M3, "F8_E4M3"),
    (DType::F8E5M2, "F8_E5M2"),
    (DType::I64, "I64"),
    (DType::I32, "I32"),
    (DType::I16, "I16"),
    (DType::I8, "I8"),
    (DType::U64, "U64"),
    (DType::U32, "U32"),
    (DType::U16, "U16"),
    (DType::U8, "U8"),
    (DType::Bool, "BOOL"),
];

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The safetensors name, such as `BF16`.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(dtype, _)| *dtype == self)
            .map_or("?", |(_, name)| name)
    }

    /// The type with this safetensors name.
    pub fn from_name(name: &str) -> Option<Self> {
        NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(dtype, _)| *dtype)
    }

    /// Whether values of this type can be decoded to `f32` here: F64, F32, F16 and BF16.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// Decodes little-endian elements, or `None` if the type is not one of F64, F32, F16, BF16.
    pub(crate) fn decode(self, bytes: &[u8]) -> Option<Vec<f32>> {
        fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks().0.iter().map(|b| read(*b)).collect()
        }
        Some(match self {
            Self::F32 => each(bytes, f32::from_le_bytes),
            Self::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Self::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => return None,
        })
    }

    /// Encodes values as little-endian elements, rounding to nearest, ties to even; `None` as for [`Self::decode`].
    pub(crate) fn encode(self, values: &[f32]) -> Option<Vec<u8>> {
        fn each<const N: usize>(values: &[f32], write: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
            values.iter().flat_map(|v| write(*v)).collect()
        }
        Some(match self {
            Self::F32 => each(values, f32::to_le_bytes),
            Self::F64 => each(values, |v| f64::from(v).to_le_bytes()),
            Self::F16 => each(values, |v| f16::from_f32(v).to_le_bytes()),
            Self::BF16 => each(values, |v| bf16::from_f32(v).to_le_bytes()),
            _ => return None,
        })
    }

    /// Position of the first value that is NaN or infinite, or that overflows `f32`.
    pub(crate) fn first_non_finite(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::F32 => position(bytes, |b| {
                u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000
            }),
            Self::F16 => position(bytes, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
            Self::BF16 => position(bytes, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
            Self::F64 => position(bytes, |b| !(f64::from_le_bytes(b) as f32).is_finite()),
            _ => None,
        }
    }
}

/// Position of the first element for which `is_bad` holds. Whole blocks are tested without a branch, so that the scan
/// of a good file runs at the speed of memory.
fn position<const N: usize>(bytes: &[u8], is_bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    let elements = bytes.as_chunks::<N>().0;
    let blocks = elements.chunks(BLOCK).enumerate();
    for (block_idx, block) in blocks {
        if block
            .iter()
            .fold(false, |bad, element| bad | is_bad(*element))
        {
            let within = block.iter().position(|element| is_bad(*element))?;
            return Some(block_idx * BLOCK + within);
        }
    }
    None
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_a_name_that_leads_back() {
        for (dtype, name) in NAMES {
            assert_eq!(DType::from_name(name), Some(dtype));
            assert_eq!(dtype.name(), name);
        }
        assert_eq!(DType::from_name("f32"), None);
    }

    #[test]
    fn decode_inverts_encode_for_values_that_fit() {
        let values = [0.0, -1.5, 0.25, 2.0];
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let bytes = dtype.encode(&values).expect("a float type");
            assert_eq!(bytes.len(), values.len() * dtype.size());
            assert_eq!(dtype.decode(&bytes).expect("a float type"), values);
            assert_eq!(dtype.first_non_finite(&bytes), None);
        }
        assert!(DType::I64.encode(&values).is_none());
    }

    #[test]
    fn non_finite_values_are_found_in_every_float_type() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
                let bytes = dtype.encode(&[1.0, bad]).expect("a float type");
                assert_eq!(dtype.first_non_finite(&bytes), Some(1), "{dtype} {bad}");
            }
        }
        let mut long = vec![0f32; 10_000];
        long[9_876] = f32::NAN;
        let bytes = DType::F32.encode(&long).expect("a float type");
        assert_eq!(DType::F32.first_non_finite(&bytes), Some(9_876));
        assert_eq!(
            DType::F64.first_non_finite(&1e300f64.to_le_bytes()),
            Some(0)
        );
    }
}
