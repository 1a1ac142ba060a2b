//! Recounts what a shard counts and compares the two: for tests.
//!
//! If a count drifts, nothing is lost and nothing is noticed: from then on admission refuses too
//! early or too late, and some day the store hangs. So the simulator calls this in the middle of
//! its runs.

use super::blocked::{LACKS, Lack};
use super::budget::request_weight;
use super::dispatch::FREE_BYTES;
use super::requests::PendingKind;
use super::reservations::Reserved;
use super::{OpKind, Shard};
use crate::base::{Lsn, PageIdx};
use crate::memory::Owner;
use std::collections::BTreeMap;
use std::fmt::{Debug, Display};

impl Shard {
    /// # Errors
    /// The count that has drifted. After a failure the counts are no longer kept.
    pub fn audit(&self) -> Result<(), String> {
        if self.ctx.failed.is_some() {
            return Ok(());
        }
        self.audit_blocked()?;
        self.map.audit()?;
        self.space.extents.audit()?;
        let pages = || self.cache.table.pages.iter().map(|(_, page)| page);
        if self.writeback.counts().behind_nodes > 0 && self.ctx.ops.is_empty() {
            return Err(format!(
                "{} versions wait for a node write, and none is under way",
                self.writeback.counts().behind_nodes
            ));
        }
        let images = self.log.open.images.iter().filter(|image| !image.is_freed).count();
        let dirty = pages().filter(|page| page.dirty_from.is_some()).count();
        same(
            "blocks reserved for dirty pages and images",
            self.reservations.dirty_blocks as usize,
            dirty + images,
        )?;
        let freed = pages().filter(|page| page.dirty_from.is_some() && page.absent).count();
        same("dirty pages that are freed", self.space.freed_pages as usize, freed)?;
        same(
            "pages in the queue of the coalescer",
            pages().filter(|page| page.queued).count(),
            self.writeback.counts().dirty,
        )?;
        same(
            "clean pages in the queue of the coalescer",
            pages().filter(|page| page.queued && page.dirty_from.is_none()).count(),
            self.writeback.counts().clean,
        )?;
        same(
            "dirty pages that are not queued",
            pages().filter(|page| page.dirty_from.is_some() && !page.queued).count(),
            0,
        )?;
        self.audit_memory()?;
        same(
            "pages with their bytes",
            self.cache.table.resident(),
            self.cache.table.count_resident(),
        )?;
        self.audit_budget()?;
        same(
            "versions on their way into the map",
            self.reservations.unpublished as usize,
            self.writeback.counts().versions,
        )?;
        let targets = pages().filter(|page| page.checkpoint_target != Lsn::ZERO).count();
        same(
            "pages that the checkpoint waits for",
            self.writeback.awaited_versions(),
            targets as u64,
        )?;

        self.audit_versions()?;
        let moves = self
            .requests
            .pending
            .iter()
            .filter(|(_, pending)| matches!(pending.kind, PendingKind::Move(..)))
            .count();
        same(
            "moves on their way",
            self.reservations.moves,
            moves + self.space.compaction.asked.reading(),
        )?;

        let parts = self.requests.pending.iter().filter_map(|(_, pending)| match &pending.kind {
            PendingKind::Part(part) => part.reserved,
            _ => None,
        });
        let reserved = parts.fold(Reserved::default(), Reserved::plus);
        same("what is reserved for parts", self.reservations.parts, reserved)
    }

    /// Checks that every version on its way from the table into the map is known to both.
    fn audit_versions(&self) -> Result<(), String> {
        let mut on_their_way: BTreeMap<PageIdx, usize> = BTreeMap::new();
        let captured = self.writeback.versions().map(|version| version.page);
        captured
            .chain(self.space.compaction.moves.iter().copied())
            .for_each(|idx| *on_their_way.entry(idx).or_default() += 1);
        for (idx, page) in self.cache.table.pages.iter() {
            let count = on_their_way.get(&idx).copied().unwrap_or(0);
            same(format_args!("versions of {:?}", page.key), page.versions as usize, count)?;
            let image = page.image.map(|no| &self.log.open.images[no.index()]);
            same(
                format_args!("the image of {:?}", page.key),
                image.is_none_or(|image| image.key == page.key && !image.is_freed),
                true,
            )?;
        }
        let writes = self.ctx.ops.iter().map(|(_, op)| match op {
            OpKind::PageWrite(versions) => versions.len(),
            _ => 0,
        });
        same("pages being written", self.writeback.counts().page_writes, writes.sum())?;
        Ok(())
    }

    /// Checks that the eviction policy knows everything that could leave memory, and that nothing
    /// is kept without a reason.
    fn audit_memory(&self) -> Result<(), String> {
        for (idx, page) in self.cache.table.pages.iter().filter(|(_, page)| page.is_unreferenced())
        {
            let Some(frame) = &page.frame else {
                return Err(format!(
                    "{:?} is kept without memory though nothing refers to it",
                    page.key
                ));
            };
            let owner = self.cache.eviction.owner_of(frame.block());
            let is_listed = page.residency.is_listed() && owner == Some(Owner::Page(idx));
            same(
                format_args!("{:?} is listed for eviction ({owner:?})", page.key),
                is_listed,
                true,
            )?;
        }
        self.map.audit_listed(&self.cache.eviction)
    }

    /// # Errors
    /// A step or a request that waits, and that nothing will wake.
    fn audit_blocked(&self) -> Result<(), String> {
        if self.ctx.blocked.refusals() > 0 && !self.ctx.blocked.lacks_memory() {
            return Err(format!(
                "{} requests for frames failed, and nobody is registered",
                self.ctx.blocked.refusals()
            ));
        }
        // Parts of commits over shards give back what they have reserved when the decision arrives,
        // by message.
        let under_way = !self.ctx.ops.is_empty()
            || self.ctx.checkpoint.is_wanted_or_active()
            || self.reservations.parts != Reserved::default();
        for lack in LACKS {
            let is_woken = match lack {
                Lack::Memory | Lack::Turn => self.next_due().is_some(),
                Lack::LogRoom | Lack::WriteBack => {
                    under_way || self.next_due().is_some() || self.waits_for().is_some()
                }
                Lack::Space => {
                    let reclaims =
                        self.space.growing || self.space.compaction.compactor.count() > 0;
                    under_way || reclaims || self.next_due().is_some()
                }
                Lack::Watermark => self.waits_for().is_some(),
            };
            if self.ctx.blocked.is_lacked(lack) && !is_woken {
                return Err(format!(
                    "nobody wakes those who wait for {lack:?}: {:?}",
                    self.ctx.blocked
                ));
            }
        }
        Ok(())
    }

    /// # Errors
    /// A count that has drifted, or a structure beyond its bound.
    fn audit_budget(&self) -> Result<(), String> {
        let pending: u64 =
            self.requests.pending.iter().map(|(_, p)| request_weight(&p.kind, p.pages.len())).sum();
        let cross: u64 = self.coordinator.weight();
        if self.reservations.request_bytes != pending + cross {
            let kept = self.reservations.request_bytes;
            return Err(format!(
                "bytes of requests: {kept} by what is kept, {pending} + {cross} counted"
            ));
        }
        let awaiting_watermark =
            self.writeback.versions().filter(|version| version.entry.is_none()).count() as u64;
        if self.reservations.frees_unpublished != awaiting_watermark {
            return Err(format!(
                "frees on their way: {} by what is kept, {awaiting_watermark} counted",
                self.reservations.frees_unpublished
            ));
        }
        let blocks = u64::from(self.ctx.limits.memory_blocks);
        let pages = || self.cache.table.pages.iter().map(|(_, page)| page);
        let freed = pages()
            .filter(|page| page.frame.is_none() && page.holds == 0 && page.leaf.is_some())
            .count() as u64;
        // A commit may go alone if it must, and so may a part.
        let most = blocks / 4 + 2 * self.ctx.limits.txn_bytes_max / FREE_BYTES;
        if freed > most {
            return Err(format!(
                "{freed} freed pages on their way into the map for {blocks} frames, at most {most}"
            ));
        }
        let nodes = u64::from(self.map.nodes_count());
        if nodes > blocks {
            return Err(format!("{nodes} map nodes for {blocks} frames"));
        }
        Ok(())
    }
}

fn same<T: PartialEq + Debug>(what: impl Display, kept: T, counted: T) -> Result<(), String> {
    if kept == counted {
        Ok(())
    } else {
        Err(format!("{what}: {kept:?} by what is kept, {counted:?} counted"))
    }
}
