//! Giving up what a store's threads are doing: opening it, or driving it after its last handle is gone.
//!
//! Invariants
//! 1. A token that was cancelled stays so.
//! 2. After that no operation is begun: at most those that are at the device already are waited for. What consists of many
//!    steps, such as an allocation, ends after the present one, with an error.
//!
//! It does *not* wake anybody: whoever cancels wakes the threads that wait.

use crate::base::error::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether to go on. Clones are the same token.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// From now on no operation is begun.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// # Errors
    /// `Closed` once it was cancelled.
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(
                ErrorKind::Closed,
                "opening the store was given up; it is as after a crash: open it again",
            )),
            false => Ok(()),
        }
    }
}
