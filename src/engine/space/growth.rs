//! Growth of the data space: a shard asks the leader, and the leader makes the file longer; if it
//! can't, the other shards give some of their extents.
//!
//! ```text
//! Nobody --WantSpace--> Leader --Granted--> Nobody
//!                         \--Denied--> Others --all have answered--> Nobody
//! ```

use crate::base::error::Result;
use crate::base::{ExtentNo, Micros, ShardId};
use crate::engine::Shard;
use crate::engine::message::{Message, Urgency};
use crate::engine::op_kind::{Growth, OpKind};
use crate::format::extent::{TABLE_ROWS, table_offset};
use crate::io::{DiskOp, FileId};

/// After a failed growth the next is tried this much later.
pub(in crate::engine) const GROW_RETRY_US: Micros = 1_000_000;

/// What an asked shard has given.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Gain {
    Nothing,
    Space,
}

/// Where a shard has requested more space.
#[derive(Clone, Copy, Default)]
pub(in crate::engine) enum SpaceAsked {
    #[default]
    Nobody,
    /// Waiting for the leader.
    Leader(Urgency),
    /// All others: how many have not answered, and what came of the rest.
    Others { left: u16, gain: Gain, urgency: Urgency },
}

impl Shard {
    /// Asks for more data space, at most `overcommit_extents` past its limit; false if it was
    /// refused a moment ago.
    pub(in crate::engine) fn grow(&mut self, overcommit_extents: u32) -> bool {
        self.ask_for_space(overcommit_extents, Urgency::Overcommit(overcommit_extents))
    }

    /// Asks for more data space, at most `overcommit_extents` past its limit; false if a request as
    /// urgent was refused a moment ago.
    pub(in crate::engine) fn ask_for_space(
        &mut self,
        overcommit_extents: u32,
        urgency: Urgency,
    ) -> bool {
        let refused =
            |(at, most): (Micros, Urgency)| self.ctx.now < at + GROW_RETRY_US && urgency <= most;
        if self.space.growing || self.space.failed.is_some_and(refused) {
            return self.space.growing;
        }
        self.space.growing = true;
        self.space.asked = SpaceAsked::Leader(urgency);
        self.ctx.send(ShardId::LEADER, Message::WantSpace(overcommit_extents));
        true
    }

    /// Called when a shard asks the leader for space.
    pub(in crate::engine) fn space_wanted_by(&mut self, shard: ShardId, overcommit_extents: u32) {
        self.space.requests.push_back((shard, overcommit_extents));
        self.grow_next();
    }

    fn grow_next(&mut self) {
        while !self.space.growth_under_way
            && let Some((of, overcommit_extents)) = self.space.requests.pop_front()
        {
            let count = self.space.extents.count();
            let most = self.ctx.limits.data_extents_max.saturating_add(overcommit_extents);
            if count >= most || self.ctx.failed.is_some() {
                self.ctx.send(of, Message::Denied);
                continue;
            }
            // An eighth of what one shard has.
            let chunk = (count / u32::from(self.ctx.shard_map.shards_count()) / 8).clamp(4, 64);
            let to = count.saturating_add(chunk).min(most);
            assert!(to > count, "{count} extents grow to {to}, of {most}");
            self.space.growth_under_way = true;
            let table = |extents: u32| table_offset(extents.div_ceil(TABLE_ROWS), 0);
            let growth = Growth { of, to, table_done: false };
            if table(to) > table(count) {
                let op =
                    DiskOp::Allocate { file: FileId::Table, from: table(count), to: table(to) };
                self.ctx.submit(OpKind::Grow(growth), op);
            } else {
                self.grow_data(growth);
            }
        }
    }

    fn grow_data(&mut self, growth: Growth) {
        let bytes = |extents: u32| u64::from(extents) * self.ctx.limits.geometry.extent_bytes;
        let (from, to) = (bytes(self.space.extents.count()), bytes(growth.to));
        let growth = Growth { table_done: true, ..growth };
        self.ctx.submit(OpKind::Grow(growth), DiskOp::Allocate { file: FileId::Data, from, to });
    }

    /// Called when a step of the growth has ended.
    pub(in crate::engine) fn grown(&mut self, growth: Growth, result: Result<()>) {
        let count = self.space.extents.count();
        assert!(
            self.space.growth_under_way && growth.to > count,
            "{count} extents have grown to {}, under way: {}",
            growth.to,
            self.space.growth_under_way
        );
        self.ctx.need_all();
        match result {
            Ok(()) if !growth.table_done => return self.grow_data(growth),
            Ok(()) => {
                self.space.growth_failure_logged = false;
                let new: Vec<ExtentNo> =
                    (self.space.extents.count()..growth.to).map(ExtentNo::new).collect();
                self.space.extents.cover(growth.to);
                self.ctx.send(growth.of, Message::Granted(new));
            }
            Err(error) => {
                if !std::mem::replace(&mut self.space.growth_failure_logged, true) {
                    tracing::warn!(
                        %error,
                        "the data space can't grow: make room in the file system; commits that \
                         need space fail until then"
                    );
                }
                self.ctx.send(growth.of, Message::Denied);
            }
        }
        self.space.growth_under_way = false;
        self.grow_next();
    }

    /// Takes over extents that the leader or another shard has granted.
    pub(in crate::engine) fn space_granted(&mut self, extents: Vec<ExtentNo>) {
        let given = if extents.is_empty() { Gain::Nothing } else { Gain::Space };
        assert!(self.space.growing, "{extents:?} were granted, and not asked for");
        self.space.extents.grant(extents);
        match self.space.asked {
            SpaceAsked::Others { left, gain, urgency } => {
                let gain = if gain == Gain::Space { gain } else { given };
                self.another_has_answered(left - 1, gain, urgency)
            }
            _ => self.end_growth(Gain::Space, Urgency::Overcommit(0)),
        }
    }

    /// Called when the file can't grow: the other shards may have extents to spare.
    pub(in crate::engine) fn space_denied(&mut self) {
        let SpaceAsked::Leader(urgency) = self.space.asked else { return };
        for shard in self.ctx.shard_map.others(self.ctx.id) {
            self.ctx.send(shard, Message::DonateExtents(urgency));
        }
        self.another_has_answered(self.ctx.shard_map.shards_count() - 1, Gain::Nothing, urgency);
    }

    fn another_has_answered(&mut self, left: u16, gain: Gain, urgency: Urgency) {
        assert!(self.space.growing, "space was not asked for, and {left} have not answered");
        self.space.asked = SpaceAsked::Others { left, gain, urgency };
        if left == 0 {
            self.end_growth(gain, urgency);
        }
    }

    fn end_growth(&mut self, gain: Gain, urgency: Urgency) {
        self.space.asked = SpaceAsked::Nobody;
        self.space.growing = false;
        self.space.granted |= gain == Gain::Space;
        self.space.failed = (gain == Gain::Nothing).then_some((self.ctx.now, urgency));
        self.ctx.need_all();
    }

    /// Called when another shard has no space left: gives it half of what this one does not need.
    pub(in crate::engine) fn donate_extents(&mut self, to: ShardId, urgency: Urgency) {
        let space = self.space.extents.space();
        let kept = match urgency {
            Urgency::Stuck => 2,
            Urgency::Overcommit(_) => {
                2 * self.reserve_blocks().div_ceil(u64::from(space.data_blocks))
            }
        };
        let needed = self.owed_blocks().div_ceil(u64::from(space.data_blocks)) + kept;
        let spare = u64::from(space.free).saturating_sub(needed).div_ceil(2);
        let given = if self.ctx.failed.is_some() {
            Vec::new()
        } else {
            self.space.extents.give_away(spare as usize)
        };
        self.ctx.send(to, Message::Granted(given));
        self.ctx.room_changed();
    }

    /// The shard that owned the extent when the store was opened; it still does, unless this shard
    /// owns it.
    pub(in crate::engine) fn first_owner(&self, no: ExtentNo) -> ShardId {
        ShardId::new((no.get() % u32::from(self.ctx.shard_map.shards_count())) as u16)
    }
}
