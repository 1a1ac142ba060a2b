//! Pauses between attempts of a call that the kernel refuses for now (`EAGAIN`, `EINTR`).
//!
//! Invariants
//! 1. Retries slow down: each pause in a row is at least as long as the one before.
//! 2. A device that refuses for [`REFUSALS_MAX`] pauses in a row, half a minute, counts as failed,
//!    so that no caller waits for ever.
//!
//! It does *not* sleep where a ring has a timer for that.

use super::cancel::Cancel;
use crate::base::Micros;
use rustix::io::Errno;
use std::time::Duration;

/// The first pause: long enough for a full device queue to have room again, too short for a client
/// to notice.
const PAUSE_MIN_US: Micros = 100;
/// The longest pause: a device that refuses for this long is not slowed down by it.
const PAUSE_MAX_US: Micros = 100 << 10;
/// Refusals in a row after which a call counts as failed.
const REFUSALS_MAX: u16 = 300;

/// Refusals in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff(u16);

impl Backoff {
    /// Counts one more refusal. Returns how long to pause before the next attempt, or `None` if the
    /// call has been refused too often and counts as failed.
    pub(super) fn refused(&mut self) -> Option<Micros> {
        self.0 = self.0.saturating_add(1);
        (self.0 <= REFUSALS_MAX).then(|| self.pause_us())
    }

    /// Sleeps if the call that failed with `e` may work later. Returns `e` as the failure if it
    /// can't, if it has been refused too often, or if the work was cancelled.
    #[allow(clippy::disallowed_methods, reason = "the kernel tells nobody when it would take it")]
    pub(super) fn pause(&mut self, e: Errno, cancel: &Cancel) -> rustix::io::Result<()> {
        if !matches!(e, Errno::INTR | Errno::AGAIN) || cancel.is_cancelled() {
            return Err(e);
        }
        let us = self.refused().ok_or(e)?;
        std::thread::sleep(Duration::from_micros(us));
        Ok(())
    }

    /// The pause after the current number of refusals.
    pub(super) fn pause_us(self) -> Micros {
        (PAUSE_MIN_US << self.0.saturating_sub(1).min(16)).min(PAUSE_MAX_US)
    }
}

/// Repeats `call`, with pauses, while the kernel refuses it for now. For calls that are made before
/// a store is open: it gives up after a fifth of a second, since nothing can cancel it.
#[allow(clippy::disallowed_methods, reason = "the kernel tells nobody when it would take it")]
pub(super) fn retry_transient<T>(
    mut call: impl FnMut() -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    let mut backoff = Backoff::default();
    loop {
        match call() {
            Err(Errno::INTR | Errno::AGAIN) if backoff.pause_us() < PAUSE_MAX_US => {
                let pause_us = backoff.refused().unwrap_or(PAUSE_MAX_US);
                std::thread::sleep(Duration::from_micros(pause_us));
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A signal in the middle of a probe must not make a store use the page cache for the rest of
    /// its life.
    #[test]
    fn a_probe_that_is_interrupted_is_repeated_and_not_for_ever() {
        for refusal in [Errno::INTR, Errno::AGAIN] {
            let mut left = 5;
            let refused_first = || {
                left -= 1;
                if left > 0 { Err(refusal) } else { Ok(7) }
            };
            assert_eq!(retry_transient(refused_first), Ok(7));
            assert_eq!(retry_transient(|| Err::<(), _>(refusal)), Err(refusal));
        }
        let mut calls = 0;
        let failed = retry_transient(|| {
            calls += 1;
            Err::<(), _>(Errno::IO)
        });
        assert_eq!((failed, calls), (Err(Errno::IO), 1), "a failure is one at once");
    }

    /// Without pauses a busy device costs a whole core; without a limit its callers wait for ever.
    #[test]
    fn pauses_grow_and_end() {
        let mut backoff = Backoff::default();
        let pauses: Vec<Micros> = std::iter::from_fn(|| backoff.refused()).collect();
        assert_eq!(pauses[..3], [100, 200, 400]);
        assert!(pauses.is_sorted() && *pauses.last().unwrap() == PAUSE_MAX_US);
        let all: Micros = pauses.iter().sum();
        assert!((25_000_000..35_000_000).contains(&all), "{all} us in all");
        assert_eq!(backoff.refused(), None, "it stays a failure");
    }
}
