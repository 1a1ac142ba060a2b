//! Writes a shard's part of a checkpoint: the dirty nodes and the root of one virtual shard after
//! another, then the handovers to the owners of other extents, and the summaries.

use super::{NODE_OPS_MAX, Phase, ROOTS_AT_A_TIME};
use crate::base::{BLOCK, VShard};
use crate::engine::map::Stream;
use crate::engine::message::{Handover, Message};
use crate::engine::writeback::plan;
use crate::engine::{Shard, Step};
use crate::format::extent::ItemKind;
use crate::format::root;
use crate::io::{DiskOp, FileId, IoSlice};
use crate::memory::Frame;
use smallvec::SmallVec;

impl Shard {
    /// The next virtual shard from `next` on that belongs to this shard and has anything to write;
    /// those before it are done.
    pub(super) fn next_dirty(&mut self, mut next: u16) -> u16 {
        while u32::from(next) < self.ctx.limits.geometry.vshards_count {
            let vshard = VShard::new(next);
            if self.ctx.shard_map.owner(vshard) == self.ctx.id {
                if self.map.is_dirty(vshard) {
                    break;
                }
                self.space.extents.captured(vshard, std::iter::empty(), Vec::new());
            }
            next += 1;
        }
        self.enter_phase(Phase::Capture { next });
        next
    }

    pub(super) fn capture_vshard(&mut self, next: u16) {
        let next = self.next_dirty(next);
        if u32::from(next) >= self.ctx.limits.geometry.vshards_count {
            self.write_roots();
            if self.checkpoint.ops == 0 {
                std::mem::take(&mut self.checkpoint.nodes)
                    .into_iter()
                    .for_each(|node| self.map.written(node));
                self.hand_over();
            }
            return;
        }
        let vshard = VShard::new(next);
        let nodes = self.map.dirty_in(vshard) as u32;
        if self.checkpoint.ops >= NODE_OPS_MAX || !self.space_for_nodes(nodes) {
            return;
        }
        // The root takes a frame of its own; nodes are written in place.
        let frames = if planted!(CaptureAllAtOnce) { nodes + 2 } else { 1 };
        if !self.ensure_frames(frames, Step::Capture) {
            self.write_roots();
            return;
        }
        self.ctx.need_all();
        self.enter_phase(Phase::Capture { next: next + 1 });
        let mut retired = Vec::new();
        let (extents, summaries) = (&mut self.space.extents, &mut self.space.summaries);
        let alloc = |key| {
            let (place, full) = extents
                .alloc(Stream::Map, ItemKind::Node(key))
                .expect("space for the nodes was just seen");
            summaries.extend(full);
            place
        };
        let writes = self.map.capture(vshard, alloc, &mut retired);
        assert!(
            writes.len() <= nodes as usize,
            "{} nodes of {vshard:?} are written, and there was room for {nodes}",
            writes.len()
        );
        self.space.extents.captured(vshard, writes.iter().map(|w| w.place), retired);
        self.checkpoint.nodes.extend(writes.iter().map(|w| w.node));
        self.ctx.stats.nodes_written += writes.len() as u64;
        // The root has one, too.
        self.ctx.stats.checksums += writes.len() as u64 + 1;
        let mut frame = self.ctx.arena.alloc(0).expect("a frame was ensured");
        let out = frame.try_mut().expect("a new frame has no pins");
        let number = self.ctx.superblock.checkpoint + 1;
        self.map.encode_root(
            vshard,
            self.ctx.superblock.store_id,
            self.checkpoint.redo,
            number,
            out,
        );
        self.checkpoint.roots.push((vshard, frame));
        if self.checkpoint.roots.len() >= ROOTS_AT_A_TIME {
            self.write_roots();
        }
        let blocks = writes.into_iter().map(|w| (w.place, IoSlice::whole(w.frame))).collect();
        for run in plan::writes(blocks, self.ctx.limits.vectored_pages_max) {
            let offset = run.place.offset(self.ctx.limits.geometry.extent_bytes);
            self.checkpoint_op(DiskOp::Write {
                file: FileId::Data,
                offset,
                from: run.items.into(),
            });
        }
    }

    /// Called when everything is captured: tells the other shards what that means for their
    /// extents.
    pub(super) fn hand_over(&mut self) {
        self.checkpoint.assert_state();
        let changes = self.space.extents.hand_over();
        let mut out: Vec<Handover> =
            self.ctx.shard_map.shards().map(|_| Handover::default()).collect();
        let owner = |place: crate::base::BlockAddr| self.first_owner(place.extent).index();
        for (place, what) in changes.named {
            out[owner(place)].named.push((place, what));
        }
        for place in changes.retired {
            out[owner(place)].retired.push(place);
        }
        for place in changes.pending_free {
            out[owner(place)].pending_free.push(place);
        }
        self.enter_phase(Phase::Handover);
        for (shard, handover) in self.ctx.shard_map.shards().zip(out) {
            if shard != self.ctx.id {
                self.ctx.send(shard, Message::Captured(Box::new(handover)));
            }
        }
        self.ctx.need_all();
    }

    /// Called when another shard has captured its trees.
    pub(in crate::engine) fn handed_over(&mut self, handover: Handover) {
        self.checkpoint.handovers += 1;
        let (handovers, shards) = (self.checkpoint.handovers, self.ctx.shard_map.shards_count());
        assert!(handovers < shards, "{handovers} other shards have handed over, of {shards}");
        self.checkpoint.assert_state();
        self.space.extents.take_over(handover.named, handover.retired, handover.pending_free);
        self.ctx.need_all();
    }

    pub(super) fn list_summaries(&mut self) {
        self.checkpoint.handovers = 0;
        if self.checkpoint.begin.is_some_and(|begin| begin.new_epoch.is_some()) {
            // The log adds nothing more: the extents that recovery reserved are now like any other.
            self.space.extents.end_redo();
        }
        self.space.summaries.extend(self.space.extents.unsummarized());
        self.space.summaries.sort();
        self.space.summaries.dedup();
        self.enter_phase(Phase::Summaries);
        self.ctx.need_all();
    }

    /// Writes the roots captured so far: nothing names their places until the superblock does.
    pub(super) fn write_roots(&mut self) {
        let count = self.ctx.limits.geometry.vshards_count;
        let roots = std::mem::take(&mut self.checkpoint.roots);
        for (vshard, _) in &roots {
            let root = self.map.root(*vshard).version.generation;
            let durable = self.ctx.superblock.vshards[vshard.index()].root.generation;
            assert!(
                root == durable + 1,
                "root {root} of {vshard:?} is written, and {durable} is the one that counts: the \
                 other of its two places is that of {}",
                durable + 1
            );
        }
        let offset = |vshard| root::offset(vshard, self.map.root(vshard).version.generation, count);
        let writes = roots
            .into_iter()
            .map(|(vshard, frame)| (FileId::Meta, offset(vshard), frame))
            .collect();
        self.submit_blocks(writes);
    }

    /// Writes blocks, adjacent ones together.
    pub(in crate::engine) fn submit_blocks(&mut self, mut writes: Vec<(FileId, u64, Frame)>) {
        writes.sort_by_key(|(file, offset, _)| (*file, *offset));
        let mut run: Option<(FileId, u64, SmallVec<[IoSlice; 4]>)> = None;
        let mut end = None;
        for (file, offset, frame) in writes {
            assert!(
                end.is_none_or(|end| end <= (file, offset)),
                "a block is written to {offset} of {file:?}, and another one up to {end:?}"
            );
            end = Some((file, offset + BLOCK as u64));
            let slice = IoSlice::whole(frame.pin());
            match &mut run {
                Some((f, start, from))
                    if *f == file
                        && *start + (from.len() * BLOCK) as u64 == offset
                        && from.len() < self.ctx.limits.vectored_pages_max =>
                {
                    from.push(slice);
                }
                _ => {
                    if let Some((file, offset, from)) =
                        run.replace((file, offset, smallvec::smallvec![slice]))
                    {
                        self.checkpoint_op(DiskOp::Write { file, offset, from });
                    }
                }
            }
        }
        if let Some((file, offset, from)) = run {
            self.checkpoint_op(DiskOp::Write { file, offset, from });
        }
    }
}
