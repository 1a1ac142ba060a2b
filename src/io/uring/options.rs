//! Options of a ring disk. They are *not* checked against the machine here.

/// How to run the ring disk.
#[derive(Clone, Debug)]
pub struct UringOptions {
    /// Entries of the ring, and therefore transfers at the device at a time (default 256).
    pub ring_entries: u32,
    /// Whether to poll the device for completions if it supports that (the default). Polling costs
    /// processor time while transfers are in flight.
    pub polling: bool,
    /// Disks of this process that share the limit of locked memory (default 1).
    pub disks_count: usize,
}

impl Default for UringOptions {
    fn default() -> Self {
        UringOptions { ring_entries: 256, polling: true, disks_count: 1 }
    }
}
