//! Values per second and core that each block format is decoded at, as a product does it: a row of 4096 at a time into a buffer that
//! stays in the cache.
#![expect(clippy::print_stdout, reason = "the figures are the result")]

use std::time::Instant;

use monteclora_converters::BLOCK_FORMATS;

const COLUMNS: usize = 4096;
const ROWS: usize = 256;

fn main() {
    let mut out = vec![0f32; COLUMNS];
    for format in &BLOCK_FORMATS {
        let (elements, bytes) = format.block();
        let row = COLUMNS / elements * bytes;
        let data: Vec<u8> = (0..row * ROWS)
            .map(|idx| (idx.wrapping_mul(2_654_435_761) >> 16) as u8 & 0xbb)
            .collect();
        let mut best = f64::INFINITY;
        for _ in 0..20 {
            let began = Instant::now();
            for row in data.chunks_exact(row) {
                (format.decode)(row, &mut out);
                std::hint::black_box(&mut out);
            }
            best = best.min(began.elapsed().as_secs_f64());
        }
        let rate = (ROWS * COLUMNS) as f64 / best / 1e9;
        println!("{:<6} {rate:6.2} billion values per second", format.name);
    }
}
