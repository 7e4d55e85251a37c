//! Converts Parquet rows to JSON Lines, one row group at a time.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use monteclora_converters::Error;
use parquet::{
    basic::{Compression, ConvertedType, LogicalType, Type as Physical},
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    schema::types::{ColumnDescriptor, Type},
};
use serde_json::Value;

use crate::data::error::{bad_data, not_unpacked};

/// Writes one line per row. A column without a value, at any depth, is left out as a key, because a table cannot
/// otherwise say that a message has no `tool_calls`.
///
/// # Errors
/// Returns an error if the file is cut short or damaged, if columns cannot be read as text (it names them), or if `out`
/// cannot be written.
pub(super) fn write_json_lines(path: &Path, file: File, out: &mut File) -> Result<(), Error> {
    let refuse = |problem: String| bad_data("parquet", format!("`{}`: {problem}", path.display()));
    let reader = SerializedFileReader::new(file).map_err(|error| {
        refuse(format!(
            "not a whole Parquet file ({error}); fetch or write it again"
        ))
    })?;
    let problems = unreadable(&reader);
    if !problems.is_empty() {
        return Err(refuse(problems.join("; ")));
    }
    let damaged = |row: usize, error: ParquetError| {
        let column = first_damaged(&reader)
            .map_or_else(String::new, |column| format!("column `{column}`, "));
        refuse(format!(
            "{column}row {row} cannot be read ({error}); fetch or write the file again"
        ))
    };
    let unpack = not_unpacked(path);
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let rows = reader
        .get_row_iter(None)
        .map_err(|error| damaged(1, error))?;
    for (idx, row) in rows.enumerate() {
        let mut value = row
            .map_err(|error| damaged(idx + 1, error))?
            .to_json_value();
        leave_out_nulls(&mut value);
        serde_json::to_writer(&mut out, &value).map_err(|error| unpack(error.into()))?;
        out.write_all(b"\n").map_err(&unpack)?;
    }
    out.flush().map_err(unpack)
}

/// Problems that make every row unreadable: columns of bytes that are not text, and compressions that are not built in.
fn unreadable(reader: &SerializedFileReader<File>) -> Vec<String> {
    let metadata = reader.metadata();
    let schema = metadata.file_metadata().schema_descr();
    let mut problems = Vec::new();
    for (idx, column) in schema.columns().iter().enumerate() {
        let name = column.path().string();
        if !is_readable(column) {
            problems.push(format!(
                "column `{name}` holds {}, which cannot be read as text or numbers; store it as a string, or leave the column out",
                column.physical_type()
            ));
        }
        let packing = metadata
            .row_groups()
            .iter()
            .map(|group| group.column(idx).compression())
            .find(|packing| !is_built_in(*packing));
        if let Some(packing) = packing {
            problems.push(format!(
                "column `{name}` is compressed with {packing}; write it again with none, snappy or zstd"
            ));
        }
    }
    problems
}

fn is_readable(column: &ColumnDescriptor) -> bool {
    match (column.physical_type(), column.converted_type()) {
        (Physical::BYTE_ARRAY, converted) => matches!(
            converted,
            ConvertedType::UTF8
                | ConvertedType::ENUM
                | ConvertedType::JSON
                | ConvertedType::DECIMAL
        ),
        (Physical::FIXED_LEN_BYTE_ARRAY, converted) => {
            converted == ConvertedType::DECIMAL
                || column.logical_type_ref() == Some(&LogicalType::Float16)
        }
        _ => true,
    }
}

fn is_built_in(packing: Compression) -> bool {
    matches!(
        packing,
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_)
    )
}

/// The first column that cannot be read to its end when it is read alone.
fn first_damaged(reader: &SerializedFileReader<File>) -> Option<String> {
    let schema = reader.metadata().file_metadata().schema();
    let fails = |field: &Arc<Type>| {
        let projection = Type::group_type_builder(schema.name())
            .with_fields(vec![field.clone()])
            .build()
            .ok()?;
        let failed = match reader.get_row_iter(Some(projection)) {
            Ok(mut rows) => rows.any(|row| row.is_err()),
            Err(_) => true,
        };
        failed.then(|| field.name().to_owned())
    };
    schema.get_fields().iter().find_map(fails)
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::data::row_file::RowFile;
    use crate::data::rows::{RowContent, RowFormat, parse_row};

    /// Files that tests/reference/make_parquet.py wrote with pyarrow.
    fn stored(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/parquet")
            .join(name)
    }

    fn rows(path: &Path) -> Vec<Value> {
        let file = RowFile::open(path).expect("opens");
        (0..file.n_rows())
            .map(|idx| serde_json::from_slice(&file.row_bytes(idx).expect("reads")).expect("JSON"))
            .collect()
    }

    /// Snappy, three row groups, lists of structs with a field that some messages lack.
    #[test]
    fn conversations_of_several_row_groups_are_read_in_order() {
        let path = stored("messages.parquet");
        let rows = rows(&path);
        assert_eq!(rows.len(), 5);
        assert_eq!(
            rows[4],
            json!({"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4, naïvely."}], "id": 4})
        );
        assert_eq!(
            rows[3]["messages"][1]["tool_calls"],
            json!([{"type": "function", "function": {"name": "weather", "arguments": "{}"}}])
        );
        let file = RowFile::open(&path).expect("opens");
        assert_eq!(file.line_number(3), 4);
        for idx in 0..5 {
            let (format, row) =
                parse_row(&file.row_bytes(idx).expect("reads"), None).expect("a row");
            assert_eq!(format, RowFormat::Messages);
            let RowContent::Conversation { messages, .. } = row.content else {
                panic!("row {idx} is no conversation");
            };
            assert_eq!(messages.len(), if idx % 2 == 0 { 2 } else { 4 });
        }
        let hash = monteclora_converters::files::file_sha256(&path).expect("reads");
        assert_eq!(file.sha256(), hash);
    }

    /// Zstandard, a dictionary, nulls and not-a-number, numbers, a time.
    #[test]
    fn columns_without_a_value_are_left_out() {
        let rows = rows(&stored("prompt_completion.parquet"));
        assert_eq!(
            rows,
            [
                json!({"prompt": "red", "completion": "rose", "choices": ["rose", "leaf"], "answer": 0, "score": 0.5, "at": "2024-05-17 12:30:00.000000 +00:00"}),
                json!({"prompt": "green", "completion": "leaf", "at": "2024-05-17 12:30:00.000000 +00:00"}),
                json!({"prompt": "blue", "completion": "sky", "choices": ["sky", "sea"], "answer": 0, "at": "2024-05-17 12:30:00.000000 +00:00"}),
            ]
        );
    }

    /// Not compressed, version 2 pages. A row of a single null is an empty object, which the check of rows then
    /// reports.
    #[test]
    fn plain_text_is_read() {
        assert_eq!(
            rows(&stored("text.parquet")),
            [json!({"text": "one"}), json!({"text": "two"}), json!({})]
        );
    }

    #[test]
    fn what_cannot_be_read_is_named_by_file_and_column() {
        for (name, column, says) in [
            ("bytes.parquet", "image.png", "BYTE_ARRAY"),
            ("gzip.parquet", "text", "GZIP"),
        ] {
            let path = stored(name);
            let error = RowFile::open(&path).expect_err("refused");
            assert_eq!(monteclora_converters::exit_code(&error, |_| None), 3);
            let text = error.to_string();
            for part in [&*path.display().to_string(), &format!("`{column}`"), says] {
                assert!(text.contains(part), "{text} does not say {part}");
            }
        }
    }

    #[test]
    fn a_file_cut_short_or_damaged_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("train.parquet");
        let whole = std::fs::read(stored("prompt_completion.parquet")).expect("reads");
        let refused = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("writes");
            RowFile::open(&path).expect_err("refused").to_string()
        };
        for n_bytes in [0, 3, 4, 100, whole.len() - 1] {
            let text = refused(&whole[..n_bytes]);
            assert!(text.contains("not a whole Parquet file"), "{text}");
        }
        // The first page that holds the second column's dictionary.
        let at = whole
            .windows(4)
            .position(|four| four == b"rose")
            .expect("a value");
        let mut damaged = whole.clone();
        damaged[at - 20..at + 4].fill(0xff);
        let text = refused(&damaged);
        assert!(text.contains("column `completion`, row 1 "), "{text}");
    }
}
