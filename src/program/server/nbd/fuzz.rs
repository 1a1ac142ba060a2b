//! Fuzz targets of the server: they send what a client might send, byte by byte, and check that the
//! server follows the protocol.
//!
//! 1. [`handshake`]: each option is answered in turn, by as many replies as the specification
//!    allows, and only replies are sent. The server does what an independent reader of the same
//!    bytes expects.
//! 2. [`transmission`]: each request whose payload arrived is answered exactly once, with an
//!    allowed reply and the bytes that a model holds; the server reads nothing twice and stops
//!    where the client breaks the protocol.
//!
//! The numbers of the specification are repeated here on purpose. `scripts/fuzz` runs the targets
//! under libFuzzer; the tests here run the stored corpus and some thousands of mutations of it.
//!
//! It does *not* exist in a release: it is compiled for tests and under `--cfg fuzzing`.

mod handshake;
mod transmission;

pub use handshake::handshake;
pub use transmission::transmission;

use super::holes::Holes;
use super::proto::{Extent, ExtentKind, Fault};
use super::{Export, Exports};
use bytes::Bytes;
use corepage::Durability;
use std::sync::{Arc, Mutex};

/// Bytes of the export: not a whole number of pages.
const SIZE: usize = 3 * 4096 + 100;

/// An export in memory; pages that are all zeros are holes.
#[derive(Clone)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn new() -> Self {
        let mut data = vec![0; SIZE];
        data[4096..8192].fill(7);
        Memory(Arc::new(Mutex::new(data)))
    }
}

impl Export for Memory {
    fn bytes(&self) -> u64 {
        SIZE as u64
    }

    fn bytes_now(&self) -> u64 {
        SIZE as u64
    }

    fn write_bytes_max(&self) -> usize {
        SIZE
    }

    async fn read(&self, offset: u64, into: &mut [u8], holes: &mut Holes) -> Result<(), Fault> {
        into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
        let mut at = 0;
        while at < into.len() {
            let end = (at + 4096 - (offset as usize + at) % 4096).min(into.len());
            if into[at..end].iter().all(|byte| *byte == 0) {
                holes.add(at..end);
            }
            at = end;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes, _: Durability) -> Result<(), Fault> {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn zero(
        &self,
        offset: u64,
        length: u64,
        _: ExtentKind,
        _: Durability,
    ) -> Result<(), Fault> {
        self.0.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }

    async fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    async fn cache(&self, offset: u64, length: u64) -> Result<(), Fault> {
        assert!(offset + length <= SIZE as u64, "a range beyond the export got through");
        Ok(())
    }

    async fn allocation(
        &self,
        offset: u64,
        length: u32,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Fault> {
        assert!(
            offset + u64::from(length) <= SIZE as u64 && length > 0,
            "a range beyond the export got through"
        );
        let stored = Extent { bytes: length.div_ceil(2), kind: ExtentKind::Stored };
        let hole = Extent { bytes: length - stored.bytes, kind: ExtentKind::Hole };
        Ok([stored, hole].into_iter().filter(|extent| extent.bytes > 0).take(extents_max).collect())
    }
}

impl Exports for Memory {
    type Export = Memory;

    fn names(&self) -> Result<Vec<String>, Fault> {
        Ok(vec!["disk".into(), "other".into()])
    }

    fn find(&self, name: &str) -> Result<Option<(String, Memory)>, Fault> {
        let name = if name.is_empty() { "disk" } else { name };
        Ok(["disk", "other"].contains(&name).then(|| (name.into(), self.clone())))
    }
}

/// Takes big-endian numbers and bytes off the front; `None` if not all of them are there.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    /// Takes a number of this many bytes.
    fn number(&mut self, bytes: usize) -> Option<u64> {
        Some(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Takes a string that follows its length.
    fn string(&mut self) -> Option<&'a str> {
        let bytes = self.number(4)? as usize;
        if bytes > 4096 {
            return None;
        }
        std::str::from_utf8(self.take(bytes)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake_survives_the_corpus_and_mutations_of_it() {
        corepage::testing::replay::run("handshake", 10_000, handshake);
    }

    #[test]
    fn transmission_survives_the_corpus_and_mutations_of_it() {
        corepage::testing::replay::run("transmission", 5000, transmission);
    }
}
