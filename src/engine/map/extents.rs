//! The extents: which shard may fill them, what is live in them, and when a block becomes free
//! again.
//!
//! ```text
//! Free --open--> Open(stream) --full--> Closing --summary written--> Closed --none live--> Free
//! Free, Closed --named by the log--> NamedByLog --end of redo--> Closing, Closed
//! Closed --the store is opened, and it is not full--> Open(stream)
//! ```
//! Invariants
//! 1. Blocks are handed out front to back within an extent, once; an extent is filled again only
//!    after `Free`. An opening continues one that is not full, after the blocks that its summary
//!    lists.
//! 2. `live` counts the blocks that the map in memory names, or that an older durable root or a log
//!    record may still name. `unpublished` counts those that were handed out but that the map does
//!    not name yet. An extent is free only when both are zero.
//! 3. `not_in_new_root` is the part of `live` that the roots of the checkpoint in progress do *not*
//!    name: blocks named after their virtual shard was captured (`named_since_capture`), or given
//!    up by the map before it was. So `live - not_in_new_root` is exactly what the new roots name,
//!    and that is what the table says.
//! 4. A block that the map gives up goes to its virtual shard's `pending_free` list. The next
//!    checkpoint *retires* it, and it stops being live when that checkpoint's superblock is
//!    durable: by then no root names it, and no log record that recovery would read. Until then it
//!    counts as `garbage`: `live - garbage` is what the map in memory names, and an extent in which
//!    that is zero is *reclaimable*: the next checkpoint frees it.
//! 5. Whatever a durable root names lies in an extent whose durable table row names a summary that
//!    lists it: each checkpoint writes the summaries of the extents still open, each time into the
//!    other of two areas. An extent gets at most one summary between two checkpoints.
//! 6. Each extent has one owner: the shard that fills it, counts in it and frees it. A free extent
//!    can change its owner.
//! 7. The counts of an extent agree with each other and with its state before and after each
//!    transition (`Extent::assert_state`).
//!
//! It plans; the shard writes.

mod checkpoint;
mod from_log;
mod garbage;
mod refill;
mod victims;

use super::remote_refs::RemoteRefs;
use crate::base::{BLOCK, BlockAddr, ExtentNo, VShard};
use crate::format::extent::{
    Item, ItemKind, TableRow, data_blocks, encode_summary, summary_at, summary_blocks,
};
use std::collections::BTreeSet;
use victims::Unreadable;

/// The streams of blocks: each fills extents of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stream {
    /// Pages as they are written.
    Data,
    /// Map nodes.
    Map,
    /// Pages moved by compaction: they have lived longer, and probably will.
    Moved,
}

const STREAMS: usize = 3;

/// State of an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ExtentState {
    /// Another shard owns it.
    OfAnotherShard,
    /// Nothing in it is needed.
    Free,
    /// Being filled.
    Open,
    /// Named by log records that recovery redoes: no block of it is handed out, but redo may
    /// register blocks that the log names.
    NamedByLog,
    /// Full, or not filled further after recovery; its last summary is not written yet.
    Closing,
    /// Filled, with a summary.
    Closed,
}

#[derive(Clone, Debug)]
struct Extent {
    state: ExtentState,
    live: u32,
    unpublished: u32,
    not_in_new_root: u32,
    garbage: u32,
    summary_crc: u32,
    summary_slot: u8,
    /// Items in the summary as last encoded.
    summarized: usize,
    /// Whether the last summary is encoded: there will be no other.
    is_final: bool,
    /// The interval between two checkpoints in which its summary was last encoded.
    summarized_in: u64,
    next_block: u32,
    items: Vec<Item>,
}

/// The memory that every shard needs for each extent of the data space. All shards together need
/// the same once more: the extent's number in its owner's set of free ones, and, while a checkpoint
/// is written, its row, once as the owner sends it to the leader and once in the table.
/// `Options::memory_bytes` says so.
const EXTENT_BYTES: usize = 72;
/// A number in the set of free extents; measured: 10 to 13 bytes.
const FREE_BYTES: usize = 16;
const _: () = assert!(size_of::<Extent>() == EXTENT_BYTES);
const _: () =
    assert!(FREE_BYTES + size_of::<(ExtentNo, TableRow)>() + size_of::<TableRow>() <= EXTENT_BYTES);

const FREE: Extent = Extent::empty(ExtentState::Free);
const OF_ANOTHER_SHARD: Extent = Extent::empty(ExtentState::OfAnotherShard);

impl Extent {
    const fn empty(state: ExtentState) -> Extent {
        Extent {
            state,
            live: 0,
            unpublished: 0,
            not_in_new_root: 0,
            garbage: 0,
            summary_crc: 0,
            summary_slot: 0,
            summarized: 0,
            is_final: false,
            summarized_in: 0,
            next_block: 0,
            items: Vec::new(),
        }
    }

    /// Whether the map names nothing in it any more: it is free once its garbage is retired.
    fn is_reclaimable(&self) -> bool {
        self.state == ExtentState::Closed
            && self.unpublished == 0
            && self.live > 0
            && self.live == self.garbage
    }

    /// Panics if the counts contradict each other or the state: that is a bug, and continuing would
    /// hand out blocks that something names, or never free them.
    fn assert_state(&self, data_blocks: u32) {
        let (live, handed_out) = (self.live, self.live + self.unpublished);
        assert!(self.garbage <= live, "more garbage than live blocks: {self:?}");
        assert!(handed_out <= data_blocks, "more blocks in use than there are: {self:?}");
        assert!(self.summarized <= self.items.len() || self.items.is_empty(), "{self:?}");
        match self.state {
            ExtentState::OfAnotherShard | ExtentState::Free => assert!(
                handed_out == 0 && self.not_in_new_root == 0 && self.next_block == 0,
                "an extent in which nothing is needed counts blocks: {self:?}"
            ),
            ExtentState::Open => {
                let next = self.next_block;
                assert!(0 < next && next < data_blocks && !self.is_final, "{self:?}");
                assert!(handed_out <= next && self.items.len() <= next as usize, "{self:?}");
            }
            ExtentState::NamedByLog => assert!(self.next_block == 0 && !self.is_final, "{self:?}"),
            ExtentState::Closing => assert!(
                self.is_final == self.items.is_empty(),
                "items are kept until the last summary is encoded: {self:?}"
            ),
            ExtentState::Closed => assert!(self.items.is_empty(), "{self:?}"),
        }
    }
}

#[derive(Default)]
struct PerVShard {
    /// The extents of blocks that the map has named since the last capture.
    named_since_capture: Vec<ExtentNo>,
    /// Blocks that the map has given up since the last capture.
    pending_free: Vec<BlockAddr>,
}

/// The sizes and totals, for reports and for decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Space {
    /// Extents that this shard owns.
    pub total: u32,
    /// Free ones.
    pub free: u32,
    /// Data blocks in use, or held for an older root.
    pub live_blocks: u64,
    /// Data blocks of an extent.
    pub data_blocks: u32,
}

/// All extents, and the contents of those that this shard owns.
pub(crate) struct Extents {
    store_id: [u8; 16],
    extent_blocks: u32,
    data_blocks: u32,
    extents: Vec<Extent>,
    /// Extents that this shard owns.
    owned_count: u32,
    remote_refs: RemoteRefs,
    /// Blocks here that other shards are about to give up.
    expected: usize,
    free: BTreeSet<u32>,
    open: [Option<ExtentNo>; STREAMS],
    per_vshard: Vec<PerVShard>,
    /// Blocks given up after the checkpoint had begun and before their virtual shard was captured:
    /// the next checkpoint retires them.
    pending_free_captured: Vec<BlockAddr>,
    retiring: Vec<BlockAddr>,
    live_blocks: u64,
    /// Blocks here that the map has given up and no checkpoint has retired yet.
    garbage_blocks: usize,
    /// Blocks that have become garbage since the store was opened.
    died: u64,
    /// Extents that the next checkpoint frees.
    reclaimable: u32,
    /// Grows with each checkpoint that ends.
    interval: u64,
    unreadable: Unreadable,
}

impl Extents {
    /// The extents that a table describes; `count` may exceed its rows: the rest are free.
    /// `is_mine` says which of them this shard owns.
    pub(crate) fn new(
        store_id: [u8; 16],
        extent_blocks: u32,
        vshards_count: u32,
        rows: &[TableRow],
        count: u32,
        is_mine: impl Fn(ExtentNo) -> bool,
    ) -> Self {
        let mut this = Extents {
            store_id,
            extent_blocks,
            data_blocks: data_blocks(extent_blocks),
            extents: Vec::new(),
            owned_count: 0,
            remote_refs: RemoteRefs::new(vshards_count),
            expected: 0,
            free: BTreeSet::new(),
            open: [None; STREAMS],
            per_vshard: (0..vshards_count).map(|_| PerVShard::default()).collect(),
            pending_free_captured: Vec::new(),
            retiring: Vec::new(),
            live_blocks: 0,
            garbage_blocks: 0,
            died: 0,
            reclaimable: 0,
            interval: 1,
            unreadable: Unreadable::default(),
        };
        this.cover(count);
        this.grant((0..count).map(ExtentNo::new).filter(|no| is_mine(*no)));
        let in_use =
            |(i, row): &(usize, &TableRow)| row.state == 1 && is_mine(ExtentNo::new(*i as u32));
        for (i, row) in rows.iter().enumerate().take(count as usize).filter(in_use) {
            let live = u32::from(row.live.get());
            this.extents[i] = Extent {
                state: ExtentState::Closed,
                live,
                summary_crc: row.summary_crc.get(),
                summary_slot: row.summary_slot,
                ..FREE
            };
            this.live_blocks += u64::from(live);
            this.free.remove(&(i as u32));
        }
        this
    }

    /// Makes sure that `count` extents are known. New ones belong to other shards until they are
    /// [granted](Self::grant).
    pub(crate) fn cover(&mut self, count: u32) {
        self.extents.resize(self.extents.len().max(count as usize), OF_ANOTHER_SHARD);
    }

    /// Takes free extents over: this shard owns them from now on.
    pub(crate) fn grant(&mut self, extents: impl IntoIterator<Item = ExtentNo>) {
        for no in extents {
            self.cover(no.get() + 1);
            let extent = &mut self.extents[no.index()];
            assert_eq!(extent.state, ExtentState::OfAnotherShard, "{no:?} is granted once");
            *extent = FREE;
            assert!(self.free.insert(no.get()), "{no:?} was free, and of another shard");
            self.owned_count += 1;
        }
    }

    /// Gives up to `count` free extents away.
    pub(crate) fn give_away(&mut self, count: usize) -> Vec<ExtentNo> {
        let given: Vec<u32> = self.free.iter().rev().take(count).copied().collect();
        for no in &given {
            self.assert_state(ExtentNo::new(*no));
            assert_eq!(self.extents[*no as usize].state, ExtentState::Free, "extent {no}");
            self.free.remove(no);
            self.extents[*no as usize] = OF_ANOTHER_SHARD;
            self.owned_count -= 1;
        }
        given.into_iter().map(ExtentNo::new).collect()
    }

    /// Extents of all owners that are known here.
    pub(crate) fn count(&self) -> u32 {
        self.extents.len() as u32
    }

    /// Whether this shard owns `no`.
    pub(crate) fn is_mine(&self, no: ExtentNo) -> bool {
        self.extents
            .get(no.index())
            .is_some_and(|extent| extent.state != ExtentState::OfAnotherShard)
    }

    /// Blocks for data in an extent.
    pub(crate) fn data_blocks(&self) -> u32 {
        self.data_blocks
    }

    /// The totals.
    pub(crate) fn space(&self) -> Space {
        Space {
            total: self.owned_count,
            free: self.free.len() as u32,
            live_blocks: self.live_blocks,
            data_blocks: self.data_blocks(),
        }
    }

    /// Extents whose last summary is not written yet, and those that are open and have items that
    /// their summary does not list: all that a checkpoint must write before its table.
    pub(crate) fn unsummarized(&self) -> Vec<ExtentNo> {
        let numbers = (0..self.extents.len() as u32).map(ExtentNo::new);
        numbers.filter(|no| self.is_unsummarized(*no)).collect()
    }

    /// Full extents whose last summary had to wait for the end of a checkpoint.
    pub(crate) fn filled(&self) -> Vec<ExtentNo> {
        let mut due = self.unsummarized();
        due.retain(|no| self.extents[no.index()].state == ExtentState::Closing);
        due
    }

    /// Whether `no` needs a summary, and may have it before the checkpoint in progress ends.
    pub(crate) fn is_unsummarized(&self, no: ExtentNo) -> bool {
        let extent = &self.extents[no.index()];
        match extent.state {
            _ if extent.summarized_in == self.interval => false,
            ExtentState::Closing => !extent.is_final,
            ExtentState::Open | ExtentState::NamedByLog => extent.items.len() > extent.summarized,
            _ => false,
        }
    }

    /// Hands out one block; also returns the extent that this filled up, if any: its summary must
    /// be written. `None`: no extent is free.
    pub(crate) fn alloc(
        &mut self,
        stream: Stream,
        what: ItemKind,
    ) -> Option<(BlockAddr, Option<ExtentNo>)> {
        let slot = stream as usize;
        if self.open[slot].is_none() {
            let no = self.free.pop_first()?;
            assert_eq!(self.extents[no as usize].state, ExtentState::Free, "extent {no}");
            self.extents[no as usize] = Extent { state: ExtentState::Open, ..FREE };
            self.open[slot] = Some(ExtentNo::new(no));
        } else if let Some(no) = self.open[slot] {
            self.assert_state(no);
        }
        let no = self.open[slot]?;
        let data_blocks = self.data_blocks();
        let extent = &mut self.extents[no.index()];
        assert_eq!(extent.state, ExtentState::Open, "{no:?} is filled");
        let block = extent.next_block;
        extent.next_block += 1;
        extent.unpublished += 1;
        extent.items.push(Item { block, what });
        let full = extent.next_block == data_blocks;
        if full {
            extent.state = ExtentState::Closing;
            self.open[slot] = None;
        }
        self.assert_state(no);
        Some((BlockAddr { extent: no, block }, full.then_some(no)))
    }

    /// Fills the next summary of an open or closing extent, and returns where it goes.
    pub(crate) fn encode_summary(&mut self, no: ExtentNo, out: &mut [u8]) -> BlockAddr {
        self.assert_state(no);
        assert!(self.is_unsummarized(no), "one summary between two checkpoints, of {no:?}");
        let store_id = self.store_id;
        let extent = &mut self.extents[no.index()];
        extent.summary_slot ^= 1;
        extent.summarized_in = self.interval;
        extent.summary_crc = encode_summary(store_id, no, &extent.items, out);
        extent.summarized = extent.items.len();
        if extent.state == ExtentState::Closing {
            extent.items = Vec::new();
            extent.is_final = true;
        }
        self.assert_state(no);
        self.summary_place(no)
    }

    /// Called when the summary of `no` has been written.
    pub(crate) fn summary_written(&mut self, no: ExtentNo) {
        let extent = &mut self.extents[no.index()];
        // It filled up while the summary was being written: another follows.
        if extent.state == ExtentState::Closing && extent.is_final {
            self.edit(no, |extent| extent.state = ExtentState::Closed);
            self.free_if_empty(no);
        }
    }

    /// The address of the summary of `no`.
    pub(crate) fn summary_place(&self, no: ExtentNo) -> BlockAddr {
        BlockAddr {
            extent: no,
            block: summary_at(self.extent_blocks, self.extents[no.index()].summary_slot),
        }
    }

    /// Bytes of a summary.
    pub(crate) fn summary_bytes(&self) -> usize {
        self.summary_blocks() as usize * BLOCK
    }

    /// Blocks of a summary.
    pub(crate) fn summary_blocks(&self) -> u32 {
        summary_blocks(self.extent_blocks)
    }

    /// The checksum of the summary of a closed extent.
    pub(crate) fn summary_crc(&self, no: ExtentNo) -> u32 {
        self.extents[no.index()].summary_crc
    }

    /// Records that the map of `vshard` names `place` from now on, which was handed out before.
    pub(crate) fn name_page(&mut self, vshard: VShard, place: BlockAddr) {
        assert!(
            self.extents[place.extent.index()].unpublished > 0,
            "{place:?} was never handed out"
        );
        self.edit(place.extent, |extent| {
            extent.unpublished -= 1;
            extent.live += 1;
            extent.not_in_new_root += 1;
        });
        self.live_blocks += 1;
        self.per_vshard[vshard.index()].named_since_capture.push(place.extent);
    }

    /// Records that the map of `vshard` no longer names `place`: it is free once a checkpoint has
    /// retired it.
    pub(crate) fn free_later(&mut self, vshard: VShard, place: BlockAddr) {
        if !self.is_mine(place.extent) {
            self.remote_refs.leave(vshard, place);
            return;
        }
        self.becomes_garbage(place);
        self.per_vshard[vshard.index()].pending_free.push(place);
    }

    /// Changes an extent and keeps the number of reclaimable ones up to date.
    fn edit(&mut self, no: ExtentNo, change: impl FnOnce(&mut Extent)) {
        // All changes go through here: the state before this one was asserted after the last one.
        let data_blocks = self.data_blocks();
        let extent = &mut self.extents[no.index()];
        self.reclaimable -= u32::from(extent.is_reclaimable());
        change(extent);
        self.reclaimable += u32::from(extent.is_reclaimable());
        extent.assert_state(data_blocks);
    }

    fn assert_state(&self, no: ExtentNo) {
        self.extents[no.index()].assert_state(self.data_blocks());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExtentState::{Closed, Closing, Free, NamedByLog, OfAnotherShard, Open};

    fn is_refused(extent: Extent) -> bool {
        std::panic::catch_unwind(|| extent.assert_state(62)).is_err()
    }

    fn items(count: u32) -> Vec<Item> {
        let what = ItemKind::Page(crate::base::PageKey::default(), crate::base::Lsn::new(1));
        (0..count).map(|block| Item { block, what }).collect()
    }

    /// If this fails, counts that have drifted go unnoticed until a block that something names is
    /// handed out again, or one that nothing names never becomes free.
    #[test]
    fn an_extent_that_contradicts_itself_stops_the_shard() {
        let in_state = |state| Extent { state, ..FREE };
        let open = Extent { state: Open, next_block: 3, live: 2, items: items(3), ..FREE };
        let closed = Extent { state: Closed, live: 5, garbage: 5, unpublished: 57, ..FREE };
        let reserved = Extent { state: NamedByLog, live: 2, items: items(2), ..FREE };
        let closing = Extent { state: Closing, next_block: 62, items: items(62), ..FREE };
        let last = Extent { state: Closing, next_block: 62, is_final: true, ..FREE };
        for right in [&FREE, &OF_ANOTHER_SHARD, &open, &closed, &reserved, &closing, &last] {
            assert!(!is_refused(right.clone()), "{right:?}");
        }
        let wrong = [
            Extent { garbage: 6, ..closed.clone() },
            Extent { unpublished: 58, ..closed.clone() },
            Extent { items: items(1), ..closed },
            Extent { live: 1, ..in_state(Free) },
            Extent { unpublished: 1, ..in_state(OfAnotherShard) },
            Extent { not_in_new_root: 1, ..in_state(Free) },
            Extent { next_block: 1, ..in_state(Free) },
            Extent { unpublished: 2, ..open.clone() },
            Extent { items: items(4), ..open.clone() },
            Extent { summarized: 4, ..open.clone() },
            Extent { is_final: true, ..open.clone() },
            Extent { next_block: 62, ..open.clone() },
            Extent { next_block: 0, live: 0, items: items(0), ..open },
            Extent { next_block: 1, ..reserved.clone() },
            Extent { is_final: true, ..reserved },
            Extent { is_final: true, ..closing },
            Extent { is_final: false, ..last },
        ];
        for extent in wrong {
            assert!(is_refused(extent.clone()), "{extent:?}");
        }
    }
}
