//! Checkpoints: a new page map becomes durable, and the log before it is not needed any more.
//!
//! ```text
//! Idle --> Pages --> Capture --> Summaries --> Flush --> Super(copy 1) --> SuperFlush --> Super(copy 2) --> ... Idle
//!          dirty     nodes,      of extents    data,     the commit point
//!          pages     one virtual in use; then  roots,
//!          up to     shard a     roots, table  table
//!          redo      turn
//! ```
//! Invariants
//! 1. `redo` is the newest LSN when it begins. Before the capture, every change up to `redo` is in the map and the
//!    watermark has reached `redo`; so the new roots reflect every record up to it, and name nothing that is not
//!    durable. They may reflect later ones: page LSNs guard the redo.
//! 2. Commits go on all the while. A virtual shard is fixed at one moment, each at its own.
//! 3. Until the first superblock copy is durable, the roots, the table and the log of the checkpoint before count.
//! 4. Only after both copies are durable are log segments recycled and retired places given out again.

use super::{OpKind, Response, Shard, Token};
use crate::coalesce;
use crate::disk::{Completion, DiskOp, FileId, IoSlice};
use crate::error::Error;
use crate::format::extent::{ItemKind, table_offset};
use crate::format::root;
use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock, VShardState};
use crate::map::{NodeIdx, Stream};
use crate::pool::Frame;
use crate::types::{BLOCK, Lsn, VShard};
use smallvec::SmallVec;

/// Where a checkpoint stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    Pages,
    Capture {
        next: u16,
    },
    Summaries,
    Flush,
    Super {
        copy: usize,
    },
    SuperFlush {
        copy: usize,
    },
}

/// A new epoch that the checkpoint's superblock begins (the one that ends a recovery).
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewEpoch {
    pub epoch: u64,
    pub salt: u64,
    pub first_lsn: Lsn,
}

/// The checkpoint under way, and who waits for one.
#[derive(Default)]
pub(super) struct Checkpoint {
    phase: Phase,
    wanted: bool,
    /// It ends the store's life: nothing comes after it.
    clean: bool,
    new_epoch: Option<NewEpoch>,
    redo: Lsn,
    /// Pages whose version at the beginning is not in the map yet.
    pages_left: u64,
    /// Operations of this phase under way.
    ops: u32,
    /// Nodes whose writes are under way.
    nodes: Vec<NodeIdx>,
    /// Virtual shards with a new root, and its block.
    roots: Vec<(VShard, Frame)>,
    next: Option<Superblock>,
    waiters: Vec<Token>,
    next_waiters: Vec<Token>,
}

/// Node writes under way at most, in blocks.
const NODE_OPS_MAX: u32 = 64;

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} redo {:?} pages left {} ops {}", self.phase, self.redo, self.pages_left, self.ops)?;
        write!(f, " wanted {}", self.wanted)
    }
}

impl Checkpoint {
    pub(super) fn is_active(&self) -> bool {
        self.phase != Phase::Idle
    }

    /// Dirty pages must go to their places now.
    pub(super) fn wants_pages(&self) -> bool {
        self.phase == Phase::Pages
    }
}

impl Shard {
    /// A caller asks for a checkpoint that covers everything up to now.
    pub(super) fn request_checkpoint(&mut self, token: Token) {
        self.checkpoint.next_waiters.push(token);
        self.need_checkpoint();
    }

    /// A checkpoint is to begin, once the one under way has ended.
    pub(super) fn need_checkpoint(&mut self) {
        if !self.checkpoint.wanted {
            self.checkpoint.wanted = true;
            self.again = true;
        }
    }

    /// The checkpoint with which a recovery ends.
    pub(crate) fn begin_epoch(&mut self, epoch: NewEpoch) {
        self.checkpoint.new_epoch = Some(epoch);
        self.need_checkpoint();
    }

    /// Whether a checkpoint is wanted or under way.
    pub(crate) fn checkpoint_under_way(&self) -> bool {
        self.checkpoint.wanted || self.checkpoint.is_active()
    }

    /// Nothing is under way but what the closing checkpoint needs: begins it, once.
    pub(super) fn checkpoint_for_close(&mut self) {
        if self.checkpoint.is_active() || self.checkpoint.clean {
            return;
        }
        if !self.log.open.is_empty() || !self.log.in_flight.is_empty() || self.flushing || self.growing {
            return;
        }
        self.checkpoint.clean = true;
        self.checkpoint.wanted = true;
        self.again = true;
    }

    pub(super) fn advance_checkpoint(&mut self) {
        if self.failed.is_some() {
            return;
        }
        match self.checkpoint.phase {
            Phase::Idle => {
                let used = self.log.segments_count() - self.log.free_segments();
                let log_is_long = used > self.log.segments_count() / 2;
                let is_moment = self.redoing.is_none_or(|redoing| !redoing.mid_batch);
                if (self.checkpoint.wanted || log_is_long) && is_moment {
                    self.begin_checkpoint();
                }
            }
            Phase::Pages if self.checkpoint.pages_left == 0 && self.order.watermark() >= self.checkpoint.redo => {
                self.checkpoint.phase = Phase::Capture { next: 0 };
                self.again = true;
            }
            Phase::Capture { next } => self.capture_vshard(next),
            Phase::Summaries => self.write_roots_and_table(),
            _ => {}
        }
    }

    fn begin_checkpoint(&mut self) {
        let c = &mut self.checkpoint;
        c.wanted = false;
        c.phase = Phase::Pages;
        c.redo = self.redoing.map_or(self.order.next().before(), |redoing| redoing.done);
        c.waiters = std::mem::take(&mut c.next_waiters);
        c.pages_left = 0;
        self.extents.begin_checkpoint();
        let slots = self.log.open.slots.iter().filter_map(|slot| self.table.find(slot.key));
        let captured = self.captures.iter().map(|(_, capture)| capture.page);
        let behind: Vec<usize> = self.dirty.iter().copied().chain(slots).chain(captured).collect();
        for idx in behind {
            let page = &mut self.table.pages[idx];
            if page.lsn > page.mapped_lsn && page.checkpoint_target == Lsn::ZERO {
                page.checkpoint_target = page.lsn;
                self.checkpoint.pages_left += 1;
            }
        }
        self.trim_log_early();
        self.again = true;
    }

    /// A version of the page is in the map.
    pub(super) fn page_settled(&mut self, idx: usize) {
        let page = &mut self.table.pages[idx];
        if page.checkpoint_target != Lsn::ZERO && page.mapped_lsn >= page.checkpoint_target {
            page.checkpoint_target = Lsn::ZERO;
            self.checkpoint.pages_left -= 1;
        }
    }

    fn capture_vshard(&mut self, next: u16) {
        if u32::from(next) == self.limits.geometry.vshards_count {
            if self.checkpoint.ops == 0 {
                std::mem::take(&mut self.checkpoint.nodes).into_iter().for_each(|node| self.map.unpin(node));
                self.summaries.extend(self.extents.unsummarized());
                self.summaries.sort();
                self.summaries.dedup();
                self.checkpoint.phase = Phase::Summaries;
                self.again = true;
            }
            return;
        }
        let vshard = VShard::new(next);
        let nodes = self.map.dirty_in(vshard) as u32;
        if self.checkpoint.ops >= NODE_OPS_MAX || !self.ensure_frames(nodes + 2) || !self.space_for_nodes(nodes) {
            return;
        }
        self.again = true;
        self.checkpoint.phase = Phase::Capture { next: next + 1 };
        if !self.map.is_dirty(vshard) {
            self.extents.captured(vshard, std::iter::empty(), Vec::new());
            return;
        }
        let mut retired = Vec::new();
        let (extents, summaries) = (&mut self.extents, &mut self.summaries);
        let alloc = |key| {
            let (place, full) =
                extents.alloc(Stream::Map, ItemKind::Node(key)).expect("space for the nodes was just seen");
            summaries.extend(full);
            place
        };
        let writes = self.map.capture(vshard, &mut self.arena, alloc, &mut retired);
        self.extents.captured(vshard, writes.iter().map(|w| w.place), retired);
        self.checkpoint.nodes.extend(writes.iter().map(|w| w.node));
        self.stats.nodes_written += writes.len() as u64;
        self.stats.checksums += writes.len() as u64;
        let mut frame = self.arena.alloc(0).expect("a frame was ensured");
        let out = frame.try_mut().expect("a new frame has no pins");
        let number = self.superblock.checkpoint + 1;
        self.map.encode_root(vshard, self.superblock.store_id, self.checkpoint.redo, number, out);
        self.checkpoint.roots.push((vshard, frame));
        let blocks = writes.into_iter().map(|w| (w.place, IoSlice::whole(w.frame))).collect();
        for run in coalesce::plan(blocks, self.limits.vectored_pages_max) {
            let offset = run.place.offset(self.limits.geometry.extent_bytes);
            self.checkpoint_op(DiskOp::Write { file: FileId::Data, offset, from: run.items.into() });
        }
    }

    fn checkpoint_op(&mut self, op: DiskOp) {
        self.checkpoint.ops += 1;
        self.submit(OpKind::Checkpoint, op);
    }

    /// All nodes are written: waits for the summaries, then writes roots and table.
    fn write_roots_and_table(&mut self) {
        if self.checkpoint.ops > 0 || self.summaries_under_way > 0 || !self.summaries.is_empty() {
            return;
        }
        if !self.ensure_frames(self.extents.table_blocks()) {
            return;
        }
        let count = self.limits.geometry.vshards_count;
        let roots = std::mem::take(&mut self.checkpoint.roots);
        let mut writes: Vec<(FileId, u64, Frame)> = Vec::new();
        for (vshard, frame) in roots {
            writes.push((FileId::Meta, root::offset(vshard, self.map.root(vshard).generation, count), frame));
        }
        let number = self.superblock.checkpoint + 1;
        for index in 0..self.extents.table_blocks() {
            let mut frame = self.arena.alloc(0).expect("frames were ensured");
            self.extents.encode_table(index, number, frame.try_mut().expect("a new frame has no pins"));
            writes.push((FileId::Table, table_offset(index, number), frame));
        }
        writes.sort_by_key(|(file, offset, _)| (*file, *offset));
        self.submit_blocks(writes);
        self.checkpoint.phase = Phase::Flush;
        self.checkpoint.next = Some(self.next_superblock());
    }

    /// Writes blocks, neighbours together.
    fn submit_blocks(&mut self, writes: Vec<(FileId, u64, Frame)>) {
        let mut run: Option<(FileId, u64, SmallVec<[IoSlice; 4]>)> = None;
        for (file, offset, frame) in writes {
            let slice = IoSlice::whole(frame.pin());
            match &mut run {
                Some((f, start, from))
                    if *f == file
                        && *start + (from.len() * BLOCK) as u64 == offset
                        && from.len() < self.limits.vectored_pages_max =>
                {
                    from.push(slice);
                }
                _ => {
                    if let Some((file, offset, from)) = run.replace((file, offset, smallvec::smallvec![slice])) {
                        self.checkpoint_op(DiskOp::Write { file, offset, from });
                    }
                }
            }
        }
        if let Some((file, offset, from)) = run {
            self.checkpoint_op(DiskOp::Write { file, offset, from });
        }
    }

    fn next_superblock(&self) -> Superblock {
        let old = &self.superblock;
        let c = &self.checkpoint;
        let vshard = |i: u16| VShardState {
            generation: self.map.root(VShard::new(i)).generation,
            redo_lsn: c.redo,
            shard: self.id,
        };
        let mut next = Superblock {
            clean: c.clean,
            generation: old.generation + 1,
            checkpoint: old.checkpoint + 1,
            watermark: self.redoing.map_or(self.order.watermark(), |redoing| redoing.cut),
            next_lsn: self.redoing.map_or(self.order.next(), |redoing| redoing.cut.plus(1)),
            extents_count: self.extents.space().total,
            logs: vec![if c.clean { self.log.end() } else { Default::default() }],
            vshards: (0..self.limits.geometry.vshards_count as u16).map(vshard).collect(),
            ..old.clone()
        };
        if let Some(new) = c.new_epoch {
            next.epoch = new.epoch;
            next.salt = new.salt;
            next.epoch_first_lsn = new.first_lsn;
        }
        next
    }

    /// One of the checkpoint's operations has ended.
    pub(super) fn checkpoint_step_done(&mut self, completion: Completion) {
        self.checkpoint.ops -= 1;
        if let Err(error) = completion.result {
            self.fail(error);
        }
        if self.failed.is_some() || self.checkpoint.ops > 0 {
            return;
        }
        self.again = true;
        match self.checkpoint.phase {
            Phase::Flush => match completion.op {
                DiskOp::Flush { .. } => self.write_superblock(0),
                _ => {
                    let files = smallvec::smallvec![FileId::Data, FileId::Meta, FileId::Table];
                    self.checkpoint_op(DiskOp::Flush { files });
                }
            },
            Phase::Super { copy } => {
                self.checkpoint.phase = Phase::SuperFlush { copy };
                self.checkpoint_op(DiskOp::Flush { files: smallvec::smallvec![FileId::Meta] });
            }
            Phase::SuperFlush { copy: 0 } => self.write_superblock(1),
            Phase::SuperFlush { .. } => self.end_checkpoint(),
            Phase::Idle | Phase::Pages | Phase::Capture { .. } | Phase::Summaries => {}
        }
    }

    fn write_superblock(&mut self, copy: usize) {
        let Some(next) = &self.checkpoint.next else { return };
        let number = Superblock::copies_of(next.generation)[copy];
        let mut bytes = vec![0; SUPERBLOCK_BYTES];
        next.encode(number, &mut bytes);
        let mut from = SmallVec::new();
        for (block, frame) in bytes.chunks(BLOCK).zip(&mut self.superblock_frames) {
            frame.try_mut().expect("the superblock before is written").copy_from_slice(block);
            from.push(IoSlice::whole(frame.pin()));
        }
        self.checkpoint.phase = Phase::Super { copy };
        self.checkpoint_op(DiskOp::Write { file: FileId::Meta, offset: Superblock::offset(number), from });
    }

    /// Both copies are durable.
    fn end_checkpoint(&mut self) {
        let Some(next) = self.checkpoint.next.take() else { return };
        let redo = self.checkpoint.redo;
        self.checkpoint.phase = Phase::Idle;
        self.checkpoint.new_epoch = None;
        self.superblock = next;
        self.stats.checkpoints += 1;
        self.log.recycle(redo);
        let freed = self.extents.end_checkpoint();
        self.summaries.extend(self.extents.filled());
        self.compacted.clear();
        self.note_reclaimed();
        tracing::debug!(shard = self.id.get(), %redo, freed_blocks = freed, "checkpoint");
        for token in std::mem::take(&mut self.checkpoint.waiters) {
            self.reply(token, Ok(Response::Checkpointed(redo)));
        }
        if self.checkpoint.clean {
            self.end_close(Ok(()));
        } else if !self.checkpoint.next_waiters.is_empty() {
            self.checkpoint.wanted = true;
        }
        self.again = true;
    }

    /// No checkpoint will end any more.
    pub(super) fn fail_checkpoint(&mut self, stopped: &Error) {
        let c = &mut self.checkpoint;
        let waiters: Vec<Token> = c.waiters.drain(..).chain(c.next_waiters.drain(..)).collect();
        for token in waiters {
            self.reply(token, Err(stopped.clone()));
        }
    }

    fn trim_log_early(&mut self) {
        if planted!(LogTrimmedEarly) {
            self.log.recycle(Lsn::MAX);
        }
    }
}
