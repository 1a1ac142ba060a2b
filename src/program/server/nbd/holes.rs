//! Tells which parts of what was read are holes: pure planning, without I/O.
//!
//! 1. Pieces cover what was read exactly once, in order, and adjacent ones differ in kind.

use std::ops::Range;

/// The parts without storage, in order; a reader of the export adds them.
#[derive(Debug, Default)]
pub struct Holes(Vec<Range<usize>>);

impl Holes {
    /// Adds a hole after the others.
    pub fn add(&mut self, hole: Range<usize>) {
        match self.0.last_mut() {
            Some(last) if last.end == hole.start => last.end = hole.end,
            _ => self.0.push(hole),
        }
    }

    /// Divides the first `length` bytes into pieces, and tells whether each is a hole of at least
    /// `bytes_min` bytes; shorter ones count as data.
    pub fn pieces(&self, length: usize, bytes_min: usize) -> Vec<(Range<usize>, bool)> {
        let mut pieces = Vec::with_capacity(2 * self.0.len() + 1);
        let mut at = 0;
        for hole in self.0.iter().filter(|hole| hole.len() >= bytes_min) {
            if at < hole.start {
                pieces.push((at..hole.start, false));
            }
            pieces.push((hole.clone(), true));
            at = hole.end;
        }
        if at < length {
            pieces.push((at..length, false));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If a byte is in no piece, the client reads it from its own uncleared memory.
    #[test]
    fn pieces_cover_what_was_read_exactly_once() {
        let pieces = |holes: &[Range<usize>]| {
            let mut all = Holes::default();
            holes.iter().for_each(|hole| all.add(hole.clone()));
            all.pieces(100, 10)
        };
        assert_eq!(pieces(&[]), [(0..100, false)]);
        assert_eq!(pieces(&[0..50, 50..100]), [(0..100, true)]);
        assert_eq!(
            pieces(&[10..20, 20..30, 90..100]),
            [(0..10, false), (10..30, true), (30..90, false), (90..100, true)]
        );
        assert_eq!(
            pieces(&[0..9, 20..30, 95..100]),
            [(0..20, false), (20..30, true), (30..100, false)]
        );
    }
}
