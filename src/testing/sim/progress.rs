//! The oracles of liveness and of memory: a shard that turns for nothing, or keeps more than it
//! may, is broken, even if every answer is right.
//!
//! Invariants
//! 1. A turn for which nothing has arrived, and which does nothing, must leave a deadline that is
//!    not due at once: otherwise the core spins.
//! 2. A shard keeps only pages in its table that have memory, or a change on its way, or are named
//!    by a request in progress: otherwise its heap grows with what clients request.
//! 3. A page, a request or a move waits for one map node at a time, and a page for one read: so the
//!    number of these bounds the waiters; an operation in flight has memory of the arena. The audit
//!    checks the bytes of requests against their limit.
//!
//! It does *not* know what the shard waits for.

use crate::engine::observe::Counts;

/// Turns in a row without arrivals or effects, each due at once after the other, after which a
/// shard counts as spinning. A checkpoint looks at 16 virtual shards a turn, of up to 512, of which
/// many may have nothing to write; and of a read that finds no memory one page or map node is given
/// up a turn, of up to 64 and their leaves, before there is an answer.
const FOR_NOTHING_MAX: u32 = 200;
/// Pages that the table may hold for work that is no request: moves, reads ahead, the redo.
const PAGES_SPARE: u64 = 256;
/// The most map nodes that compaction moves at a time: those of the extents that are being
/// compacted.
const MOVES_SPARE: u64 = 4_096;

/// The reason and the result of a turn.
#[derive(Clone, Copy, Debug)]
pub struct TurnOutcome {
    /// Whether something had arrived.
    pub delivered: bool,
    /// Whether something was emitted.
    pub emitted: bool,
    /// Whether the next turn is due at once, by the deadline or the watermark.
    pub again_at_once: bool,
}

/// For each shard, its turns for nothing in a row.
pub struct Progress {
    for_nothing: Vec<u32>,
    /// The total of turns for nothing.
    pub total: u64,
}

impl Progress {
    /// The counters of `shards` shards.
    pub fn new(shards: usize) -> Self {
        Progress { for_nothing: vec![0; shards], total: 0 }
    }

    /// Counts a turn of a shard, and checks that it doesn't spin.
    ///
    /// # Errors
    /// If it spins.
    pub fn turned(&mut self, shard: usize, outcome: TurnOutcome) -> Result<(), String> {
        let for_nothing = !outcome.delivered && !outcome.emitted;
        self.total += u64::from(for_nothing);
        let count = &mut self.for_nothing[shard];
        *count = if for_nothing && outcome.again_at_once { *count + 1 } else { 0 };
        if *count > FOR_NOTHING_MAX {
            return Err(format!(
                "shard {shard} spins: {count} turns for nothing, and the next is due at once"
            ));
        }
        Ok(())
    }
}

/// Checks that a shard keeps no more than it may.
///
/// # Errors
/// What the shard keeps too much of.
pub fn check_budget(counts: &Counts) -> Result<(), String> {
    let Counts { frames, pages, requests, requests_pages, versions, .. } = *counts;
    let bounds = [
        ("pages in the table", pages, frames + requests_pages + versions + PAGES_SPARE),
        ("map nodes in memory", counts.nodes, frames),
        ("map nodes waited for", counts.node_waits, counts.node_waiters),
        ("waiting for map nodes", counts.node_waiters, pages + requests + MOVES_SPARE),
        ("page reads not submitted", counts.reads_wanted, pages),
        ("operations under way", counts.ops, frames),
    ];
    match bounds.into_iter().find(|(_, count, most)| count > most) {
        Some((what, count, most)) => {
            Err(format!("{count} {what}, of {frames} frames: more than {most}: {counts:?}"))
        }
        None => Ok(()),
    }
}
