//! Matrices that are stored in blocks of quantised values and decoded in parts.

mod affine;
mod ggml;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use memmap2::Mmap;
use rayon::prelude::*;

pub(crate) use affine::Affine;
pub use ggml::{BLOCK_FORMATS, BlockFormat};

/// Number of values that are decoded at a time if a whole row is not needed; they fit the first-level cache.
const AT_A_TIME: usize = 2048;

/// Number of values of the largest block.
const LARGEST: usize = 256;

/// A matrix `[rows, columns]` of a model file, which stays mapped. Blocks are decoded each time they are read. A row is
/// a whole number of blocks. Cloning copies no data.
#[derive(Clone)]
pub struct BlockMatrix(Arc<Layout>);

enum Layout {
    Ggml {
        format: &'static BlockFormat,
        map: Arc<Mmap>,
        start: usize,
        rows: usize,
        columns: usize,
        /// Size of the heads whose rows llama.cpp interleaves. Rows are returned in transformers' order.
        head: Option<usize>,
    },
    Affine(Affine),
}

impl BlockMatrix {
    /// Creates a matrix of `rows` times `columns` values in blocks of `format` at `range` of a mapped file; `None` if
    /// they do not fill the range.
    pub(crate) fn ggml(
        format: &'static BlockFormat,
        (map, range): (Arc<Mmap>, Range<usize>),
        (rows, columns): (usize, usize),
        head: Option<usize>,
    ) -> Option<Self> {
        let (elements, bytes) = format.block();
        let n_bytes = (columns / elements).checked_mul(bytes)?.checked_mul(rows)?;
        let fits = columns.is_multiple_of(elements) && n_bytes == range.len();
        let is_headed =
            |head: usize| head >= 2 && head.is_multiple_of(2) && rows.is_multiple_of(head);
        (fits && range.end <= map.len() && head.is_none_or(is_headed)).then(|| {
            Self(Arc::new(Layout::Ggml {
                format,
                map,
                start: range.start,
                rows,
                columns,
                head,
            }))
        })
    }

    pub(crate) fn affine(affine: Affine) -> Self {
        Self(Arc::new(Layout::Affine(affine)))
    }

    /// Numbers of rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        match &*self.0 {
            Layout::Ggml { rows, columns, .. } => (*rows, *columns),
            Layout::Affine(affine) => affine.dims(),
        }
    }

    /// Name of the block format, such as `Q4_K`.
    pub fn format(&self) -> String {
        match &*self.0 {
            Layout::Ggml { format, .. } => format.ggml_name(),
            Layout::Affine(affine) => affine.name(),
        }
    }

    /// ggml's format, if the blocks are ggml's.
    pub fn ggml_format(&self) -> Option<&'static BlockFormat> {
        match &*self.0 {
            Layout::Ggml { format, .. } => Some(format),
            Layout::Affine(_) => None,
        }
    }

    /// Returns the fault in the scales or biases, if any, for a format whose files are not checked elsewhere.
    pub fn fault(&self) -> Option<String> {
        match &*self.0 {
            // `refer_to_gguf` checks all values.
            Layout::Ggml { .. } => None,
            Layout::Affine(affine) => affine.fault(),
        }
    }

    /// Number of values of a row that are decoded together. Parts that begin and end at its multiples cost least.
    pub fn block(&self) -> usize {
        match &*self.0 {
            Layout::Ggml { format, .. } => format.block().0,
            Layout::Affine(affine) => affine.group(),
        }
    }

    /// Bytes in the file.
    pub fn n_bytes(&self) -> usize {
        match &*self.0 {
            Layout::Ggml {
                format,
                rows,
                columns,
                ..
            } => {
                let (elements, bytes) = format.block();
                columns / elements * bytes * rows
            }
            Layout::Affine(affine) => affine.n_bytes(),
        }
    }

    /// Bytes of row `row`, in transformers' order of rows; empty if the format is not ggml's.
    pub fn row(&self, row: usize) -> &[u8] {
        let Layout::Ggml {
            format,
            map,
            start,
            columns,
            head,
            ..
        } = &*self.0
        else {
            return &[];
        };
        let (elements, bytes) = format.block();
        let length = columns / elements * bytes;
        let row = head.map_or(row, |head| interleaved_row(row, head));
        let from = start + row * length;
        &map[from..from + length]
    }

    /// Writes the given part as f32, row by row, into `out`, which has the size of the part. Any part is allowed.
    ///
    /// # Panics
    /// If the rows or columns do not exist.
    pub fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        if let Some((format, blocks)) = self.whole_rows(&rows, &columns) {
            (format.decode)(blocks, out);
            return;
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            self.decode_row(row, columns.clone(), out);
        }
    }

    /// The blocks of whole rows, if they lie one after the other.
    fn whole_rows(
        &self,
        rows: &Range<usize>,
        columns: &Range<usize>,
    ) -> Option<(&'static BlockFormat, &[u8])> {
        let Layout::Ggml {
            format,
            map,
            start,
            columns: width,
            head: None,
            ..
        } = &*self.0
        else {
            return None;
        };
        let (elements, bytes) = format.block();
        let length = width / elements * bytes;
        (*columns == (0..*width)).then(|| {
            (
                *format,
                &map[start + rows.start * length..start + rows.end * length],
            )
        })
    }

    /// As [`Self::decode`], with each value rounded to nearest.
    ///
    /// # Panics
    /// If the rows or columns do not exist.
    pub fn decode_bf16(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [bf16]) {
        let mut values = [0f32; AT_A_TIME];
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let mut from = columns.start;
            let mut rest = out;
            while !rest.is_empty() {
                // Up to a multiple of the largest block, so that none is decoded twice.
                let to = ((from + AT_A_TIME) / LARGEST * LARGEST).min(columns.end);
                let (part, after) = rest.split_at_mut(to - from);
                let values = &mut values[..to - from];
                self.decode_row(row, from..to, values);
                ggml::narrow(values, part);
                (from, rest) = (to, after);
            }
        }
    }

    fn decode_row(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let block = self.block();
        let (first, last) = (columns.start / block * block, columns.end / block * block);
        let starts_inside = first < columns.start;
        let mut from = columns.start;
        let mut rest = out;
        if starts_inside {
            let scratch = &mut [0f32; LARGEST][..block];
            self.decode_blocks(row, first..first + block, scratch);
            let to = (first + block).min(columns.end);
            let (part, after) = rest.split_at_mut(to - from);
            part.copy_from_slice(&scratch[from - first..to - first]);
            (from, rest) = (to, after);
        }
        if from < last {
            let (part, after) = rest.split_at_mut(last - from);
            self.decode_blocks(row, from..last, part);
            (from, rest) = (last, after);
        }
        if !rest.is_empty() {
            let scratch = &mut [0f32; LARGEST][..block];
            self.decode_blocks(row, from..from + block, scratch);
            let n_values = rest.len();
            rest.copy_from_slice(&scratch[..n_values]);
        }
    }

    /// Decodes whole blocks of a row.
    fn decode_blocks(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        match &*self.0 {
            Layout::Ggml { format, .. } => {
                let (elements, bytes) = format.block();
                let range = columns.start / elements * bytes..columns.end / elements * bytes;
                (format.decode)(&self.row(row)[range], out);
            }
            Layout::Affine(affine) => affine.decode(row, columns, out),
        }
    }

    /// All values in row-major order.
    pub(crate) fn values(&self) -> Vec<f32> {
        let (rows, columns) = self.dims();
        let mut values = vec![0f32; rows * columns];
        values
            .par_chunks_mut(columns.max(1))
            .enumerate()
            .for_each(|(row, out)| self.decode_row(row, 0..columns, out));
        values
    }

    /// The value at `index` in row-major order, if there is one.
    pub(crate) fn value(&self, index: usize) -> Option<f32> {
        let (rows, columns) = self.dims();
        let (row, column) = (index.checked_div(columns)?, index.checked_rem(columns)?);
        let mut value = [0f32];
        (row < rows).then(|| self.decode_row(row, column..column + 1, &mut value))?;
        Some(value[0])
    }

    /// Index of the first value that is NaN or infinite, if any. At most one row per thread is in memory.
    pub(crate) fn first_non_finite(&self) -> Option<usize> {
        let (rows, columns) = self.dims();
        let in_row = |buffer: &mut Vec<f32>, row: usize| {
            buffer.resize(columns, 0.0);
            self.decode_row(row, 0..columns, buffer);
            let at = buffer.iter().position(|value| !value.is_finite())?;
            Some(row * columns + at)
        };
        let rows = (0..rows).into_par_iter();
        rows.map_init(Vec::new, in_row)
            .find_map_first(|found| found)
    }
}

impl fmt::Debug for BlockMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockMatrix({} {:?})", self.format(), self.dims())
    }
}

/// Returns the row in llama.cpp's order that is row `row` in Hugging Face's, for heads of `head` rows.
///
/// Within a head of size d, Hugging Face's row `j d/2 + i` (j = 0, 1) is llama.cpp's row `2 i + j`.
pub(crate) fn interleaved_row(row: usize, head: usize) -> usize {
    let (start, within) = (row - row % head, row % head);
    let (half, idx) = (within / (head / 2), within % (head / 2));
    start + 2 * idx + half
}
