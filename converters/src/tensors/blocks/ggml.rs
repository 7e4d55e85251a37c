//! The block formats of ggml that are decoded: where the numbers lie in a block, and what they stand for (`ggml-quants.c`).
//!
//! Each value is computed in float32 with the operations of `dequantize_row_*` in their order, so that it equals llama.cpp's to the
//! bit.

use half::{bf16, f16};

use super::super::ggml_type::{ggml_block, ggml_type_name};
use crate::simd::vectorised;

/// One format.
pub struct BlockFormat {
    /// ggml's number for it.
    pub number: u32,
    /// Its name as reports have it.
    pub name: &'static str,
    /// Decodes whole blocks, one after the other, into as many values as they hold.
    pub decode: fn(&[u8], &mut [f32]),
}

impl std::fmt::Debug for BlockFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl BlockFormat {
    /// The format with ggml's number, if it is decoded.
    pub fn find(number: u32) -> Option<&'static Self> {
        BLOCK_FORMATS.iter().find(|format| format.number == number)
    }

    /// Elements and bytes of one block.
    pub fn block(&self) -> (usize, usize) {
        ggml_block(self.number).unwrap_or((1, 1))
    }

    /// ggml's own name.
    pub fn ggml_name(&self) -> String {
        ggml_type_name(self.number)
    }
}

/// A format whose blocks of so many bytes and elements the function decodes.
macro_rules! format {
    ($number:literal, $name:literal, $decode:path) => {
        BlockFormat {
            number: $number,
            name: $name,
            decode: |bytes, out| {
                vectorised(
                    #[inline(always)]
                    || each(bytes, out, $decode),
                );
            },
        }
    };
}

/// Every format. Q8_1 and Q8_K are intermediate forms that no file stores.
pub static BLOCK_FORMATS: [BlockFormat; 13] = [
    format!(0, "F32", float32),
    format!(1, "F16", float16),
    format!(2, "Q4_0", q4_0),
    format!(3, "Q4_1", q4_1),
    format!(6, "Q5_0", q5_0),
    format!(7, "Q5_1", q5_1),
    format!(8, "Q8_0", q8_0),
    format!(10, "Q2K", q2_k),
    format!(11, "Q3K", q3_k),
    format!(12, "Q4K", q4_k),
    format!(13, "Q5K", q5_k),
    format!(14, "Q6K", q6_k),
    format!(30, "BF16", bfloat16),
];

#[inline(always)]
fn each<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (blocks, places) = (bytes.as_chunks().0, out.as_chunks_mut().0);
    for (block, place) in blocks.iter().zip(places) {
        decode(block, place);
    }
}

#[inline(always)]
fn float32(block: &[u8; 4], out: &mut [f32; 1]) {
    *out = [f32::from_le_bytes(*block)];
}

#[inline(always)]
fn bfloat16(block: &[u8; 2], out: &mut [f32; 1]) {
    *out = [f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16)];
}

/// The exponent is moved by a multiplication, which is exact for subnormal numbers too, and has no branch.
#[inline(always)]
fn float16(block: &[u8; 2], out: &mut [f32; 1]) {
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(u16::from_le_bytes(*block));
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * REBIAS;
    let special = match bits & 0x7c00 {
        0x7c00 => 0x7f80_0000,
        _ => 0,
    };
    *out = [f32::from_bits(
        magnitude.to_bits() | special | ((bits & 0x8000) << 16),
    )];
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Two values of four bits per byte: those of the first half of the block are the low ones.
#[inline(always)]
fn nibbles(quants: &[u8], out: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    for (idx, byte) in quants[..16].iter().enumerate() {
        out[idx] = value(idx, byte & 15);
        out[idx + 16] = value(idx + 16, byte >> 4);
    }
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], out, |_, q| (f32::from(q) - 8.0) * d);
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], out, |_, q| f32::from(q) * d + m);
}

/// The fifth bit of value `idx`, at its place.
#[inline(always)]
fn fifth(bits: u32, idx: usize) -> u8 {
    ((bits >> idx) as u8 & 1) << 4
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(&block[6..], out, |idx, q| {
        (f32::from(q | fifth(high, idx)) - 16.0) * d
    });
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], out, |idx, q| {
        f32::from(q | fifth(high, idx)) * d + m
    });
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q.cast_signed()) * d;
    }
}

#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, min) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Of each half of the block 32 bytes, four values in each: first all lowest bits, then the next.
        let (half, shift, at) = (group / 8, group % 8 / 2 * 2, group % 2 * 16);
        let (scale, m) = (
            d * f32::from(scales[group] & 15),
            min * f32::from(scales[group] >> 4),
        );
        for (out, q) in out.iter_mut().zip(&quants[half * 32 + at..][..16]) {
            *out = scale * f32::from(q >> shift & 3) - m;
        }
    }
}

#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (mask, quants, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = packed[group % 8] >> (group / 8 * 4) & 15;
        let high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        let (half, shift, at) = (group / 8, group % 8 / 2 * 2, group % 2 * 16);
        let bit = group / 2;
        let quants = quants[half * 32 + at..][..16].iter();
        for ((out, q), mask) in out.iter_mut().zip(quants).zip(&mask[at..][..16]) {
            let third = mask >> bit & 1;
            *out = scale * (f32::from((q >> shift & 3) | third << 2) - 4.0);
        }
    }
}

/// Scale and minimum of group `idx`, of six bits each.
#[inline(always)]
fn scale_and_min(packed: &[u8], idx: usize) -> (u8, u8) {
    match idx {
        0..4 => (packed[idx] & 63, packed[idx + 4] & 63),
        _ => (
            packed[idx + 4] & 15 | packed[idx - 4] >> 6 << 4,
            packed[idx + 4] >> 4 | packed[idx] >> 6 << 4,
        ),
    }
}

#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, min, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, m) = scale_and_min(packed, group);
        let (scale, m) = (d * f32::from(scale), min * f32::from(m));
        let shift = group % 2 * 4;
        for (out, q) in out.iter_mut().zip(&block[16 + group / 2 * 32..][..32]) {
            *out = scale * f32::from(q >> shift & 15) - m;
        }
    }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, min, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    let high = &block[16..48];
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, m) = scale_and_min(packed, group);
        let (scale, m) = (d * f32::from(scale), min * f32::from(m));
        let shift = group % 2 * 4;
        let quants = block[48 + group / 2 * 32..][..32].iter();
        for ((out, q), high) in out.iter_mut().zip(quants).zip(high) {
            *out = scale * f32::from((q >> shift & 15) | (high >> group & 1) << 4) - m;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group].cast_signed());
        // Of each half of the block: quarters of 32 values, of which the first two have the low bits of their bytes.
        let (half, quarter, at) = (group / 8, group % 8 / 2, group % 2 * 16);
        let (low_shift, high_shift) = (quarter / 2 * 4, quarter * 2);
        let low = low[half * 64 + quarter % 2 * 32 + at..][..16].iter();
        let high = &high[half * 32 + at..][..16];
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let q = (low >> low_shift & 15) | (high >> high_shift & 3) << 4;
            *out = scale * (f32::from(q) - 32.0);
        }
    }
}

/// Rounds to nearest, ties to even, as [`bf16::from_f32`].
pub(super) fn narrow(values: &[f32], out: &mut [bf16]) {
    vectorised(
        #[inline(always)]
        || {
            for (value, out) in values.iter().zip(out) {
                let bits = value.to_bits();
                let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
                let quiet = bits >> 16 | 0x40;
                *out = bf16::from_bits(match value.is_nan() {
                    true => quiet as u16,
                    false => rounded as u16,
                });
            }
        },
    );
}
