//! Which pages of a volume there are, and freeing many at once.
//!
//! Invariants
//! 1. Only what is allocated is freed: a huge sparse range costs what is in it, and a look at the page map.
//! 2. Each commit frees pages of one run, so of one shard; a bounded number of them is under way.

use super::{Store, Volume, committed, unexpected};
use crate::error::Result;
use crate::mesh::Reply;
use crate::shard::{Change, Commit, PageRange, Request, Response};
use crate::types::{PageId, PageKey, RUN_PAGES, VolumeId};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// Ranges asked for at a time.
const RANGES: usize = 1024;
/// Commits under way at a time.
const COMMITS: usize = 32;
/// What the store counts for a freed page against `txn_bytes_max`.
const FREE_BYTES: u64 = 512;

/// Some of the pages of a volume that there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// First and last pages of ranges, in order; between two of them nothing was found.
    pub ranges: Vec<(PageId, PageId)>,
    /// Where to go on; `None`: these are all that were asked for.
    pub next: Option<PageId>,
}

/// A look at what is allocated, under way.
#[derive(Default)]
pub(super) struct Look {
    replies: Vec<Reply>,
    ranges: Vec<(PageId, PageId)>,
    next: Option<PageId>,
}

impl Look {
    /// Waits for all shards. If it is dropped and called again it goes on where it was.
    pub(super) async fn wait(&mut self) -> Result<()> {
        while let Some(reply) = self.replies.last_mut() {
            let result = reply.await;
            self.replies.pop();
            match result? {
                Response::Allocated { ranges, next } => {
                    self.ranges.extend(ranges);
                    self.next = self.next.into_iter().chain(next).min();
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    /// What was found.
    pub(super) fn into_allocated(mut self) -> Allocated {
        self.ranges.sort_unstable();
        Allocated { ranges: joined(self.ranges, self.next), next: self.next }
    }
}

impl Volume {
    /// The pages from `first` to `last` that were written and not freed, as ranges: about `ranges_max` of them, or less where
    /// much is looked at; [`Allocated::next`] says where to go on. Each page counts as a reader would have found it at one
    /// moment during the call. Takes no pages into memory; what was never written costs next to nothing.
    ///
    /// # Errors
    /// `Corrupt`, `Io`: of the page map. `NotFound`: the volume was deleted. `Busy`: no memory is free. `Closed`.
    pub async fn allocated(&self, first: PageId, last: PageId, ranges_max: usize) -> Result<Allocated> {
        self.check()?;
        self.store().allocated_in(self.id(), first, last, ranges_max).await
    }

    /// Frees all pages from `first` to `last`, in many commits: visible on return, durable after a later [`Store::flush`].
    /// What is not allocated costs next to nothing. Pages written meanwhile may be freed or not.
    ///
    /// # Errors
    /// As [`allocated`](Self::allocated) and [`Volume::free`]; some of the pages may be freed then.
    pub async fn free_range(&self, first: PageId, last: PageId) -> Result<()> {
        self.check()?;
        self.store().free_pages(self.id(), first, last).await
    }
}

impl Store {
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

    /// Asks all shards what is allocated in a range.
    pub(super) async fn begin_look(
        &self,
        volume: VolumeId,
        first: PageId,
        last: PageId,
        ranges_max: usize,
    ) -> Result<Look> {
        let mut look = Look::default();
        if first <= last {
            let asked = PageRange { volume, first, last, ranges_max: ranges_max.max(1) };
            for shard in self.inner.runtime.deal().shards() {
                look.replies.push(self.inner.runtime.submit_to(shard, Request::Allocated(asked)).await?);
            }
        }
        Ok(look)
    }

    /// Frees what is allocated in a range.
    pub(super) async fn free_pages(&self, volume: VolumeId, first: PageId, last: PageId) -> Result<()> {
        let mut next = Some(first);
        while let Some(first) = next {
            next = self.free_some(volume, first, last).await?;
        }
        Ok(())
    }

    /// Frees a bounded part of it; where to go on.
    pub(super) async fn free_some(&self, volume: VolumeId, first: PageId, last: PageId) -> Result<Option<PageId>> {
        let Allocated { ranges, next } = self.allocated_in(volume, first, last, RANGES).await?;
        let most = (self.txn_bytes_max() / FREE_BYTES).max(1);
        let mut under_way = VecDeque::new();
        for pages in by_run(&ranges, most) {
            let free = |page| (PageKey::new(volume, PageId::new(page)), Change::Free);
            let changes = pages.into_iter().flatten().map(free).collect();
            let commit = Commit { reads: Vec::new(), changes, durable: false };
            under_way.push_back(self.inner.runtime.submit(Request::Commit(commit)).await?);
            if under_way.len() == COMMITS
                && let Some(oldest) = under_way.pop_front()
            {
                committed(oldest.await?)?;
            }
        }
        for commit in under_way {
            committed(commit.await?)?;
        }
        Ok(next)
    }
}

/// Ranges in parts of at most `most` pages, each within one run.
fn by_run(ranges: &[(PageId, PageId)], most: u64) -> Vec<SmallVec<[RangeInclusive<u64>; 1]>> {
    let mut parts: Vec<SmallVec<[RangeInclusive<u64>; 1]>> = Vec::new();
    let (mut run, mut room) = (None, 0);
    for (first, last) in ranges {
        let mut next = Some(first.get());
        while let Some(first) = next.filter(|next| *next <= last.get()) {
            if run != Some(first / RUN_PAGES) || room == 0 {
                parts.push(SmallVec::new());
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

/// Ranges in order, cut off before `next`, neighbours made one.
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
