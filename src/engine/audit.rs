//! Counts that are kept in step with what they count, counted anew: for tests.
//!
//! If one drifts nothing is lost, and nothing is noticed: admission refuses too early or too late
//! from then on, and some day the store hangs. So the simulator asks in the middle of its runs.

use super::requests::PendingKind;
use super::txn::participant::Reserved;
use super::{OpKind, Shard};
use crate::base::{Lsn, PageIdx};
use crate::memory::Owner;
use std::collections::BTreeMap;
use std::fmt::{Debug, Display};

impl Shard {
    /// # Errors
    /// The count that has drifted. After a failure nobody counts any more.
    pub fn audit(&self) -> Result<(), String> {
        if self.ctx.failed.is_some() {
            return Ok(());
        }
        self.audit_blocked()?;
        self.map.audit()?;
        self.space.extents.audit()?;
        let pages = || self.cache.table.pages.iter().map(|(_, page)| page);
        if !self.checkpoint.behind_nodes.is_empty() && self.ctx.ops.is_empty() {
            return Err(format!(
                "{} versions wait for a node write, and none is under way",
                self.checkpoint.behind_nodes.len()
            ));
        }
        let images = self.log.open.images.iter().filter(|image| !image.is_freed).count();
        let dirty = pages().filter(|page| page.dirty_from.is_some()).count();
        same(
            "blocks reserved for dirty pages and images",
            self.writeback.reserved_blocks as usize,
            dirty + images,
        )?;
        let freed = pages().filter(|page| page.dirty_from.is_some() && page.absent).count();
        same("dirty pages that are freed", self.space.freed_pages as usize, freed)?;
        same(
            "pages in the queue of the coalescer",
            pages().filter(|page| page.queued).count(),
            self.writeback.dirty.len(),
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
        let targets = pages().filter(|page| page.checkpoint_target != Lsn::ZERO).count();
        same("pages that the checkpoint waits for", self.checkpoint.pages_left, targets as u64)?;
        self.audit_pages()?;
        let writes = self.ctx.ops.iter().map(|(_, op)| match op {
            OpKind::PageWrite(versions) => versions.len(),
            _ => 0,
        });
        same("pages being written", self.writeback.page_writes, writes.sum())?;

        let moves = self
            .requests
            .pending
            .iter()
            .filter(|(_, pending)| matches!(pending.kind, PendingKind::Move(..)))
            .count();
        same(
            "moves on their way",
            self.requests.held.moves,
            moves + self.compaction.asked.reading(),
        )?;

        let parts = self.requests.pending.iter().filter_map(|(_, pending)| match &pending.kind {
            PendingKind::Part(part) => part.reserved,
            _ => None,
        });
        let reserved = parts.fold(Reserved::default(), Reserved::plus);
        same("what is reserved for parts", self.participant.reserved, reserved)
    }

    /// Whether each page counts its versions on their way, and its image is its own.
    fn audit_pages(&self) -> Result<(), String> {
        let mut on_their_way: BTreeMap<PageIdx, usize> = BTreeMap::new();
        let under_way = self.writeback.versions.iter().map(|(_, version)| version.page);
        under_way
            .chain(self.compaction.moves.iter().copied())
            .for_each(|idx| *on_their_way.entry(idx).or_default() += 1);
        for (idx, page) in self.cache.table.pages.iter() {
            let count = on_their_way.get(&idx).copied().unwrap_or(0);
            same(
                format_args!("versions of {:?} on their way", page.key),
                page.versions as usize,
                count,
            )?;
            let image = page.image.map(|no| &self.log.open.images[no.index()]);
            same(
                format_args!("the image of {:?}", page.key),
                image.is_none_or(|image| image.key == page.key && !image.is_freed),
                true,
            )?;
        }
        Ok(())
    }

    /// Whether all that could leave memory is known to the eviction policy, and nothing is kept for
    /// nobody.
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
}

fn same<T: PartialEq + Debug>(what: impl Display, kept: T, counted: T) -> Result<(), String> {
    if kept == counted {
        Ok(())
    } else {
        Err(format!("{what}: {kept:?} by what is kept, {counted:?} counted"))
    }
}
