//! A store that is being opened on a thread of its own, and how that is given up.
//!
//! Invariants
//! 1. Given up, at any moment, opening begins nothing more: no operation, no thread, no store. It waits for what is at the
//!    device, and for nothing else.
//! 2. When its [`Guard`] has gone, so have the threads and the locks, except where a shard's thread dropped it (which
//!    waits for nobody).
//!
//! It does *not* undo what was done: that is as after a crash, and the next opening goes on from there.

use super::seat::drives_a_shard;
use super::shared::Shared;
use crate::io::{Cancel, Opener};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What the one who waits and the coordinator share.
#[derive(Default)]
pub(super) struct Opening {
    pub(super) cancel: Cancel,
    opener: Opener,
    /// The threads that are being started now.
    launched: Mutex<Option<Arc<Shared>>>,
}

impl Opening {
    fn give_up(&self) {
        self.cancel.cancel();
        if let Some(shared) = &*self.launched.lock().unwrap_or_else(PoisonError::into_inner) {
            shared.abandon();
        }
    }

    /// These threads are being started: they end if opening is, or was, given up.
    pub(super) fn launch(&self, shared: &Arc<Shared>) {
        *self.launched.lock().unwrap_or_else(PoisonError::into_inner) = Some(shared.clone());
        // After they can be found, so that either this sees that it was given up, or the one who gives up sees them.
        if self.cancel.is_cancelled() {
            shared.abandon();
        }
    }

    /// There is a store now, or none of these threads: giving up has nobody to tell.
    pub(super) fn landed(&self) {
        *self.launched.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Gives opening up when it is dropped unfinished, and waits for the coordinator's end.
pub(super) struct Guard {
    opening: Arc<Opening>,
    /// Taken only in `drop`.
    coordinator: Option<JoinHandle<()>>,
    finished: bool,
}

impl Guard {
    pub(super) fn new(opening: Arc<Opening>, coordinator: JoinHandle<()>) -> Guard {
        Guard { opening, coordinator: Some(coordinator), finished: false }
    }

    /// The coordinator's result was taken: a store that is open now stays so.
    pub(super) fn finish(&mut self) {
        self.finished = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.opening.opener.is_here() {
            // In a forked child nobody opens anything.
            return std::mem::forget(self.coordinator.take());
        }
        if !self.finished {
            self.opening.give_up();
        }
        if let Some(coordinator) = self.coordinator.take().filter(|_| !drives_a_shard()) {
            let _ = coordinator.join();
        }
    }
}
