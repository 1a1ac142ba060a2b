//! Who waits for how long, who was served before whom, and what this life has changed.
//!
//! How many have overtaken a request is counted and not judged: whoever asks for pages that are in memory rightly passes all who wait
//! for the device, any number of times. What is judged is the time that a request waits (see `drive`): a queue that is not first in,
//! first out lets somebody wait without end, and that is found.
//!
//! It does *not* know why somebody waits.

use super::Oracle;
use super::asked::Asked;
use crate::base::{Micros, PageKey};
use std::collections::BTreeSet;

impl Oracle {
    /// When the oldest request without an answer was asked.
    pub fn oldest_at(&self) -> Option<Micros> {
        self.asked.values().map(|asked| asked.at).min()
    }

    /// The oldest request without an answer, for messages.
    pub fn oldest(&self) -> Option<String> {
        let (token, asked) = self.asked.iter().min_by_key(|(_, asked)| asked.at)?;
        Some(format!("{token:?}: {}, drawn {:?}", asked.what.describe(), asked.drawn))
    }

    /// The pages that commits of this life have changed.
    pub fn changed(&self) -> BTreeSet<PageKey> {
        self.drawn.iter().flat_map(|(_, changes)| changes.iter().map(|(key, _)| *key)).collect()
    }

    /// Others of its kind have waited for longer.
    pub(super) fn count_overtaken(&mut self, answered: &Asked) {
        let is_before = |asked: &Asked| asked.shard == answered.shard && asked.moment < answered.moment;
        for asked in self.asked.values_mut().filter(|asked| is_before(asked) && asked.what.is_like(&answered.what)) {
            asked.overtaken += 1;
            self.counters.overtaken_most = self.counters.overtaken_most.max(asked.overtaken);
        }
    }
}
