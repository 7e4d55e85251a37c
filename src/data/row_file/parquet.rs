//! Parquet rows as JSON Lines: what other readers of a data set see, a row group at a time.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
};

use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

/// Writes one line a row. A column without a value, at any depth, is a key that is left out: a table has no other
/// way to say that a message has no `tool_calls`.
pub(super) fn write_json_lines(file: File, out: &mut File) -> io::Result<()> {
    let reader = SerializedFileReader::new(file).map_err(io::Error::other)?;
    let mut out = BufWriter::with_capacity(1 << 20, out);
    for row in reader.get_row_iter(None).map_err(io::Error::other)? {
        let mut value = row.map_err(io::Error::other)?.to_json_value();
        leave_out_nulls(&mut value);
        serde_json::to_writer(&mut out, &value)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

fn leave_out_nulls(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.retain(|_, value| !value.is_null());
            object.values_mut().for_each(leave_out_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(leave_out_nulls),
        _ => {}
    }
}
