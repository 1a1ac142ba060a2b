//! How long to pause before something is tried again that the kernel has refused for now (`EAGAIN`, `EINTR`).
//!
//! Invariants
//! 1. No refusal is answered by an immediate retry for ever: each pause in a row is at least as long as the one before.
//! 2. A device that refuses for [`REFUSALS_MAX`] pauses in a row, half a minute, counts as failed: nobody waits for ever.
//!
//! It does *not* sleep: threads do, and the ring has a timer for it.

use crate::types::Micros;

/// The first pause: longer than a queue of the device takes to have room again, short enough not to be noticed.
const PAUSE_MIN_US: Micros = 100;
/// The longest: a device that is that slow is not slowed down by it.
const PAUSE_MAX_US: Micros = 100 << 10;
/// So many refusals in a row are a failure.
const REFUSALS_MAX: u16 = 300;

/// Refusals in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff(u16);

impl Backoff {
    /// One more refusal. How long to pause before the next attempt, or `None`: it is a failure.
    pub(super) fn refused(&mut self) -> Option<Micros> {
        self.0 = self.0.saturating_add(1);
        (self.0 <= REFUSALS_MAX).then(|| self.pause_us())
    }

    /// The pause after the present number of refusals.
    pub(super) fn pause_us(self) -> Micros {
        (PAUSE_MIN_US << self.0.saturating_sub(1).min(16)).min(PAUSE_MAX_US)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without pauses a device that is busy costs a whole core; without an end its callers wait for ever.
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
