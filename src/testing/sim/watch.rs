//! Observes a cluster from outside: whether its shards spin, what they wait for, how often rare
//! events happen.
//!
//! It does *not* drive anything, and knows no clients.

use super::cluster::Cluster;
use super::progress::TurnOutcome;
use super::rare::Rare;
use crate::base::Micros;
use crate::engine::{Activity, Shard};

impl Cluster {
    /// Counts of rare events.
    pub fn rare(&self) -> Rare {
        Rare { turns_for_nothing: self.progress.total, ..self.late.rare }
    }

    /// Checkpoints that have ended, counted over all shards.
    pub fn checkpoints_ended(&self) -> u64 {
        self.shards.iter().map(Shard::checkpoints_ended).sum()
    }

    /// The levels of the highest tree.
    pub fn levels_most(&self) -> u8 {
        self.shards.iter().map(Shard::levels_most).max().unwrap_or(0)
    }

    /// Frames of the shard that has the fewest.
    pub fn frames_least(&self) -> u64 {
        self.shards.iter().map(Shard::frames).min().unwrap_or(0)
    }

    /// Frames of all shards.
    pub fn frames(&self) -> u64 {
        self.shards.iter().map(Shard::frames).sum()
    }

    /// Whether the shard has turned for nothing, and what it waits for.
    pub(super) fn watch(
        &mut self,
        index: usize,
        now: Micros,
        step: Activity,
    ) -> std::result::Result<(), String> {
        let watermark = self.order.watermark();
        let (node, shard) = (&mut self.nodes[index], &self.shards[index]);
        let by_deadline = shard.deadline().is_some_and(|at| at <= now + 1);
        let again_at_once = by_deadline || shard.waits_for().is_some_and(|lsn| lsn <= watermark);
        let is_short = shard.is_short_of_memory() && shard.commits_ready() > 0;
        self.late.rare.commits_short_of_memory += u64::from(is_short && !node.was_short);
        node.was_short = is_short;
        let ended = shard.checkpoints_ended();
        if node.starved_after.is_some_and(|before| ended > before) {
            self.late.rare.checkpoints_starved += 1;
            node.starved_after = None;
        }
        if shard.is_checkpoint_starved() {
            node.starved_after.get_or_insert(ended);
        }
        self.late.rare.segments_added += shard.log_segments() - node.log_segments;
        node.log_segments = shard.log_segments();
        let spins = self.progress.turned(
            index,
            TurnOutcome { delivered: step.delivered, emitted: step.emitted, again_at_once },
        );
        spins.map_err(|why| format!("{why}: {}", self.describe()))
    }

    /// Describes what each shard waits for.
    pub fn describe(&self) -> String {
        let mut text = format!(
            "at {}, {} operations in flight, {} messages under way",
            self.disk.now(),
            self.disk.in_flight(),
            self.net.under_way()
        );
        for (index, (node, shard)) in self.nodes.iter().zip(&self.shards).enumerate() {
            text += &format!(
                "\n  s{index}: {} requests and {} completions not taken, accepting {}, waits for \
                 {:?}, deadline {:?}, next turn at {:?}; {}",
                node.requests.len(),
                node.completions.len(),
                shard.accepting(),
                shard.waits_for(),
                shard.deadline(),
                self.turn_at(index),
                shard.dump_state()
            );
        }
        text
    }
}
