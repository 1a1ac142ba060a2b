//! Divides byte ranges into pages: pure planning, without I/O.
//!
//! 1. The spans of a range cover each of its bytes exactly once, in order; only the first and the
//!    last can be partial.
//! 2. A batch of spans never exceeds its limits, and is never empty.

use std::iter::Peekable;
use std::ops::Range;

/// Bytes of a page of an exported volume.
pub const PAGE: u64 = 4096;

/// The part of one page that a range covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The page's number.
    pub page: u64,
    /// First byte within the page.
    pub start: u32,
    /// Bytes, at least one.
    pub length: u32,
}

impl Span {
    /// Whether it is the whole page.
    pub fn is_whole(&self) -> bool {
        u64::from(self.length) == PAGE
    }

    /// The range of its bytes within the page.
    pub fn in_page(&self) -> Range<usize> {
        self.start as usize..(self.start + self.length) as usize
    }
}

/// The spans of `length` bytes from `offset` on; the end must not overflow.
pub fn spans(offset: u64, length: u64) -> impl Iterator<Item = Span> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at % PAGE;
        let length = (PAGE - start).min(end - at);
        let span = Span { page: at / PAGE, start: start as u32, length: length as u32 };
        at += length;
        (length > 0).then_some(span)
    })
}

/// Takes spans off `from` for one commit: at most `count_max` of them, and at most `bytes_max`
/// bytes according to `cost`, but always one.
pub fn batch<I: Iterator<Item = Span>>(
    from: &mut Peekable<I>,
    count_max: usize,
    bytes_max: u64,
    cost: impl Fn(&Span) -> u64,
) -> Vec<Span> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while let Some(span) = from
        .next_if(|s| batch.is_empty() || (batch.len() < count_max && bytes + cost(s) <= bytes_max))
    {
        bytes += cost(&span);
        batch.push(span);
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(offset: u64, length: u64) -> Vec<(u64, u32, u32)> {
        spans(offset, length).map(|s| (s.page, s.start, s.length)).collect()
    }

    /// If a byte is left out or taken twice, data is lost or overwritten.
    #[test]
    fn spans_cover_a_range_exactly_once() {
        assert_eq!(all(0, 0), []);
        assert_eq!(all(0, 4096), [(0, 0, 4096)]);
        assert_eq!(all(100, 50), [(0, 100, 50)]);
        assert_eq!(all(4095, 2), [(0, 4095, 1), (1, 0, 1)]);
        assert_eq!(all(4000, 4096 + 200), [(0, 4000, 96), (1, 0, 4096), (2, 0, 104)]);
        assert_eq!(all(u64::MAX - 1, 1), [(u64::MAX / 4096, 4094, 1)]);
    }

    /// The store would refuse a commit beyond the limits, and with it a valid request.
    #[test]
    fn batches_keep_their_bounds_and_lose_nothing() {
        let mut rest = spans(10, 10 * 4096).peekable();
        let mut seen = Vec::new();
        while rest.peek().is_some() {
            let batch = batch(&mut rest, 3, 8192, |s| u64::from(s.length));
            assert!((1..=3).contains(&batch.len()));
            assert!(batch.iter().map(|s| u64::from(s.length)).sum::<u64>() <= 8192);
            seen.extend(batch);
        }
        assert_eq!(seen, spans(10, 10 * 4096).collect::<Vec<_>>());
        assert_eq!(
            batch(&mut spans(0, 4096).peekable(), 1, 1, |_| 99).len(),
            1,
            "one span always goes"
        );
    }
}
