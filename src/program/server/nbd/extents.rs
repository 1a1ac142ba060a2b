//! Turns ranges of pages into extents of bytes: pure planning, without I/O.
//!
//! 1. Extents follow each other from the first requested byte, none is empty, and adjacent ones
//!    differ in kind.
//! 2. There are never more than requested, and they never extend beyond the range.

use super::proto::{Extent, ExtentKind};
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

    /// Covers the bytes before page `page` that no extent covers yet by one of this kind.
    pub fn upto(&mut self, page: u64, kind: ExtentKind) {
        let end = page.saturating_mul(PAGE).min(self.end);
        if self.over || end <= self.at {
            return;
        }
        let bytes = (end - self.at) as u32;
        let is_full = self.list.len() == self.count_max;
        match self.list.last_mut() {
            Some(last) if last.kind == kind => last.bytes += bytes,
            _ if is_full => {
                self.over = true;
                return;
            }
            _ => self.list.push(Extent { bytes, kind }),
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
    use super::ExtentKind::{Hole, Stored};
    use super::*;

    fn made(
        range: (u64, u64),
        count_max: usize,
        told: &[(u64, ExtentKind)],
    ) -> Vec<(u32, ExtentKind)> {
        let mut extents = Extents::new(range.0, range.1, count_max);
        told.iter().for_each(|(page, kind)| extents.upto(*page, *kind));
        extents.into_list().iter().map(|e| (e.bytes, e.kind)).collect()
    }

    /// A client copies exactly what it is told is stored.
    #[test]
    fn extents_follow_each_other_within_the_range_and_the_count() {
        assert_eq!(made((0, 8192), 9, &[(1, Stored), (2, Hole)]), [(4096, Stored), (4096, Hole)]);
        // Adjacent extents of a kind are merged, wherever the lookups ended.
        assert_eq!(
            made((100, 9000), 9, &[(0, Hole), (1, Stored), (2, Stored), (9, Stored)]),
            [(8900, Stored)]
        );
        assert_eq!(
            made((4000, 4100), 9, &[(0, Hole), (1, Hole), (2, Stored)]),
            [(96, Hole), (4, Stored)]
        );
        assert_eq!(
            made((0, 1 << 20), 2, &[(1, Hole), (2, Stored), (3, Hole), (4, Stored)]),
            [(4096, Hole), (4096, Stored)]
        );
        assert_eq!(
            made((0, 1 << 20), 1, &[(1, Hole), (2, Hole), (3, Stored), (9, Hole)]),
            [(8192, Hole)]
        );
        assert_eq!(made((u64::MAX - 10, u64::MAX), 1, &[(u64::MAX, Stored)]), [(10, Stored)]);
    }
}
