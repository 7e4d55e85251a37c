//! TensorBoard event files: scalars as protocol-buffer events in checksummed records.
//!
//! A record is `length: u64, crc(length), bytes, crc(bytes)`, little endian. The checksum is the rotated CRC-32C of
//! TensorFlow's `record_writer.cc`. Field numbers are those of TensorFlow's `event.proto` and `summary.proto`.
//!
//! No library is used: tboard needs a protocol-buffer compiler on the user's machine, tensorboard-rs panics when the
//! disk is full, and tfrecord builds its own compiler and an HTTP client. tests/reference/check_tensorboard.py reads
//! the files with TensorBoard itself.

use super::io_error;
use monteclora_adapters::Result;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crc::{CRC_32_ISCSI, Crc};

const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
/// `SessionLog.START`: TensorBoard drops records of earlier files from this event's step on.
const SESSION_START: u64 = 1;

/// One event file.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts a file in `dir` for a run that continues after `step`. TensorBoard drops later steps of older files.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub(super) fn create(dir: &Path, step: u64) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(io_error(dir))?;
        let (wall, process) = (now(), std::process::id());
        // Names sort by time. The number separates files of the same second.
        let mut number = 0;
        let (path, file) = loop {
            let name = format!(
                "events.out.tfevents.{:010}.monteclora.{process}.{number}",
                wall as u64
            );
            let path = dir.join(name);
            match File::create_new(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(io_error(&path)(e)),
            }
        };
        let mut events = Self { path, file };
        let version = Message::default().double(1, wall);
        events.record(version.bytes(3, b"brain.Event:2"))?;
        let session = Message::default().varint(1, SESSION_START);
        let start = Message::default().double(1, wall).varint(2, step + 1);
        events.record(start.bytes(7, &session.0))?;
        Ok(events)
    }

    /// Writes the scalars of one step in one call, so that a killed run leaves whole records.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub(super) fn write(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in scalars {
            let entry = Message::default().bytes(1, tag.as_bytes());
            summary = summary.bytes(1, &entry.float(2, *value as f32).0);
        }
        let event = Message::default().double(1, now()).varint(2, step);
        self.record(event.bytes(5, &summary.0))
    }

    fn record(&mut self, Message(bytes): Message) -> Result<()> {
        let length = (bytes.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(bytes.len() + 16);
        record.extend(length);
        record.extend(checksum(&length).to_le_bytes());
        record.extend(&bytes);
        record.extend(checksum(&bytes).to_le_bytes());
        self.file.write_all(&record).map_err(io_error(&self.path))
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    CRC32C
        .checksum(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// A protocol-buffer message under construction.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(mut self, field: u64, wire_type: u64) -> Self {
        self.raw_varint(field << 3 | wire_type);
        self
    }

    fn varint(self, field: u64, value: u64) -> Self {
        let mut message = self.key(field, 0);
        message.raw_varint(value);
        message
    }

    fn double(self, field: u64, value: f64) -> Self {
        self.key(field, 1).raw(&value.to_le_bytes())
    }

    fn bytes(self, field: u64, value: &[u8]) -> Self {
        let mut message = self.key(field, 2);
        message.raw_varint(value.len() as u64);
        message.raw(value)
    }

    fn float(self, field: u64, value: f32) -> Self {
        self.key(field, 5).raw(&value.to_le_bytes())
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads records back, checking both checksums.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(path).expect("reads");
        let mut rest = bytes.as_slice();
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (length, after) = rest.split_at(8);
            let word = |at: usize| u32::from_le_bytes(after[at..at + 4].try_into().expect("four"));
            assert_eq!(word(0), checksum(length));
            let n = u64::from_le_bytes(length.try_into().expect("eight")) as usize;
            assert_eq!(word(4 + n), checksum(&after[4..4 + n]));
            found.push(after[4..4 + n].to_vec());
            rest = &after[8 + n..];
        }
        found
    }

    #[test]
    fn checksums_are_tensorflows() {
        // RFC 3720's CRC-32C of 32 zero bytes is 0x8a9136aa.
        assert_eq!(CRC32C.checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(
            checksum(&[0; 32]),
            0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
    }

    /// The expected bytes are derived by hand from event.proto.
    #[test]
    fn scalars_are_encoded_as_event_proto_says() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut file = EventFile::create(dir.path(), 4).expect("creates");
        file.write(300, &[("a", 0.5)]).expect("writes");
        let records = records(&file.path);
        assert_eq!(records.len(), 3);
        assert_eq!(&records[0][9..], b"\x1a\x0dbrain.Event:2");
        // step 5, session_log { status: START }
        assert_eq!(&records[1][9..], b"\x10\x05\x3a\x02\x08\x01");
        // step 300, summary { value { tag: "a" simple_value: 0.5 } }
        assert_eq!(
            &records[2][9..],
            b"\x10\xac\x02\x2a\x0a\x0a\x08\x0a\x01a\x15\x00\x00\x00\x3f"
        );
        EventFile::create(dir.path(), 0).expect("another in the same second");
        assert_eq!(std::fs::read_dir(dir.path()).expect("lists").count(), 2);
    }
}
