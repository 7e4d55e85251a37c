//! Recognises CSV and TSV tables by name or by their first two lines, and gives the command that converts them to rows.

use std::path::Path;

/// Largest number of columns that a message names.
const SHOWN: usize = 20;

/// A table, described by its first line.
pub(super) struct Table<'a> {
    separator: char,
    columns: Vec<&'a str>,
}

/// Whether a file has the extension of a table.
pub(super) fn is_named_table(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        extension.eq_ignore_ascii_case("csv") || extension.eq_ignore_ascii_case("tsv")
    })
}

impl<'a> Table<'a> {
    /// Recognises a table whose header line is `first`.
    pub(super) fn recognise(path: &Path, first: &'a str, second: Option<&str>) -> Option<Self> {
        let columns = |separator: char| -> Vec<&'a str> {
            let names = first.split(separator);
            names.map(|name| name.trim().trim_matches('"')).collect()
        };
        let by = |separator| Self {
            separator,
            columns: columns(separator),
        };
        if is_named_table(path) {
            let tables = ['\t', ';', ','].into_iter().map(by);
            return tables.max_by_key(|table| table.columns.len());
        }
        // Column names are short. This excludes sentences, which also contain commas.
        let is_name = |name: &&str| !name.is_empty() && name.len() <= 40 && !name.contains(". ");
        [',', '\t', ';'].into_iter().map(by).find(|table| {
            let names = &table.columns;
            names.len() > 1
                && names.iter().all(is_name)
                && first.split_whitespace().count() <= 2 * names.len()
                && second.is_some_and(|second| second.contains(table.separator))
        })
    }

    /// Describes the table.
    pub(super) fn describe(&self) -> String {
        let name = if self.separator == '\t' { "TSV" } else { "CSV" };
        let shown = self.columns.iter().take(SHOWN).copied();
        let shown = shown.collect::<Vec<_>>().join(", ");
        let more = match self.columns.len().saturating_sub(SHOWN) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        format!("{name}, whose line 1 names the columns {shown}{more}; rows are JSON")
    }

    /// The command that converts the table to rows.
    pub(super) fn remedy(&self, encoding: &str) -> String {
        let delimiter = match self.separator {
            ',' => String::new(),
            '\t' => ", delimiter=\"\\t\"".to_owned(),
            other => format!(", delimiter=\"{other}\""),
        };
        format!(
            "convert it: `python3 -c 'import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(open(sys.argv[1], encoding=\"{encoding}\", newline=\"\"){delimiter})]' FILE > rows.jsonl`"
        )
    }
}
