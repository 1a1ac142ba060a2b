//! Counts the operations in each of the last seconds.
//!
//! Invariants
//! 1. The current second is not reported: it is not over.
//! 2. Seconds are numbered from a moment that all shards share, so those of several shards can be
//!    added.

/// The seconds that are remembered, and the current one.
const SECONDS: usize = 61;

/// Operations of the last minute, second by second.
#[derive(Clone, Debug)]
pub(crate) struct Recent {
    counts: [u32; SECONDS],
    /// The current second.
    now: u64,
    peak: u32,
}

impl Default for Recent {
    fn default() -> Self {
        Recent { counts: [0; SECONDS], now: 0, peak: 0 }
    }
}

impl Recent {
    /// Counts operations in second `now`.
    pub(crate) fn count(&mut self, now: u64, operations: u32) {
        self.advance(now);
        self.counts[(self.now % SECONDS as u64) as usize] += operations;
    }

    /// Begins second `now`: the seconds in between had no operations.
    pub(crate) fn advance(&mut self, now: u64) {
        if now <= self.now {
            return;
        }
        self.peak = self.peak.max(self.counts[(self.now % SECONDS as u64) as usize]);
        for second in self.now + 1..=now.min(self.now + SECONDS as u64) {
            self.counts[(second % SECONDS as u64) as usize] = 0;
        }
        if now > self.now + SECONDS as u64 {
            self.counts = [0; SECONDS];
        }
        self.now = now;
    }

    /// The most operations in one full second.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.into()
    }

    /// Operations per second, over the last `seconds` full ones.
    pub(crate) fn rate(&self, seconds: u64) -> f64 {
        let seconds = seconds.clamp(1, SECONDS as u64 - 1).min(self.now.max(1));
        let full = (1..=seconds).filter_map(|back| self.now.checked_sub(back));
        full.map(|second| f64::from(self.counts[(second % SECONDS as u64) as usize])).sum::<f64>()
            / seconds as f64
    }

    /// Adds the operations of another shard.
    pub(crate) fn add(&mut self, other: &Recent) {
        let mut other = other.clone();
        let now = self.now.max(other.now);
        self.advance(now);
        other.advance(now);
        self.counts.iter_mut().zip(other.counts).for_each(|(own, other)| *own += other);
        self.peak += other.peak;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_full_seconds_and_empty_ones_count() {
        let mut recent = Recent::default();
        assert_eq!((recent.rate(1), recent.peak()), (0.0, 0));
        for second in 10..20 {
            recent.count(second, 100 * second as u32);
        }
        assert_eq!((recent.rate(1), recent.rate(3), recent.peak()), (1800.0, 1700.0, 1800));
        recent.advance(25);
        assert_eq!(
            (recent.rate(1), recent.rate(6), recent.rate(60)),
            (0.0, 1900.0 / 6.0, 14_500.0 / 25.0)
        );
        let mut other = Recent::default();
        other.count(30, 7);
        other.count(31, 0);
        other.add(&recent);
        assert_eq!((other.rate(1), other.rate(12)), (7.0, 1907.0 / 12.0));
        recent.advance(1 << 40);
        assert_eq!(recent.rate(60), 0.0);
    }
}
