//! Properties that hold for every test row.

use super::*;

/// In every row, a column or turn key that nothing reads is counted, and a misspelt column is refused.
#[test]
fn no_column_of_any_case_is_passed_over() {
    let root = std::env::var_os("MONTECLORA_CASES").map_or_else(own, PathBuf::from);
    let mut n_rows = 0;
    for folder in std::fs::read_dir(root.join("training")).expect("cases") {
        let folder = folder.expect("an entry").path();
        for file in std::fs::read_dir(&folder).into_iter().flatten() {
            let path = file.expect("an entry").path();
            if path
                .extension()
                .is_some_and(|extension| extension == "jsonl")
            {
                n_rows += columns_are_noticed(&path);
            }
        }
    }
    assert!(n_rows > 0, "no row was found");
}

fn columns_are_noticed(path: &Path) -> usize {
    let schema = RowSchema::default();
    let Ok(source) = Source::open(path, Split::Train) else {
        return 0;
    };
    let mut n_rows = 0;
    for idx in 0..source.n_rows() {
        let bytes = source.row_bytes(idx).expect("reads");
        if schema.parse(&bytes).is_err() {
            continue;
        }
        n_rows += 1;
        let mut json: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
        json["zz_note"] = 1.into();
        let turns: Vec<_> = ["messages", "conversations"]
            .into_iter()
            .filter(|list| json.get(*list).is_some_and(serde_json::Value::is_array))
            .collect();
        for list in &turns {
            json[*list][0]["zz_mood"] = "glad".into();
        }
        let parse = |json: &serde_json::Value| schema.parse(json.to_string().as_bytes());
        let (_, row) = parse(&json).expect("a note does no harm");
        assert!(row.notes.unread.contains(&"zz_note".to_owned()), "{json}");
        let of_turns = row.notes.unread.iter().chain(&row.notes.for_template);
        assert_eq!(
            of_turns.filter(|key| key.ends_with(".zz_mood")).count(),
            turns.len(),
            "{json}"
        );
        if json.get("choices").is_some() {
            continue;
        }
        json["choises"] = serde_json::json!(["a", "b"]);
        let problems = parse(&json).expect_err("refused");
        assert!(
            problems.iter().any(|problem| problem.at == "choises"
                && problem.message.contains("did you mean `choices`?")),
            "{problems:?}"
        );
    }
    n_rows
}
