//! Records how long requests wait, which were overtaken by which, and what this life has changed.
//!
//! How many have overtaken a request is counted but not judged: requests for pages in memory
//! rightly pass all that wait for the device, any number of times. The time that a request waits is
//! judged instead (see `steps`): a queue that is not first in, first out makes a request wait
//! without end, and that is found.
//!
//! It does *not* know why a request waits.

use super::Oracle;
use super::pending_requests::PendingRequest;
use crate::base::{Micros, PageKey};
use std::collections::BTreeSet;

impl Oracle {
    /// When the oldest request without an answer was made.
    pub fn oldest_at(&self) -> Option<Micros> {
        self.pending.values().map(|pending| pending.at).min()
    }

    /// The oldest request without an answer, for messages.
    pub fn oldest(&self) -> Option<String> {
        let (token, pending) = self.pending.iter().min_by_key(|(_, pending)| pending.at)?;
        Some(format!("{token:?}: {}, allocated {:?}", pending.what.describe(), pending.allocated))
    }

    /// The pages that commits of this life have changed.
    pub fn changed(&self) -> BTreeSet<PageKey> {
        self.allocated.iter().flat_map(|(_, changes)| changes.iter().map(|(key, _)| *key)).collect()
    }

    /// Counts, for each older request of its kind, that the request answered now has overtaken it.
    pub(super) fn count_overtaken(&mut self, answered: &PendingRequest) {
        let is_before = |pending: &PendingRequest| {
            pending.shard == answered.shard && pending.moment < answered.moment
        };
        for pending in self
            .pending
            .values_mut()
            .filter(|pending| is_before(pending) && pending.what.is_like(&answered.what))
        {
            pending.overtaken += 1;
            self.counters.overtaken_most = self.counters.overtaken_most.max(pending.overtaken);
        }
    }
}
