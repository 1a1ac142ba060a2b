//! Who waits for how long, who was served before whom, and what this life has changed.
//!
//! How many have overtaken a request is counted and not judged: whoever asks for pages that are in
//! memory rightly passes all who wait for the device, any number of times. What is judged is the
//! time that a request waits (see `steps`): a queue that is not first in, first out lets a request
//! wait without end, and that is found.
//!
//! It does *not* know why a request waits.

use super::Oracle;
use super::pending_requests::PendingRequest;
use crate::base::{Micros, PageKey};
use std::collections::BTreeSet;

impl Oracle {
    /// When the oldest request without an answer was asked.
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

    /// Others of its kind have waited for longer.
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
