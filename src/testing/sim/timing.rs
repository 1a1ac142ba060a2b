//! The delays of one life: how long turns, messages and wake-ups take, which shard is slow, and
//! which gets no requests.
//!
//! Invariants
//! 1. Some lives have no delays at all, so that many things happen at one moment and chance alone
//!    picks the order.
//! 2. At most one shard is slow and at most one is idle; shard 0 leads checkpoints and closes, so
//!    it is never idle.
//!
//! It does *not* drive anything.

use crate::base::{Micros, ShardId};
use crate::testing::random::Rng;

/// The delays of one life.
#[derive(Clone, Debug)]
pub struct Timing {
    /// The longest turn.
    turn: Micros,
    /// The longest way of a message.
    message: Micros,
    /// The longest way of a request to its shard.
    request: Micros,
    /// The longest time from the end of an operation until its shard sees it.
    completion: Micros,
    /// The longest time from a risen watermark until a parked shard wakes.
    wake: Micros,
    /// The percentage of turns that take only a part of what has arrived.
    part_percent: u64,
    slow: Option<Slow>,
    /// A shard that gets no requests, and whose pages no request concerns.
    pub idle: Option<ShardId>,
    /// The percentage of commits that go to a random shard instead of that of their first page.
    pub stray_percent: u64,
}

/// A slow shard, with a factor for each kind of delay.
#[derive(Clone, Debug)]
struct Slow {
    shard: usize,
    turns: u64,
    messages: u64,
    device: u64,
}

impl Timing {
    /// Random delays for a life with `shards` shards.
    pub fn random(rng: &mut Rng, shards: u16) -> Self {
        let lockstep = rng.one_in(6);
        let upto = |rng: &mut Rng, usual: Micros| match rng.below(4) {
            _ if lockstep => 0,
            0 => 0,
            1 => usual * 20,
            _ => usual,
        };
        let several = shards > 1;
        Timing {
            turn: upto(rng, 5),
            message: upto(rng, 10),
            request: upto(rng, 10),
            completion: upto(rng, 5),
            wake: upto(rng, 10),
            part_percent: *rng.pick(&[0, 20, 60]),
            slow: (several && rng.one_in(3)).then(|| Slow::random(rng, shards)),
            idle: (several && rng.one_in(4))
                .then(|| ShardId::new(rng.within(1, u64::from(shards) - 1) as u16)),
            stray_percent: if several { *rng.pick(&[0, 0, 20, 100]) } else { 0 },
        }
    }

    /// How long a turn keeps `shard` busy.
    pub fn turn_us(&self, rng: &mut Rng, shard: usize) -> Micros {
        rng.within(0, self.turn) * self.factor(shard, |slow| slow.turns)
    }

    /// How long a message takes.
    pub fn message_us(&self, rng: &mut Rng, from: usize, to: usize) -> Micros {
        let factor = |shard| self.factor(shard, |slow| slow.messages);
        rng.within(0, self.message) * factor(from).max(factor(to))
    }

    /// How long a request takes to its shard.
    pub fn request_us(&self, rng: &mut Rng) -> Micros {
        rng.within(0, self.request)
    }

    /// How long it takes until `shard` can see that an operation has ended.
    pub fn completion_us(&self, rng: &mut Rng) -> Micros {
        rng.within(0, self.completion)
    }

    /// How long a parked shard takes to wake.
    pub fn wake_us(&self, rng: &mut Rng) -> Micros {
        rng.within(0, self.wake)
    }

    /// The factor by which the device is slower for `shard`.
    pub fn device_factor(&self, shard: usize) -> u64 {
        self.factor(shard, |slow| slow.device)
    }

    /// The number of `arrived` arrivals that a turn takes.
    pub fn take(&self, rng: &mut Rng, arrived: usize) -> usize {
        if rng.chance(self.part_percent) { rng.within(0, arrived as u64) as usize } else { arrived }
    }

    /// The factor by which an answer may take longer than usual.
    pub fn patience(&self) -> u64 {
        self.slow.as_ref().map_or(1, |slow| slow.device.max(slow.turns).max(slow.messages))
    }

    fn factor(&self, shard: usize, of: impl Fn(&Slow) -> u64) -> u64 {
        self.slow.as_ref().filter(|slow| slow.shard == shard).map_or(1, of)
    }
}

impl Slow {
    fn random(rng: &mut Rng, shards: u16) -> Self {
        let factor = rng.within(10, 100);
        let shard = rng.below(u64::from(shards)) as usize;
        let mut slow = Slow { shard, turns: 1, messages: 1, device: 1 };
        match rng.below(4) {
            0 => slow.turns = factor,
            1 => slow.messages = factor,
            2 => slow.device = factor,
            _ => (slow.turns, slow.messages, slow.device) = (factor, factor, factor),
        }
        slow
    }
}
