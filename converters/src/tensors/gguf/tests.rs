//! Valid files are read; invalid files are refused without a panic.

use proptest::prelude::*;

use super::*;

fn open_bytes(bytes: &[u8]) -> Result<GgufFile> {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    std::fs::write(file.path(), bytes).expect("writable");
    GgufFile::open(file.path())
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn start(n_tensors: u64, n_entries: u64) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(n_tensors.to_le_bytes());
    bytes.extend(n_entries.to_le_bytes());
    bytes
}

fn tensor(bytes: &mut Vec<u8>, name: &str, shape: &[u64], ggml_type: u32, offset: u64) {
    text(bytes, name);
    bytes.extend(u32::try_from(shape.len()).expect("few").to_le_bytes());
    for dim in shape {
        bytes.extend(dim.to_le_bytes());
    }
    bytes.extend(ggml_type.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
}

fn honest() -> Vec<u8> {
    let mut bytes = start(2, 3);
    text(&mut bytes, "general.architecture");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, "llama");
    text(&mut bytes, "llama.block_count");
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(3u32.to_le_bytes());
    text(&mut bytes, "tokenizer.ggml.tokens");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(8u32.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    text(&mut bytes, "a");
    text(&mut bytes, "é");
    tensor(&mut bytes, "x", &[2, 3], 0, 0);
    tensor(&mut bytes, "y", &[32], 8, 32);
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend((0..66u8).collect::<Vec<_>>());
    bytes
}

#[test]
fn an_honest_file_is_read() {
    let file = open_bytes(&honest()).expect("honest");
    assert_eq!(file.version(), 3);
    assert_eq!(
        file.metadata()["general.architecture"].as_str(),
        Some("llama")
    );
    assert_eq!(file.metadata()["llama.block_count"].as_u64(), Some(3));
    let tokens = file.metadata()["tokenizer.ggml.tokens"].as_strings();
    assert_eq!(tokens, Some(&["a".to_owned(), "é".to_owned()][..]));
    assert_eq!(file.names().collect::<Vec<_>>(), ["x", "y"]);
    let x = file.tensor("x").expect("there");
    assert_eq!((x.ggml_type, x.shape, x.bytes.len()), (0, &[2, 3][..], 24));
    let y = file.tensor("y").expect("there");
    assert_eq!((y.ggml_type, y.bytes.len(), y.bytes[0]), (8, 34, 32));
    assert!(file.tensor("z").is_none());
}

#[test]
fn absurd_counts_and_lying_tensors_are_refused() {
    let mut cases = vec![
        start(u64::MAX, 0),
        start(0, u64::MAX),
        start(1 << 19, 1 << 15),
        b"GGML".to_vec(),
        b"GGUF\x00\x00\x00\x03".to_vec(),
    ];
    let mut long_text = start(0, 1);
    long_text.extend(u64::MAX.to_le_bytes());
    cases.push(long_text);
    let mut long_array = start(0, 1);
    text(&mut long_array, "k");
    long_array.extend(9u32.to_le_bytes());
    long_array.extend(0u32.to_le_bytes());
    long_array.extend((1u64 << 60).to_le_bytes());
    cases.push(long_array);
    let mut nested = start(0, 1);
    text(&mut nested, "k");
    nested.extend(9u32.to_le_bytes());
    nested.extend(9u32.to_le_bytes());
    nested.extend(1u64.to_le_bytes());
    cases.push(nested);
    for (shape, ggml_type, offset) in [
        (&[u64::MAX, u64::MAX][..], 0, 0),
        (&[1 << 40], 0, 0),
        (&[4], 0, u64::MAX - 31),
        (&[4], 0, 1 << 20),
        (&[4], 0, 3),
        (&[4], 8, 0),
        (&[4], 99, 0),
        (&[1, 1, 1, 1, 1], 0, 0),
    ] {
        let mut bytes = start(1, 0);
        tensor(&mut bytes, "t", shape, ggml_type, offset);
        bytes.resize(256, 0);
        cases.push(bytes);
    }
    for second in [("t", 32), ("u", 0)] {
        let mut bytes = start(2, 0);
        tensor(&mut bytes, "t", &[4], 0, 0);
        tensor(&mut bytes, second.0, &[4], 0, second.1);
        bytes.resize(512, 0);
        cases.push(bytes);
    }
    for bytes in cases {
        let error = open_bytes(&bytes).expect_err("hostile");
        assert_eq!(error.code(), "malformed", "{error}");
    }
}

#[test]
fn every_truncation_is_refused() {
    let bytes = honest();
    for length in 0..bytes.len() {
        assert!(open_bytes(&bytes[..length]).is_err(), "{length}");
    }
}

proptest! {
    #[test]
    fn changed_bytes_never_panic(at in 0usize..300, value in any::<u8>()) {
        let mut bytes = honest();
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = open_bytes(&bytes);
    }
}
