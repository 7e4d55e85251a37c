//! The block formats of ggml that are decoded: where the numbers lie in a block, and what they mean (`ggml-quants.c`).
//!
//! Each value is computed in float32 with the operations of `dequantize_row_*` in their order, so that it equals
//! llama.cpp's bit for bit.

use half::{bf16, f16};

use super::super::ggml_type::{ggml_block, ggml_type_name};
use crate::simd::vectorised;

/// One block format.
pub struct BlockFormat {
    /// ggml's number of the format.
    pub number: u32,
    /// Its name in reports.
    pub name: &'static str,
    /// Decodes whole blocks into as many values as they hold.
    pub decode: fn(&[u8], &mut [f32]),
}

impl std::fmt::Debug for BlockFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl BlockFormat {
    /// Finds the format with ggml's number, if it is decoded.
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

/// Defines a format whose blocks `$decode` decodes. It is called in a closure, because a function that is passed as a
/// value is not inlined where the instruction set is chosen.
macro_rules! format {
    ($number:literal, $name:literal, $decode:path) => {
        BlockFormat {
            number: $number,
            name: $name,
            decode: |bytes, out| {
                vectorised(
                    #[inline(always)]
                    || {
                        each(
                            bytes,
                            out,
                            #[inline(always)]
                            |block, place| $decode(block, place),
                        );
                    },
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

/// Works without a branch, and without an intermediate subnormal number, which is slow on some processors.
#[inline(always)]
fn float16(block: &[u8; 2], out: &mut [f32; 1]) {
    /// The increase of the exponent's bias, shifted to the exponent's position.
    const REBIAS: u32 = 112 << 23;
    let bits = u32::from(u16::from_le_bytes(*block));
    let (exponent, fraction) = (bits & 0x7c00, bits & 0x3ff);
    let subnormal = float(fraction) * f32::from_bits((127 - 24) << 23);
    let special = if exponent == 0x7c00 { REBIAS } else { 0 };
    let normal = ((bits & 0x7fff) << 13) + REBIAS + special;
    let magnitude = if exponent == 0 {
        subnormal.to_bits()
    } else {
        normal
    };
    *out = [f32::from_bits(magnitude | (bits & 0x8000) << 16)];
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Decodes two 4-bit values per byte: the low bits are the first half of the block, the high bits the second. Integers
/// are as wide as the floats, so that they need no narrower registers.
#[inline(always)]
fn nibbles(quants: &[u8], out: &mut [f32; 32], value: impl Fn(u32, u32) -> f32) {
    for (idx, byte) in quants[..16].iter().enumerate() {
        out[idx] = value(idx as u32, u32::from(byte & 15));
        out[idx + 16] = value(idx as u32 + 16, u32::from(byte >> 4));
    }
}

/// Converts a small integer exactly.
#[inline(always)]
fn float(value: u32) -> f32 {
    value.cast_signed() as f32
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(&block[2..], out, |_, q| (float(q) - 8.0) * d);
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(&block[4..], out, |_, q| float(q) * d + m);
}

/// The fifth bit of value `idx`, shifted to its position.
#[inline(always)]
fn fifth(bits: u32, idx: u32) -> u32 {
    (bits >> idx & 1) << 4
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(&block[6..], out, |idx, q| {
        (float(q | fifth(high, idx)) - 16.0) * d
    });
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], out, |idx, q| {
        float(q | fifth(high, idx)) * d + m
    });
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let quants = &block[2..34];
    for idx in 0..32 {
        out[idx] = f32::from(quants[idx].cast_signed()) * d;
    }
}

/// Repeats each of two numbers sixteen times, because compilers vectorise loops over 32 values.
#[inline(always)]
fn sixteen_each(of: [f32; 2]) -> [f32; 32] {
    let mut each = [of[0]; 32];
    each[16..].fill(of[1]);
    each
}

#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, min) = (half_at(block, 80), half_at(block, 82));
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Each half of the block has 32 bytes of four values each: first the lowest bits of all bytes, then the next.
        let (half, shift) = (part / 4, part % 4 * 2);
        let of = [scales[2 * part], scales[2 * part + 1]];
        let scales = sixteen_each(of.map(|of| d * f32::from(of & 15)));
        let mins = sixteen_each(of.map(|of| min * f32::from(of >> 4)));
        let quants = &quants[half * 32..][..32];
        for idx in 0..32 {
            out[idx] = scales[idx] * float(u32::from(quants[idx]) >> shift & 3) - mins[idx];
        }
    }
}

#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (mask, quants, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    let scale = |group: usize| {
        let low = packed[group % 8] >> (group / 8 * 4) & 15;
        let high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
        d * (f32::from(low | high << 4) - 32.0)
    };
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, shift) = (part / 4, part % 4 * 2);
        let scales = sixteen_each([scale(2 * part), scale(2 * part + 1)]);
        let quants = &quants[half * 32..][..32];
        for idx in 0..32 {
            let third = u32::from(mask[idx]) >> part & 1;
            let q = (u32::from(quants[idx]) >> shift & 3) | third << 2;
            out[idx] = scales[idx] * (float(q) - 4.0);
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
    let quants = block[16..].as_chunks::<32>().0.iter();
    // Two groups share the same bytes, one in the low bits and one in the high bits.
    for (pair, (out, quants)) in out
        .as_chunks_mut::<64>()
        .0
        .iter_mut()
        .zip(quants)
        .enumerate()
    {
        let [(scale, m), (other_scale, other_m)] = [2 * pair, 2 * pair + 1].map(|group| {
            let (scale, m) = scale_and_min(packed, group);
            (d * f32::from(scale), min * f32::from(m))
        });
        for (idx, byte) in quants.iter().enumerate() {
            out[idx] = scale * float(u32::from(byte & 15)) - m;
            out[idx + 32] = other_scale * float(u32::from(byte >> 4)) - other_m;
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
        let (quants, shift) = (&block[48 + group / 2 * 32..][..32], group % 2 * 4);
        for idx in 0..32 {
            let high = (u32::from(high[idx]) >> group & 1) << 4;
            out[idx] = scale * float((u32::from(quants[idx]) >> shift & 15) | high) - m;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Each half of the block has four quarters; the first two use the low bits of their bytes.
        let (half, quarter) = (part / 4, part % 4);
        let of = [scales[2 * part], scales[2 * part + 1]];
        let scales = sixteen_each(of.map(|of| d * f32::from(of.cast_signed())));
        let (low_shift, high_shift) = (quarter / 2 * 4, quarter * 2);
        let low = &low[half * 64 + quarter % 2 * 32..][..32];
        let high = &high[half * 32..][..32];
        for idx in 0..32 {
            let high = u32::from(high[idx]) >> high_shift & 3;
            let q = (u32::from(low[idx]) >> low_shift & 15) | high << 4;
            out[idx] = scales[idx] * (float(q) - 32.0);
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
