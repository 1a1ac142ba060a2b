//! Latencies as a histogram of about 1,500 counters.
//!
//! Buckets grow with their values: each power of two is divided into [`SPLIT`] of them, so that a
//! value is known to within 1 % whether it is 200 µs or 20 s.

use std::fmt;

/// The largest value that is told apart, a minute: longer ones count as this.
const MOST_US: u64 = 60_000_000;
/// The number of buckets for each power of two, itself a power of two. Values below twice this have
/// a bucket each.
const SPLIT: u64 = 64;
const BUCKETS: usize = bucket_of(MOST_US) + 1;

/// A histogram of how long operations took, in microseconds. Values are rounded by up to 1 %; the
/// least is 1.
#[derive(Clone, Default)]
pub struct Latency(Option<Box<Counts>>);

#[derive(Clone)]
struct Counts {
    total: u64,
    buckets: [u64; BUCKETS],
}

/// The bucket in which a value is counted.
const fn bucket_of(us: u64) -> usize {
    let halvings = us.ilog2().saturating_sub(SPLIT.ilog2());
    (halvings as u64 * SPLIT + (us >> halvings)) as usize
}

/// The highest value that a bucket counts.
fn highest_in(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let halvings = (bucket / SPLIT).saturating_sub(1);
    ((bucket - halvings * SPLIT + 1) << halvings) - 1
}

/// The value in the middle of a bucket.
fn middle_of(bucket: usize) -> f64 {
    let width = 1u64 << (bucket as u64 / SPLIT).saturating_sub(1);
    highest_in(bucket) as f64 - (width - 1) as f64 / 2.0
}

impl Latency {
    /// Counts one operation.
    pub(crate) fn record(&mut self, us: u64) {
        let counts =
            self.0.get_or_insert_with(|| Box::new(Counts { total: 0, buckets: [0; BUCKETS] }));
        counts.total += 1;
        counts.buckets[bucket_of(us.clamp(1, MOST_US))] += 1;
    }

    /// The number of operations counted.
    pub fn count(&self) -> u64 {
        self.0.as_ref().map_or(0, |counts| counts.total)
    }

    /// The latency, in microseconds, that `percent` of the operations did not exceed: 50 gives the
    /// median. 0 if no operation was counted.
    pub fn percentile(&self, percent: f64) -> u64 {
        let wanted =
            (self.count() as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil().max(1.0) as u64;
        let mut counted = 0;
        let reached = self.filled().find(|(_, count)| {
            counted += count;
            counted >= wanted
        });
        reached.map_or(0, |(bucket, _)| highest_in(bucket))
    }

    /// The longest latency, in microseconds.
    pub fn max(&self) -> u64 {
        self.filled().last().map_or(0, |(bucket, _)| highest_in(bucket))
    }

    /// The mean latency, in microseconds.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.filled().map(|(bucket, count)| middle_of(bucket) * count as f64).sum();
        sum / self.count().max(1) as f64
    }

    /// Adds the operations that `other` has counted.
    pub fn add(&mut self, other: &Latency) {
        match (&mut self.0, &other.0) {
            (Some(own), Some(other)) => {
                own.total += other.total;
                own.buckets.iter_mut().zip(&other.buckets).for_each(|(own, other)| *own += other);
            }
            (own @ None, Some(other)) => *own = Some(other.clone()),
            (_, None) => {}
        }
    }

    /// The operations counted since `earlier`, an earlier state of the same histogram.
    pub fn since(&self, earlier: &Latency) -> Latency {
        let mut new = self.clone();
        if let (Some(new), Some(earlier)) = (&mut new.0, &earlier.0) {
            // A count can't be lower than it was earlier.
            new.buckets
                .iter_mut()
                .zip(&earlier.buckets)
                .for_each(|(new, old)| *new = new.saturating_sub(*old));
            new.total = new.buckets.iter().sum();
        }
        new
    }

    /// The buckets that are not empty, from short to long.
    fn filled(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let buckets = self.0.iter().flat_map(|counts| counts.buckets.iter().copied().enumerate());
        buckets.filter(|(_, count)| *count > 0)
    }
}

impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, p50, p99) = (self.count(), self.percentile(50.0), self.percentile(99.0));
        write!(f, "{count} (P50 {p50} us, P99 {p99} us, max {} us)", self.max())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Latency {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
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

    /// A bucket that is too wide, or that overlaps its neighbour, would give percentiles that were
    /// never measured.
    #[test]
    fn buckets_lie_side_by_side_and_are_no_wider_than_promised() {
        let mut lowest = 1;
        for bucket in 1..BUCKETS {
            let highest = highest_in(bucket);
            assert_eq!(
                (bucket_of(lowest), bucket_of(highest)),
                (bucket, bucket),
                "from {lowest} to {highest}"
            );
            assert!(
                (highest - lowest) as f64 <= 0.0157 * lowest as f64,
                "bucket {bucket}: {lowest} to {highest}"
            );
            assert_eq!(middle_of(bucket), (lowest + highest) as f64 / 2.0);
            lowest = highest + 1;
        }
        assert!(lowest > MOST_US, "the last bucket holds the longest");
    }
}
