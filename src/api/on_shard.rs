//! Work on a shard's own thread: tasks, and the handle through which they use the store.
//!
//! Invariants
//! 1. A handle lives only on its shard's thread; what a task returns must be able to leave it.
//! 2. The handle of a task offers what every handle offers. Pages of its shard take no hop; pages
//!    of other shards take one each way ([`Store::shard_of`] tells which shard owns a page).

use super::{Access, OnShard, Store, Volume};
use crate::base::error::{Error, Result};
use crate::base::{PageId, ShardId};
use std::future::Future;
use std::sync::Arc;

/// The store for a task that runs on the thread of a shard: it offers all that a [`Store`] does,
/// and requests to that shard take no hop. [`Volume::on`] returns a volume for it.
///
/// It does not leave its thread, and does not keep the store open.
pub type ShardHandle = Store<OnShard>;

impl Store<OnShard> {
    /// The number of the shard on whose thread this handle lives.
    pub fn shard(&self) -> usize {
        self.access.tasks().shard().index()
    }

    /// Runs `future` as a task of its own on this thread. The task continues if the result is
    /// dropped.
    ///
    /// # Errors
    /// `Closed`: the store is, or was closed before the task ended. `Busy`: the shard has 65,536
    /// tasks.
    ///
    /// # Panics
    /// The result panics if the task did.
    pub fn spawn<T, F>(&self, future: F) -> impl Future<Output = Result<T>> + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.access.tasks().spawn(future)
    }
}

impl<A: Access> Store<A> {
    /// The number of shards. They are numbered from 0.
    pub fn shards_count(&self) -> usize {
        self.inner.runtime.shard_map().shards_count().into()
    }

    /// The number of the shard that a page belongs to, while the store is open.
    pub fn shard_of<V: Access>(&self, volume: &Volume<V>, page: PageId) -> usize {
        self.inner.runtime.shard_map().shard_of(volume.key(page)).index()
    }

    /// Runs the future that `make` returns as a task on the thread of shard `shard`. The task
    /// continues if the result is dropped. It must not block its thread: the shard could do nothing
    /// in the meantime.
    ///
    /// # Errors
    /// `Invalid`: there is no such shard. `Busy`: too many tasks are on their way there. `Closed`:
    /// the store is, or was closed before the task ended.
    ///
    /// # Panics
    /// The result panics if the task did.
    pub fn on_shard<T, F, G>(
        &self,
        shard: usize,
        make: G,
    ) -> Result<impl Future<Output = Result<T>> + Send + use<A, T, F, G>>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
        G: FnOnce(ShardHandle) -> F + Send + 'static,
    {
        if shard >= self.shards_count() {
            let count = self.shards_count();
            return Err(Error::invalid(format_args!(
                "there is no shard {shard}: the store has {count}, numbered from 0"
            )));
        }
        let (pins, inner) = (self.pins.another(), Arc::clone(&self.inner));
        self.inner.runtime.spawn_on(ShardId::new(shard as u16), |tasks| {
            make(Store { access: OnShard::new(tasks), inner, pins })
        })
    }
}
