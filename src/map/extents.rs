//! Extents: who may be filled, what is live in them, and when a place is free again.
//!
//! ```text
//! Free --open--> Open(stream) --full-----------> Closing --summary written--> Closed --nothing live--> Free
//! Free, Closed --named by the log--> Adopting --end of redo--> Closing, Closed
//! ```
//! Invariants
//! 1. Places are handed out front to back within an extent, once; an extent is filled again only after `Free`.
//! 2. `live` = places of the extent that the map in memory names, or that an older durable root or a log record
//!    may still name. `assigned` = places handed out and not yet named. An extent is free only when both are zero.
//! 3. `excluded` = the part of `live` that the roots of the checkpoint under way do *not* name: named since the
//!    capture of their virtual shard (`fresh`), or left before it. So `live - excluded` is exactly what the new
//!    roots name, and that is what the table says.
//! 4. A place that the map left goes to its virtual shard's `left` list; the next checkpoint *retires* it, and it
//!    stops being live when that checkpoint's superblock is durable: by then no root names it, and no log record
//!    that recovery would read.
//! 5. Whatever a durable root names lies in an extent whose durable table row names a summary that lists it: each
//!    checkpoint writes the summaries of the extents still open, each time into the other of two areas. An extent
//!    gets at most one summary between two checkpoints.
//!
//! It plans; the shard writes.

use crate::format::extent::{
    Item, ItemKind, TABLE_ROWS, TableRow, data_blocks, encode_summary, encode_table, summary_at, summary_blocks,
};
use crate::types::{BLOCK, ExtentNo, Place, VShard};
use std::collections::BTreeSet;

/// What goes together into one extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stream {
    /// Pages as they are written.
    Data,
    /// Map nodes.
    Map,
    /// Pages moved by compaction: they have stayed longer, and will.
    Moved,
}

const STREAMS: usize = 3;

/// State of an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ExtentState {
    /// Nothing in it is needed.
    Free,
    /// Being filled.
    Open,
    /// Named by log records that recovery redoes: nothing is put into it, but items of the log may be adopted.
    Adopting,
    /// Full, or given up by recovery; its last summary is not written yet.
    Closing,
    /// Filled, with a summary.
    Closed,
}

#[derive(Clone, Debug)]
struct Extent {
    state: ExtentState,
    live: u32,
    assigned: u32,
    excluded: u32,
    summary_crc: u32,
    summary_slot: u8,
    /// Items in the summary as last encoded.
    summarized: usize,
    /// The last summary is encoded: there will be no other.
    is_final: bool,
    /// Between which checkpoints its summary was last encoded.
    summarized_in: u64,
    next_block: u32,
    items: Vec<Item>,
}

const FREE: Extent = Extent {
    state: ExtentState::Free,
    live: 0,
    assigned: 0,
    excluded: 0,
    summary_crc: 0,
    summary_slot: 0,
    summarized: 0,
    is_final: false,
    summarized_in: 0,
    next_block: 0,
    items: Vec::new(),
};

#[derive(Default)]
struct PerVShard {
    /// Places named since the last capture.
    fresh: Vec<ExtentNo>,
    /// Places that the map left since the last capture.
    left: Vec<Place>,
}

/// Sizes and sums for reports and for deciding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Space {
    /// Extents in all.
    pub total: u32,
    /// Free ones.
    pub free: u32,
    /// Data blocks in use, or held for an older root.
    pub live_blocks: u64,
    /// Data blocks of an extent.
    pub data_blocks: u32,
}

/// All extents that one shard owns.
pub(crate) struct Extents {
    store_id: [u8; 16],
    extent_blocks: u32,
    extents: Vec<Extent>,
    free: BTreeSet<u32>,
    open: [Option<ExtentNo>; STREAMS],
    per_vshard: Vec<PerVShard>,
    /// Left before the capture of their virtual shard, after the checkpoint had begun: retired by the next one.
    left_captured: Vec<Place>,
    retiring: Vec<Place>,
    live_blocks: u64,
    /// Grows with each checkpoint that ends.
    interval: u64,
}

impl Extents {
    /// The extents as a table says; `count` may be more than it has rows: the rest is free.
    pub(crate) fn new(
        store_id: [u8; 16],
        extent_blocks: u32,
        vshards_count: u32,
        rows: &[TableRow],
        count: u32,
    ) -> Self {
        let mut this = Extents {
            store_id,
            extent_blocks,
            extents: Vec::new(),
            free: BTreeSet::new(),
            open: [None; STREAMS],
            per_vshard: (0..vshards_count).map(|_| PerVShard::default()).collect(),
            left_captured: Vec::new(),
            retiring: Vec::new(),
            live_blocks: 0,
            interval: 1,
        };
        this.grow(count);
        for (i, row) in rows.iter().enumerate().take(count as usize).filter(|(_, row)| row.state == 1) {
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

    /// Appends free extents until there are `count`.
    pub(crate) fn grow(&mut self, count: u32) {
        self.free.extend(self.extents.len() as u32..count);
        self.extents.resize(self.extents.len().max(count as usize), FREE);
    }

    /// Blocks for data in an extent.
    pub(crate) fn data_blocks(&self) -> u32 {
        data_blocks(self.extent_blocks)
    }

    /// Sums.
    pub(crate) fn space(&self) -> Space {
        Space {
            total: self.extents.len() as u32,
            free: self.free.len() as u32,
            live_blocks: self.live_blocks,
            data_blocks: self.data_blocks(),
        }
    }

    /// An extent that log records name, before recovery writes anything: nothing is put into it any more. If it was
    /// in use, returns where its summary is (and its sum): the caller reads it and brings the items.
    pub(crate) fn reserve_named(&mut self, no: ExtentNo) -> Option<(Place, u32)> {
        let at = self.summary_place(no);
        let extent = &mut self.extents[no.index()];
        let was = extent.state;
        if was == ExtentState::Adopting {
            return None;
        }
        self.free.remove(&no.get());
        extent.state = ExtentState::Adopting;
        (was == ExtentState::Closed).then_some((at, extent.summary_crc))
    }

    /// The items that the summary of a [reserved](Self::reserve_named) extent lists.
    pub(crate) fn restore_items(&mut self, no: ExtentNo, items: Vec<Item>) {
        let extent = &mut self.extents[no.index()];
        extent.summarized = items.len();
        extent.items = items;
    }

    /// Redo is over: no more items come from the log.
    pub(crate) fn end_adoption(&mut self) {
        for i in 0..self.extents.len() {
            let extent = &mut self.extents[i];
            if extent.state != ExtentState::Adopting {
                continue;
            }
            // A summary that lists everything is as good as a last one.
            let listed = extent.items.len() == extent.summarized;
            extent.state = if listed { ExtentState::Closed } else { ExtentState::Closing };
            if listed {
                extent.items = Vec::new();
                self.free_if_empty(ExtentNo::new(i as u32));
            }
        }
    }

    /// During recovery: a place that a log record names, now to be named by the map too.
    pub(crate) fn adopt(&mut self, place: Place, what: ItemKind) {
        let extent = &mut self.extents[place.extent.index()];
        assert_eq!(extent.state, ExtentState::Adopting, "named extents were reserved");
        extent.assigned += 1;
        if !extent.items.iter().any(|item| item.block == place.block) {
            extent.items.push(Item { block: place.block, what });
        }
    }

    /// Extents whose last summary is not written yet, and those that are open and have items that their summary
    /// does not list: all that a checkpoint must write before its table.
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

    /// Whether `no` needs a summary written, and may have it before the checkpoint under way ends.
    pub(crate) fn is_unsummarized(&self, no: ExtentNo) -> bool {
        let extent = &self.extents[no.index()];
        match extent.state {
            _ if extent.summarized_in == self.interval => false,
            ExtentState::Closing => !extent.is_final,
            ExtentState::Open | ExtentState::Adopting => extent.items.len() > extent.summarized,
            _ => false,
        }
    }

    /// A place for one block, and the extent that this filled up, if any: its summary is to be written.
    /// `None`: no extent is free.
    pub(crate) fn alloc(&mut self, stream: Stream, what: ItemKind) -> Option<(Place, Option<ExtentNo>)> {
        let slot = stream as usize;
        if self.open[slot].is_none() {
            let no = self.free.pop_first()?;
            self.extents[no as usize] = Extent { state: ExtentState::Open, ..FREE };
            self.open[slot] = Some(ExtentNo::new(no));
        }
        let no = self.open[slot]?;
        let data_blocks = self.data_blocks();
        let extent = &mut self.extents[no.index()];
        let block = extent.next_block;
        extent.next_block += 1;
        extent.assigned += 1;
        extent.items.push(Item { block, what });
        let full = extent.next_block == data_blocks;
        if full {
            extent.state = ExtentState::Closing;
            self.open[slot] = None;
        }
        Some((Place { extent: no, block }, full.then_some(no)))
    }

    /// Fills the next summary of an open or closing extent, and returns where it goes.
    pub(crate) fn encode_summary(&mut self, no: ExtentNo, out: &mut [u8]) -> Place {
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
        self.summary_place(no)
    }

    /// The summary of `no` has been written.
    pub(crate) fn summary_written(&mut self, no: ExtentNo) {
        let extent = &mut self.extents[no.index()];
        // Filled up while the summary was under way: one more follows.
        if extent.state == ExtentState::Closing && extent.is_final {
            extent.state = ExtentState::Closed;
            self.free_if_empty(no);
        }
    }

    /// Where the summary of `no` is.
    pub(crate) fn summary_place(&self, no: ExtentNo) -> Place {
        Place { extent: no, block: summary_at(self.extent_blocks, self.extents[no.index()].summary_slot) }
    }

    /// Bytes of a summary.
    pub(crate) fn summary_bytes(&self) -> usize {
        summary_blocks(self.extent_blocks) as usize * BLOCK
    }

    /// Sum of the summary of a closed extent.
    pub(crate) fn summary_crc(&self, no: ExtentNo) -> u32 {
        self.extents[no.index()].summary_crc
    }

    /// The map of `vshard` names `place` from now on.
    pub(crate) fn name_page(&mut self, vshard: VShard, place: Place) {
        let extent = &mut self.extents[place.extent.index()];
        assert!(extent.assigned > 0, "{place:?} was never handed out");
        extent.assigned -= 1;
        extent.live += 1;
        extent.excluded += 1;
        self.live_blocks += 1;
        self.per_vshard[vshard.index()].fresh.push(place.extent);
    }

    /// The map of `vshard` does not name `place` any more.
    pub(crate) fn leave_page(&mut self, vshard: VShard, place: Place) {
        self.per_vshard[vshard.index()].left.push(place);
    }

    /// A checkpoint begins: everything left so far will be retired by it.
    pub(crate) fn begin_checkpoint(&mut self) {
        assert!(self.retiring.is_empty(), "one checkpoint at a time");
        self.retiring = std::mem::take(&mut self.left_captured);
        for i in 0..self.per_vshard.len() {
            let left = std::mem::take(&mut self.per_vshard[i].left);
            for place in &left {
                self.extents[place.extent.index()].excluded += 1;
            }
            self.retiring.extend(left);
        }
    }

    /// The tree of `vshard` was captured: `nodes` are the places of nodes that the new root names, `retired` those
    /// that it left.
    pub(crate) fn captured(&mut self, vshard: VShard, nodes: impl Iterator<Item = Place>, retired: Vec<Place>) {
        for place in nodes {
            let extent = &mut self.extents[place.extent.index()];
            extent.assigned -= 1;
            extent.live += 1;
            self.live_blocks += 1;
        }
        let mine = &mut self.per_vshard[vshard.index()];
        for extent in mine.fresh.drain(..) {
            self.extents[extent.index()].excluded -= 1;
        }
        let left = std::mem::take(&mut mine.left);
        for place in left.iter().chain(&retired) {
            self.extents[place.extent.index()].excluded += 1;
        }
        self.left_captured.extend(left);
        self.retiring.extend(retired);
    }

    /// Table blocks.
    pub(crate) fn table_blocks(&self) -> u32 {
        (self.extents.len() as u32).div_ceil(TABLE_ROWS)
    }

    /// Fills table block `index` for checkpoint `checkpoint`.
    pub(crate) fn encode_table(&self, index: u32, checkpoint: u64, out: &mut [u8]) {
        let from = (index * TABLE_ROWS) as usize;
        let to = (from + TABLE_ROWS as usize).min(self.extents.len());
        let row = |e: &Extent| {
            let live = e.live - e.excluded;
            if live == 0 {
                return TableRow::default();
            }
            assert!(e.state != ExtentState::Free, "what a root names has a summary");
            TableRow {
                state: 1,
                live: (live as u16).into(),
                summary_crc: e.summary_crc.into(),
                summary_slot: e.summary_slot,
                ..TableRow::default()
            }
        };
        let rows: Vec<_> = self.extents[from..to].iter().map(row).collect();
        encode_table(self.store_id, index, checkpoint, &rows, out);
    }

    /// The checkpoint's superblock is durable: what it retired is free. Returns the number of blocks.
    pub(crate) fn end_checkpoint(&mut self) -> u64 {
        self.interval += 1;
        let retiring = std::mem::take(&mut self.retiring);
        for place in &retiring {
            let extent = &mut self.extents[place.extent.index()];
            extent.live -= 1;
            extent.excluded -= 1;
            self.live_blocks -= 1;
            self.free_if_empty(place.extent);
        }
        retiring.len() as u64
    }

    /// For the planted bug that reuses places too early: whether `place` could be taken once more.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn hand_out_again(&mut self, place: Place) -> bool {
        let extent = &mut self.extents[place.extent.index()];
        let taken = extent.state != ExtentState::Free;
        extent.assigned += u32::from(taken);
        taken
    }

    fn free_if_empty(&mut self, no: ExtentNo) {
        let extent = &mut self.extents[no.index()];
        if extent.state == ExtentState::Closed && extent.live == 0 && extent.assigned == 0 {
            *extent = FREE;
            self.free.insert(no.get());
        }
    }

    /// The closed extent with the least live blocks, if its share of live blocks is below `share_max` (of 1,000).
    pub(crate) fn emptiest(&self, share_max: u32, except: impl Fn(ExtentNo) -> bool) -> Option<ExtentNo> {
        let limit = self.data_blocks() * share_max / 1000;
        self.extents
            .iter()
            .enumerate()
            .map(|(i, e)| (ExtentNo::new(i as u32), e))
            .filter(|(no, e)| e.state == ExtentState::Closed && e.assigned == 0 && e.live <= limit && !except(*no))
            .min_by_key(|(_, e)| e.live - e.excluded.min(e.live))
            .map(|(no, _)| no)
    }

    /// Blocks left by the map that no checkpoint has retired yet.
    pub(crate) fn left_count(&self) -> usize {
        self.left_captured.len() + self.retiring.len() + self.per_vshard.iter().map(|v| v.left.len()).sum::<usize>()
    }
}
