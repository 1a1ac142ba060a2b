//! Checks that a request may begin: it belongs to this shard, is within its limits, and the store
//! is open.

use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{BLOCK, ShardId};
use crate::engine::{Change, Commit, Request, Shard};

/// What a commit counts against `txn_bytes_max`: the memory that its pages and map leaves may need
/// at once.
fn commit_bytes(commit: &Commit) -> u64 {
    let change = |(_, change): &(_, Change)| match change {
        Change::Put(_) | Change::Patch { .. } => BLOCK as u64,
        Change::Free => FREE_BYTES,
    };
    commit.changes.iter().map(change).sum()
}

/// A freed page needs no memory but, at worst, a map leaf for every eight: pages are freed in runs.
pub(in crate::engine) const FREE_BYTES: u64 = 512;

fn check_commit(commit: &Commit, bytes_max: u64) -> Result<()> {
    for (key, change) in &commit.changes {
        match change {
            Change::Put(bytes) if bytes.len() != BLOCK => {
                let len = bytes.len();
                return Err(Error::invalid(format_args!(
                    "page {key:?}: {len} bytes given, a page has {BLOCK}"
                )));
            }
            Change::Patch { offset, bytes }
                if bytes.is_empty() || *offset as usize + bytes.len() > BLOCK =>
            {
                return Err(Error::invalid(format_args!(
                    "page {key:?}: a patch of {} bytes at {offset} does not fit: it needs 1 to \
                     {BLOCK} bytes in the page",
                    bytes.len()
                )));
            }
            _ => {}
        }
        if usize::from(key.volume.get()) >= crate::format::root::VOLUMES_MAX {
            return Err(Error::invalid(format_args!("page {key:?}: volume numbers end at 247")));
        }
    }
    let bytes = commit_bytes(commit);
    let reads_max = bytes_max / 64;
    if bytes > bytes_max || commit.reads.len() as u64 > reads_max {
        return Err(Error::new(
            ErrorKind::TooLarge,
            format_args!(
                "a commit of {bytes} bytes and {} reads: at most {bytes_max} bytes \
                 (txn_bytes_max) and {reads_max} reads; split it",
                commit.reads.len()
            ),
        ));
    }
    Ok(())
}

impl Shard {
    pub(super) fn admit_request(&self, request: &Request) -> Result<()> {
        if self.life.closed || self.life.closing.is_some() {
            return Err(Error::new(ErrorKind::Closed, "the store is closed; open it again"));
        }
        match request {
            Request::Read(keys)
                if keys.iter().any(|key| self.ctx.shard_map.shard_of(*key) != self.ctx.id) =>
            {
                Err(Error::internal(format_args!(
                    "a read of pages of another shard came to shard {}",
                    self.ctx.id.get()
                )))
            }
            Request::Checkpoint | Request::Close if self.ctx.id != ShardId::LEADER => {
                Err(Error::internal(format_args!(
                    "only shard 0 takes checkpoints and closes, not {}",
                    self.ctx.id.get()
                )))
            }
            Request::Read(keys) if keys.len() > self.ctx.limits.vectored_pages_max => {
                Err(Error::invalid(format_args!(
                    "{} pages in one read: at most {} (vectored_pages_max)",
                    keys.len(),
                    self.ctx.limits.vectored_pages_max
                )))
            }
            Request::Commit(commit) => {
                check_commit(commit, self.ctx.limits.txn_bytes_max)?;
                self.ctx.failed.clone().map_or(Ok(()), Err)
            }
            Request::WaitDurable(lsn) if *lsn >= self.ctx.order.next() => {
                Err(Error::invalid(format_args!(
                    "LSN {lsn} has not been given to any commit yet; the next is {}",
                    self.ctx.order.next()
                )))
            }
            Request::WaitDurable(lsn) if *lsn <= self.ctx.order.watermark() => Ok(()),
            Request::Flush | Request::WaitDurable(_) | Request::Checkpoint => {
                self.ctx.failed.clone().map_or(Ok(()), Err)
            }
            Request::Read(_) | Request::Allocated(_) | Request::Stats | Request::Close => Ok(()),
        }
    }
}
