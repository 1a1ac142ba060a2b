//! Empties extents: reads the summaries of the emptiest, and moves what the maps still name in them
//! elsewhere.
//!
//! ```text
//! owner of the extent: reads its summary --Move--> the shard whose map would name an item
//! that shard: not named? --Moved--> owner
//!             a page: loaded, flushed to a new block; a node: marked dirty --Moved--> owner
//! ```
//! Invariants
//! 1. An item moves only if the map names this very place; everything else in the extent is garbage
//!    already.
//! 2. A moved page keeps its version; its old block is given back like any block that the map gives
//!    up.
//! 3. A map node moves by being marked dirty: the next checkpoint writes it elsewhere.
//! 4. It stops for a checkpoint when many nodes are dirty: they can't leave memory before.
//! 5. Few extents at a time at each owner, and a bounded number of items: commits and reads go on.
//! 6. It continues during checkpoints, which treat what it moves like changes of commits.
//! 7. It takes no place that is owed to a commit or a dirty node: rather, an item stays where it
//!    is.
//! 8. Map nodes that have to be read first are read in parallel, and hold up nothing behind them.
//! 9. What can't be read is read once: its extent is passed over until it is garbage, and the
//!    operator is told once.

use crate::base::error::{Error, ErrorKind};
use crate::base::{
    BLOCK, BlockAddr, ExtentNo, IndexedSlab, NodeMoveIdx, PageIdx, RequestIdx, ShardId,
};
use crate::engine::Work;
use crate::engine::cache::table::Needs;
use crate::engine::map::Lookup;
use crate::engine::message::Message;
use crate::engine::requests::PendingKind;
use crate::engine::reservations::dirty_nodes_are_many;
use crate::engine::{NodeWaiter, OpKind, Shard, Step};
use crate::format::extent::{Item, ItemKind, NodeKey, decode_summary};
use crate::io::{Completion, DiskOp, FileId};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// Extents with a larger share of live blocks (of 1,000) are left alone.
const SHARE_MAX: u32 = 850;
/// Extents being emptied at a time: enough to hide the latency of the device.
const EXTENTS_MAX: usize = 4;
/// Items on their way at a time, and the part of the memory that they may take.
const MOVES_MAX: usize = 1024;
const MOVES_MEMORY_SHARE: usize = 32;
/// Extents that moves leave free beyond what is owed to commits and dirty nodes.
const LEAVES_FREE: u64 = 3;
/// The most extents that one search chooses for compaction, and the largest part of all extents
/// that this may be: the choice is a little old when the last of them is begun.
const CHOSEN_MAX: usize = 16;
const CHOSEN_PART: u32 = 64;

/// The extents being emptied, and those that come next.
pub(in crate::engine) struct Compactor {
    under_way: Vec<Emptying>,
    /// Many moves are requested together, so that neighbours are read together.
    prepares: bool,
    /// The next ones, the emptiest last.
    chosen: Vec<ExtentNo>,
    /// Since the last checkpoint.
    begun: hashbrown::HashSet<ExtentNo, foldhash::fast::FixedState>,
    /// Victim selection is skipped until `Extents::died` reaches this.
    rests_until: u64,
}

/// An extent being emptied.
struct Emptying {
    extent: ExtentNo,
    /// `None` until the summary is read.
    items: Option<Vec<Item>>,
    next: usize,
    /// Items whose move has not been answered.
    asked: usize,
}

/// Extents being emptied by this shard, and what it moves for others.
pub(in crate::engine) struct Compaction {
    pub compactor: Compactor,
    /// Pages to move: clean, in memory, their leaf pinned.
    pub moves: Vec<PageIdx>,
    pub asked: Moves,
}

impl Compaction {
    pub fn new(hasher: foldhash::fast::FixedState) -> Self {
        Compaction { compactor: Compactor::new(hasher), moves: Vec::new(), asked: Moves::default() }
    }
}

impl Compactor {
    pub(in crate::engine) fn new(hasher: foldhash::fast::FixedState) -> Self {
        let begun = hashbrown::HashSet::with_hasher(hasher);
        Compactor {
            under_way: Vec::new(),
            prepares: false,
            chosen: Vec::new(),
            begun,
            rests_until: 0,
        }
    }

    /// Extents being emptied.
    pub(in crate::engine) fn count(&self) -> usize {
        self.under_way.len()
    }

    /// Called when a checkpoint has ended: every extent may be a victim again. Returns whether any
    /// was compacted since the last.
    pub(in crate::engine) fn look_again(&mut self) -> bool {
        let some = !self.under_way.is_empty() || !self.begun.is_empty();
        self.begun.clear();
        self.chosen.clear();
        self.rests_until = 0;
        some
    }

    fn of(&mut self, extent: ExtentNo) -> Option<&mut Emptying> {
        self.under_way.iter_mut().find(|c| c.extent == extent)
    }
}

/// Items that owners of extents have asked this shard to move.
#[derive(Default)]
pub(in crate::engine) struct Moves {
    asked: VecDeque<Asked>,
    /// Map nodes that wait for a read, of themselves or above; part of `Reservations::moves`.
    reading: IndexedSlab<NodeMoveIdx, Asked>,
}

/// An item to move out of `place`.
#[derive(Clone, Copy)]
struct Asked {
    owner: ShardId,
    what: ItemKind,
    place: BlockAddr,
    /// Its age among reads of nodes, once it has waited for one; 0 before.
    age: u64,
}

impl Moves {
    /// The moves that wait for a node.
    #[cfg(any(test, feature = "sim"))]
    pub(in crate::engine) fn reading(&self) -> usize {
        self.reading.len()
    }
}

impl Shard {
    /// Begins with the emptiest extent, if one is worth it; returns false if none is being emptied.
    pub(in crate::engine) fn begin_compaction(&mut self) -> bool {
        self.begin_one_more();
        self.space.compaction.compactor.count() > 0
    }

    /// Whether one more is being emptied.
    pub(in crate::engine) fn begin_one_more(&mut self) -> bool {
        let count = self.space.compaction.compactor.count();
        let rests = self.space.extents.died() < self.space.compaction.compactor.rests_until;
        // Each may fill as many blocks elsewhere before it is free itself.
        let may_move = self.may_move(1 + count as u64);
        if count >= EXTENTS_MAX
            || !may_move
            || rests
            || self.life.closing.is_some()
            || self.life.opening
        {
            return false;
        }
        // The extent comes first: the search for frames evicts, even what has just been read for a
        // request.
        let Some(extent) = self.next_victim() else { return false };
        let blocks = self.space.extents.summary_bytes() / BLOCK;
        if !self.ensure_frames(blocks as u32, Step::Compaction) {
            self.space.compaction.compactor.chosen.push(extent);
            return false;
        }
        let into =
            (0..blocks).map(|_| self.ctx.arena.alloc(0).expect("frames were ensured")).collect();
        let place = self.space.extents.summary_place(extent);
        self.space.compaction.compactor.begun.insert(extent);
        self.space.compaction.compactor.under_way.push(Emptying {
            extent,
            items: None,
            next: 0,
            asked: 0,
        });
        let offset = place.offset(self.ctx.limits.geometry.extent_bytes);
        self.ctx
            .submit(OpKind::SummaryRead(extent), DiskOp::Read { file: FileId::Data, offset, into });
        true
    }

    /// The next extent to empty.
    fn next_victim(&mut self) -> Option<ExtentNo> {
        let Compactor { begun, under_way, chosen, rests_until, .. } =
            &mut self.space.compaction.compactor;
        let known = |no| begun.contains(&no) || under_way.iter().any(|c| c.extent == no);
        while let Some(no) = chosen.pop() {
            if self.space.extents.to_move(no, SHARE_MAX).is_some() && !known(no) {
                return Some(no);
            }
        }
        let count = CHOSEN_MAX.min(1 + (self.space.extents.space().total / CHOSEN_PART) as usize);
        *chosen = self.space.extents.emptiest(SHARE_MAX, count, known);
        if chosen.is_empty() {
            // A search costs time; a tenth of an extent has to die before there can be much to
            // find.
            *rests_until =
                self.space.extents.died() + u64::from(self.space.extents.data_blocks() / 10).max(1);
        }
        chosen.pop()
    }

    /// Whether there is space for moves, and for `more` extents; what commits have been promised is
    /// not touched.
    pub(in crate::engine) fn may_move(&self, more: u64) -> bool {
        let left = (LEAVES_FREE + more) * u64::from(self.space.extents.data_blocks());
        self.free_blocks() >= self.owed_blocks() + left
    }

    pub(in crate::engine) fn summary_read(&mut self, extent: ExtentNo, completion: Completion) {
        self.ctx.need_all();
        let DiskOp::Read { into, .. } = completion.op else {
            unreachable!("a read completes as a read")
        };
        let bytes: Vec<u8> = into.iter().flat_map(|frame| frame.iter().copied()).collect();
        let crc = self.space.extents.summary_crc(extent);
        self.ctx.stats.checksums += 1;
        let items = completion.result.and_then(|()| {
            decode_summary(self.ctx.superblock.store_id, extent, crc, &bytes).map_err(|what| {
                Error::corrupt(format_args!("the summary of extent {} {what}", extent.get()))
            })
        });
        match (items, self.space.compaction.compactor.of(extent)) {
            (Ok(items), Some(compaction)) => compaction.items = Some(items),
            (Err(error), Some(_)) => {
                self.give_compaction_up(extent);
                if may_last(&error) && self.space.extents.pass_over_extent(extent) {
                    tracing::warn!(
                        extent = extent.get(),
                        %error,
                        "the summary of an extent can't be read: its space comes back only when \
                         everything in it is garbage; its pages can still be read"
                    );
                }
            }
            (_, None) => {}
        }
    }

    /// Called when the extent can't be emptied now: it stays as it is, and is not tried again
    /// before the next checkpoint.
    fn give_compaction_up(&mut self, extent: ExtentNo) {
        if let Some(compaction) = self.space.compaction.compactor.of(extent) {
            compaction.items = Some(Vec::new());
            compaction.next = 0;
        }
    }

    /// The most items on their way at a time, from here or moved by this shard.
    fn moves_max(&self) -> usize {
        MOVES_MAX.min(self.ctx.limits.memory_blocks as usize / MOVES_MEMORY_SHARE)
    }

    /// Requests the moves of further items.
    pub(in crate::engine) fn advance_compaction(&mut self) {
        if self.ctx.failed.is_some() {
            self.space.compaction.compactor.under_way.clear();
        }
        let moves_max = self.moves_max();
        let mut asked: usize =
            self.space.compaction.compactor.under_way.iter().map(|c| c.asked).sum();
        self.space.compaction.compactor.prepares |= asked <= moves_max / 2;
        let mut i = 0;
        while i < self.space.compaction.compactor.under_way.len() {
            let Emptying { extent, items, next, asked: of_this } =
                &mut self.space.compaction.compactor.under_way[i];
            let Some(items) = items else {
                i += 1;
                continue;
            };
            if self.life.closing.is_some() {
                items.truncate(*next);
            }
            let room = if self.space.compaction.compactor.prepares {
                moves_max.saturating_sub(asked)
            } else {
                0
            };
            let some: SmallVec<[Item; 64]> = items.iter().skip(*next).take(room).copied().collect();
            *next += some.len();
            *of_this += some.len();
            asked += some.len();
            let (extent, done) = (*extent, *next == items.len() && *of_this == 0);
            for item in some {
                let shard = match item.what {
                    ItemKind::Page(key, _) => self.ctx.shard_map.shard_of(key),
                    ItemKind::Node(key) => self.ctx.shard_map.owner(key.vshard),
                };
                self.ctx
                    .send(shard, Message::Move(item.what, BlockAddr { extent, block: item.block }));
            }
            if done {
                self.space.compaction.compactor.under_way.remove(i);
                self.ctx.stats.extents_compacted += 1;
                self.ctx.room_changed();
            } else {
                i += 1;
            }
        }
        self.space.compaction.compactor.prepares &= asked < moves_max;
    }

    /// Called when an item has been moved, or need not be.
    pub(in crate::engine) fn moved(
        &mut self,
        from: ShardId,
        place: BlockAddr,
        error: Option<Error>,
    ) {
        self.ctx.need(Work::Compaction);
        self.ctx.room_changed();
        let mut what = None;
        if let Some(c) = self.space.compaction.compactor.of(place.extent) {
            c.asked -= 1;
            what = c
                .items
                .iter()
                .flatten()
                .find(|item| item.block == place.block)
                .map(|item| item.what);
        }
        match error {
            Some(error) => {
                self.give_compaction_up(place.extent);
                if may_last(&error) && self.space.extents.pass_over(place) {
                    tracing::warn!(
                        ?what,
                        extent = place.extent.get(),
                        block = place.block,
                        %error,
                        "this can't be read, so it can't be moved: its extent is not compacted \
                         until it is overwritten or freed; restore it from a backup, or free it"
                    );
                }
            }
            None if from != self.ctx.id => self.space.extents.expect_pending_free(),
            None => {}
        }
    }

    /// Called when the owner of an extent asks for an item to be moved out of it.
    pub(in crate::engine) fn move_asked(
        &mut self,
        owner: ShardId,
        what: ItemKind,
        place: BlockAddr,
    ) {
        self.space.compaction.asked.asked.push_back(Asked { owner, what, place, age: 0 });
        self.ctx.need(Work::Moves);
    }

    /// Moves the items that were requested.
    pub(in crate::engine) fn advance_moves(&mut self) {
        for (no, error) in std::mem::take(&mut self.cache.moves_ended) {
            self.node_move_read(no, error);
        }
        while self.ctx.failed.is_none()
            && let Some(asked) = self.space.compaction.asked.asked.front().copied()
        {
            let Asked { owner, what, place, .. } = asked;
            if dirty_nodes_are_many(&self.map, &self.ctx.limits) {
                // Every node that moves is dirty until a checkpoint has written it.
                self.ctx.need_checkpoint();
                return;
            }
            if self.reservations.moves >= self.moves_max() {
                // Many owners may ask at a time. A move that ends brings a turn.
                return;
            }
            self.space.compaction.asked.asked.pop_front();
            if !self.may_move(0) {
                self.ctx.send(owner, Message::Moved(place, None));
                continue;
            }
            match what {
                ItemKind::Page(key, lsn) => {
                    // Versions that the table knows to be superseded need no read.
                    let known = self.cache.table.find(key).map(|idx| &self.cache.table.pages[idx]);
                    if known.is_some_and(|page| page.resolved && page.mapped_lsn != lsn) {
                        self.ctx.send(owner, Message::Moved(place, None));
                    } else {
                        let idx = self.cache.table.entry(key);
                        self.reservations.moves += 1;
                        self.begin(
                            None,
                            PendingKind::Move(place, owner),
                            smallvec::smallvec![idx],
                            |_| false,
                        );
                    }
                }
                ItemKind::Node(key) => self.move_node(asked, key),
            }
        }
    }

    /// Marks a node dirty if the map names it where it was found; if that takes a read, it is
    /// called again once the read has ended.
    fn move_node(&mut self, asked: Asked, key: NodeKey) {
        let Asked { owner, place, .. } = asked;
        let (wanted, child) = match self.map.find_node(key) {
            Ok(Some(child)) if child.place() == place && !self.map.is_resident(key) => (key, child),
            Err(above) => above,
            Ok(child) => {
                if child.is_some_and(|child| child.place() == place) {
                    self.map.touch(key);
                    self.ctx.room_changed();
                }
                return self.ctx.send(owner, Message::Moved(place, None));
            }
        };
        self.reservations.moves += 1;
        let age = match asked.age {
            0 => self.cache.wanted.next_age(),
            age => age,
        };
        let no = self.space.compaction.asked.reading.insert(Asked { age, ..asked });
        self.want_node(wanted, child, NodeWaiter::Move(no, age));
    }

    /// Called when a node that a move waited for is there, or will not come.
    fn node_move_read(&mut self, no: NodeMoveIdx, error: Option<Error>) {
        self.reservations.moves -= 1;
        let asked = self.space.compaction.asked.reading.remove(no);
        match error {
            Some(_) => self.ctx.send(asked.owner, Message::Moved(asked.place, error)),
            None => self.space.compaction.asked.asked.push_front(asked),
        }
    }

    /// Called when a page that may have to move is resolved, or loaded.
    pub(in crate::engine) fn move_ready(
        &mut self,
        waiter: RequestIdx,
        from: BlockAddr,
        owner: ShardId,
    ) {
        let idx = self.requests.pending[waiter].pages[0];
        let page = &self.cache.table.pages[idx];
        let named = page.resolved
            && page.entry.is_some_and(|e| e.place() == from)
            && page.lsn == page.mapped_lsn;
        let busy =
            page.absent || page.versions > 0 || page.dirty_from.is_some() || page.image.is_some();
        let failed = self.requests.pending[waiter].error.clone();
        if failed.is_none() && named && !busy && self.ctx.failed.is_none() {
            if page.frame.is_none() {
                self.requests.need_more(waiter);
                if self.want(idx, Needs::Bytes, waiter) {
                    self.requests.need_met(waiter, None, &mut self.ctx);
                }
                return;
            }
            if !self.pin_for_move(idx, waiter) {
                return;
            }
            self.cache.table.pages[idx].versions += 1;
            self.space.compaction.moves.push(idx);
            self.ctx.need(Work::WriteBack);
        }
        self.release(waiter);
        self.ctx.send(owner, Message::Moved(from, failed));
    }

    /// Pins the map leaf of a clean page; if the leaf has left memory meanwhile, requests it and
    /// returns false.
    fn pin_for_move(&mut self, idx: PageIdx, waiter: RequestIdx) -> bool {
        let key = self.cache.table.pages[idx].key;
        if self.cache.table.pages[idx].leaf.is_some() {
            return true;
        }
        if let Lookup::Load(node, child) = self.map.lookup(key) {
            self.requests.need_more(waiter);
            self.want_node(node, child, NodeWaiter::Request(waiter));
            return false;
        }
        // The page is in the map, so its leaf exists: nothing is created.
        let leaf = self.map.pin(key, &mut self.ctx.arena);
        self.cache.table.pages[idx].leaf = Some(leaf);
        true
    }
}

/// Whether another read would most likely fail too. Where memory was short, or the store has
/// stopped, it need not.
fn may_last(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io)
}
