//! How a store is being driven, for `serve` and `doctor`.

use crate::io::DiskReport;
use std::fmt;

/// How a store is being driven.
#[derive(Clone, Debug)]
pub struct RuntimeReport {
    /// `io_uring` or `portable`.
    pub driver: &'static str,
    /// For each shard the core that its thread is pinned to.
    pub pins: Vec<Option<usize>>,
    /// Thousandths of a processor that control groups allow, if that is less than the cores that
    /// could be used: what no number of shards gets beyond.
    pub quota_millis: Option<u64>,
    /// How long a shard polls after the last thing that happened, in microseconds; `None`: for
    /// ever.
    pub poll_us: Option<u64>,
    /// What the disk of the first shard is like, and why it is not the ring; those of the others
    /// are the same.
    pub disk: DiskReport,
}

impl fmt::Display for RuntimeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.pins.len();
        write!(f, "{count} shard{}", if count == 1 { "" } else { "s" })?;
        let pins: Vec<String> = self.pins.iter().flatten().map(usize::to_string).collect();
        match pins.is_empty() {
            true => write!(f, ", not pinned")?,
            false => {
                write!(f, " on core{} {}", if pins.len() == 1 { "" } else { "s" }, pins.join(", "))?
            }
        }
        if let Some(millis) = self.quota_millis {
            write!(
                f,
                ", time for {} processors (a control group's limit)",
                millis as f64 / 1000.0
            )?;
        }
        match self.poll_us {
            None => write!(f, ", polling without end")?,
            Some(0) => write!(f, ", not polling")?,
            Some(us) => write!(f, ", polling for {us} µs")?,
        }
        write!(f, "; {}", self.disk)
    }
}
