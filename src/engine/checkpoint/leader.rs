//! The work of shard 0 for all shards: it begins checkpoints and ends them with table and
//! superblock, ends the opening, closes the store, and extends the data file.
//!
//! ```text
//! checkpoint  Idle --wanted--> Beginning --all Began--> Running --all Ready--> Table --> Flush
//!                  --> Super(copy 1) --> SuperFlush --> Super(copy 2) --> SuperFlush
//!                  --Done to all--> Idle
//! opening     all Redone --> the checkpoint of the new epoch --> open
//! closing     Quiesce to all --> all Quiet --> the clean checkpoint --> closed
//! ```
//! Invariants
//! 1. One checkpoint at a time, over all shards: one superblock write makes all their roots true
//!    together.
//! 2. The flush is submitted when every write of every shard for this checkpoint has completed.
//! 3. No commit over shards is in progress when all are quiet: its owner would have a request.

use crate::base::{BLOCK, Lsn, ShardId};
use crate::engine::life::Closing;
use crate::engine::message::{Begin, Contribution, Message, NewEpoch, Pace};
use crate::engine::{Response, Shard, Step, Token};
use crate::format::extent::{TABLE_ROWS, TableRow, encode_table, table_crc, table_offset};
use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock, VShardState};
use crate::io::{DiskOp, FileId, IoSlice};
use crate::memory::Frame;
use smallvec::SmallVec;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    #[default]
    Idle,
    Beginning,
    Running,
    Table,
    Flush,
    Super {
        copy: usize,
    },
    SuperFlush {
        copy: usize,
    },
}

impl Phase {
    /// Whether `next` may come after this one.
    fn leads_to(self, next: Phase) -> bool {
        use Phase::*;
        match (self, next) {
            (Idle, Beginning) | (Beginning, Running) | (Running, Table) | (Table, Flush) => true,
            (Flush, Super { copy: 0 }) | (SuperFlush { copy: 0 }, Super { copy: 1 }) => true,
            (Super { copy: written }, SuperFlush { copy }) => written == copy,
            (SuperFlush { copy: 1 }, Idle) => true,
            _ => false,
        }
    }
}

/// The extent table on its way to the device.
#[derive(Default, Debug)]
struct TableParts {
    rows: Vec<TableRow>,
    /// The checksums of the blocks submitted so far.
    sums: Vec<u32>,
}

/// Blocks of the table that are encoded at a time: no more than a checkpoint always has memory for.
const TABLE_BLOCKS_AT_A_TIME: usize = 8;

/// The leader's state; idle in all other shards.
#[derive(Default, Debug)]
pub(in crate::engine) struct Leader {
    /// Frames reserved for the next superblock, so that a checkpoint can end even if readers pin
    /// all memory.
    superblock_frames: Vec<Frame>,
    phase: Phase,
    wanted: Option<Pace>,
    /// How many shards have not begun, or are not ready.
    left: u16,
    begin: Option<Begin>,
    redo: Lsn,
    contributions: Vec<Contribution>,
    by_shard: Vec<Option<Contribution>>,
    next: Option<Superblock>,
    table: Option<TableParts>,
    /// The epoch to begin when all have redone their part of the log.
    new_epoch: Option<NewEpoch>,
    redone: u16,
    quiet: u16,
    closing: bool,
}

impl Leader {
    pub(in crate::engine) fn new(
        new_epoch: Option<NewEpoch>,
        superblock_frames: Vec<Frame>,
    ) -> Self {
        Leader { new_epoch, superblock_frames, ..Leader::default() }
    }

    /// Panics if the state of the checkpoint contradicts its phase: a superblock would be written
    /// that does not name all shards' roots, or the checkpoint would never end.
    fn assert_state(&self) {
        let (phase, left) = (self.phase, self.left);
        assert!(
            self.begin.is_some() == (phase != Phase::Idle),
            "{:?} was begun, and the leader is {phase:?}",
            self.begin
        );
        assert!(
            (left > 0) == matches!(phase, Phase::Beginning | Phase::Running),
            "{left} shards are waited for while the leader is {phase:?}"
        );
        let missing = self.by_shard.iter().filter(|shard| shard.is_none()).count();
        let expected = if phase == Phase::Running { usize::from(left) } else { 0 };
        assert!(
            missing == expected,
            "{missing} contributions are missing while the leader is {phase:?}, {left} left"
        );
        let has_next =
            matches!(phase, Phase::Flush | Phase::Super { .. } | Phase::SuperFlush { .. });
        assert!(
            self.next.is_some() == has_next,
            "a superblock is there: {}, while the leader is {phase:?}",
            self.next.is_some()
        );
        let (contributions, is_ready) =
            (self.contributions.len(), has_next || phase == Phase::Table);
        assert!(
            (contributions > 0) == is_ready,
            "{contributions} shards have contributed while the leader is {phase:?}"
        );
        assert!(
            self.table.is_none() || phase == Phase::Table,
            "the extent table is being written while the leader is {phase:?}"
        );
    }

    /// Enters the next phase; what it needs is there, and what it must not find is gone.
    fn enter(&mut self, phase: Phase) {
        assert!(self.phase.leads_to(phase), "{phase:?} does not follow {:?}", self.phase);
        self.phase = phase;
        self.assert_state();
    }
}

impl Shard {
    fn leads(&self) -> bool {
        self.ctx.id == ShardId::LEADER
    }

    /// Handles a caller's request for a checkpoint that covers everything up to now.
    pub(in crate::engine) fn request_checkpoint(&mut self, token: Token) {
        self.checkpoint.next_waiters.push(token);
        self.ctx.need_checkpoint();
    }

    /// Records that some shard wants a checkpoint.
    pub(in crate::engine) fn checkpoint_wanted(&mut self, pace: Pace) {
        assert!(self.leads(), "a checkpoint is asked of {:?}, which does not lead", self.ctx.id);
        self.checkpoint.leader.wanted = self.checkpoint.leader.wanted.max(Some(pace));
        self.ctx.need_all();
    }

    /// A shard waits for the end of the checkpoint under way: all of them hurry.
    pub(in crate::engine) fn hurry_asked(&mut self) {
        assert!(self.leads(), "hurry is asked of {:?}, which does not lead", self.ctx.id);
        // It may have ended meanwhile.
        if let Some(begin) = &mut self.checkpoint.leader.begin
            && begin.pace == Pace::Spread
        {
            begin.pace = Pace::Urgent;
            self.tell_all(|| Message::Hurry);
        }
    }

    /// Records that a shard has redone its part of the log.
    pub(in crate::engine) fn shard_redone(&mut self) {
        self.checkpoint.leader.redone += 1;
        let (redone, all) = (self.checkpoint.leader.redone, self.ctx.shard_map.shards_count());
        assert!(redone <= all, "{redone} of {all} shards have redone their logs");
        self.ctx.need_all();
    }

    /// Records that a shard has no more requests in progress.
    pub(in crate::engine) fn shard_quiet(&mut self) {
        self.checkpoint.leader.quiet += 1;
        let (quiet, all) = (self.checkpoint.leader.quiet, self.ctx.shard_map.shards_count());
        assert!(quiet <= all, "{quiet} of {all} shards are quiet");
        self.ctx.need_all();
    }

    pub(in crate::engine) fn advance_leader(&mut self) {
        if !self.leads() || self.ctx.failed.is_some() {
            return;
        }
        match self.checkpoint.leader.phase {
            Phase::Idle => self.begin_if_wanted(),
            Phase::Table => self.write_table(),
            _ => {}
        }
    }

    fn begin_if_wanted(&mut self) {
        let all = self.ctx.shard_map.shards_count();
        let new_epoch =
            self.checkpoint.leader.new_epoch.filter(|_| self.checkpoint.leader.redone == all);
        let clean = self.checkpoint.leader.quiet == all && !self.checkpoint.leader.closing;
        if new_epoch.is_none() && !clean && self.checkpoint.leader.wanted.is_none() {
            return;
        }
        // Before the last checkpoint no other is needed: it covers all.
        if self.checkpoint.leader.closing {
            return;
        }
        self.checkpoint.leader.assert_state();
        self.checkpoint.leader.closing = clean;
        let wanted = self.checkpoint.leader.wanted.take();
        self.checkpoint.leader.left = all;
        let is_last_or_first = new_epoch.is_some() || clean;
        let pace = wanted.filter(|_| !is_last_or_first).unwrap_or(Pace::Urgent);
        let begin = Begin { new_epoch, clean, pace };
        self.checkpoint.leader.begin = Some(begin);
        self.checkpoint.leader.enter(Phase::Beginning);
        self.tell_all(|| Message::Begin(begin));
        self.ctx.need_all();
    }

    /// Sends a message to every shard, including this one.
    fn tell_all(&mut self, message: impl Fn() -> Message) {
        for shard in self.ctx.shard_map.shards() {
            self.ctx.send(shard, message());
        }
    }

    /// Records that a shard has begun the checkpoint.
    pub(in crate::engine) fn shard_began(&mut self) {
        self.checkpoint.leader.assert_state();
        assert_eq!(
            self.checkpoint.leader.phase,
            Phase::Beginning,
            "shards begin what the leader began"
        );
        self.checkpoint.leader.left -= 1;
        if self.checkpoint.leader.left > 0 {
            return;
        }
        // If the redo is interrupted, it starts over from the old roots: page LSNs guard against
        // doing anything twice.
        let redo = match self.checkpoint.leader.begin {
            Some(Begin { new_epoch: Some(epoch), .. }) => epoch.first_lsn.before(),
            _ => self
                .redo
                .recovering
                .as_ref()
                .map_or(self.ctx.order.next().before(), |recovering| recovering.redo),
        };
        self.checkpoint.leader.redo = redo;
        self.checkpoint.leader.left = self.ctx.shard_map.shards_count();
        self.checkpoint.leader.by_shard = self.ctx.shard_map.shards().map(|_| None).collect();
        self.checkpoint.leader.enter(Phase::Running);
        self.tell_all(|| Message::Redo(redo));
    }

    /// Records that a shard has written its part.
    pub(in crate::engine) fn shard_ready(&mut self, from: ShardId, contribution: Contribution) {
        self.checkpoint.leader.assert_state();
        assert_eq!(
            self.checkpoint.leader.phase,
            Phase::Running,
            "a contribution belongs to a checkpoint"
        );
        for (vshard, root) in &contribution.roots {
            let owner = self.ctx.shard_map.owner(*vshard);
            assert!(owner == from, "{from:?} has written {root:?} of {vshard:?}, {owner:?}'s own");
        }
        let before = self.checkpoint.leader.by_shard[from.index()].replace(contribution);
        assert!(before.is_none(), "{from:?} is ready twice in one checkpoint");
        self.checkpoint.leader.left -= 1;
        if self.checkpoint.leader.left == 0 {
            self.checkpoint.leader.contributions =
                std::mem::take(&mut self.checkpoint.leader.by_shard)
                    .into_iter()
                    .flatten()
                    .collect();
            let (count, all) =
                (self.checkpoint.leader.contributions.len(), self.ctx.shard_map.shards_count());
            assert!(count == usize::from(all), "{count} of {all} shards are ready");
            self.checkpoint.leader.enter(Phase::Table);
            self.ctx.need_all();
        }
    }

    /// Called when all parts are written: writes the extent table of all shards, a few blocks at a
    /// time.
    fn write_table(&mut self) {
        self.checkpoint.leader.assert_state();
        let mut table = match self.checkpoint.leader.table.take() {
            Some(table) => table,
            None => TableParts { rows: self.contributed_rows(), sums: Vec::new() },
        };
        let blocks = table.rows.len().div_ceil(TABLE_ROWS as usize);
        let number = self.ctx.superblock.checkpoint + 1;
        while table.sums.len() < blocks {
            let first = table.sums.len();
            let most = if planted!(TableAllAtOnce) { blocks } else { TABLE_BLOCKS_AT_A_TIME };
            let count = most.min(blocks - first);
            if !self.ensure_frames(count as u32, Step::Table) {
                break;
            }
            let mut writes = Vec::with_capacity(count);
            for (index, rows) in
                table.rows.chunks(TABLE_ROWS as usize).enumerate().skip(first).take(count)
            {
                let mut frame = self.ctx.arena.alloc(0).expect("frames were ensured");
                let out = frame.try_mut().expect("a new frame has no pins");
                table.sums.push(encode_table(
                    self.ctx.superblock.store_id,
                    index as u32,
                    number,
                    rows,
                    out,
                ));
                writes.push((FileId::Table, table_offset(index as u32, number), frame));
            }
            self.ctx.stats.checksums += count as u64;
            self.submit_blocks(writes);
        }
        if table.sums.len() < blocks {
            self.checkpoint.leader.table = Some(table);
            return;
        }
        self.checkpoint.leader.next =
            Some(self.next_superblock(table.rows.len() as u32, table_crc(table.sums)));
        self.checkpoint.leader.enter(Phase::Flush);
    }

    fn contributed_rows(&self) -> Vec<TableRow> {
        let mut rows = vec![TableRow::default(); self.space.extents.count() as usize];
        for (no, row) in self.checkpoint.leader.contributions.iter().flat_map(|c| &c.rows) {
            assert!(rows[no.index()] == TableRow::default(), "{no:?} is two shards' own");
            rows[no.index()] = *row;
        }
        rows
    }

    fn next_superblock(&self, extents_count: u32, table_crc: u32) -> Superblock {
        let old = &self.ctx.superblock;
        let leader = &self.checkpoint.leader;
        let begin = leader.begin.expect("it has begun");
        let mut vshards =
            vec![VShardState::default(); self.ctx.limits.geometry.vshards_count as usize];
        for (vshard, root) in leader.contributions.iter().flat_map(|c| &c.roots) {
            let shard = self.ctx.shard_map.owner(*vshard);
            let VShardState { root: before, redo_lsn, .. } = old.vshards[vshard.index()];
            // A root has two places, which take turns: another write would go over the one that
            // counts.
            assert!(
                (before.generation..=before.generation + 1).contains(&root.generation)
                    && redo_lsn <= leader.redo,
                "the root of {vshard:?} is {root:?}, {before:?} before, and reflects all up to \
                 {:?}, {redo_lsn:?} before",
                leader.redo
            );
            vshards[vshard.index()] = VShardState { root: *root, redo_lsn: leader.redo, shard };
        }
        let mut next = Superblock {
            clean: begin.clean,
            generation: old.generation + 1,
            checkpoint: old.checkpoint + 1,
            watermark: self
                .redo
                .recovering
                .as_ref()
                .map_or(self.ctx.order.watermark(), |recovering| recovering.recovered_lsn),
            next_lsn: match begin.new_epoch {
                _ if self.redo.recovering.is_some() => self.redo.recovered_lsn.plus(1),
                Some(_) => self.redo.recovered_lsn.plus(1),
                // The roots hold nothing of this epoch: the last commit is still the one before the
                // gap.
                None if leader.redo < old.epoch_first_lsn => old.next_lsn,
                None => self.ctx.order.next(),
            },
            extents_count,
            table_crc,
            logs: match begin.new_epoch {
                // Until an epoch begins, the logs are those of the last one.
                None if self.redo.recovering.is_some() => old.logs.clone(),
                _ => leader.contributions.iter().map(|c| c.log).collect(),
            },
            vshards,
            ..old.clone()
        };
        if let Some(new) = begin.new_epoch {
            next.epoch = new.epoch;
            next.salt = new.salt;
            next.epoch_first_lsn = new.first_lsn;
        }
        next
    }

    /// Called when all operations of a step of the leader have ended.
    pub(in crate::engine) fn leader_step_done(&mut self, op: DiskOp) {
        self.checkpoint.leader.assert_state();
        match self.checkpoint.leader.phase {
            Phase::Flush if matches!(op, DiskOp::Flush { .. }) || planted!(RootsNotFlushed) => {
                self.write_superblock(0)
            }
            Phase::Flush => {
                let files = smallvec::smallvec![FileId::Data, FileId::Meta, FileId::Table];
                self.checkpoint_op(DiskOp::Flush { files });
            }
            Phase::Super { copy } => {
                self.checkpoint.leader.enter(Phase::SuperFlush { copy });
                self.checkpoint_op(DiskOp::Flush { files: smallvec::smallvec![FileId::Meta] });
            }
            Phase::SuperFlush { copy: 0 } => self.write_superblock(1),
            Phase::SuperFlush { .. } => self.superblock_durable(),
            Phase::Idle | Phase::Beginning | Phase::Running | Phase::Table => {}
        }
    }

    fn write_superblock(&mut self, copy: usize) {
        let Some(next) = &self.checkpoint.leader.next else { return };
        let number = Superblock::copies_of(next.generation)[copy];
        let mut bytes = vec![0; SUPERBLOCK_BYTES];
        assert!(next.is_consistent(), "this superblock can't be read again: {next:?}");
        next.encode(number, &mut bytes);
        let mut from = SmallVec::new();
        for (block, frame) in bytes.chunks(BLOCK).zip(&mut self.checkpoint.leader.superblock_frames)
        {
            frame.try_mut().expect("the superblock before is written").copy_from_slice(block);
            from.push(IoSlice::whole(frame.pin()));
        }
        self.ctx.stats.checksums += 1;
        self.checkpoint.leader.enter(Phase::Super { copy });
        self.checkpoint_op(DiskOp::Write {
            file: FileId::Meta,
            offset: Superblock::offset(number),
            from,
        });
    }

    fn superblock_durable(&mut self) {
        let Some(next) = self.checkpoint.leader.next.take() else { return };
        self.checkpoint.leader.contributions.clear();
        if self.checkpoint.leader.begin.take().is_some_and(|begin| begin.new_epoch.is_some()) {
            self.checkpoint.leader.new_epoch = None;
        }
        self.checkpoint.leader.enter(Phase::Idle);
        self.tell_all(|| Message::Done(Box::new(next.clone())));
        self.ctx.need_all();
    }

    /// Handles a caller's request to close the store.
    pub(in crate::engine) fn request_close(&mut self, token: Token) {
        self.life.closing = Some(Closing::Caller(token));
        self.ctx.need_all();
        for shard in self.ctx.shard_map.others(self.ctx.id) {
            self.ctx.send(shard, Message::Quiesce);
        }
    }

    /// Called when the leader closes the store.
    pub(in crate::engine) fn quiesce(&mut self) {
        self.life.closing = Some(Closing::Leader);
        self.ctx.need_all();
    }

    /// Reports that no request is in progress any more or, in a store that has stopped, ends.
    pub(in crate::engine) fn advance_close(&mut self) {
        if self.life.closing.is_none() || self.life.closed {
            return;
        }
        if self.ctx.failed.is_some() {
            // Wait for what the device still holds: only then are its buffers ours again.
            if self.ctx.ops.is_empty() && self.requests.pending.is_empty() {
                let error = self.ctx.failed.clone();
                self.end_close(Err(error.expect("just seen")));
            }
            return;
        }
        let busy = self.requests.pending.iter().any(|(_, pending)| pending.is_own())
            || !self.coordinator.is_idle()
            || self.space.compaction.compactor.count() > 0
            || !self.space.compaction.moves.is_empty();
        if !busy && !self.life.quiet {
            self.life.quiet = true;
            self.ctx.send(ShardId::LEADER, Message::Quiet);
        }
    }

    /// Called when the closing checkpoint is durable, or will never be.
    pub(in crate::engine) fn end_close(&mut self, result: crate::Result<()>) {
        self.life.closed = true;
        if let Some(Closing::Caller(token)) = self.life.closing.replace(Closing::Leader) {
            self.ctx.reply(token, result.map(|()| Response::Closed));
        }
    }
}
