//! How a store is being driven, for `serve` and `doctor`.

use crate::io::DiskReport;
use std::fmt;

/// How a store runs.
#[derive(Clone, Debug)]
pub struct RuntimeReport {
    /// `io_uring` or `portable`.
    pub driver: &'static str,
    /// The core that each shard's thread is pinned to; `None` if it is not pinned.
    pub pins: Vec<Option<usize>>,
    /// The processor time that control groups allow, in thousandths of a processor, if that is less
    /// than the usable cores. More shards don't get more.
    pub quota_millis: Option<u64>,
    /// How long a shard polls after its last work before it waits, in microseconds; `None` if it
    /// never waits.
    pub poll_us: Option<u64>,
    /// The report of the first shard's disk, which stands for the others.
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
            None => write!(f, ", polling all the time")?,
            Some(0) => write!(f, ", not polling")?,
            Some(us) => write!(f, ", polling for {us} µs")?,
        }
        write!(f, "; {}", self.disk)
    }
}
