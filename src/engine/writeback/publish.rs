//! Publishes written versions: makes the map name them once they are durable.
//!
//! ```text
//! written --at or below the watermark--> its leaf is not being written --> in the map
//!     \--above it--> awaits the watermark --^         \--it is--> behind the node's write --^
//! ```
//! Invariants
//! 1. The map gets a version only when it is written *and* at or below the watermark.
//! 2. A version that comes late (the map already names a newer one) gives its block back like any
//!    other: a log record may name it.
//! 3. A move changes the map only if the map still names the place that it moved from.
//!
//! It does *not* choose what is written, nor does it write anything.

use super::{AwaitingWatermark, PageVersion};
use crate::base::{Lsn, PageIdx, PageVersionIdx};
use crate::engine::Shard;
use std::cmp::Reverse;

impl Shard {
    /// Called when writes of these versions have completed.
    pub(in crate::engine) fn versions_written(&mut self, versions: Vec<PageVersionIdx>) {
        for version in versions {
            self.version_written(version);
        }
    }

    pub(super) fn version_written(&mut self, version: PageVersionIdx) {
        self.writeback.unblock(&mut self.ctx);
        let lsn = self.writeback.versions[version].lsn;
        if lsn <= self.ctx.order.watermark() || planted!(MappedTooSoon) {
            self.publish_or_wait(version);
        } else {
            self.ctx.press(&mut self.log.open);
            self.watermark.want(lsn);
            self.writeback.awaiting_watermark.push(AwaitingWatermark(Reverse((lsn, version))));
        }
    }

    /// Called when the watermark has advanced: puts what is written and durable into the map.
    pub(in crate::engine) fn publish_durable(&mut self) {
        self.writeback.unblock(&mut self.ctx);
        let watermark = self.ctx.order.watermark();
        while self.writeback.awaiting_watermark.peek().is_some_and(|u| u.lsn() <= watermark) {
            if let Some(AwaitingWatermark(Reverse((_, version)))) =
                self.writeback.awaiting_watermark.pop()
            {
                self.publish_or_wait(version);
            }
        }
    }

    /// Called when node writes may have ended: puts what waited for them into the map.
    pub(in crate::engine) fn publish_behind_nodes(&mut self) {
        for version in std::mem::take(&mut self.writeback.behind_nodes) {
            self.publish_or_wait(version);
        }
    }

    /// Puts a version into the map, or, if its leaf is being written, defers it until that write
    /// has ended.
    fn publish_or_wait(&mut self, version: PageVersionIdx) {
        let leaf = self.cache.table.pages[self.writeback.versions[version].page].leaf;
        if leaf.is_some_and(|leaf| self.map.is_being_written(leaf)) {
            self.ctx.stats.settles_delayed += 1;
            self.writeback.behind_nodes.push(version);
        } else {
            self.publish_to_map(version);
        }
    }

    fn publish_to_map(&mut self, version: PageVersionIdx) {
        let PageVersion { page: idx, lsn, entry, moved_from } =
            self.writeback.versions.remove(version);
        let unpublished = self.reservations.unpublished;
        assert!(unpublished > 0, "{lsn:?} is published, of {unpublished} versions on their way");
        self.reservations.unpublished -= 1;
        let page = &mut self.cache.table.pages[idx];
        let key = page.key;
        assert!(
            page.versions > 0 && lsn <= page.lsn,
            "{lsn:?} of {key:?} is published, of {} captures, and the page is at {:?}",
            page.versions,
            page.lsn
        );
        assert!(
            entry.is_none_or(|entry| entry.lsn() == lsn),
            "{:?} of {key:?} is published as {lsn:?}",
            entry.map(|entry| entry.lsn())
        );
        page.versions -= 1;
        let (vshard, _) = self.map.position(key);
        let applies = match moved_from {
            Some(from) => {
                page.mapped_lsn == lsn && page.entry.is_some_and(|e| e.place() == from)
                    || planted!(MovedAnyway)
            }
            None => page.mapped_lsn < lsn,
        };
        match entry {
            Some(entry) => self.space.extents.name_page(vshard, entry.place()),
            None => {
                let frees = self.reservations.frees_unpublished;
                assert!(
                    frees > 0 && moved_from.is_none(),
                    "the end of {key:?} is published, of {frees} on their way, moved from \
                     {moved_from:?}"
                );
                self.reservations.frees_unpublished -= 1;
            }
        }
        if applies {
            let leaf = page.leaf.expect("a page with a version on its way has its leaf pinned");
            page.entry = entry;
            page.mapped_lsn = lsn;
            if let Some(old) = self.map.set(leaf, key, entry) {
                let (old, new) = (old.place(), entry.map(|entry| entry.place()));
                assert!(Some(old) != new, "{key:?} at {lsn:?} lies where its last version does");
                self.space.extents.free_later(vshard, old);
            }
        } else if let Some(entry) = entry {
            self.space.extents.free_later(vshard, entry.place());
        }
        self.cache.table.pages[idx].assert_state();
        self.page_published(idx);
        self.unpin_if_clean(idx);
        self.writeback.unblock(&mut self.ctx);
        self.ctx.room_changed();
    }

    /// Called when a version of the page is in the map.
    pub(in crate::engine) fn page_published(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        if page.checkpoint_target != Lsn::ZERO && page.mapped_lsn >= page.checkpoint_target {
            let left = self.writeback.checkpoint_versions;
            assert!(left > 0, "{:?} is waited for, of {left} pages", page.key);
            page.checkpoint_target = Lsn::ZERO;
            self.writeback.checkpoint_versions -= 1;
        }
    }
}
