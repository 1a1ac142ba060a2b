//! Where a handle is used from: the one difference between handles on any thread and those in a
//! task on a shard. Stores, volumes, transactions and scans are written once, over [`Access`], so
//! both kinds of handle can do the same.
//!
//! ```text
//!   Store, Volume, Txn, Scan <A>  --submit--> AnyThread: inbox of the shard -----------> shard
//!                                 --submit--> OnShard:   its own shard, without a hop -> shard
//!                                                        others: as AnyThread
//!   a call returns a future, for every runtime; `blocking::Wait` waits for it on a plain thread
//! ```
//! Invariants
//! 1. An access decides how a request gets to a shard, and nothing else: no error, limit or answer
//!    depends on it, except that requests of tasks are refused where those of other threads wait
//!    for a permit.
//! 2. Only [`AnyThread`] keeps a store open: a task on a shard may not keep its own shard alive.

use super::freeing::Handles;
use crate::base::ShardId;
use crate::base::error::Result;
use crate::engine::{Request, Response};
use crate::runtime::{LocalReply, Reply, Runtime, RuntimeHandle, TaskContext};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Where a store is used from: [`AnyThread`] or [`OnShard`]. Both offer the same calls with the
/// same answers.
///
/// The trait is sealed. Functions that work with either take it as a parameter:
///
/// ```
/// use corepage::{Access, PageId, Result, Volume};
///
/// async fn first_byte<A: Access>(disk: &Volume<A>, page: PageId) -> Result<u8> {
///     Ok(disk.read(page).await?[0])
/// }
/// # use corepage::{Options, Store, blocking::Wait};
/// # fn main() -> Result<()> {
/// # let dir = tempfile::tempdir().expect("a directory for the example");
/// # let store = Store::open(dir.path(), Options::default()).wait()?;
/// # let disk = store.create_volume("disk", 64 << 20).wait()?;
/// let page = PageId::new(7);
/// disk.write(page, vec![1; 4096]).wait()?;
/// assert_eq!(first_byte(&disk, page).wait()?, 1);
/// let (shard, its) = (store.shard_of(&disk, page), disk.clone());
/// let task = store.on_shard(shard, move |handle| async move {
///     first_byte(&its.on(&handle)?, page).await // without a hop
/// })?;
/// assert_eq!(task.wait()??, 1);
/// # store.close().wait() }
/// ```
#[expect(private_bounds, reason = "sealed")]
pub trait Access: Submit {}

/// How a request is submitted, and its reply awaited: all that differs between handles.
pub(crate) trait Submit: Clone + 'static {
    /// The pending reply. Dropping it does not undo the request.
    type Reply: Future<Output = Result<Response>> + Unpin + From<Reply>;

    /// Submits a request to `shard`, or to the one that it belongs to, if that takes no hop; else
    /// returns it with the shard that it has to go to. This is not a future, since it is on the
    /// path of every cached read.
    fn submit(
        &self,
        runtime: &RuntimeHandle,
        shard: Option<ShardId>,
        request: Request,
    ) -> std::result::Result<Self::Reply, (ShardId, Request)>;

    /// The shard on whose thread it is used, if any.
    fn shard(&self) -> Option<ShardId>;

    /// The same store from any thread; it keeps the store open only if this access does.
    fn any_thread(&self) -> AnyThread;
}

/// A store used from any thread and any runtime.
#[derive(Clone)]
pub struct AnyThread(#[expect(dead_code, reason = "held")] Option<Arc<Opened>>);

/// Keeps a store open. Its threads are dropped last.
struct Opened {
    _handles: Handles,
    _runtime: Runtime,
}

impl AnyThread {
    /// For the handles of callers: keeps the store open.
    pub(super) fn keeps_open(runtime: Runtime, handles: Handles) -> AnyThread {
        AnyThread(Some(Arc::new(Opened { _handles: handles, _runtime: runtime })))
    }

    /// For the library's own work: does not keep the store open, which ends with a caller's last
    /// handle.
    pub(super) fn of_engine() -> AnyThread {
        AnyThread(None)
    }
}

impl Access for AnyThread {}

impl Submit for AnyThread {
    type Reply = Reply;

    #[inline]
    fn submit(
        &self,
        runtime: &RuntimeHandle,
        shard: Option<ShardId>,
        request: Request,
    ) -> std::result::Result<Reply, (ShardId, Request)> {
        Err((shard.unwrap_or_else(|| runtime.shard_for(&request)), request))
    }

    fn shard(&self) -> Option<ShardId> {
        None
    }

    fn any_thread(&self) -> AnyThread {
        self.clone()
    }
}

/// A store used by a task on the thread of one of its shards: requests to that shard take no hop,
/// no lock and no copy. The handle stays on that thread, and does not keep the store open.
#[derive(Clone)]
pub struct OnShard(TaskContext);

impl OnShard {
    pub(super) fn new(tasks: TaskContext) -> OnShard {
        OnShard(tasks)
    }

    pub(super) fn tasks(&self) -> &TaskContext {
        &self.0
    }
}

impl Access for OnShard {}

impl Submit for OnShard {
    type Reply = ShardReply;

    #[inline]
    fn submit(
        &self,
        runtime: &RuntimeHandle,
        shard: Option<ShardId>,
        request: Request,
    ) -> std::result::Result<ShardReply, (ShardId, Request)> {
        let shard = match (shard, &request) {
            (Some(shard), _) => shard,
            // Any shard can lead a commit, whichever pages it changes.
            (None, Request::Commit(_) | Request::Flush | Request::WaitDurable(_)) => self.0.shard(),
            (None, request) => runtime.shard_for(request),
        };
        if shard == self.0.shard() {
            Ok(ShardReply::Here(self.0.call(request)))
        } else {
            Err((shard, request))
        }
    }

    fn shard(&self) -> Option<ShardId> {
        Some(self.0.shard())
    }

    fn any_thread(&self) -> AnyThread {
        AnyThread::of_engine()
    }
}

/// The reply to a request of a task on a shard.
pub(crate) enum ShardReply {
    Here(LocalReply),
    Elsewhere(Reply),
}

impl From<Reply> for ShardReply {
    fn from(reply: Reply) -> ShardReply {
        ShardReply::Elsewhere(reply)
    }
}

impl Future for ShardReply {
    type Output = Result<Response>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        match &mut *self {
            ShardReply::Here(reply) => Pin::new(reply).poll(cx),
            ShardReply::Elsewhere(reply) => Pin::new(reply).poll(cx),
        }
    }
}
