//! A store that is being opened on a thread of its own, the coordinator, and how opening is
//! cancelled.
//!
//! Invariants
//! 1. Once it is cancelled, opening begins nothing more: no operation, no thread, no store. It
//!    waits for its operations at the device, and for nothing else.
//! 2. When the [`OpenGuard`] has been dropped, the threads and the locks are gone too, except if a
//!    shard's thread dropped it, which waits for no other thread.
//!
//! It does *not* undo what was done: the store is as after a crash, and the next opening continues
//! from there.

use super::shard_thread::is_shard_thread;
use super::shared::RuntimeShared;
use crate::io::{Cancel, Opener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// State that the waiting caller and the coordinator share.
#[derive(Default)]
pub(super) struct PendingOpen {
    pub(super) cancel: Cancel,
    opener: Opener,
    /// The shared state of the threads that are being started.
    starting: Mutex<Option<Arc<RuntimeShared>>>,
}

impl PendingOpen {
    fn give_up(&self) {
        self.cancel.cancel();
        if let Some(shared) = &*self.starting.lock().unwrap_or_else(PoisonError::into_inner) {
            shared.abandon();
        }
    }

    /// Registers the threads that are being started: they end if opening is, or was, cancelled.
    pub(super) fn threads_starting(&self, shared: &Arc<RuntimeShared>) {
        *self.starting.lock().unwrap_or_else(PoisonError::into_inner) = Some(shared.clone());
        // Checked after they are stored, so that either this sees that opening was cancelled, or
        // `give_up` sees them.
        if self.cancel.is_cancelled() {
            shared.abandon();
        }
    }

    /// Unregisters the threads, which run or have ended: cancelling must no longer end them.
    pub(super) fn threads_settled(&self) {
        *self.starting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Cancels opening if it is dropped unfinished, and waits for the coordinator to end.
pub(super) struct OpenGuard {
    opening: Arc<PendingOpen>,
    /// `None` only in `drop`.
    coordinator: Option<JoinHandle<()>>,
    finished: bool,
}

impl OpenGuard {
    pub(super) fn new(opening: Arc<PendingOpen>, coordinator: JoinHandle<()>) -> OpenGuard {
        OpenGuard { opening, coordinator: Some(coordinator), finished: false }
    }

    /// Called when the coordinator's result was taken: a store that is now open stays open.
    pub(super) fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        if !self.opening.opener.is_here() {
            // A forked child has no coordinator.
            return std::mem::forget(self.coordinator.take());
        }
        if !self.finished {
            self.opening.give_up();
        }
        if let Some(coordinator) = self.coordinator.take().filter(|_| !is_shard_thread()) {
            let _ = coordinator.join();
        }
    }
}
