//! An export over a volume: a page's id is its offset / 4096.
//!
//! 1. A write within the commit limit is one atomic commit, whatever its alignment: whole pages are
//!    replaced, edges patched.
//! 2. A longer one takes several commits in order of offset. Only the last requires durability:
//!    commits become durable in order, so it covers the ones before it.
//! 3. The store makes holes of more than [`FREE_AT_ONCE`] pages, in many commits; partial pages at
//!    their edges are patched before. Pages that are not stored cost next to nothing.
//! 4. `Busy` is retried while the connection lives (see `pause`); every other failure is reported
//!    to the client at once.
//!
//! A flush is the store's flush: it covers the acknowledged writes of all connections and volumes.

use super::extents::Extents;
use super::holes::Holes;
use super::proto::{Errno, Extent, ExtentKind, Fault, PAYLOAD_BYTES_MAX};
use super::span::{self, PAGE, Span, spans};
use super::{Export, Exports, Memory, pause};
use bytes::Bytes;
use corepage::{Change, Durability, Error, ErrorKind, PageId, Store, Volume};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::warn;

/// Pages that a read takes at a time: each is pinned while it is copied, so this limits the pins of
/// a large request.
const READ_PAGES: usize = 256;
/// Pages that one CACHE reads at a time: all of a connection's CACHEs together leave its reads
/// enough pins.
pub const CACHE_PAGES: usize = 32;
/// The most changes of a commit: 4,096 freed pages are 16 MiB of the volume.
const CHANGES_MAX: usize = 4096;
/// The most whole pages of a hole that one commit makes: 2 MiB.
const FREE_AT_ONCE: u64 = 512;
/// Ranges that are requested from the store at a time, and how often for one extent: a lookup
/// covers up to 32 MiB a shard.
const RANGES: usize = 64;
const LOOKS: usize = 64;
/// The bytes that the store counts for a freed page; for any other change it counts a page.
const FREE_BYTES: u64 = 512;

static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

/// All volumes of a store.
#[derive(Clone)]
pub struct StoreExports {
    store: Store,
    commit_bytes_max: u64,
}

/// One volume.
pub struct VolumeExport {
    store: Store,
    volume: Volume,
    /// The size that the client was told: the volume's size when the connection was made.
    bytes: u64,
    commit_bytes_max: u64,
}

impl StoreExports {
    /// Exports the volumes of `store`; commits are no larger than `memory` can take as a whole.
    pub fn new(store: Store, memory: &Memory) -> Self {
        let commit_bytes_max =
            (store.txn_bytes_max() / PAGE * PAGE).min(memory.payload_bytes_max() as u64).max(PAGE);
        StoreExports { store, commit_bytes_max }
    }
}

impl Exports for StoreExports {
    type Export = VolumeExport;

    fn names(&self) -> Result<Vec<String>, Fault> {
        let volumes = futures_lite::future::block_on(retry_busy(|| self.store.volumes()))?;
        Ok(volumes.iter().map(|v| v.name().to_owned()).collect())
    }

    /// The default export is the volume `disk`, or the only one there is.
    fn find(&self, name: &str) -> Result<Option<(String, VolumeExport)>, Fault> {
        // Each connection gets a handle of its own, so that its reads don't count against another's
        // pins.
        let store = self.store.clone();
        let mut volumes = futures_lite::future::block_on(retry_busy(|| store.volumes()))?;
        let wanted = if name.is_empty() && volumes.len() != 1 { "disk" } else { name };
        let index = volumes.iter().position(|v| wanted.is_empty() || v.name() == wanted);
        let Some(volume) = index.map(|i| volumes.swap_remove(i)) else { return Ok(None) };
        let commit_bytes_max = self.commit_bytes_max;
        Ok(Some((
            volume.name().to_owned(),
            VolumeExport { store, bytes: volume.bytes(), volume, commit_bytes_max },
        )))
    }
}

impl VolumeExport {
    async fn zero_in_place(
        &self,
        range: (u64, u64),
        kind: ExtentKind,
        durability: Durability,
    ) -> Result<(), Fault> {
        let change = |span: &Span| match (span.is_whole(), kind) {
            (true, ExtentKind::Hole) => Change::Free,
            (true, ExtentKind::Stored) => Change::Put(Bytes::from_static(&ZEROS)),
            (false, _) => Change::Patch {
                offset: span.start,
                bytes: Bytes::from_static(&ZEROS[span.in_page()]),
            },
        };
        self.commit_all(range, durability, change).await
    }

    /// Commits all of `range`, batch by batch, with the changes that `change` makes of its spans.
    async fn commit_all(
        &self,
        range: (u64, u64),
        durability: Durability,
        change: impl Fn(&Span) -> Change,
    ) -> Result<(), Fault> {
        let cost = |s: &Span| match change(s) {
            Change::Free => FREE_BYTES,
            Change::Put(_) | Change::Patch { .. } => PAGE,
        };
        let mut rest = spans(range.0, range.1).peekable();
        while rest.peek().is_some() {
            let batch = span::batch(&mut rest, CHANGES_MAX, self.commit_bytes_max, cost);
            // The durability of the last one covers those before it.
            let own = if rest.peek().is_none() { durability } else { Durability::Buffered };
            retry_busy(|| {
                let changes = batch.iter().map(|s| (PageId::new(s.page), change(s))).collect();
                self.volume.apply(changes, own)
            })
            .await?;
        }
        Ok(())
    }
}

impl Export for VolumeExport {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn bytes_now(&self) -> u64 {
        self.volume.bytes()
    }

    /// A volume has at least one page until it is deleted.
    fn is_deleted(&self) -> bool {
        self.volume.bytes() == 0
    }

    fn write_bytes_max(&self) -> usize {
        self.commit_bytes_max as usize
    }

    async fn read(&self, offset: u64, into: &mut [u8], holes: &mut Holes) -> Result<(), Fault> {
        let mut rest = spans(offset, into.len() as u64).peekable();
        let mut at = 0;
        while rest.peek().is_some() {
            let batch = span::batch(&mut rest, READ_PAGES, u64::MAX, |_| 0);
            let ids: Vec<PageId> = batch.iter().map(|s| PageId::new(s.page)).collect();
            let pages = retry_busy(|| self.volume.read_many(&ids)).await?;
            for (span, page) in batch.iter().zip(&pages) {
                let part = at..at + span.length as usize;
                at = part.end;
                match page.is_absent() {
                    false => into[part].copy_from_slice(&page[span.in_page()]),
                    true => holes.add(part),
                }
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes, durability: Durability) -> Result<(), Fault> {
        let change = |span: &Span| {
            let at = (span.page * PAGE + u64::from(span.start) - offset) as usize;
            let bytes = data.slice(at..at + span.length as usize);
            if span.is_whole() {
                Change::Put(bytes)
            } else {
                Change::Patch { offset: span.start, bytes }
            }
        };
        self.commit_all((offset, data.len() as u64), durability, change).await
    }

    async fn zero(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        durability: Durability,
    ) -> Result<(), Fault> {
        let (first, behind) = (offset.div_ceil(PAGE), (offset + length) / PAGE);
        if kind == ExtentKind::Stored || behind.saturating_sub(first) <= FREE_AT_ONCE {
            return self.zero_in_place((offset, length), kind, durability).await;
        }
        let end = offset + length;
        for (from, to) in [(offset, first * PAGE), (behind * PAGE, end)] {
            self.zero_in_place((from, to - from), kind, Durability::Buffered).await?;
        }
        retry_busy(|| self.volume.free_range(PageId::new(first), PageId::new(behind - 1))).await?;
        match durability {
            Durability::Durable => self.flush().await,
            Durability::Buffered => Ok(()),
        }
    }

    async fn flush(&self) -> Result<(), Fault> {
        retry_busy(|| self.store.flush()).await.map(drop)
    }

    /// Reads into the cache, up to the size of the largest READ: a longer range would evict itself
    /// again.
    async fn cache(&self, offset: u64, length: u64) -> Result<(), Fault> {
        let mut rest = spans(offset, length.min(u64::from(PAYLOAD_BYTES_MAX))).peekable();
        while rest.peek().is_some() {
            let batch = span::batch(&mut rest, CACHE_PAGES, u64::MAX, |_| 0);
            let ids: Vec<PageId> = batch.iter().map(|s| PageId::new(s.page)).collect();
            retry_busy(|| self.volume.read_many(&ids)).await?;
        }
        Ok(())
    }

    async fn allocation(
        &self,
        offset: u64,
        length: u32,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Fault> {
        let last = PageId::new((offset + u64::from(length) - 1) / PAGE);
        let mut extents = Extents::new(offset, offset + u64::from(length), extents_max);
        let mut next = Some(PageId::new(offset / PAGE));
        for _ in 0..LOOKS {
            let Some(first) = next.filter(|_| !extents.is_full()) else { break };
            let found = retry_busy(|| self.volume.allocated(first, last, RANGES)).await?;
            next = found.next;
            for (first, last) in found.ranges {
                extents.upto(first.get(), ExtentKind::Hole);
                extents.upto(last.get() + 1, ExtentKind::Stored);
            }
            extents.upto(next.map_or(last.get() + 1, PageId::get), ExtentKind::Hole);
        }
        Ok(extents.into_list())
    }
}

/// Retries while the store is busy.
async fn retry_busy<T, F: Future<Output = Result<T, Error>>>(
    attempt: impl FnMut() -> F,
) -> Result<T, Fault> {
    pause::retry_busy(attempt, fault).await
}

/// The number of failures so far, over all connections.
static FAILURES: AtomicU64 = AtomicU64::new(0);

/// Converts an error for the client. If the client did not cause it, it is logged, but only the
/// 1st, 2nd, 4th, 8th … failure: clients of a failed store keep retrying, and must not fill a disk
/// with log lines.
fn fault(error: Error) -> Fault {
    let errno = match error.kind() {
        ErrorKind::Full => Errno::NoSpace,
        ErrorKind::Invalid | ErrorKind::TooLarge => Errno::Invalid,
        // The volume was deleted in the meantime.
        ErrorKind::NotFound => Errno::Shutdown,
        _ => {
            let failures = FAILURES.fetch_add(1, Ordering::Relaxed) + 1;
            if failures.is_power_of_two() {
                warn!(error = %error, failures, "a request failed");
            }
            Errno::Io
        }
    };
    Fault::new(errno, error.to_string())
}
