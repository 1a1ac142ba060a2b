//! What the simulator drives: the shard, or a stand-in that shows that the judge can condemn.
//!
//! It does *not* add anything to the shard's own interface; it names the part of it that is driven.

use super::canary::Canary;
use crate::disk::{Completion, Disk};
use crate::error::Result;
use crate::options::Options;
use crate::shard::{Effect, Request, Shard, Token};
use crate::types::{Lsn, Micros};

/// A state machine that takes requests and completions and emits effects.
pub trait Engine {
    /// A request; exactly one reply will follow.
    fn request(&mut self, token: Token, request: Request);
    /// An operation has ended.
    fn complete(&mut self, completion: Completion);
    /// Advances everything; afterwards the effects are to be drained.
    fn turn(&mut self, now: Micros);
    /// The next effect.
    fn next_effect(&mut self) -> Option<Effect>;
    /// When it wants a turn even if nothing happens.
    fn deadline(&self) -> Option<Micros>;
    /// Whether it is closed and has nothing more to do.
    fn is_closed(&self) -> bool;
    /// Which request drew which LSN since last asked, in order.
    fn take_drawn(&mut self) -> Vec<(Token, Lsn)>;
    /// What it waits for, in words.
    fn describe(&self) -> String;
    /// Plants a bug.
    fn set_canary(&mut self, canary: Option<Canary>);
}

/// What opening found.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// The store was made.
    pub created: bool,
    /// It had been closed.
    pub clean: bool,
    /// The state is that of this LSN.
    pub cut: Lsn,
}

/// Opens a store, and makes it if there is none.
pub type Open = fn(&mut dyn Disk, &Options, u64, Micros) -> Result<(Box<dyn Engine>, Opened)>;

impl Engine for Shard {
    fn request(&mut self, token: Token, request: Request) {
        Shard::request(self, token, request);
    }
    fn complete(&mut self, completion: Completion) {
        Shard::complete(self, completion);
    }
    fn turn(&mut self, now: Micros) {
        Shard::turn(self, now);
    }
    fn next_effect(&mut self) -> Option<Effect> {
        Shard::next_effect(self)
    }
    fn deadline(&self) -> Option<Micros> {
        Shard::deadline(self)
    }
    fn is_closed(&self) -> bool {
        Shard::is_closed(self)
    }
    fn take_drawn(&mut self) -> Vec<(Token, Lsn)> {
        Shard::take_drawn(self)
    }
    fn describe(&self) -> String {
        Shard::whereabouts(self)
    }
    fn set_canary(&mut self, canary: Option<Canary>) {
        Shard::set_canary(self, canary);
    }
}

/// Opens a real store.
pub fn open_store(disk: &mut dyn Disk, options: &Options, seed: u64, now: Micros) -> Result<(Box<dyn Engine>, Opened)> {
    let (shard, report) = crate::recovery::open(disk, options, seed, now)?;
    let opened = Opened { created: report.created, clean: report.clean, cut: report.cut };
    Ok((Box::new(shard), opened))
}
