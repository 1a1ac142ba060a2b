//! How the world drives the shard: requests in, time on, completions in, effects out, answers to the judge.
//!
//! Invariants
//! 1. A turn brings completions, turns the shard, tells the judge the LSNs drawn, and only then the answers.
//! 2. After the power is cut nothing of a turn counts any more, not even what the shard has already said.
//! 3. Time moves only to the next completion or deadline, or over a time in which nobody asks for anything.

use super::engine::Engine;
use super::rng::mix;
use super::workload::Ask;
use super::world::{Outcome, World};
use crate::disk::Disk;
use crate::error::Result as StoreResult;
use crate::shard::{Effect, PageRef, Request, Response, Token};
use crate::types::{Micros, PageKey};
use smallvec::SmallVec;

/// How long a request may take without errors of the device.
const PATIENCE_US: Micros = 60_000_000;
/// Turns in a row in which nothing happens, before the shard is said to spin.
pub(super) const IDLE_TURNS_MAX: u32 = 1_000;

impl World {
    /// Asks for something, or lets time pass.
    pub(super) fn step(&mut self) -> Outcome {
        if self.oracle.outstanding() < self.workload.profile.in_flight && self.rng.chance(60) {
            let ask = self.workload.next_ask();
            if ask == Ask::Idle {
                return self.idle();
            }
            let request = self.workload.request(ask, &self.oracle);
            self.ask(request);
            // Several requests may reach one turn.
            if self.rng.one_in(3) && self.oracle.outstanding() < self.workload.profile.in_flight {
                return Ok(());
            }
            return self.turn();
        }
        self.pass()
    }

    pub(super) fn shard(&mut self) -> &mut dyn Engine {
        self.shard.as_deref_mut().expect("the store is open")
    }

    /// Hands a request to the shard.
    pub(super) fn ask(&mut self, request: Request) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.tally.requests += 1;
        self.idle_turns = 0;
        self.oracle.on_request(token, &request, self.disk.now());
        self.shard().request(token, request);
        token
    }

    /// Lets time pass up to the next event, and the shard turn.
    pub(super) fn pass(&mut self) -> Outcome {
        let deadline = self.shard().deadline();
        let next = [self.disk.next_due(), deadline].into_iter().flatten().min();
        match next {
            Some(at) => self.disk.advance_to(at),
            None if self.oracle.outstanding() == 0 => return Ok(()),
            // Requests may have been made since the last turn.
            None if self.idle_turns < 2 => {}
            None => return Err(format!("nothing is in flight and no deadline is set: {}", self.waiting())),
        }
        if let Some((since, _)) = self.oracle.oldest()
            && self.disk.now() > since + PATIENCE_US
        {
            return Err(format!("no answer for {} s: {}", PATIENCE_US / 1_000_000, self.waiting()));
        }
        self.turn()
    }

    fn waiting(&self) -> String {
        let oldest = self.oracle.oldest().map_or_else(|| "nobody".into(), |(_, what)| what);
        let shard = self.shard.as_ref().map(|shard| shard.describe()).unwrap_or_default();
        format!("{} wait, the first of them {oldest}; {shard}", self.oracle.outstanding())
    }

    /// One turn of the shard: completions in, effects out.
    pub(super) fn turn(&mut self) -> Outcome {
        let mut done = Vec::new();
        self.disk.clone().reap(&mut done);
        if self.disk.is_off() {
            return Ok(());
        }
        let mut busy = !done.is_empty();
        for completion in done {
            self.shard().complete(completion);
        }
        let now = self.disk.now();
        self.tally.turns += 1;
        self.shard().turn(now);
        for (token, lsn) in self.shard().take_drawn() {
            self.oracle.on_drawn(token, lsn)?;
        }
        while let Some(effect) = self.shard().next_effect() {
            busy = true;
            match effect {
                Effect::Submit(id, op) => {
                    self.disk.clone().submit(id, op);
                    self.check_disk()?;
                    if self.disk.is_off() {
                        return Ok(());
                    }
                }
                Effect::Reply(token, reply) => self.answer(token, reply)?,
                Effect::Send(..) => return Err("a message to no shard".into()),
            }
        }
        self.idle_turns = if busy { 0 } else { self.idle_turns + 1 };
        if self.idle_turns > IDLE_TURNS_MAX {
            let deadline = self.shard().deadline();
            let (due, flying) = (self.disk.next_due(), self.disk.in_flight());
            return Err(format!(
                "{IDLE_TURNS_MAX} turns in which nothing happened, at {now}, deadline {deadline:?}, {flying} operations \
                 in flight, the next due at {due:?}: {}",
                self.waiting()
            ));
        }
        Ok(())
    }

    fn answer(&mut self, token: Token, reply: StoreResult<Response>) -> Outcome {
        let asked_for = self.oracle.keys_of(token);
        self.oracle.on_reply(token, &reply)?;
        let kind = reply.as_ref().err().map_or(0, |error| error.kind() as u64 + 1);
        self.tally.trace = mix(self.tally.trace ^ token.0 ^ (kind << 32) ^ (self.disk.now() << 40));
        if let Ok(Response::Stats(stats)) = &reply {
            self.tally.shard = stats.as_ref().clone();
        }
        if let Some((watched, answer)) = &mut self.watched
            && *watched == token
        {
            *answer = Some(reply);
            return Ok(());
        }
        if let Ok(Response::Pages(pages)) = reply {
            for (key, page) in asked_for.into_iter().zip(pages) {
                self.workload.on_read(key, page.lsn());
                if self.rng.one_in(8) && self.held.len() < 16 {
                    let bytes = page.to_vec().into();
                    self.held.push((page, bytes));
                }
            }
        }
        if self.rng.one_in(8) {
            self.let_go(1)?;
        }
        Ok(())
    }

    /// Gives back pages that were held, which must be as they were.
    pub(super) fn let_go(&mut self, count: usize) -> Outcome {
        for (page, bytes) in self.held.drain(..count.min(self.held.len())) {
            if page[..] != bytes[..] {
                return Err(format!("a page of {:?} changed while it was held", page.lsn()));
            }
        }
        Ok(())
    }

    /// Nobody asks for anything for a while.
    pub(super) fn idle(&mut self) -> Outcome {
        let until = self.disk.now() + self.rng.within(100, 200_000);
        while !self.disk.is_off() {
            let deadline = self.shard().deadline();
            match [self.disk.next_due(), deadline].into_iter().flatten().min() {
                Some(at) if at <= until => self.pass()?,
                _ => break,
            }
        }
        self.disk.advance_to(until);
        Ok(())
    }

    /// Lets everything under way come to its end.
    pub(super) fn settle(&mut self) -> Outcome {
        while self.oracle.outstanding() > 0 && !self.disk.is_off() {
            self.pass()?;
        }
        Ok(())
    }

    /// Asks for something and waits for the answer, which is judged like all others.
    pub(super) fn call(&mut self, request: Request) -> Outcome<StoreResult<Response>> {
        let token = self.ask(request);
        self.watched = Some((token, None));
        self.turn()?;
        loop {
            if let Some((_, Some(answer))) = self.watched.take_if(|(_, answer)| answer.is_some()) {
                return Ok(answer);
            }
            if self.disk.is_off() {
                return Err("the power failed while an answer was waited for".into());
            }
            self.pass()?;
        }
    }

    /// Reads pages past the judge, while nothing else is under way.
    pub(super) fn read_now(&mut self, keys: &[PageKey]) -> Outcome<SmallVec<[PageRef; 1]>> {
        self.try_read_now(keys)?.map_err(|error| format!("reading {keys:?}: {:?}: {error}", error.kind()))
    }

    /// The same; an error of the store is an answer.
    pub(super) fn try_read_now(&mut self, keys: &[PageKey]) -> Outcome<StoreResult<SmallVec<[PageRef; 1]>>> {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.shard().request(token, Request::Read(keys.iter().copied().collect()));
        for _ in 0..10_000 {
            let mut done = Vec::new();
            self.disk.clone().reap(&mut done);
            for completion in done {
                self.shard().complete(completion);
            }
            let now = self.disk.now();
            self.shard().turn(now);
            while let Some(effect) = self.shard().next_effect() {
                match effect {
                    Effect::Submit(id, op) => self.disk.clone().submit(id, op),
                    Effect::Reply(of, Ok(Response::Pages(pages))) if of == token => return Ok(Ok(pages)),
                    Effect::Reply(of, Err(error)) if of == token => return Ok(Err(error)),
                    Effect::Send(..) => return Err("a message to no shard".into()),
                    Effect::Reply(of, reply) => return Err(format!("reading {keys:?}: {of:?} {reply:?}")),
                }
            }
            self.check_disk()?;
            let deadline = self.shard().deadline();
            let next = [self.disk.next_due(), deadline].into_iter().flatten().min();
            let next = next.ok_or_else(|| format!("reading {keys:?} hangs"))?;
            self.disk.advance_to(next);
        }
        Err(format!("reading {keys:?} never ends"))
    }
}
