//! The handles that callers hold: the store, its volumes, and transactions.
//!
//! Invariants
//! 1. A handle holds no state of pages: everything is asked of the shard. So handles are cheap to clone, and any
//!    number of them, on any thread and runtime, see the same store.
//! 2. A future that is dropped before its first poll did nothing; one dropped later undoes nothing that was
//!    submitted.
//! 3. Volumes are named in the catalog (volume 0) by ordinary transactions: creation is as atomic and durable as any
//!    commit.

mod on_shard;
mod txn;
mod volume;

pub use on_shard::ShardHandle;
pub use txn::{PageView, Txn};
pub use volume::{Durability, Volume};

use crate::disk::portable::DiskReport;
use crate::error::{Error, ErrorKind, Result};
use crate::format::catalog;
use crate::format::root::VOLUMES_MAX;
use crate::metrics::ShardStats;
use crate::options::Options;
use crate::recovery::RecoveryReport;
use crate::runtime::{Runtime, RuntimeReport};
use crate::shard::{Change, Commit, PageRef, Request, Response};
use crate::types::{BLOCK, Lsn, PageId, PageKey, VolumeId};
use bytes::Bytes;
use smallvec::SmallVec;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Pages of one read request; larger reads are split.
const READ_PAGES: usize = 64;

/// An open store. Clones are handles to the same one; it ends without a clean close (as in a crash: nothing
/// acknowledged as durable is lost) when the last handle is dropped, and cleanly by [`close`](Store::close).
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    runtime: Runtime,
    read_pages: usize,
    closing: Mutex<bool>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("recovery", &self.inner.runtime.recovery).finish()
    }
}

impl Store {
    /// Opens the store in directory `dir`, or creates one there if it holds none. After a crash this recovers: on
    /// return the store holds exactly the commits up to [`RecoveryReport::cut`], all acknowledged ones among them.
    ///
    /// # Errors
    /// `InUse`: another process, or another handle of this one, has it open. `Unsupported`: another format version.
    /// `Corrupt`: damage that recovery must not pass over; nothing was changed. `Invalid`: an option; the message
    /// says which. `Io`, `Full`: the directory can't be written.
    pub async fn open(dir: impl AsRef<Path>, options: Options) -> Result<Store> {
        let read_pages = options.vectored_pages_max.min(READ_PAGES);
        let runtime = Runtime::start(dir.as_ref().to_path_buf(), options).await?;
        Ok(Store { inner: Arc::new(Inner { runtime, read_pages, closing: Mutex::new(false) }) })
    }

    /// What opening found and did.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.inner.runtime.recovery
    }

    /// The most that one commit may count: 4 KiB for each page written or patched, 512 bytes for each page freed.
    /// It is `Options::txn_bytes_max`, or less where the memory or the log segments ask for it.
    pub fn txn_bytes_max(&self) -> u64 {
        self.inner.runtime.txn_bytes_max
    }

    /// What the machine really gives: driver and why not another, direct I/O, file system, flush method.
    pub fn disk_report(&self) -> &DiskReport {
        &self.inner.runtime.report.disk
    }

    /// How the store is driven: driver, shards and cores, and what the disk is like.
    pub fn report(&self) -> &RuntimeReport {
        &self.inner.runtime.report
    }

    pub(crate) async fn ask(&self, request: Request) -> Result<Response> {
        self.inner.runtime.submit(request).await?.await
    }

    pub(crate) async fn commit(&self, commit: Commit) -> Result<Lsn> {
        committed(self.ask(Request::Commit(commit)).await?)
    }

    pub(crate) async fn read(&self, keys: &[PageKey]) -> Result<Vec<PageRef>> {
        let most = self.inner.read_pages;
        let deal = self.inner.runtime.deal();
        if keys.len() <= most && keys.iter().all(|key| deal.shard_of(*key) == deal.shard_of(keys[0])) {
            return Ok(pages(self.ask(Request::Read(keys.into())).await?)?.into_vec());
        }
        // Each shard reads what is its own, all at once.
        let mut by_shard: Vec<Vec<usize>> = deal.shards().map(|_| Vec::new()).collect();
        for (i, key) in keys.iter().enumerate() {
            by_shard[deal.shard_of(*key).index()].push(i);
        }
        let mut asked = Vec::new();
        for part in by_shard.iter().flat_map(|part| part.chunks(most)) {
            let request = Request::Read(part.iter().map(|i| keys[*i]).collect());
            asked.push((part, self.inner.runtime.submit(request).await?));
        }
        let mut found: Vec<Option<PageRef>> = keys.iter().map(|_| None).collect();
        for (part, reply) in asked {
            for (i, page) in part.iter().zip(pages(reply.await?)?) {
                found[*i] = Some(page);
            }
        }
        found.into_iter().collect::<Option<_>>().ok_or_else(|| Error::corrupt("a read gave fewer pages than asked for"))
    }

    /// Creates volume `name` of `bytes` bytes; durable on return. All its pages read as zeros.
    ///
    /// # Errors
    /// `Invalid`: the name is taken, empty or longer than 255 bytes, the size is no multiple of 4,096, or there are
    /// 247 volumes already. `Full`: no space.
    pub async fn create_volume(&self, name: &str, bytes: u64) -> Result<Volume> {
        if name.is_empty() || name.len() > catalog::NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(Error::invalid(format_args!(
                "volume name {name:?}: it must have 1 to 255 bytes and no control characters"
            )));
        }
        if bytes == 0 || !bytes.is_multiple_of(BLOCK as u64) {
            return Err(Error::invalid(format_args!(
                "a volume of {bytes} bytes: it must be a multiple of {BLOCK}, not 0"
            )));
        }
        loop {
            match self.try_create(name, bytes).await {
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                other => return other,
            }
        }
    }

    async fn try_create(&self, name: &str, bytes: u64) -> Result<Volume> {
        let keys: Vec<PageKey> = catalog_keys().collect();
        let pages = self.read(&keys).await?;
        let mut free = None;
        for (key, page) in keys.iter().zip(&pages) {
            if page.is_absent() {
                free = free.or(Some(*key));
            } else if decode(*key, page)?.0 == name {
                return Err(Error::invalid(format_args!("a volume named {name} exists already")));
            }
        }
        let key = free.ok_or_else(|| Error::invalid("there are 247 volumes, the most that a store can have"))?;
        // Numbers are given in order, so two creations at a time, of the same name or not, meet at the first free page.
        let reads = keys.iter().zip(&pages).take_while(|(k, _)| **k <= key).map(|(k, page)| (*k, page.lsn())).collect();
        let record = Bytes::from(catalog::encode(name, bytes));
        self.commit(Commit { reads, changes: vec![(key, Change::Put(record))], durable: true }).await?;
        Ok(Volume::new(self.clone(), VolumeId::new(key.page.get() as u8), name, bytes))
    }

    /// The volume `name`, if there is one.
    pub async fn volume(&self, name: &str) -> Result<Option<Volume>> {
        Ok(self.volumes().await?.into_iter().find(|volume| volume.name() == name))
    }

    /// All volumes, by number.
    pub async fn volumes(&self) -> Result<Vec<Volume>> {
        let keys: Vec<PageKey> = catalog_keys().collect();
        let pages = self.read(&keys).await?;
        let mut volumes = Vec::new();
        for (key, page) in keys.into_iter().zip(pages).filter(|(_, page)| !page.is_absent()) {
            let (name, bytes) = decode(key, &page)?;
            volumes.push(Volume::new(self.clone(), VolumeId::new(key.page.get() as u8), &name, bytes));
        }
        Ok(volumes)
    }

    /// Begins a transaction.
    pub fn begin(&self) -> Txn {
        Txn::new(self.clone())
    }

    /// Returns when everything acknowledged before the call, on any handle, is durable; up to which LSN that is.
    ///
    /// # Errors
    /// `Closed`: the store is closed or has stopped after a failed write; what was buffered may be lost.
    pub async fn flush(&self) -> Result<Lsn> {
        match self.ask(Request::Flush).await? {
            Response::Flushed(lsn) => Ok(lsn),
            other => Err(unexpected(&other)),
        }
    }

    /// Returns when the commit `lsn`, and all before it, are durable.
    ///
    /// # Errors
    /// `Invalid`: no commit has that LSN yet. `Closed` as for [`flush`](Self::flush).
    pub async fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        self.ask(Request::WaitDurable(lsn)).await.map(drop)
    }

    /// Writes all dirty pages and a new page map: a crash afterwards has no log to replay up to the LSN returned.
    pub async fn checkpoint(&self) -> Result<Lsn> {
        match self.ask(Request::Checkpoint).await? {
            Response::Checkpointed(lsn) => Ok(lsn),
            other => Err(unexpected(&other)),
        }
    }

    /// Counters since the store was opened, of all shards together.
    pub async fn stats(&self) -> Result<ShardStats> {
        let mut total = ShardStats::default();
        for stats in self.shard_stats().await? {
            total.add(&stats);
        }
        Ok(total)
    }

    /// Counters since the store was opened, of each shard.
    pub async fn shard_stats(&self) -> Result<Vec<ShardStats>> {
        let mut all = Vec::new();
        for shard in self.inner.runtime.deal().shards() {
            match self.inner.runtime.submit_to(shard, Request::Stats).await?.await? {
                Response::Stats(stats) => all.push(*stats),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(all)
    }

    /// Finishes what is under way, makes everything durable and records the end of the log, so that the next open
    /// has nothing to recover. All other handles get `Closed` from then on.
    ///
    /// # Errors
    /// `Closed`: it is closed already, or has stopped after a failed write; then nothing more could be done.
    pub async fn close(&self) -> Result<()> {
        let first = !std::mem::replace(&mut *self.inner.closing.lock().unwrap_or_else(PoisonError::into_inner), true);
        if !first {
            return Err(Error::new(ErrorKind::Closed, "the store is closed; open it again"));
        }
        let result = self.ask(Request::Close).await.map(drop);
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy) {
            // It did not get through: the store is open, and the next call may close it.
            *self.inner.closing.lock().unwrap_or_else(PoisonError::into_inner) = false;
            return result;
        }
        self.inner.runtime.ended().await;
        result
    }
}

fn catalog_keys() -> impl Iterator<Item = PageKey> {
    (1..VOLUMES_MAX as u64).map(|n| PageKey::new(VolumeId::CATALOG, PageId::new(n)))
}

fn decode(key: PageKey, page: &[u8]) -> Result<(String, u64)> {
    catalog::decode(page).map_err(|what| Error::corrupt(format_args!("catalog page {:?} {what}", key.page)))
}

fn committed(response: Response) -> Result<Lsn> {
    match response {
        Response::Committed(lsn) => Ok(lsn),
        other => Err(unexpected(&other)),
    }
}

fn pages(response: Response) -> Result<SmallVec<[PageRef; 1]>> {
    match response {
        Response::Pages(pages) => Ok(pages),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> Error {
    Error::new(ErrorKind::Closed, format_args!("the shard gave another answer than was asked for: {response:?}"))
}
