//! Measures one shard: how long its requests take, how many there are, and what it submits to the
//! device.
//!
//! Invariants
//! 1. It takes no lock and uses no atomics; it reads the clock once for the requests taken in a
//!    round, and once for those answered in it.
//! 2. A request is measured from the moment when the shard takes it until its answer; the time in
//!    the inbox is not included.
//! 3. The recorder knows every request that was taken and not answered: when the thread ends, it
//!    answers those.

use super::clock::Clock;
use super::task_context::LOCAL_TOKEN_BIT;
use crate::base::metrics::{Latency, Recent, ShardStats};
use crate::base::{Micros, VolumeId};
use crate::engine::{Request, Token};
use crate::io::DiskOp;
use hashbrown::HashMap;

#[derive(Clone, Copy, Default)]
enum Kind {
    Read,
    Commit,
    Buffered,
    Flush,
    #[default]
    Other,
}

impl Kind {
    fn of(request: &Request) -> Kind {
        match request {
            // The library itself reads the records of volumes.
            Request::Read(keys)
                if keys.first().is_some_and(|key| key.volume == VolumeId::CATALOG) =>
            {
                Kind::Other
            }
            Request::Read(_) => Kind::Read,
            Request::Commit(commit) if commit.durable => Kind::Commit,
            Request::Commit(_) => Kind::Buffered,
            Request::Flush => Kind::Flush,
            _ => Kind::Other,
        }
    }
}

#[derive(Clone, Copy, Default)]
struct RequestStart {
    at: Micros,
    kind: Kind,
    /// Bytes that the request is charged with until it is answered.
    bytes: u64,
}

/// The measurements of one shard.
pub(super) struct LatencyRecorder {
    clock: Clock,
    /// Requests of tasks on this thread, by the number in their token.
    local: Vec<RequestStart>,
    /// Requests of handles.
    foreign: HashMap<Token, RequestStart, foldhash::fast::FixedState>,
    read: Latency,
    commit: Latency,
    buffered: Latency,
    flush: Latency,
    recent: Recent,
    device: ShardStats,
    /// When this round took its requests, and when it gave its answers; set by the first of each.
    taken_at: Option<Micros>,
    answered_at: Option<Micros>,
    answered: u32,
}

impl LatencyRecorder {
    pub(super) fn new(clock: Clock) -> LatencyRecorder {
        let (read, commit, buffered, flush) = Default::default();
        let (recent, device) = Default::default();
        let (taken_at, answered_at) = (None, None);
        let (local, foreign) = (Vec::new(), HashMap::default());
        LatencyRecorder {
            clock,
            local,
            foreign,
            read,
            commit,
            buffered,
            flush,
            recent,
            device,
            taken_at,
            answered_at,
            answered: 0,
        }
    }

    /// Records that a request goes to the shard, charged with `bytes`.
    pub(super) fn request_started(&mut self, token: Token, request: &Request, bytes: u64) {
        let now = *self.taken_at.get_or_insert_with(|| self.clock.now());
        let start = RequestStart { at: now, kind: Kind::of(request), bytes };
        if token.0 & LOCAL_TOKEN_BIT == 0 {
            self.foreign.insert(token, start);
            return;
        }
        let place = (token.0 & !LOCAL_TOKEN_BIT) as usize;
        if place >= self.local.len() {
            self.local.resize(place + 1, RequestStart::default());
        }
        self.local[place] = start;
    }

    /// Records that the request is answered. Returns the bytes that it was charged with.
    pub(super) fn request_answered(&mut self, token: Token) -> u64 {
        let start = match token.0 & LOCAL_TOKEN_BIT {
            0 => self.foreign.remove(&token),
            _ => self.local.get((token.0 & !LOCAL_TOKEN_BIT) as usize).copied(),
        };
        let Some(RequestStart { at, kind, bytes }) = start else { return 0 };
        let now = *self.answered_at.get_or_insert_with(|| self.clock.now());
        let took = now.saturating_sub(at);
        match kind {
            Kind::Read => self.read.record(took),
            Kind::Commit => self.commit.record(took),
            Kind::Buffered => self.buffered.record(took),
            Kind::Flush => self.flush.record(took),
            Kind::Other => return bytes,
        }
        self.answered += 1;
        bytes
    }

    /// Records that an operation goes to the device.
    pub(super) fn operation_submitted(&mut self, op: &DiskOp) {
        let device = &mut self.device;
        device.device_operations += 1;
        match op {
            DiskOp::Read { into, .. } => {
                device.device_reads += 1;
                device.vectored_reads += u64::from(into.len() > 1);
                device.device_bytes_read +=
                    into.iter().map(|frame| frame.len() as u64).sum::<u64>();
            }
            DiskOp::Write { from, .. } => {
                device.device_writes += 1;
                device.vectored_writes += u64::from(from.len() > 1);
                device.device_bytes_written +=
                    from.iter().map(|slice| u64::from(slice.len)).sum::<u64>();
            }
            DiskOp::Flush { .. } => device.device_flushes += 1,
            DiskOp::Allocate { .. } => {}
        }
    }

    /// Ends the round, so that the next one reads the clock again.
    pub(super) fn end_round(&mut self) {
        if self.answered > 0
            && let Some(now) = self.answered_at
        {
            self.recent.count(now / 1_000_000, std::mem::take(&mut self.answered));
        }
        (self.taken_at, self.answered_at) = (None, None);
    }

    /// Adds the measurements to the shard's own counters.
    pub(super) fn add_to(&mut self, stats: &mut ShardStats, submissions: u64) {
        self.recent.advance(self.clock.now() / 1_000_000);
        let measured = ShardStats {
            read_latency: self.read.clone(),
            commit_latency: self.commit.clone(),
            buffered_latency: self.buffered.clone(),
            flush_latency: self.flush.clone(),
            peak_iops: self.recent.peak(),
            recent: self.recent.clone(),
            submissions,
            ..self.device.clone()
        };
        stats.add(&measured);
    }

    /// Returns the requests of handles that were taken and not answered, with their bytes.
    pub(super) fn into_unanswered(self) -> impl Iterator<Item = (Token, u64)> {
        self.foreign.into_iter().map(|(token, start)| (token, start.bytes))
    }
}
