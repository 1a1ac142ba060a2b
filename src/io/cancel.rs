//! A token that cancels the work of a store's threads: opening it, or running it after its last
//! handle was dropped.
//!
//! Invariants
//! 1. A cancelled token stays cancelled.
//! 2. After cancellation no operation begins; only those that are at the device already are waited
//!    for. Work in many steps, such as an allocation, ends with an error after the current step.
//!
//! It does *not* wake a thread: the caller that cancels does.

use crate::base::error::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A cancellation token. Clones share its state.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Cancels the work: no further operation begins.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Fails once the token was cancelled.
    ///
    /// # Errors
    /// `Closed`.
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(
                ErrorKind::Closed,
                "opening the store was cancelled, which left it as a crash would: open it again",
            )),
            false => Ok(()),
        }
    }
}
