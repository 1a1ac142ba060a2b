//! Latencies as a histogram.

use hdrhistogram::Histogram;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use std::fmt;

/// Values above this count as this: a minute.
const MOST_US: u64 = 60_000_000;
/// Percentiles are right to 1 %.
const DIGITS: u8 = 2;

/// How long operations took, in microseconds; values are right to 1 %, and at least 1.
#[derive(Clone, Default)]
pub struct Latency(Option<Box<Histogram<u64>>>);

impl Latency {
    /// Counts one operation.
    pub(crate) fn record(&mut self, us: u64) {
        let new = || Box::new(Histogram::new_with_bounds(1, MOST_US, DIGITS).expect("the bounds are in order"));
        self.0.get_or_insert_with(new).saturating_record(us.max(1));
    }

    /// Operations counted.
    pub fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, |known| known.len())
    }

    /// Microseconds that `percent` of the operations did not exceed, 50 for the median; 0 if there are none.
    pub fn percentile(&self, percent: f64) -> u64 {
        self.0.as_ref().map_or(0, |known| known.value_at_percentile(percent.clamp(0.0, 100.0)))
    }

    /// The longest, in microseconds.
    pub fn max(&self) -> u64 {
        self.0.as_ref().map_or(0, |known| known.max())
    }

    /// The mean, in microseconds.
    pub fn mean(&self) -> f64 {
        self.0.as_ref().map_or(0.0, |known| known.mean())
    }

    /// The operations of `other` too.
    pub fn add(&mut self, other: &Latency) {
        match (&mut self.0, &other.0) {
            (Some(own), Some(other)) => own.add(&**other).expect("all have the same bounds"),
            (own @ None, Some(other)) => *own = Some(other.clone()),
            (_, None) => {}
        }
    }

    /// The operations counted since `earlier`, a state of the same counts.
    pub fn since(&self, earlier: &Latency) -> Latency {
        let mut new = self.clone();
        if let (Some(new), Some(earlier)) = (&mut new.0, &earlier.0) {
            // What was not counted later can't be taken away: then nothing is.
            let _ = new.subtract(&**earlier);
        }
        new
    }
}

impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, p50, p99) = (self.count(), self.percentile(50.0), self.percentile(99.0));
        write!(f, "{count} (P50 {p50} us, P99 {p99} us, max {} us)", self.max())
    }
}

impl Serialize for Latency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Latency", 6)?;
        out.serialize_field("count", &self.count())?;
        out.serialize_field("mean_us", &self.mean())?;
        out.serialize_field("p50_us", &self.percentile(50.0))?;
        out.serialize_field("p99_us", &self.percentile(99.0))?;
        out.serialize_field("p999_us", &self.percentile(99.9))?;
        out.serialize_field("max_us", &self.max())?;
        out.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_all_that_was_counted_also_of_several_shards() {
        let (mut a, mut b) = (Latency::default(), Latency::default());
        assert_eq!((a.count(), a.percentile(50.0), a.max(), a.mean()), (0, 0, 0, 0.0));
        (1..=900).for_each(|us| a.record(us));
        (901..=1000).for_each(|us| b.record(us));
        let before = a.clone();
        a.add(&b);
        assert_eq!(a.count(), 1000);
        for (percent, us) in [(50.0, 500.0), (99.0, 990.0), (99.9, 999.0)] {
            let told = a.percentile(percent) as f64;
            assert!((told - us).abs() <= us / 100.0, "P{percent} is {told}, not {us}");
        }
        let later = a.since(&before);
        assert!(later.count() == 100 && later.percentile(0.1) >= 895, "{later:?}");
        a.record(u64::MAX);
        assert!(a.max() <= MOST_US * 101 / 100, "an hour counts as a minute");
    }
}
