//! Recognises files that hold no rows by how they begin. Says what the file is, and how to make rows from it.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

use monteclora_converters::{Error, Problem, foreign, foreign::FileKind};
use serde::de::IgnoredAny;

use super::table::{Table, is_named_table};

/// Number of bytes at the start of a file that are examined.
const HEAD: u64 = 1 << 16;
/// Number of lines at the start of a file among which one must be JSON.
const FIRST_LINES: usize = 8;
/// Number of characters of a text that a message shows.
const SHOWN_TEXT: usize = 60;

/// Archives, other tables and documents: the first bytes, the kind, and the fix.
const MAGIC: [(&[u8], &str, &str); 17] = [
    (
        b"\x28\xb5\x2f\xfd",
        "compressed with zstd",
        "unpack it: `zstd -d FILE`",
    ),
    (
        b"\xfd7zXZ\0",
        "compressed with xz",
        "unpack it: `xz -d FILE`",
    ),
    (
        b"BZh",
        "compressed with bzip2",
        "unpack it: `bzip2 -d FILE`",
    ),
    (
        b"\x04\x22\x4d\x18",
        "compressed with lz4",
        "unpack it: `lz4 -d FILE`",
    ),
    (
        b"7z\xbc\xaf\x27\x1c",
        "a 7z archive",
        "unpack it, and name the file in it",
    ),
    (
        b"Rar!",
        "a RAR archive",
        "unpack it, and name the file in it",
    ),
    (
        b"PK\x05\x06",
        "an empty zip archive",
        "fetch the file again",
    ),
    (
        b"ARROW1\0\0",
        "an Arrow file, as `datasets` saves it",
        ARROW,
    ),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream, as `datasets` saves it",
        ARROW,
    ),
    (
        b"FEA1",
        "a Feather file",
        "write it as JSON Lines: `pandas.read_feather(FILE).to_json(\"rows.jsonl\", orient=\"records\", lines=True)`",
    ),
    (b"ORC", "an ORC file", "write it as JSON Lines or Parquet"),
    (
        b"Obj\x01",
        "an Avro file",
        "write it as JSON Lines or Parquet",
    ),
    (
        b"SQLite format 3\0",
        "an SQLite database",
        "write the table as JSON Lines: `sqlite3 -json FILE \"select * from TABLE\" > rows.json`",
    ),
    (
        b"%PDF",
        "a PDF document",
        "write its text as rows: {\"text\": ...}",
    ),
    (
        b"\xd0\xcf\x11\xe0",
        "an old Office document, such as .xls",
        EXCEL,
    ),
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file",
        "write it as JSON Lines",
    ),
    (
        b"{\\rtf",
        "a document in rich text",
        "write its text as rows: {\"text\": ...}",
    ),
];
const ARROW: &str = "write it as JSON Lines: `datasets.Dataset.from_file(FILE).to_json(\"rows.jsonl\")`, or `datasets.load_from_disk(FOLDER)` in place of from_file";
const EXCEL: &str = "save the sheet as JSON Lines: `pandas.read_excel(FILE).to_json(\"rows.jsonl\", orient=\"records\", lines=True)`";

/// Refuses a file, already unpacked, that is not JSON, or that is JSON in another layout than rows.
///
/// # Errors
/// Returns what the file is and how to fix it, or an error if it cannot be read.
pub(super) fn refuse(
    path: &Path,
    file: &mut File,
    unreadable: impl Fn(io::Error) -> Error,
) -> Result<(), Error> {
    let mut head = Vec::new();
    file.rewind().map_err(&unreadable)?;
    file.by_ref()
        .take(HEAD)
        .read_to_end(&mut head)
        .map_err(&unreadable)?;
    let mut found = recognise(path, &head);
    if found.is_none() {
        file.rewind().map_err(&unreadable)?;
        found = spread(path, &head, &*file);
    }
    let Some(mut problem) = found else {
        return Ok(());
    };
    if path.extension().is_some_and(|extension| extension == "gz") {
        problem.fix = format!("unpack it with `gunzip FILE`, then {}", problem.fix);
    }
    Err(problem.into())
}

fn refused(path: &Path, is: impl Into<String>, fix: impl Into<String>) -> Problem {
    let at = format!("`{}`", path.display());
    Problem::new("not-rows", at, is, fix).exit(3)
}

/// Recognises a foreign file by its first bytes; `None` if they may begin JSON, or if the file is blank.
fn recognise(path: &Path, head: &[u8]) -> Option<Problem> {
    let refused = |is: String, fix: &str| Some(refused(path, is, fix));
    if let Some((_, is, fix)) = MAGIC.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return refused((*is).to_owned(), fix);
    }
    if head.starts_with(b"PK\x03\x04") {
        let holds = |name: &[u8]| head.windows(name.len()).any(|window| window == name);
        return match holds(b"xl/") || holds(b"[Content_Types].xml") {
            true => refused("an Office document, such as .xlsx".to_owned(), EXCEL),
            false => refused(
                "a zip archive, which may hold several files".to_owned(),
                "unpack it, and name the file of rows: `unzip FILE`",
            ),
        };
    }
    if head.get(257..262) == Some(b"ustar") {
        let fix = "unpack it, and name the file of rows: `tar -xf FILE`";
        return refused("a tar archive".to_owned(), fix);
    }
    if head.starts_with(b"\xff\xfe\0\0") || head.starts_with(b"\0\0\xfe\xff") {
        let fix = "save it as UTF-8: `iconv -f UTF-32 -t UTF-8 FILE > rows.jsonl`";
        return refused("the file is UTF-32".to_owned(), fix);
    }
    match FileKind::of(head) {
        FileKind::Utf16 => {
            return refused(
                "the file is UTF-16".to_owned(),
                "save it as UTF-8: `iconv -f UTF-16 -t UTF-8 FILE > rows.jsonl`",
            );
        }
        FileKind::Safetensors | FileKind::Gguf | FileKind::OldGgml => {
            let is = format!("{}, which holds weights", FileKind::of(head));
            return refused(is, "name a file of rows");
        }
        FileKind::Zeros => {
            let fix = "fetch or save it again: this is what an interrupted download or a full disk leaves";
            return refused("zeros only".to_owned(), fix);
        }
        FileKind::PyTorch | FileKind::Pickle | FileKind::Numpy => {
            let is = FileKind::of(head).to_string();
            return refused(is, "write its rows as JSON Lines");
        }
        FileKind::LfsPointer(_) | FileKind::AnnexPointer | FileKind::Html | FileKind::Xml => {
            let found = foreign::not_wanted(path, head, "a file of rows");
            return found.map(|problem| problem.exit(3));
        }
        _ => {}
    }
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = String::from_utf8_lossy(head);
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines().next()?;
    let is_json = |line: &str| {
        line.starts_with(['{', '[']) || serde_json::from_str::<IgnoredAny>(line).is_ok()
    };
    // One line of JSON is enough. Other lines are reported one by one later.
    let n_looked_at = if is_named_table(path) { 1 } else { FIRST_LINES };
    if lines().take(n_looked_at).any(is_json) {
        return None;
    }
    if head.contains(&0) {
        return refused(
            "not text".to_owned(),
            "name a file of rows: JSON Lines, a JSON array or Parquet",
        );
    }
    if let Some(table) = Table::recognise(path, first, lines().nth(1)) {
        let encoding = match text.contains(char::REPLACEMENT_CHARACTER) {
            true => "latin-1",
            false => "utf-8-sig",
        };
        return refused(table.describe(), &table.remedy(encoding));
    }
    let mut shown: String = first.chars().take(SHOWN_TEXT).collect();
    if shown.len() < first.len() {
        shown.push_str("...");
    }
    refused(
        format!("text that is not JSON; it begins \"{shown}\""),
        "write one JSON object per line; lines of plain text become rows by `jq -Rc '{text: .}' FILE > rows.jsonl`",
    )
}

/// The problem of a file whose first object spans several lines, as pretty-printers write it.
fn spread(path: &Path, head: &[u8], file: impl Read) -> Option<Problem> {
    let mark = if head.starts_with(b"\xef\xbb\xbf") {
        3
    } else {
        0
    };
    let text = &head[mark..];
    let start = text.iter().position(|byte| !byte.is_ascii_whitespace())?;
    let text = &text[start..];
    let line = text.split(|byte| *byte == b'\n').next()?;
    if text.first() != Some(&b'{') || line.len() == text.len() {
        return None;
    }
    let alone = serde_json::from_slice::<IgnoredAny>(line).err()?;
    if !alone.is_eof() {
        return None;
    }
    let mut reader = BufReader::with_capacity(1 << 20, file);
    io::copy(&mut reader.by_ref().take(mark as u64), &mut io::sink()).ok()?;
    let mut values = serde_json::Deserializer::from_reader(reader).into_iter::<IgnoredAny>();
    values.next()?.ok()?;
    let at = 1 + head[..mark + start]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count();
    let mut problem = refused(
        path,
        "an object goes over several lines; a row is one line, or an element of one array",
        "write one object a line: `jq -c . FILE > rows.jsonl`, or `jq -c '.KEY[]'` where a key holds the rows",
    );
    problem.at = format!("{}:{at}", path.display());
    Some(problem)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn says(name: &str, head: &[u8]) -> String {
        let path = Path::new(name);
        recognise(path, head)
            .or_else(|| spread(path, head, Cursor::new(head)))
            .map_or(String::new(), |problem| {
                assert_eq!(problem.exit, 3, "{name}");
                problem.to_string()
            })
    }

    #[test]
    fn files_without_rows_are_named_with_the_remedy() {
        let mut tar = vec![b'a'; 300];
        tar[257..262].copy_from_slice(b"ustar");
        for (name, head, is, fix) in [
            (
                "a.jsonl",
                &b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"[..],
                "a Git LFS pointer, which stands for a file of 1234 bytes",
                "git lfs pull",
            ),
            (
                "a.jsonl",
                b"<!DOCTYPE html><html><title>Sign in</title>",
                "an HTML page",
                "/resolve/",
            ),
            (
                "a.jsonl",
                b"<?xml version=\"1.0\"?><Error/>",
                "an XML document",
                "token",
            ),
            (
                "a.zst",
                b"\x28\xb5\x2f\xfd\x04",
                "compressed with zstd",
                "`zstd -d FILE`",
            ),
            (
                "a.xz",
                b"\xfd7zXZ\0\0",
                "compressed with xz",
                "`xz -d FILE`",
            ),
            (
                "a.bz2",
                b"BZh91AY",
                "compressed with bzip2",
                "`bzip2 -d FILE`",
            ),
            (
                "a.zip",
                b"PK\x03\x04....train.jsonl",
                "a zip archive",
                "`unzip FILE`",
            ),
            (
                "a.xlsx",
                b"PK\x03\x04..[Content_Types].xml",
                "an Office document, such as .xlsx",
                "read_excel",
            ),
            ("a.tar", &tar, "a tar archive", "`tar -xf FILE`"),
            ("a.arrow", b"ARROW1\0\0....", "an Arrow file", "to_json"),
            (
                "a.arrow",
                b"\xff\xff\xff\xff\x08\0\0\0",
                "an Arrow stream",
                "to_json",
            ),
            (
                "a.db",
                b"SQLite format 3\0",
                "an SQLite database",
                "sqlite3 -json",
            ),
            ("a.pdf", b"%PDF-1.7", "a PDF document", "text"),
            (
                "a.safetensors",
                b"\x02\0\0\0\0\0\0\0{}",
                "a safetensors file, which holds weights",
                "name a file of rows",
            ),
            ("a.pt", b"\x80\x02}q\0.", "a pickle", "JSON Lines"),
            (
                "a.jsonl",
                b"\xff\xfe{\0}\0",
                "the file is UTF-16",
                "iconv -f UTF-16",
            ),
            (
                "a.jsonl",
                b"{\0\"\0a\0\"\0",
                "the file is UTF-16",
                "iconv -f UTF-16",
            ),
            ("a.jsonl", &[0; 64], "zeros only", "again"),
            (
                "a.csv",
                b"prompt,completion\na,b\n",
                "CSV, whose line 1 names the columns prompt, completion",
                "csv.DictReader",
            ),
            (
                "a.csv",
                b"text\nonly one\n",
                "CSV, whose line 1 names the columns text",
                "csv.DictReader",
            ),
            (
                "a.jsonl",
                b"\xef\xbb\xbf\"prompt\";\"completion\"\na;b\n",
                "CSV, whose line 1 names the columns prompt, completion",
                "delimiter=\";\"",
            ),
            (
                "a.csv",
                b"prompt,completion\ncaf\xe9,\"x\n{\"\n",
                "CSV, whose line 1 names the columns prompt, completion",
                "encoding=\"latin-1\"",
            ),
            (
                "a.txt",
                b"prompt\tcompletion\na\tb\n",
                "TSV, whose line 1 names the columns prompt, completion",
                "delimiter=\"\\t\"",
            ),
            (
                "a.txt",
                b"Once upon a time, there was\na king, who\n",
                "text that is not JSON; it begins \"Once upon",
                "jq -Rc",
            ),
            (
                "a.jsonl",
                b"{\n \"text\": \"a\"\n}\n",
                "a.jsonl:1: an object goes over several lines",
                "`jq -c . FILE",
            ),
            (
                "a.jsonl",
                b"\xef\xbb\xbf\n{\"text\":\n\"a\"}\n{\"text\":\n\"b\"}",
                "a.jsonl:2: an object goes over several lines",
                "`jq -c . FILE",
            ),
        ] {
            let found = says(name, head);
            assert!(found.contains(is) && found.contains(fix), "{name}: {found}");
        }
    }

    #[test]
    fn what_may_hold_rows_is_left_to_their_reader() {
        for head in [
            &b""[..],
            b"\n\n",
            b"{\"text\": \"a\"}\n",
            b"[{\"text\": \"a\"}]",
            b"\"a\"\n\"b\"\n",
            b"1\n2\n",
            b"a comment\n{\"text\": \"a\"}\n",
            b"{\"text\": \"a\n",
            b"{\"text\":\"caf\xe9\"}\n",
            b"{\"text\": 1,\n{\"text\": \"b\"}\n",
        ] {
            assert_eq!(
                says("a.jsonl", head),
                "",
                "{}",
                String::from_utf8_lossy(head)
            );
        }
    }
}
