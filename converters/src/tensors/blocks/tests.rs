//! Compares parts of matrices in blocks with the whole, rows with llama.cpp's order, and rounding with the library's.

use std::io::Write;

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::fixtures::Stream;
use crate::tensors::dtype::DType;
use crate::tensors::tensor::Tensor;

/// Maps a file with `bytes`.
fn mapped(bytes: &[u8]) -> (Arc<Mmap>, Range<usize>) {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("written");
    // SAFETY: nobody else has the file.
    let map = unsafe { Mmap::map(&file) }.expect("mapped");
    (Arc::new(map), 0..bytes.len())
}

/// Random blocks whose scales are finite.
fn random(
    format: &'static BlockFormat,
    (rows, columns): (usize, usize),
    head: Option<usize>,
) -> BlockMatrix {
    let (elements, bytes) = format.block();
    let mut stream = Stream(7);
    let mut data = vec![0u8; rows * columns / elements * bytes];
    for byte in &mut data {
        *byte = (stream.next() >> 32) as u8;
    }
    // No exponent of all ones, in whichever of the two bytes of a float it lies.
    for byte in &mut data {
        *byte &= 0xbb;
    }
    BlockMatrix::ggml(format, mapped(&data), (rows, columns), head).expect("whole blocks")
}

#[test]
fn every_part_of_every_format_is_that_of_the_whole() {
    let (rows, columns) = (4, 512);
    for format in &BLOCK_FORMATS {
        let matrix = random(format, (rows, columns), None);
        let whole = matrix.values();
        assert!(whole.iter().any(|v| *v != 0.0), "{}", format.name);
        assert_eq!(matrix.first_non_finite(), None, "{}", format.name);
        for (from, to) in [
            (0, 512),
            (3, 5),
            (31, 33),
            (250, 270),
            (17, 511),
            (256, 512),
        ] {
            let width = to - from;
            let mut part = vec![f32::NAN; 2 * width];
            matrix.decode(1..3, from..to, &mut part);
            let mut short = vec![bf16::NAN; 2 * width];
            matrix.decode_bf16(1..3, from..to, &mut short);
            for row in 0..2 {
                let expected = &whole[(1 + row) * columns + from..][..width];
                assert_eq!(&part[row * width..][..width], expected, "{}", format.name);
                let rounded: Vec<bf16> = expected.iter().map(|v| bf16::from_f32(*v)).collect();
                assert_eq!(&short[row * width..][..width], rounded, "{}", format.name);
            }
        }
        for at in [0, 511, 512, 2047] {
            assert_eq!(matrix.value(at), Some(whole[at]));
        }
        assert_eq!(matrix.value(2048), None);
    }
}

#[test]
fn rows_of_heads_are_given_in_transformers_order() {
    let format = BlockFormat::find(8).expect("Q8_0");
    let (plain, headed) = (
        random(format, (8, 32), None).values(),
        random(format, (8, 32), Some(4)).values(),
    );
    for row in 0..8 {
        let stored = interleaved_row(row, 4);
        assert_eq!(headed[row * 32..][..32], plain[stored * 32..][..32]);
    }
    let (map, range) = mapped(&[0; 34]);
    assert!(BlockMatrix::ggml(format, (map, range), (2, 32), None).is_none());
}

/// What llama.cpp's converter does: reshape to [heads, 2, d/2], swap the last two axes.
fn permute(rows: &[usize], head_dim: usize) -> Vec<usize> {
    let mut permuted = Vec::new();
    for head in rows.chunks(head_dim) {
        for idx in 0..head_dim / 2 {
            permuted.extend([head[idx], head[head_dim / 2 + idx]]);
        }
    }
    permuted
}

#[test]
fn interleaved_rows_are_where_llama_cpp_puts_them() {
    for (heads, head_dim) in [(1, 2), (3, 4), (2, 6), (9, 64)] {
        let rows: Vec<usize> = (0..heads * head_dim).collect();
        let permuted = permute(&rows, head_dim);
        let restored: Vec<usize> = rows
            .iter()
            .map(|row| permuted[interleaved_row(*row, head_dim)])
            .collect();
        assert_eq!(restored, rows);
        assert!(head_dim == 2 || permuted != rows);
    }
}

#[test]
fn every_half_is_what_the_library_reads() {
    let format = BlockFormat::find(1).expect("F16");
    for bits in 0..=u16::MAX {
        let mut found = [0f32];
        (format.decode)(&bits.to_le_bytes(), &mut found);
        let expected = half::f16::from_bits(bits).to_f32();
        assert!(
            found[0].to_bits() == expected.to_bits() || (found[0].is_nan() && expected.is_nan()),
            "{bits:#x}: {} {expected}",
            found[0]
        );
    }
}

#[test]
fn a_value_that_is_not_finite_is_found() {
    let format = BlockFormat::find(8).expect("Q8_0");
    let mut bytes = vec![0u8; 4 * 34];
    // The scale of the third block.
    bytes[2 * 34..2 * 34 + 2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    bytes[2 * 34 + 2..3 * 34].fill(1);
    let matrix = BlockMatrix::ggml(format, mapped(&bytes), (2, 64), None).expect("fits");
    assert_eq!(matrix.first_non_finite(), Some(64));
    assert_eq!(Tensor::from_blocks(matrix).first_non_finite(), Some(64));
}

/// Packs integers as MLX does: the first in the lowest bits.
fn packed(quants: &[u8], bits: usize) -> Vec<u8> {
    match bits {
        4 => quants
            .chunks(2)
            .map(|pair| pair[0] | pair[1] << 4)
            .collect(),
        _ => quants.to_vec(),
    }
}

proptest! {
    #[test]
    fn affine_groups_are_scale_times_integer_and_bias(
        seed in any::<u64>(), bits in prop::sample::select(vec![4usize, 8]),
        group in prop::sample::select(vec![32usize, 64, 128]),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
    ) {
        let (rows, columns) = (3, 256);
        let mut stream = Stream(seed);
        let quants: Vec<u8> = (0..rows * columns).map(|_| (stream.next() >> 40) as u8 & ((1u16 << bits) - 1) as u8).collect();
        let words = [rows, columns * bits / 32];
        let stored = Tensor::from_bytes(DType::U32, &words, packed(&quants, bits)).expect("sized");
        let (scales, biases) = (stream.tensor(&[rows, columns / group], dtype), stream.tensor(&[rows, columns / group], dtype));
        let affine = Affine::new(stored, scales.clone(), biases.clone(), (bits, group)).expect("fits");
        let matrix = BlockMatrix::affine(affine);
        prop_assert_eq!(matrix.dims(), (rows, columns));
        let (scales, biases) = (scales.to_f32().expect("real"), biases.to_f32().expect("real"));
        let expected: Vec<f32> = (0..rows * columns).map(|idx| {
            let at = idx / columns * (columns / group) + idx % columns / group;
            scales[at] * f32::from(quants[idx]) + biases[at]
        }).collect();
        prop_assert_eq!(&matrix.values(), &expected);
        let mut part = vec![0f32; 70];
        matrix.decode(1..2, 15..85, &mut part);
        prop_assert_eq!(&part, &expected[columns + 15..columns + 85]);
    }
}

#[test]
fn affine_tensors_that_do_not_belong_together_are_refused() {
    let words = |shape: [usize; 2]| {
        Tensor::from_bytes(DType::U32, &shape, vec![0; shape[0] * shape[1] * 4]).expect("sized")
    };
    let floats = |shape: [usize; 2]| {
        Tensor::from_f32(&shape, vec![0.0; shape[0] * shape[1]]).expect("sized")
    };
    let made = |words, scales, biases, sizes| Affine::new(words, scales, biases, sizes).err();
    let (w, s) = (words([2, 8]), floats([2, 1]));
    assert_eq!(made(w.clone(), s.clone(), s.clone(), (4, 64)), None);
    for (words, scales, biases, sizes, expected) in [
        (w.clone(), s.clone(), s.clone(), (3, 64), "3 bits"),
        (w.clone(), s.clone(), s.clone(), (4, 48), "groups of 48"),
        (w.clone(), s.clone(), s.clone(), (4, 32), "scales are"),
        (w.clone(), s.clone(), floats([1, 2]), (4, 64), "biases are"),
        (
            s.clone(),
            s.clone(),
            s.clone(),
            (4, 64),
            "expected a matrix of U32",
        ),
    ] {
        let message = made(words, scales, biases, sizes).expect("refused");
        assert!(message.contains(expected), "{message}");
    }
}
