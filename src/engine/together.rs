//! All shards of a store driven by one thread on one disk: for tests, and wherever threads are not wanted.
//!
//! Invariants
//! 1. A lap brings completions and messages, turns every shard once, and carries effects out.
//! 2. Operations of different shards don't mix: their ids carry the shard.

use super::{Effect, Message, Request, Response, Shard, Token};
use crate::base::error::Result;
use crate::base::{Micros, ShardId};
use crate::io::{Completion, Disk, OpId};
use std::collections::VecDeque;

const ID_BITS: u32 = 48;

/// The shards.
pub(crate) struct Together {
    pub(crate) shards: Vec<Shard>,
    messages: VecDeque<(ShardId, ShardId, Message)>,
    /// Answers that came.
    pub(crate) replies: Vec<(Token, Result<Response>)>,
}

impl Together {
    pub(crate) fn new(shards: Vec<Shard>) -> Self {
        Together { shards, messages: VecDeque::new(), replies: Vec::new() }
    }

    /// Hands a request to a shard.
    pub(crate) fn request(&mut self, shard: ShardId, token: Token, request: Request) {
        self.shards[shard.index()].request(token, request);
    }

    /// One lap; whether anything happened.
    pub(crate) fn lap(&mut self, disk: &mut dyn Disk, now: Micros) -> bool {
        let mut busy = false;
        let mut done = Vec::new();
        disk.reap(&mut done);
        for Completion { id, op, result } in done {
            let (shard, id) = ((id.0 >> ID_BITS) as usize, OpId(id.0 & ((1 << ID_BITS) - 1)));
            self.shards[shard].complete(Completion { id, op, result });
            busy = true;
        }
        for (from, to, message) in std::mem::take(&mut self.messages) {
            self.shards[to.index()].message(from, message);
            busy = true;
        }
        for i in 0..self.shards.len() {
            self.shards[i].turn(now);
            let from = ShardId::new(i as u16);
            while let Some(effect) = self.shards[i].next_effect() {
                busy = true;
                match effect {
                    Effect::Submit(id, op) => disk.submit(OpId((i as u64) << ID_BITS | id.0), op),
                    Effect::Reply(token, result) => self.replies.push((token, result)),
                    Effect::Send(to, message) => self.messages.push_back((from, to, message)),
                }
            }
        }
        busy
    }

    /// Laps until `done` says so, or a shard has failed: then that error, when no operation is under way any more.
    pub(crate) fn run(
        &mut self,
        disk: &mut dyn Disk,
        mut now: Micros,
        mut done: impl FnMut(&mut Self) -> bool,
    ) -> Result<()> {
        loop {
            now += 100;
            let busy = self.lap(disk, now);
            let under_way: usize = self.shards.iter().map(Shard::ops_under_way).sum();
            if let Some(error) = self.shards.iter().find_map(Shard::failure) {
                if under_way == 0 {
                    return Err(error);
                }
            } else if done(self) && under_way == 0 {
                return Ok(());
            }
            if !busy && under_way > 0 {
                disk.wait(None);
            }
        }
    }

    /// Laps until the store is open.
    pub(crate) fn open(&mut self, disk: &mut dyn Disk, now: Micros) -> Result<()> {
        self.run(disk, now, |all| all.shards.iter().all(Shard::is_open))
    }
}
