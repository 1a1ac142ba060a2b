//! An export over a volume: page id = offset / 4096.
//!
//! 1. A write within the commit limit is one atomic commit, whatever its alignment: whole pages are put, edges patched.
//! 2. A longer one is several commits in order of offset. Only the last asks for durability: commits become durable in
//!    their order, so it covers the ones before it.
//! 3. `Busy` is waited for, within bounds; every other failure is told the client at once.
//! 4. Trims and zeroed ranges of many pages cost what is stored in them; they are not one commit.
//!
//! A flush here is the store's flush: it covers the acknowledged writes of all connections and volumes.

use super::proto::Errno;
use super::span::{self, PAGE, Span, spans};
use super::{Export, Exports, Holes, Stretch};
use bytes::Bytes;
use corepage::{Change, Durability, Error, ErrorKind, PageId, Store, Volume};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tracing::warn;

/// Pages of a read at a time: each is pinned while it is copied, so this bounds the pins of a large request.
const READ_PAGES: usize = 256;
/// Changes of a commit: 4,096 freed pages are 16 MiB of the volume.
const CHANGES_MAX: usize = 4096;
/// More pages than these are freed as a range.
const FREE_PAGES: u64 = 64;
/// Ranges of the page map asked for at a time.
const STRETCHES: usize = 1024;
/// Pages that one CACHE brings into memory at most: 64 MiB.
const CACHE_PAGES: usize = 16 << 10;
/// What the store counts for a freed page; for any other change it counts a page.
const FREE_BYTES: u64 = 512;
/// How long a request waits for a busy store, and for how long between tries.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_PAUSE: Duration = Duration::from_millis(1);

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
    commit_bytes_max: u64,
}

impl StoreExports {
    /// The volumes of `store`.
    pub fn new(store: Store) -> Self {
        let commit_bytes_max = store.txn_bytes_max();
        StoreExports { store, commit_bytes_max }
    }
}

impl Exports for StoreExports {
    type Export = VolumeExport;

    fn names(&self) -> Result<Vec<String>, Errno> {
        let volumes = futures_lite::future::block_on(self.store.volumes()).map_err(errno)?;
        Ok(volumes.iter().map(|v| v.name().to_owned()).collect())
    }

    /// The default export is the volume `disk`, or the only one there is.
    fn find(&self, name: &str) -> Result<Option<(String, VolumeExport)>, Errno> {
        let mut volumes = futures_lite::future::block_on(self.store.volumes()).map_err(errno)?;
        let wanted = if name.is_empty() && volumes.len() != 1 { "disk" } else { name };
        let index = volumes.iter().position(|v| wanted.is_empty() || v.name() == wanted);
        let Some(volume) = index.map(|i| volumes.swap_remove(i)) else { return Ok(None) };
        let (store, commit_bytes_max) = (self.store.clone(), self.commit_bytes_max);
        Ok(Some((volume.name().to_owned(), VolumeExport { store, volume, commit_bytes_max })))
    }
}

impl VolumeExport {
    /// Commits all of `range`, batch after batch, with the changes that `change` makes of its spans.
    async fn commit_all(&self, range: (u64, u64), fua: bool, change: impl Fn(&Span) -> Change) -> Result<(), Errno> {
        let cost = |s: &Span| match change(s) {
            Change::Free => FREE_BYTES,
            Change::Put(_) | Change::Patch { .. } => PAGE,
        };
        let mut rest = spans(range.0, range.1).peekable();
        while rest.peek().is_some() {
            let batch = span::batch(&mut rest, CHANGES_MAX, self.commit_bytes_max, cost);
            let last = rest.peek().is_none();
            let durability = if fua && last { Durability::Durable } else { Durability::Buffered };
            patiently(|| {
                let changes = batch.iter().map(|s| (PageId::new(s.page), change(s))).collect();
                self.volume.apply(changes, durability)
            })
            .await?;
        }
        Ok(())
    }
}

impl Export for VolumeExport {
    fn bytes(&self) -> u64 {
        self.volume.bytes()
    }

    async fn read(&self, offset: u64, into: &mut [u8]) -> Result<Holes, Errno> {
        let mut rest = spans(offset, into.len() as u64).peekable();
        let (mut into, mut at, mut holes) = (into, 0, Holes::new());
        while rest.peek().is_some() {
            let batch = span::batch(&mut rest, READ_PAGES, u64::MAX, |_| 0);
            let ids: Vec<PageId> = batch.iter().map(|s| PageId::new(s.page)).collect();
            let pages = patiently(|| self.volume.read_many(&ids)).await?;
            for (span, page) in batch.iter().zip(&pages) {
                let (head, tail) = into.split_at_mut(span.length as usize);
                let part = at..at + head.len();
                match holes.last_mut() {
                    _ if !page.is_absent() => head.copy_from_slice(&page[span.in_page()]),
                    Some(last) if last.end == part.start => last.end = part.end,
                    _ => holes.push(part.clone()),
                }
                (into, at) = (tail, part.end);
            }
        }
        Ok(holes)
    }

    async fn cache(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let (mut next, last) = (Some(PageId::new(offset / PAGE)), PageId::new((offset + length - 1) / PAGE));
        let mut pages_left = CACHE_PAGES;
        while let Some(first) = next
            && pages_left > 0
        {
            let allocated = patiently(|| self.volume.allocated(first, last, STRETCHES)).await?;
            next = allocated.next;
            let pages = allocated.ranges.iter().flat_map(|(first, last)| first.get()..=last.get());
            let pages: Vec<PageId> = pages.take(pages_left).map(PageId::new).collect();
            pages_left -= pages.len();
            for some in pages.chunks(READ_PAGES) {
                patiently(|| self.volume.read_many(some)).await?;
            }
        }
        Ok(())
    }

    async fn allocation(&self, offset: u64, length: u32) -> Result<Vec<Stretch>, Errno> {
        let end = offset + u64::from(length);
        let (first, last) = (PageId::new(offset / PAGE), PageId::new((end - 1) / PAGE));
        let allocated = patiently(|| self.volume.allocated(first, last, STRETCHES)).await?;
        Ok(span::stretches(offset, end, &allocated))
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), Errno> {
        let change = |span: &Span| {
            let at = (span.page * PAGE + u64::from(span.start) - offset) as usize;
            let bytes = data.slice(at..at + span.length as usize);
            if span.is_whole() { Change::Put(bytes) } else { Change::Patch { offset: span.start, bytes } }
        };
        self.commit_all((offset, data.len() as u64), fua, change).await
    }

    async fn zero(&self, offset: u64, length: u64, hole: bool, fua: bool) -> Result<(), Errno> {
        let whole = offset.div_ceil(PAGE)..(offset + length) / PAGE;
        if hole && whole.end.saturating_sub(whole.start) > FREE_PAGES {
            // Only what is stored there costs anything: not one commit, which nobody was promised.
            let (first, last) = (PageId::new(whole.start), PageId::new(whole.end - 1));
            patiently(|| self.volume.free_range(first, last)).await?;
            let edges = [(offset, whole.start * PAGE - offset), (whole.end * PAGE, offset + length - whole.end * PAGE)];
            for (offset, length) in edges.into_iter().filter(|(_, length)| *length > 0) {
                self.commit_all((offset, length), false, |span| zeros_in(span, hole)).await?;
            }
            return if fua { self.flush().await } else { Ok(()) };
        }
        self.commit_all((offset, length), fua, |span| zeros_in(span, hole)).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        patiently(|| self.store.flush()).await.map(drop)
    }
}

/// The change that makes a span read as zeros.
fn zeros_in(span: &Span, hole: bool) -> Change {
    match (span.is_whole(), hole) {
        (true, true) => Change::Free,
        (true, false) => Change::Put(Bytes::from_static(&ZEROS)),
        (false, _) => Change::Patch { offset: span.start, bytes: Bytes::from_static(&ZEROS[span.in_page()]) },
    }
}

/// Tries again while the store is busy. The pause blocks this connection's reply thread and nobody else's, and the
/// other requests of the connection get their turn after each.
async fn patiently<T, F: Future<Output = Result<T, Error>>>(mut attempt: impl FnMut() -> F) -> Result<T, Errno> {
    let mut started = None;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(e) if matches!(e.kind(), ErrorKind::Busy | ErrorKind::Conflict) => {
                if started.get_or_insert_with(Instant::now).elapsed() > BUSY_LIMIT {
                    return Err(errno(e));
                }
                std::thread::sleep(BUSY_PAUSE);
                futures_lite::future::yield_now().await;
            }
            Err(e) => return Err(errno(e)),
        }
    }
}

/// Failures so far, over all connections.
static FAILURES: AtomicU64 = AtomicU64::new(0);

/// The client's view of an error; what is lost on the way is logged, for the 1st, 2nd, 4th, 8th … failure only: clients
/// of a failed store try again and again, and must not fill a disk with log.
fn errno(error: Error) -> Errno {
    match error.kind() {
        ErrorKind::Full => Errno::NoSpace,
        ErrorKind::Invalid | ErrorKind::TooLarge | ErrorKind::NotFound => Errno::Invalid,
        _ => {
            let failures = FAILURES.fetch_add(1, Ordering::Relaxed) + 1;
            if failures.is_power_of_two() {
                warn!(error = %error, failures, "a request failed");
            }
            Errno::Io
        }
    }
}
