//! Tells which pages of a volume are stored, and frees many at once.
//!
//! Invariants
//! 1. Only allocated pages are freed: a huge sparse range costs as much as its allocated pages, and
//!    a lookup in the page map.
//! 2. Each commit frees pages of one run, and so of one shard; a bounded number of commits is in
//!    flight, fewer when the store is busy. One that the store finds too large is divided.

use super::{Access, Store, Volume, committed, unexpected};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{Lsn, PageId, PageKey, RUN_PAGES, VolumeId};
use crate::engine::{Change, Commit, PageRange, Request, Response};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// Ranges that are requested at a time.
const RANGES: usize = 1024;
/// The most commits in flight at a time.
const COMMITS: usize = 32;
/// The bytes that a freed page counts against `txn_bytes_max`.
const FREE_BYTES: u64 = 512;

/// Ranges of the pages that are stored in a volume, from [`Volume::allocated`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// The first and the last page of each range, in order. No page between two ranges is stored.
    pub ranges: Vec<(PageId, PageId)>,
    /// The page to continue with; `None` if these are all ranges in the requested one.
    pub next: Option<PageId>,
    /// Once the store is durable up to this LSN, so is this answer: the writes of the pages found,
    /// and the frees of those that are missing. Zero if it already is.
    pub lsn: Lsn,
}

/// A lookup of allocated pages in progress.
pub(super) struct Look<A: Access> {
    replies: Vec<A::Reply>,
    ranges: Vec<(PageId, PageId)>,
    next: Option<PageId>,
    lsn: Lsn,
}

impl<A: Access> Look<A> {
    /// Waits for all shards. If it is dropped and called again, it continues where it was.
    pub(super) async fn wait(&mut self) -> Result<()> {
        while let Some(reply) = self.replies.last_mut() {
            let result = reply.await;
            self.replies.pop();
            match result? {
                Response::Allocated { ranges, next, lsn } => {
                    self.lsn = self.lsn.max(lsn);
                    self.ranges.extend(ranges);
                    self.next = self.next.into_iter().chain(next).min();
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    /// Returns what was found.
    pub(super) fn into_allocated(mut self) -> Allocated {
        self.ranges.sort_unstable();
        Allocated { ranges: joined(self.ranges, self.next), next: self.next, lsn: self.lsn }
    }
}

impl<A: Access> Volume<A> {
    /// Returns the pages from `first` to `last` that were written and not freed, as ranges: about
    /// `ranges_max` of them, or fewer if much of the map has to be searched; [`Allocated::next`]
    /// says where to continue. Each page counts as a reader would have found it at some moment
    /// during the call, durable or not ([`Allocated::lsn`] tells which). Reads no pages into
    /// memory; pages that were never written cost next to nothing.
    ///
    /// # Errors
    /// `Corrupt`, `Io`: the page map can't be read. `NotFound`: the volume was deleted. `Busy`: no
    /// memory is free. `Closed`.
    pub async fn allocated(
        &self,
        first: PageId,
        last: PageId,
        ranges_max: usize,
    ) -> Result<Allocated> {
        self.check()?;
        self.store().allocated_in(self.id(), first, last, ranges_max).await
    }

    /// Frees all pages from `first` to `last`, in many commits: visible on return, durable after a
    /// later [`Store::flush`]. Pages that are not allocated cost next to nothing. Pages that are
    /// written in the meantime may or may not be freed.
    ///
    /// # Errors
    /// As [`allocated`](Self::allocated) and [`Volume::free`]; some of the pages may have been
    /// freed.
    pub async fn free_range(&self, first: PageId, last: PageId) -> Result<()> {
        self.check()?;
        self.store().free_pages(self.id(), first, last).await
    }
}

impl<A: Access> Store<A> {
    async fn allocated_in(
        &self,
        volume: VolumeId,
        first: PageId,
        last: PageId,
        ranges_max: usize,
    ) -> Result<Allocated> {
        let mut look = self.begin_look(volume, first, last, ranges_max).await?;
        look.wait().await?;
        Ok(look.into_allocated())
    }

    /// Asks all shards which pages are allocated in a range.
    pub(super) async fn begin_look(
        &self,
        volume: VolumeId,
        first: PageId,
        last: PageId,
        ranges_max: usize,
    ) -> Result<Look<A>> {
        let (ranges, next, lsn) = Default::default();
        let mut look = Look { replies: Vec::new(), ranges, next, lsn };
        if first <= last {
            let asked = PageRange { volume, first, last, ranges_max: ranges_max.max(1) };
            for shard in self.inner.runtime.shard_map().shards() {
                look.replies.push(self.submit(Some(shard), Request::Allocated(asked)).await?);
            }
        }
        Ok(look)
    }

    /// Frees the allocated pages in a range.
    pub(super) async fn free_pages(
        &self,
        volume: VolumeId,
        first: PageId,
        last: PageId,
    ) -> Result<()> {
        let mut next = Some(first);
        while let Some(first) = next {
            next = self.free_some(volume, first, last).await?;
        }
        Ok(())
    }

    /// Frees a bounded part of a range. Returns where to continue. On return none of its commits is
    /// in flight, even after an error, so a page that is written afterwards stays written.
    pub(super) async fn free_some(
        &self,
        volume: VolumeId,
        first: PageId,
        last: PageId,
    ) -> Result<Option<PageId>> {
        let Allocated { ranges, next, .. } = self.allocated_in(volume, first, last, RANGES).await?;
        let most = (self.txn_bytes_max() / FREE_BYTES).max(1);
        let mut parts =
            Parts { waiting: by_run(&ranges, most).into(), width: COMMITS, failed: None };
        let mut under_way: VecDeque<(Part, A::Reply)> = VecDeque::new();
        loop {
            while under_way.len() < parts.width
                && let Some(part) = parts.waiting.pop_front()
            {
                match self.submit(None, Request::Commit(frees(volume, &part))).await {
                    Ok(reply) => under_way.push_back((part, reply)),
                    Err(error) => parts.refused(part, error, under_way.len()),
                }
            }
            let Some((part, reply)) = under_way.pop_front() else { break };
            if let Err(error) = reply.await.and_then(committed) {
                parts.refused(part, error, under_way.len());
            }
        }
        parts.failed.map_or(Ok(next), Err)
    }
}

/// The pages that one commit frees.
type Part = SmallVec<[RangeInclusive<u64>; 1]>;

fn frees(volume: VolumeId, part: &Part) -> Commit {
    let free = |page| (PageKey::new(volume, PageId::new(page)), Change::Free);
    Commit {
        reads: Vec::new(),
        changes: part.iter().cloned().flatten().map(free).collect(),
        durable: false,
    }
}

/// The parts that are left to be freed, and how to free them.
struct Parts {
    waiting: VecDeque<Part>,
    /// Commits in flight at a time: fewer while the store is busy.
    width: usize,
    /// The error that ends it, once all commits in flight have ended.
    failed: Option<Error>,
}

impl Parts {
    /// Handles a refused part. One that is too large is divided; one that the store was too busy
    /// for is retried with fewer others in flight, and in the end alone; `others` are in flight now.
    fn refused(&mut self, part: Part, error: Error, others: usize) {
        match error.kind() {
            ErrorKind::TooLarge if pages_count(&part) > 1 && self.failed.is_none() => {
                let (front, back) = halves(part);
                self.waiting.push_front(back);
                self.waiting.push_front(front);
            }
            ErrorKind::Busy | ErrorKind::Conflict
                if (others > 0 || self.width > 1) && self.failed.is_none() =>
            {
                self.width = (self.width / 2).max(1);
                self.waiting.push_front(part);
            }
            _ => {
                self.waiting.clear();
                self.failed.get_or_insert(error);
            }
        }
    }
}

fn pages_count(part: &Part) -> u64 {
    part.iter().map(|range| range.end() - range.start() + 1).sum()
}

/// Divides a part of at least two pages into two with half of the pages each.
fn halves(part: Part) -> (Part, Part) {
    let (mut front, mut back, mut room) = (Part::new(), Part::new(), pages_count(&part) / 2);
    for range in part {
        let (first, last) = range.into_inner();
        let count = room.min(last - first + 1);
        room -= count;
        if count > 0 {
            front.push(first..=first + count - 1);
        }
        if first + count <= last {
            back.push(first + count..=last);
        }
    }
    (front, back)
}

/// Divides ranges into parts of at most `most` pages, each within one run.
fn by_run(ranges: &[(PageId, PageId)], most: u64) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let (mut run, mut room) = (None, 0);
    for (first, last) in ranges {
        let mut next = Some(first.get());
        while let Some(first) = next.filter(|next| *next <= last.get()) {
            if run != Some(first / RUN_PAGES) || room == 0 {
                parts.push(Part::new());
                (run, room) = (Some(first / RUN_PAGES), most);
            }
            let end = (first | (RUN_PAGES - 1)).min(last.get()).min(first.saturating_add(room - 1));
            room -= end - first + 1;
            parts.iter_mut().last().into_iter().for_each(|part| part.push(first..=end));
            next = end.checked_add(1);
        }
    }
    parts
}

/// Sorts ranges, cuts them off before `next`, and merges adjacent ones.
fn joined(ranges: Vec<(PageId, PageId)>, next: Option<PageId>) -> Vec<(PageId, PageId)> {
    let mut out: Vec<(PageId, PageId)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        let last = match next {
            Some(next) if first >= next => break,
            Some(next) => last.min(PageId::new(next.get() - 1)),
            None => last,
        };
        match out.last_mut() {
            Some((_, end)) if end.get() + 1 == first.get() => *end = last,
            _ => out.push((first, last)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(part: &Part) -> Vec<u64> {
        part.iter().cloned().flatten().collect()
    }

    fn error(kind: ErrorKind) -> Error {
        Error::new(kind, "planted")
    }

    /// If a part is left out, its space is lost for good; if one is never small enough, a deletion
    /// never ends.
    #[test]
    fn a_part_that_is_too_large_is_divided_down_to_single_pages_and_loses_none() {
        let whole: Part = SmallVec::from_vec(vec![3..=3, 10..=14, 20..=21]);
        let mut parts =
            Parts { waiting: VecDeque::from([whole.clone()]), width: COMMITS, failed: None };
        let mut freed = Vec::new();
        while let Some(part) = parts.waiting.pop_front() {
            match pages_count(&part) {
                0 => panic!("an empty part"),
                1 => freed.extend(pages(&part)),
                _ => parts.refused(part, error(ErrorKind::TooLarge), 0),
            }
        }
        assert_eq!((freed, parts.failed.is_none()), (pages(&whole), true));
        parts.refused(SmallVec::from_vec(vec![7..=7]), error(ErrorKind::TooLarge), 0);
        assert_eq!(
            parts.failed.map(|error| error.kind()),
            Some(ErrorKind::TooLarge),
            "a single page can't be divided"
        );
    }

    /// Without a limit a client's request would spin in a store that has no memory.
    #[test]
    fn a_part_that_the_store_is_too_busy_for_is_tried_again_with_less_beside_it_and_at_last_alone()
    {
        let part: Part = SmallVec::from_vec(vec![1..=9]);
        let mut parts = Parts { waiting: VecDeque::new(), width: COMMITS, failed: None };
        let mut tries = 0;
        loop {
            let others = parts.width - 1;
            parts.refused(part.clone(), error(ErrorKind::Busy), others);
            tries += 1;
            let Some(again) = parts.waiting.pop_front() else { break };
            assert_eq!(pages(&again), pages(&part));
        }
        assert_eq!((tries, parts.failed.map(|error| error.kind())), (6, Some(ErrorKind::Busy)));
    }
}
