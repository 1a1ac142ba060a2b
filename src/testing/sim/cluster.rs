//! A store of one or more shards, each driven as its real event loop would: parked until something
//! arrives for it.
//!
//! ```text
//! request, message, completion ... arrive, each after a delay of its own
//!      |            deadline, watermark >= waits_for()
//!      v            v
//!    parked ----> turn: take what has arrived (or a part), Shard::turn, effects out ----> parked
//! ```
//! Invariants
//! 1. A shard turns only if something has arrived for it, its deadline has come, or the watermark
//!    has reached what it waits for; and once at the beginning. So if a shard waits for something
//!    that never happens, it hangs, and the run fails.
//! 2. A turn is atomic; the seed says which shard turns next, and what it takes.
//! 3. One disk serves all shards; a completion comes back to the shard that submitted the
//!    operation.
//! 4. Effects of a shard after the power was cut are dropped.
//!
//! It does *not* route requests or check answers.

use super::disk::SimDisk;
use super::host::{Node, NodeHost, SHARD_SHIFT, Stop, Turn};
use super::late::{Holding, Late};
use super::net::{Mark, Net};
use super::progress::{Progress, check_budget};
use super::timing::Timing;
use crate::base::error::{Error, Result};
use crate::base::mix::mix;
use crate::base::options::Options;
use crate::base::{Lsn, Micros, ShardId, ShardMap};
use crate::engine::order::GlobalOrder;
use crate::engine::recovery::RecoveryReport;
use crate::engine::{Message, Request, Shard, Token, step};
use crate::io::{Disk, OpId};
use crate::testing::random::Rng;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Idle turns in a row after which the store counts as spinning, if they come faster than
/// `IDLE_TURN_US` on average.
const IDLE_TURNS_MAX: u64 = 1_000;
const IDLE_TURN_US: Micros = 200;
/// If more messages than this are in flight between two shards, the protocol counts as unbounded.
const MESSAGES_MAX: usize = 8_192;
/// Turns between two audits: at least `AUDIT_EACH`, and one for each `AUDITED_A_TURN` pages and map
/// nodes, so that a large store does not spend all its time on audits.
const AUDIT_EACH: u64 = 32;
const AUDITED_A_TURN: u64 = 4;
/// A store must be open within this many turns; a few thousand are usual.
const OPENING_TURNS_MAX: u32 = 1_000_000;

/// An open store, or one being opened.
pub struct Cluster {
    pub(super) shards: Vec<Shard>,
    pub(super) nodes: Vec<Node>,
    pub(super) order: Arc<GlobalOrder>,
    pub(super) net: Net<Message>,
    shard_map: ShardMap,
    /// How long everything takes.
    pub timing: Timing,
    rng: Rng,
    pub(super) disk: SimDisk,
    pub(super) late: Late,
    pub(super) progress: Progress,
    idle_turns: u64,
    /// The turn of the next audit.
    audit_at: u64,
    /// The time of the last event.
    busy_at: Micros,
    counters: ClusterCounters,
}

/// What an opening found.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// Whether the store was created.
    pub created: bool,
    /// Whether it had been closed cleanly.
    pub clean: bool,
    /// The last LSN of the recovered state.
    pub recovered_lsn: Lsn,
    /// Copies of the superblock that could not be used.
    pub warnings: usize,
}

/// Counters of a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterCounters {
    /// Turns of shards.
    pub turns: u64,
    /// Turns of a shard that was not the last one to turn.
    pub switches: u64,
    /// Messages sent.
    pub messages: u64,
    /// The most messages in flight between two shards.
    pub messages_most: u64,
    /// Shards woken because the watermark had reached what they waited for.
    pub wakes: u64,
    /// Stores opened, by the number of their shards, from one on.
    pub opened: [u64; 4],
    /// A hash of the order and times of all turns.
    pub trace: u64,
}

impl ClusterCounters {
    /// Adds the counters of another cluster.
    pub fn add(&mut self, other: &ClusterCounters) {
        self.turns += other.turns;
        self.switches += other.switches;
        self.messages += other.messages;
        self.messages_most = self.messages_most.max(other.messages_most);
        self.wakes += other.wakes;
        self.opened.iter_mut().zip(other.opened).for_each(|(sum, more)| *sum += more);
        // The sum does not depend on the order, since the threads of a campaign end in any.
        self.trace = self.trace.wrapping_add(other.trace);
    }
}

impl Cluster {
    /// Begins to open or create the store on `disk`; call [`step`](Self::step) until it [is
    /// open](Self::is_open).
    ///
    /// # Errors
    /// Those of recovery.
    pub fn begin(
        disk: &SimDisk,
        options: &Options,
        shards: u16,
        holding: Holding,
        rng: &mut Rng,
    ) -> Result<(Cluster, Opened)> {
        let mut rng = rng.fork(3);
        let opening = crate::engine::recovery::begin(
            &mut disk.clone(),
            options,
            shards,
            rng.draw(),
            disk.now(),
        )?;
        let RecoveryReport { created, clean, recovered_lsn, warnings, .. } = opening.report;
        let opened = Opened { created, clean, recovered_lsn, warnings: warnings.len() };
        assert_eq!(opening.shards.len(), usize::from(shards), "as many shards as asked for");
        let now = Some(disk.now());
        let node = |shard: &Shard| Node {
            log_segments: shard.log_segments(),
            requests: Vec::new(),
            completions: Vec::new(),
            free_at: 0,
            woken_at: now,
            was_short: false,
            starved_after: None,
        };
        let shards = opening.shards;
        let nodes: Vec<Node> = shards.iter().map(node).collect();
        let cluster = Cluster {
            net: Net::new(nodes.len()),
            // This does not draw from the main random stream: a run without held reads must not
            // change.
            late: Late::new(holding, nodes.len(), rng.clone().fork(7)),
            progress: Progress::new(nodes.len()),
            shard_map: shards[0].shard_map(),
            timing: Timing::random(&mut rng, shards.len() as u16),
            shards,
            nodes,
            order: opening.order,
            rng,
            disk: disk.clone(),
            idle_turns: 0,
            audit_at: AUDIT_EACH,
            busy_at: disk.now(),
            counters: ClusterCounters::default(),
        };
        Ok((cluster, opened))
    }

    /// Drives a store that has [begun](Self::begin) to open until it is open, or the power is off.
    ///
    /// # Errors
    /// Inner: the failure of a shard. Outer: opening hangs, or never ends.
    pub fn finish_opening(&mut self) -> std::result::Result<Result<()>, String> {
        let mut turns = 0;
        while !self.is_open() && !self.disk.is_off() {
            turns += 1;
            if turns > OPENING_TURNS_MAX {
                return Err(format!("opening has no end: {}", self.describe()));
            }
            if let Some(error) = self.failure() {
                return Ok(Err(error));
            }
            let turn = self.step()?.ok_or_else(|| format!("opening hangs: {}", self.describe()))?;
            if let Some((token, reply)) = turn.replies.first() {
                return Err(format!("an answer during opening: {token:?} {reply:?}"));
            }
        }
        self.counters.opened[self.nodes.len() - 1] += 1;
        Ok(Ok(()))
    }

    /// Whether all shards take requests.
    pub fn is_open(&self) -> bool {
        self.shards.iter().all(Shard::is_open)
    }

    /// Whether all shards are closed.
    pub fn is_closed(&self) -> bool {
        self.shards.iter().all(Shard::is_closed)
    }

    /// Why a shard stopped, if one did.
    pub fn failure(&self) -> Option<Error> {
        self.shards.iter().find_map(Shard::failure)
    }

    /// How the pages are distributed over shards.
    pub fn shard_map(&self) -> ShardMap {
        self.shard_map
    }

    /// The most bytes of one commit.
    pub fn txn_bytes_max(&self) -> u64 {
        self.shards.iter().map(Shard::txn_bytes_max).min().expect("there is a shard")
    }

    /// The watermark: everything up to it is durable.
    pub fn watermark(&self) -> Lsn {
        self.order.watermark()
    }

    /// The newest LSN that was allocated, used or void.
    pub fn newest(&self) -> Lsn {
        self.order.next().before()
    }

    /// The first breach of the disk seam's rules, if there was one.
    pub fn violation(&self) -> Option<String> {
        self.disk.violation()
    }

    /// The counters so far.
    pub fn counters(&self) -> ClusterCounters {
        ClusterCounters { messages_most: self.net.most() as u64, ..self.counters }
    }

    /// Sends a request to a shard.
    pub fn request(&mut self, shard: ShardId, token: Token, request: Request) {
        let at = self.disk.now() + self.timing.request_us(&mut self.rng);
        self.nodes[shard.index()].requests.push((at, token, request));
        (self.idle_turns, self.busy_at) = (0, self.disk.now());
    }

    /// The time of the next event. `None` if there is none until a request arrives.
    pub fn next_at(&self) -> Option<Micros> {
        let next = self.next_event_at();
        let kept = self.late.next_due(self.is_at_rest()).map(|at| at.max(self.disk.now()));
        // If nothing else will happen, one of them is delivered at once.
        if next.is_none() {
            kept.map(|_| self.disk.now())
        } else {
            next.into_iter().chain(kept).min()
        }
    }

    /// The time of the next event, not counting delayed completions.
    fn next_event_at(&self) -> Option<Micros> {
        let turns = (0..self.nodes.len()).filter_map(|index| self.turn_at(index));
        turns.chain(self.disk.next_due()).min()
    }

    /// Whether only deadlines and delayed completions are left.
    fn is_at_rest(&self) -> bool {
        let has_work = |(node, shard): (&Node, &Shard)| {
            !node.completions.is_empty() || (!node.requests.is_empty() && shard.accepting())
        };
        let mut nodes = self.nodes.iter().zip(&self.shards);
        self.disk.next_due().is_none() && self.net.under_way() == 0 && !nodes.any(has_work)
    }

    /// When the shard turns next.
    pub(super) fn turn_at(&self, index: usize) -> Option<Micros> {
        let (node, shard) = (&self.nodes[index], &self.shards[index]);
        let requests = node.requests.iter().map(|&(at, ..)| at).min().filter(|_| shard.accepting());
        let completions = node.completions.iter().map(|&(at, _)| at).min();
        let messages = self.net.next_for(index);
        let reasons = [requests, completions, messages, shard.deadline(), node.woken_at];
        reasons.into_iter().flatten().min().map(|at| at.max(node.free_at))
    }

    /// Marks all that `shard` has sent to others until now.
    pub fn mark(&self, shard: ShardId) -> Mark {
        self.net.mark(shard.index())
    }

    /// Whether everything sent before the mark has arrived.
    pub fn reached(&self, mark: &Mark) -> bool {
        self.net.reached(mark)
    }

    /// Advances time to the next event, and lets a shard turn if one has a reason to. `None` if
    /// nothing will happen.
    ///
    /// # Errors
    /// What is wrong with the shards.
    pub fn step(&mut self) -> std::result::Result<Option<Turn>, String> {
        let Some(at) = self.next_at() else { return Ok(None) };
        let nothing_else = self.next_event_at().is_none();
        self.disk.advance_to(at);
        self.reap();
        let now = self.disk.now();
        let at_rest = self.late.is_keeping() && self.is_at_rest();
        for (shard, completion) in
            self.late.take_due(self.counters.turns, now, nothing_else, at_rest)
        {
            self.nodes[shard].completions.push((now, completion));
        }
        let ready: Vec<usize> = (0..self.nodes.len())
            .filter(|&index| self.turn_at(index).is_some_and(|at| at <= now))
            .collect();
        if ready.is_empty() || self.disk.is_off() {
            return Ok(Some(Turn::default()));
        }
        let index = *self.rng.pick(&ready);
        self.turn(index).map(Some)
    }

    /// Delivers completions from the disk to the shards that submitted the operations.
    fn reap(&mut self) {
        let mut done = Vec::new();
        self.disk.clone().reap(&mut done);
        for mut completion in done {
            let shard = (completion.id.0 >> SHARD_SHIFT) as usize;
            completion.id = OpId(completion.id.0 & ((1 << SHARD_SHIFT) - 1));
            let at = self.disk.now() + self.timing.completion_us(&mut self.rng);
            let Some(completion) = self.late.keep(shard, completion, self.counters.turns) else {
                continue;
            };
            self.nodes[shard].completions.push((at, completion));
        }
    }

    fn turn(&mut self, index: usize) -> std::result::Result<Turn, String> {
        let now = self.disk.now();
        let before = self.order.watermark();
        self.nodes[index].woken_at = None;
        let shard = ShardId::new(index as u16);
        let mut host = NodeHost {
            index,
            shards_count: self.shards.len(),
            now,
            turns: self.counters.turns,
            node: &mut self.nodes[index],
            net: &mut self.net,
            late: &mut self.late,
            timing: &self.timing,
            rng: &mut self.rng,
            disk: &self.disk,
            turn: Turn { shard, ..Turn::default() },
            messages: 0,
        };
        let stepped = step(&mut self.shards[index], &mut host);
        let NodeHost { turn, messages, .. } = host;
        self.counters.messages += messages;
        let step = match stepped {
            ControlFlow::Continue(step) => step,
            ControlFlow::Break(Stop::DiskEnded) => return Ok(turn),
            ControlFlow::Break(Stop::Wrong(why)) => return Err(why),
        };
        self.park(index, now, before)?;
        self.note(index, now, step.is_busy())?;
        self.watch(index, now, step)?;
        if self.counters.turns >= self.audit_at {
            self.audit(index)?;
        }
        Ok(turn)
    }

    /// Audits a shard's counters, and checks that it keeps no more than it may.
    fn audit(&mut self, index: usize) -> std::result::Result<(), String> {
        let (id, shard) = (ShardId::new(index as u16), &self.shards[index]);
        shard.audit().map_err(|drift| format!("{id:?} counts wrongly: {drift}"))?;
        let counts = shard.counts();
        check_budget(&counts).map_err(|why| format!("{id:?} keeps too much: {why}"))?;
        self.audit_at =
            self.counters.turns + AUDIT_EACH.max((counts.pages + counts.nodes) / AUDITED_A_TURN);
        Ok(())
    }

    /// Parks the shard after its turn, and wakes others if the watermark has reached what they wait
    /// for.
    fn park(&mut self, index: usize, now: Micros, before: Lsn) -> std::result::Result<(), String> {
        let watermark = self.order.watermark();
        if watermark < before {
            return Err(format!("the watermark fell from {before:?} to {watermark:?}"));
        }
        self.nodes[index].free_at = now + self.timing.turn_us(&mut self.rng, index);
        for (other, (node, shard)) in self.nodes.iter_mut().zip(&self.shards).enumerate() {
            let reached = shard.waits_for().is_some_and(|lsn| lsn <= watermark);
            if reached && node.woken_at.is_none() {
                self.counters.wakes += u64::from(other != index);
                // A shard that is about to park checks the watermark again.
                let after = if other == index { 0 } else { self.timing.wake_us(&mut self.rng) };
                node.woken_at = Some(now + after);
            }
        }
        Ok(())
    }

    fn note(&mut self, index: usize, now: Micros, busy: bool) -> std::result::Result<(), String> {
        let last = self.counters.trace & 0xff;
        self.counters.turns += 1;
        self.counters.switches += u64::from(last != index as u64);
        self.counters.trace = (mix(self.counters.trace ^ now) & !0xff) | index as u64;
        (self.idle_turns, self.busy_at) =
            if busy { (0, now) } else { (self.idle_turns + 1, self.busy_at) };
        if self.idle_turns > IDLE_TURNS_MAX && now < self.busy_at + self.idle_turns * IDLE_TURN_US {
            let (turns, since) = (self.idle_turns, self.busy_at);
            return Err(format!(
                "{turns} turns in which nothing happened, since {since}: {}",
                self.describe()
            ));
        }
        if self.net.most() > MESSAGES_MAX {
            return Err(format!(
                "{} messages under way between two shards: {}",
                self.net.most(),
                self.describe()
            ));
        }
        Ok(())
    }
}
