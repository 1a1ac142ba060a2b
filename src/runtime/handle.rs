//! The running store: its threads, and the handle through which requests reach them and are
//! answered.

use super::reply::Reply;
use super::report::RuntimeReport;
use super::shard_thread::is_shard_thread;
use super::shared::{BytesPermit, QueuedRequest, RuntimeShared, charged_bytes, closed};
use super::task_context::{TaskContext, TaskHandle, spawn_request};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{Lsn, ShardId, ShardMap};
use crate::engine::order::GlobalOrder;
use crate::engine::recovery::RecoveryReport;
use crate::engine::{Request, Token};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

/// The threads that drive the shards of one store. Dropping it ends them.
pub(crate) struct Runtime {
    handle: Arc<RuntimeHandle>,
    threads: Vec<JoinHandle<()>>,
}

/// The handle through which requests reach the shards of one store. It keeps no thread running:
/// once they have ended, requests are refused.
pub(crate) struct RuntimeHandle {
    shared: Arc<RuntimeShared>,
    shard_map: ShardMap,
    order: Arc<GlobalOrder>,
    /// The next shard in turn for a request that any shard can answer.
    next: AtomicUsize,
    /// What recovery found.
    pub(crate) recovery: RecoveryReport,
    /// How the store is driven.
    pub(crate) report: RuntimeReport,
    /// The most bytes that one commit may have.
    pub(crate) txn_bytes_max: u64,
}

impl Runtime {
    pub(super) fn new(
        shared: Arc<RuntimeShared>,
        threads: Vec<JoinHandle<()>>,
        shard_map: ShardMap,
        order: Arc<GlobalOrder>,
        recovery: RecoveryReport,
        report: RuntimeReport,
        txn_bytes_max: u64,
    ) -> Runtime {
        let next = AtomicUsize::new(0);
        let handle =
            RuntimeHandle { shared, shard_map, order, next, recovery, report, txn_bytes_max };
        Runtime { handle: Arc::new(handle), threads }
    }

    /// The report, to be completed while the store is being opened.
    pub(super) fn report_mut(&mut self) -> &mut RuntimeReport {
        &mut Arc::get_mut(&mut self.handle).expect("no handle has been given out").report
    }

    /// The handle for requests.
    pub(crate) fn handle(&self) -> &Arc<RuntimeHandle> {
        &self.handle
    }
}

impl RuntimeHandle {
    /// Which shard owns which pages.
    pub(crate) fn shard_map(&self) -> ShardMap {
        self.shard_map
    }

    /// The watermark: every commit at or below it is durable.
    pub(crate) fn watermark(&self) -> Lsn {
        self.order.watermark()
    }

    /// The shard that a request belongs to.
    ///
    /// The pages of a read belong to one shard; a commit goes to the shard of its first changed
    /// page, or of the first that it read; what any shard can answer goes to each in turn.
    /// [`Request::Stats`] and [`Request::Allocated`] concern each shard: this returns the first one
    /// for them.
    pub(crate) fn shard_for(&self, request: &Request) -> ShardId {
        let key = match request {
            Request::Read(keys) => {
                debug_assert!(
                    keys.iter().all(
                        |key| self.shard_map.shard_of(*key) == self.shard_map.shard_of(keys[0])
                    )
                );
                keys.first()
            }
            Request::Commit(commit) => commit
                .changes
                .first()
                .map(|(key, _)| key)
                .or(commit.reads.first().map(|(key, _)| key)),
            Request::Flush | Request::WaitDurable(_) => {
                let next = self.next.fetch_add(1, Ordering::Relaxed)
                    % usize::from(self.shard_map.shards_count());
                return ShardId::new(next as u16);
            }
            Request::Checkpoint | Request::Allocated(_) | Request::Stats | Request::Close => None,
        };
        key.map_or(ShardId::LEADER, |key| self.shard_map.shard_of(*key))
    }

    /// Submits a request to a shard. Once this returns, dropping the reply does not undo the
    /// request.
    pub(crate) async fn submit_to(&self, shard: ShardId, request: Request) -> Result<Reply> {
        let shared = &self.shared;
        let mailbox = &shared.mailboxes[usize::from(shard.get())];
        shared.check_open()?;
        // Bytes come first, so that a caller with a request permit waits for nothing else.
        let permit = BytesPermit::acquire(mailbox, charged_bytes(&request)).await?;
        shared.request_permits.acquire(0).await?;
        let Some((key, reply)) = shared.in_flight.register() else {
            shared.request_permits.release(1, 0);
            return Err(Error::new(
                ErrorKind::Busy,
                "too many requests are in flight; wait for some replies and try again",
            ));
        };
        let token = Token(key);
        let bytes = permit.into_charged();
        match mailbox.inbox.push(QueuedRequest { token, request, bytes }) {
            Ok(()) => mailbox.parking.unpark(),
            Err(_) => shared.finish(
                mailbox,
                token,
                bytes,
                Err(Error::new(ErrorKind::Busy, "the inbox is full; try again")),
            ),
        }
        if mailbox.inbox.is_closed() {
            shared.refuse_rest(mailbox);
        }
        Ok(Reply(reply))
    }

    /// Runs the future that `make` returns as a task on the shard's own thread, where its requests
    /// take no hop.
    pub(crate) fn spawn_on<T, F, G>(&self, shard: ShardId, make: G) -> Result<TaskHandle<T>>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
        G: FnOnce(TaskContext) -> F + Send + 'static,
    {
        let mailbox = &self.shared.mailboxes[usize::from(shard.get())];
        let (spawn, join) = spawn_request(make);
        if self.shared.is_forked() {
            self.shared.check_open()?;
        }
        if mailbox.inbox.is_closed() {
            return Err(closed());
        }
        if mailbox.spawn_queue.push(spawn).is_err() {
            return Err(Error::new(
                ErrorKind::Busy,
                "too many tasks are on their way to this shard; try again",
            ));
        }
        mailbox.parking.unpark();
        if mailbox.spawn_queue.is_closed() {
            mailbox.refuse_spawned();
        }
        Ok(join)
    }

    #[cfg(test)]
    pub(super) fn shared_for_tests(&self) -> &RuntimeShared {
        &self.shared
    }

    /// Waits until a shard has failed. Returns the reason.
    pub(crate) async fn failed(&self) -> Error {
        self.shared.failed().await
    }

    /// Closes the store cleanly. Later requests are refused at once, unless the shards were too
    /// busy to take the `Close`.
    pub(crate) async fn close(&self) -> Result<()> {
        let reply = self.submit_to(ShardId::LEADER, Request::Close).await?;
        self.shared.begin_closing();
        let result = reply.await.map(drop);
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy) {
            self.shared.cancel_closing();
        }
        result
    }

    /// Waits until the shards have released their files, which they do after `Close`.
    pub(crate) async fn ended(&self) {
        if self.shared.is_forked() {
            return;
        }
        self.shared.ended().await;
    }
}

impl Drop for Runtime {
    /// Ends the threads without a clean close, as a crash would, but waits for the operations at
    /// the device: the store can be opened again at once.
    ///
    /// On a shard's thread, of any store, this waits for no thread: the calling one may lead a
    /// flush that the others wait for, or they may be dropping the last handle of its own store.
    /// The threads then end by themselves, and the next opening waits for their locks.
    ///
    /// A forked child has no threads to end, and must leave alone what belongs to its parent.
    fn drop(&mut self) {
        let shared = &self.handle.shared;
        if shared.is_forked() {
            return std::mem::forget(std::mem::take(&mut self.threads));
        }
        shared.abandon();
        if is_shard_thread() {
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
