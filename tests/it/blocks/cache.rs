//! What the cache holds of a GGUF file: made once, shared, and made again where it is no longer right.

use std::fs::File;

use monteclora::gguf_import::refer_to_gguf;
use monteclora_converters::ModelFiles;

use super::{every_type, files_below, ok_with_cache, with_cache};
use crate::cli::text;

#[test]
fn a_file_that_changed_or_went_away_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (file, described) = (dir.path().join("model.gguf"), dir.path().join("described"));
    std::fs::copy(every_type(), &file).unwrap();
    refer_to_gguf(&file, &described, &mut |_, _| {}).unwrap();
    let refused = || ModelFiles::open(&described).unwrap_err().to_string();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.extend([0; 32]);
    std::fs::write(&file, bytes).unwrap();
    assert!(refused().contains("give the .gguf file itself again"));
    std::fs::remove_file(&file).unwrap();
    assert!(refused().contains("model.gguf"));
}

/// Commands that meet an empty cache together all succeed; what was removed from the cache is made again.
#[test]
fn a_cold_or_damaged_cache_is_filled() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let file = every_type();
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"prompt\": \"a\", \"completion\": \"b\"}\n").unwrap();
    let stats = || with_cache(&cache, &["data", "stats", text(&rows), "-m", text(&file)]);
    std::thread::scope(|scope| {
        let together: Vec<_> = (0..6).map(|_| scope.spawn(stats)).collect();
        for done in together {
            let done = done.join().unwrap();
            assert_eq!(done.code, 0, "{}", done.stderr);
        }
    });
    let whole = files_below(&cache);
    assert!(whole.len() >= 5, "{whole:?}");
    for path in whole.iter().filter(|path| {
        ["config.json", "tokenizer.json", "model.gguf.json"]
            .iter()
            .any(|name| path.ends_with(&format!("/{name}")))
    }) {
        std::fs::remove_file(path).unwrap();
        assert_eq!(stats().code, 0, "{path}");
        assert_eq!(files_below(&cache).len(), whole.len(), "{path}");
    }
}

/// A file in the place of another one, of the same size and time, is another base.
#[test]
fn a_replaced_file_is_read_anew() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    std::fs::copy(every_type(), &file).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let descriptions = || {
        let question = [
            "predict",
            "--prompt",
            "a",
            "--max-tokens",
            "1",
            "-m",
            text(&file),
        ];
        ok_with_cache(&dir.path().join("cache"), &question);
        let models = std::fs::read_dir(dir.path().join("cache/models")).unwrap();
        models.count()
    };
    assert_eq!(descriptions(), 1);
    let mut bytes = std::fs::read(&file).unwrap();
    let key = b"llama.attention.layer_norm_rms_epsilon";
    let at = bytes.windows(key.len()).position(|window| window == key);
    let at = at.unwrap() + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&1e-4f32.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let open = File::options().write(true).open(&file).unwrap();
    open.set_modified(modified).unwrap();
    assert_eq!(descriptions(), 2);
}
