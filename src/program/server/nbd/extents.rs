//! Turns ranges of pages into extents of bytes: pure planning, without I/O.
//!
//! 1. Extents follow each other from the first requested byte, none is empty, and adjacent ones
//!    differ in kind.
//! 2. There are never more than requested, and they never extend beyond the range.

use super::proto::Extent;
use super::span::PAGE;

/// The extents of a range, collected from its start on.
#[derive(Debug)]
pub struct Extents {
    list: Vec<Extent>,
    /// The first byte that no extent covers yet.
    at: u64,
    end: u64,
    count_max: usize,
    /// Whether an extent did not fit any more.
    over: bool,
}

impl Extents {
    /// Begins with no extents of the bytes from `start` to `end`, which are at most 4 GiB.
    pub fn new(start: u64, end: u64, count_max: usize) -> Self {
        Extents { list: Vec::new(), at: start, end, count_max, over: false }
    }

    /// Covers the bytes before page `page` that no extent covers yet, as a hole or as stored.
    pub fn upto(&mut self, page: u64, is_hole: bool) {
        let end = page.saturating_mul(PAGE).min(self.end);
        if self.over || end <= self.at {
            return;
        }
        let bytes = (end - self.at) as u32;
        let is_full = self.list.len() == self.count_max;
        match self.list.last_mut() {
            Some(last) if last.is_hole == is_hole => last.bytes += bytes,
            _ if is_full => {
                self.over = true;
                return;
            }
            _ => self.list.push(Extent { bytes, is_hole }),
        }
        self.at = end;
    }

    /// Whether no more can be added.
    pub fn is_full(&self) -> bool {
        self.over || self.at == self.end
    }

    /// Returns all extents.
    pub fn into_list(self) -> Vec<Extent> {
        self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(range: (u64, u64), count_max: usize, told: &[(u64, bool)]) -> Vec<(u32, bool)> {
        let mut extents = Extents::new(range.0, range.1, count_max);
        told.iter().for_each(|(page, is_hole)| extents.upto(*page, *is_hole));
        extents.into_list().iter().map(|e| (e.bytes, e.is_hole)).collect()
    }

    /// A client copies exactly what it is told is stored.
    #[test]
    fn extents_follow_each_other_within_the_range_and_the_count() {
        assert_eq!(made((0, 8192), 9, &[(1, false), (2, true)]), [(4096, false), (4096, true)]);
        // Adjacent extents of a kind are merged, wherever the lookups ended.
        assert_eq!(
            made((100, 9000), 9, &[(0, true), (1, false), (2, false), (9, false)]),
            [(8900, false)]
        );
        assert_eq!(
            made((4000, 4100), 9, &[(0, true), (1, true), (2, false)]),
            [(96, true), (4, false)]
        );
        assert_eq!(
            made((0, 1 << 20), 2, &[(1, true), (2, false), (3, true), (4, false)]),
            [(4096, true), (4096, false)]
        );
        assert_eq!(
            made((0, 1 << 20), 1, &[(1, true), (2, true), (3, false), (9, true)]),
            [(8192, true)]
        );
        assert_eq!(made((u64::MAX - 10, u64::MAX), 1, &[(u64::MAX, false)]), [(10, false)]);
    }
}
