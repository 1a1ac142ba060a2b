//! What a driver needs of a shard: the seam at which the tests of the drivers put shards of their own.

use crate::base::error::{Error, Result};
use crate::base::options::Options;
use crate::base::{Deal, Lsn, Micros, ShardId};
use crate::engine::order::GlobalOrder;
use crate::engine::recovery::{self, RecoveryReport};
use crate::engine::{Effect, Message, Request, Response, Shard, Token};
use crate::io::{Completion, Disk};
use crate::memory::Mapping;
use std::sync::Arc;

/// [`Effect`], with messages of any kind.
pub(super) enum Deed<T> {
    Submit(crate::io::OpId, crate::io::DiskOp),
    Reply(Token, Result<Response>),
    Send(ShardId, T),
}

/// A shard, as drivers see it. The methods are [`Shard`]'s.
pub(super) trait Machine: Send + 'static {
    type Message: Send + 'static;

    fn request(&mut self, token: Token, request: Request);
    fn message(&mut self, from: ShardId, message: Self::Message);
    fn complete(&mut self, completion: Completion);
    fn turn(&mut self, now: Micros);
    fn next_deed(&mut self) -> Option<Deed<Self::Message>>;
    fn deadline(&self) -> Option<Micros>;
    fn accepting(&self) -> bool;
    fn is_open(&self) -> bool;
    fn is_closed(&self) -> bool;
    fn ops_under_way(&self) -> usize;
    fn waits_for(&self) -> Option<Lsn>;
    fn failure(&self) -> Option<Error>;
    /// The memory that its operations use.
    fn mapping(&self) -> Option<Mapping>;
}

impl Machine for Shard {
    type Message = Message;

    fn request(&mut self, token: Token, request: Request) {
        Shard::request(self, token, request);
    }

    fn message(&mut self, from: ShardId, message: Message) {
        Shard::message(self, from, message);
    }

    fn complete(&mut self, completion: Completion) {
        Shard::complete(self, completion);
    }

    fn turn(&mut self, now: Micros) {
        Shard::turn(self, now);
    }

    fn next_deed(&mut self) -> Option<Deed<Message>> {
        Some(match self.next_effect()? {
            Effect::Submit(id, op) => Deed::Submit(id, op),
            Effect::Reply(token, result) => Deed::Reply(token, result),
            Effect::Send(to, message) => Deed::Send(to, message),
        })
    }

    fn deadline(&self) -> Option<Micros> {
        Shard::deadline(self)
    }

    fn accepting(&self) -> bool {
        Shard::accepting(self)
    }

    fn is_open(&self) -> bool {
        Shard::is_open(self)
    }

    fn is_closed(&self) -> bool {
        Shard::is_closed(self)
    }

    fn ops_under_way(&self) -> usize {
        Shard::ops_under_way(self)
    }

    fn waits_for(&self) -> Option<Lsn> {
        Shard::waits_for(self)
    }

    fn failure(&self) -> Option<Error> {
        Shard::failure(self)
    }

    fn mapping(&self) -> Option<Mapping> {
        Some(Shard::mapping(self))
    }
}

/// What opening a store begins with.
pub(super) struct Begun<M> {
    pub(super) machines: Vec<M>,
    pub(super) recovery: RecoveryReport,
    pub(super) order: Arc<GlobalOrder>,
    /// What one commit may count at most.
    pub(super) txn_bytes_max: u64,
    /// Which shard owns what.
    pub(super) deal: Deal,
}

/// Begins to open the store on `disk`.
pub(super) fn begin(disk: &mut dyn Disk, options: &Options, shards_count: u16, now: Micros) -> Result<Begun<Shard>> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::io("asking the kernel for random bytes", e.into()))?;
    let opening = recovery::begin(disk, options, shards_count, u64::from_le_bytes(random), now)?;
    let report = opening.report;
    for warning in &report.warnings {
        tracing::warn!("{warning}");
    }
    let first = opening.shards.first().ok_or_else(|| Error::invalid("a store needs a shard"))?;
    Ok(Begun {
        txn_bytes_max: first.txn_bytes_max(),
        deal: first.deal(),
        order: opening.order,
        machines: opening.shards,
        recovery: report,
    })
}
