//! The bounded lock-free inbox of a shard, and the wake-up of its thread.
//!
//! Invariants
//! 1. No wake-up is lost: the thread says that it parks, then looks again; a sender pushes, then looks whether it
//!    parks. The fences between make one of the two see the other.
//! 2. A sender makes a system call only if the thread is parked.
//! 3. After `close` nothing is left in it: whoever pushes late takes it out again.

use crate::shard::{Request, Token};
use crossbeam_queue::ArrayQueue;
use parking::Unparker;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// The inbox.
pub(super) struct Inbox {
    queue: ArrayQueue<(Token, Request)>,
    parked: AtomicBool,
    closed: AtomicBool,
    unparker: OnceLock<Unparker>,
}

impl Inbox {
    pub(super) fn new(capacity: usize) -> Self {
        Inbox {
            queue: ArrayQueue::new(capacity),
            parked: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            unparker: OnceLock::new(),
        }
    }

    /// How the thread is woken.
    pub(super) fn set_unparker(&self, unparker: Unparker) {
        let _ = self.unparker.set(unparker);
        // With the one in `wake`: either that finds the unparker, or the thread finds why it was to be woken.
        fence(Ordering::SeqCst);
    }

    /// Wakes the thread for another reason than a request, which the caller has made visible before.
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        if let Some(unparker) = self.unparker.get() {
            unparker.unpark();
        }
    }

    /// Hands a request to the shard; gives it back if the inbox is full.
    pub(super) fn push(&self, token: Token, request: Request) -> Result<(), Request> {
        self.queue.push((token, request)).map_err(|(_, request)| request)?;
        fence(Ordering::SeqCst);
        if self.parked.load(Ordering::Relaxed)
            && self.parked.swap(false, Ordering::AcqRel)
            && let Some(unparker) = self.unparker.get()
        {
            unparker.unpark();
        }
        Ok(())
    }

    pub(super) fn pop(&self) -> Option<(Token, Request)> {
        self.queue.pop()
    }

    /// The thread is about to wait; false: something has come, it must not.
    pub(super) fn park(&self) -> bool {
        self.parked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.queue.is_empty() {
            return true;
        }
        self.awake();
        false
    }

    /// The thread is awake.
    pub(super) fn awake(&self) {
        self.parked.store(false, Ordering::Release);
    }

    /// Nothing will be taken out any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}
