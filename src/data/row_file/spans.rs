//! Finds the rows in a stream of JSON: one per line, or the elements of one array.

use std::{
    io::{self, BufRead},
    path::Path,
};

use monteclora_converters::{Error, Problem};

use crate::data::error::{RowProblem, field_problem, unreadable};

/// The place of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) n_bytes: u32,
    /// Line in which the row begins, from 1.
    pub(super) line: u32,
    crc: u32,
}

impl Span {
    fn new(path: &Path, offset: u64, n_bytes: u64, line: u32, crc: u32) -> Result<Self, Error> {
        let n_bytes = u32::try_from(n_bytes).map_err(|_| {
            let message = format!("the row at line {line} is longer than 4 GiB");
            unreadable(path)(io::Error::other(message))
        })?;
        Ok(Self {
            offset,
            n_bytes,
            line,
            crc,
        })
    }

    /// Whether these are the bytes that were indexed.
    pub(super) fn is_of(&self, bytes: &[u8]) -> bool {
        crc32fast::hash(bytes) == self.crc
    }
}

/// Finds the rows of a stream. If its first character is `[`, the stream is an array. With lines, only one row is in
/// memory at a time; with an array, only the state of the scan.
pub(super) fn index(mut reader: impl BufRead, path: &Path) -> Result<Vec<Span>, Error> {
    let read_error = unreadable(path);
    let mut spans = Vec::new();
    let mut buffer = Vec::new();
    let mut offset = 0u64;
    let mut line = 0u32;
    loop {
        buffer.clear();
        let n_read = reader.read_until(b'\n', &mut buffer).map_err(&read_error)?;
        if n_read == 0 {
            return Ok(spans);
        }
        line = line.saturating_add(1);
        let has_mark = offset == 0 && buffer.starts_with(b"\xef\xbb\xbf");
        let mark = if has_mark { 3 } else { 0 };
        let start = offset + mark as u64;
        let content = buffer[mark..].trim_ascii_end();
        if let Some(&first) = content.trim_ascii_start().first() {
            if spans.is_empty() && first == b'[' {
                let mut array = ArrayScan::new(path, start, line);
                array.feed(&buffer[mark..])?;
                loop {
                    let chunk = reader.fill_buf().map_err(&read_error)?;
                    if chunk.is_empty() {
                        return array.finish();
                    }
                    let n_bytes = chunk.len();
                    array.feed(chunk)?;
                    reader.consume(n_bytes);
                }
            }
            let crc = crc32fast::hash(content);
            spans.push(Span::new(path, start, content.len() as u64, line, crc)?);
        }
        offset += n_read as u64;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expects {
    Opening,
    FirstValue,
    Value,
    Comma,
    End,
}

/// Finds the elements of a JSON array by brackets and strings only. Each element is parsed later, like a line.
struct ArrayScan<'a> {
    path: &'a Path,
    spans: Vec<Span>,
    expects: Expects,
    offset: u64,
    line: u32,
    /// Offset and line of the open element, and the checksum of its bytes before this chunk.
    start: Option<(u64, u32, crc32fast::Hasher)>,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl<'a> ArrayScan<'a> {
    fn new(path: &'a Path, offset: u64, line: u32) -> Self {
        Self {
            path,
            spans: Vec::new(),
            expects: Expects::Opening,
            offset,
            line,
            start: None,
            depth: 0,
            in_string: false,
            escaped: false,
        }
    }

    fn refuse<T>(&self, line: u32, problem: &str) -> Result<T, Error> {
        let fix = "correct the array, or write one JSON object per line";
        let problem = field_problem("row", problem, fix);
        Err(Problem::from(RowProblem::new(self.path, line as usize, problem)).into())
    }

    fn feed(&mut self, chunk: &[u8]) -> Result<(), Error> {
        let mut from = 0;
        let mut at = 0;
        while at < chunk.len() {
            let byte = chunk[at];
            if self.start.is_some() {
                if self.inside(byte) {
                    // The byte ends a number or a word and belongs to what follows.
                    self.close(&chunk[from..at], at)?;
                    continue;
                }
                at += 1;
                if self.depth == 0 && !self.in_string && matches!(byte, b'}' | b']' | b'"') {
                    self.close(&chunk[from..at], at)?;
                }
            } else {
                if self.between(byte, at)? {
                    from = at;
                }
                at += 1;
            }
            if byte == b'\n' {
                self.line = self.line.saturating_add(1);
            }
        }
        if let Some((_, _, crc)) = &mut self.start {
            crc.update(&chunk[from..]);
        }
        self.offset += chunk.len() as u64;
        Ok(())
    }

    /// Processes a byte of an element. Returns true if the byte ends a scalar but does not belong to it.
    fn inside(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b',' | b']' | b'}' | b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => return true,
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        false
    }

    /// Processes a byte between elements. Returns true if the byte begins an element.
    fn between(&mut self, byte: u8, at: usize) -> Result<bool, Error> {
        if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
            return Ok(false);
        }
        let refuse = |problem| self.refuse(self.line, problem);
        match (self.expects, byte) {
            (Expects::Opening, b'[') => self.expects = Expects::FirstValue,
            (Expects::FirstValue | Expects::Comma, b']') => self.expects = Expects::End,
            (Expects::Comma, b',') => self.expects = Expects::Value,
            (Expects::Value, b']') => return refuse("a comma before the closing `]`"),
            (Expects::Comma, _) => return refuse("no comma between two elements"),
            (Expects::End, _) => return refuse("text after the closing `]`"),
            (_, b',') => return refuse("a comma without an element before it"),
            _ => {
                let offset = self.offset + at as u64;
                self.start = Some((offset, self.line, crc32fast::Hasher::new()));
                self.depth = usize::from(matches!(byte, b'{' | b'['));
                self.in_string = byte == b'"';
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn close(&mut self, rest: &[u8], at: usize) -> Result<(), Error> {
        if let Some((offset, line, mut crc)) = self.start.take() {
            crc.update(rest);
            let n_bytes = self.offset + at as u64 - offset;
            let span = Span::new(self.path, offset, n_bytes, line, crc.finalize())?;
            self.spans.push(span);
            self.expects = Expects::Comma;
        }
        Ok(())
    }

    fn finish(self) -> Result<Vec<Span>, Error> {
        match self.start {
            Some((_, line, _)) => {
                self.refuse(line, "the file ends within the element that begins here")
            }
            None if self.expects == Expects::End => Ok(self.spans),
            None => self.refuse(self.line, "the file ends before the closing `]`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::prelude::*;

    use super::*;

    fn rows(text: &str, capacity: usize) -> Result<Vec<(String, u32)>, String> {
        let reader = BufReader::with_capacity(capacity, text.as_bytes());
        let spans = index(reader, Path::new("t.json")).map_err(|error| error.to_string())?;
        Ok(spans
            .into_iter()
            .map(|span| {
                let start = usize::try_from(span.offset).expect("small");
                let row = &text[start..start + span.n_bytes as usize];
                assert!(span.is_of(row.as_bytes()));
                (row.to_owned(), span.line)
            })
            .collect())
    }

    #[test]
    fn elements_keep_the_line_they_begin_in() {
        let text =
            "\u{feff} [\n{\"a\": \"]},\\\"\"}, {\n \"b\": [1, {}]\n},\n\n 12 ,null,\"s\"\n]\n";
        for capacity in [1, 2, 7, 1 << 16] {
            assert_eq!(
                rows(text, capacity).expect("indexes"),
                [
                    ("{\"a\": \"]},\\\"\"}".to_owned(), 2),
                    ("{\n \"b\": [1, {}]\n}".to_owned(), 2),
                    ("12".to_owned(), 6),
                    ("null".to_owned(), 6),
                    ("\"s\"".to_owned(), 6),
                ],
                "{capacity}"
            );
        }
        assert_eq!(rows("[]", 4).expect("indexes"), []);
    }

    #[test]
    fn broken_arrays_are_told_by_line() {
        for (text, part) in [
            ("[\n{},\n]", "t.json:3: row: a comma before the closing `]`"),
            ("[{}\n{}]", "t.json:2: row: no comma between two elements"),
            (
                "[\n{\"a\":\n1",
                "t.json:2: row: the file ends within the element that begins here",
            ),
            ("[{}\n", "the file ends before the closing `]`"),
            ("[{}]\n{}", "t.json:2: row: text after the closing `]`"),
            ("[,{}]", "a comma without an element before it"),
        ] {
            let error = rows(text, 3).expect_err("refused");
            assert!(error.contains(part), "{error} does not say {part}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// For any elements and any chunks of the stream, every element is found whole, as serde_json sees it.
        #[test]
        fn every_element_is_found(
            texts in prop::collection::vec("[\\]\\[{}\",\\\\a \n\u{e9}]{0,8}", 0..6),
            pretty in any::<bool>(),
            capacity in 1usize..9,
        ) {
            let values: Vec<_> = texts.iter().enumerate().map(|(idx, text)| match idx % 3 {
                0 => serde_json::json!({ text.as_str(): [text, idx] }),
                1 => serde_json::json!([text]),
                _ => serde_json::json!(text),
            }).collect();
            let json = if pretty { serde_json::to_string_pretty(&values) } else { serde_json::to_string(&values) };
            let found: Vec<serde_json::Value> = rows(&json.expect("writes"), capacity)
                .expect("indexes")
                .iter()
                .map(|(row, _)| serde_json::from_str(row).expect("an element"))
                .collect();
            prop_assert_eq!(found, values);
        }
    }
}
