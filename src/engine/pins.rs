//! Counts pinned pages against the handle that holds them.
//!
//! Invariants
//! 1. Each pin taken is given back exactly once: with its page, or with the rest of its share.
//! 2. A clone of a page counts as a page, but is never refused.

use crate::base::error::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The pins of one handle.
#[derive(Debug)]
pub(crate) struct PinQuota {
    held: AtomicUsize,
    most: usize,
}

impl PinQuota {
    pub(crate) fn new(most: usize) -> Arc<PinQuota> {
        Arc::new(PinQuota { held: AtomicUsize::new(0), most })
    }

    /// A quota of the same size, for another handle.
    pub(crate) fn another(&self) -> Arc<PinQuota> {
        PinQuota::new(self.most)
    }

    /// A share for `count` pages.
    ///
    /// # Errors
    /// `Busy` if too many pages are held.
    pub(crate) fn take(this: &Arc<PinQuota>, count: usize) -> Result<PinReservation> {
        this.hold(count)?;
        Ok(PinReservation { pins: this.clone(), count })
    }

    /// The pin of one page, without a share to take it from.
    ///
    /// # Errors
    /// `Busy` if too many pages are held.
    pub(crate) fn take_one(this: &Arc<PinQuota>) -> Result<Pin> {
        this.hold(1)?;
        Ok(Pin(this.clone()))
    }

    fn hold(&self, count: usize) -> Result<()> {
        // Counted only if it fits: a refused share must not get in the way of others even for a
        // moment.
        let fits = |held: usize| held.checked_add(count).filter(|all| *all <= self.most);
        let Err(held) = self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Busy,
            format_args!(
                "{held} pages are pinned through this handle, and {count} more would be over the \
                 most, {}: drop some pages, read fewer at a time, or give the store more memory",
                self.most
            ),
        ))
    }
}

/// A share of pins for pages that have not arrived yet.
#[derive(Debug)]
pub(crate) struct PinReservation {
    pins: Arc<PinQuota>,
    count: usize,
}

impl PinReservation {
    pub(super) fn one(&mut self) -> Option<Pin> {
        self.count = self.count.checked_sub(1)?;
        Some(Pin(self.pins.clone()))
    }
}

impl Drop for PinReservation {
    fn drop(&mut self) {
        self.pins.held.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// One pinned page.
#[derive(Debug)]
pub(crate) struct Pin(Arc<PinQuota>);

impl Clone for Pin {
    fn clone(&self) -> Self {
        self.0.held.fetch_add(1, Ordering::Relaxed);
        Pin(self.0.clone())
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails, a caller that requests more than it can have makes others, which request one
    /// page, get `Busy`.
    #[test]
    fn what_is_refused_is_in_nobodys_way() {
        let (pins, done) = (PinQuota::new(100), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            for count in [101, 1000, usize::MAX] {
                let (pins, done) = (&pins, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        assert!(PinQuota::take(pins, count).is_err(), "{count} of 100");
                    }
                });
            }
            let refused = (0..200_000).filter(|_| PinQuota::take_one(&pins).is_err()).count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(refused, 0, "nothing was held");
        });
        assert_eq!(pins.held.load(Ordering::Relaxed), 0);
    }
}
