//! Fuzzes the reader `safetensors` with what the tests call too.
#![no_main]

#[path = "../../tests/readers/mod.rs"]
#[allow(dead_code, reason = "one reader of several")]
mod readers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| readers::safetensors(input));
