//! Who was served before whom, and what this life has changed.
//!
//! It does *not* know why somebody waits.

use super::Oracle;
use super::asked::Asked;
use crate::types::PageKey;
use std::collections::BTreeSet;

impl Oracle {
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
