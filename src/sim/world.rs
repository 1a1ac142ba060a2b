//! One store, its clients, its disk and its crashes, on one thread and by one seed.
//!
//! A run is a sequence of lives: open (crashing in it, maybe), hold every page against the model, work until the
//! power fails or the store is closed, make what is left of the disk, and so on.
//!
//! Invariants
//! 1. Everything that happens follows from the plan; the same plan gives the same trace.
//! 2. An answer counts only if it was given before the power failed.
//! 3. Without errors of the device every request is answered in bounded virtual time: if nothing is in flight and no
//!    deadline is set while somebody waits, the run fails, as it does if the shard turns without end.
//!
//! It does *not* judge; see `oracle`.

use super::canary::Canary;
use super::disk::{DiskCounters, Fault, Latency, Loss, SimDisk};
use super::engine::{Engine, Open, Opened};
use super::oracle::{Oracle, OracleCounters, Tolerance};
use super::rng::{Rng, mix};
use super::workload::{Ask, Profile, Workload};
use crate::disk::Disk;
use crate::options::Options;
use crate::shard::{Effect, PageRef, Request, Response, Token};
use crate::types::{Lsn, Micros, PageKey};
use smallvec::SmallVec;

/// What a run is to be.
#[derive(Clone)]
pub struct Plan {
    /// From which all else follows.
    pub seed: u64,
    /// Crashes and closes; after each the store is opened again.
    pub lives: u32,
    /// Images of the disk that are recovered and checked for each crash; the last one goes on.
    pub images: u32,
    /// Events of the disk in a life, at most.
    pub events_max: u64,
    /// Of a hundred recoveries, how many are crashed into.
    pub recovery_crash_percent: u64,
    /// A planted bug.
    pub canary: Option<Canary>,
    /// Errors of the device, from the second life on, in every life.
    pub faults: Vec<Fault>,
    /// Instead of the seed's own.
    pub options: Option<Options>,
    /// Instead of the seed's own.
    pub profile: Option<Profile>,
    /// What is opened.
    pub open: Open,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// States of the disk that were recovered after a crash during work.
    pub crashes: u64,
    /// Crashes in recovery.
    pub crashes_in_recovery: u64,
    /// Of those, crashes in the recovery after such a crash.
    pub crashes_in_second_recovery: u64,
    /// Clean closes.
    pub closes: u64,
    /// Requests made.
    pub requests: u64,
    /// Turns of the shard.
    pub turns: u64,
    /// Virtual microseconds.
    pub virtual_us: u64,
    /// Answers.
    pub oracle: OracleCounters,
    /// Operations and losses.
    pub disk: DiskCounters,
    /// A hash of all operations and answers, in order.
    pub trace: u64,
}

/// A run that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Of the run.
    pub seed: u64,
    /// In which life.
    pub life: u32,
    /// After how many requests.
    pub requests: u64,
    /// What was wrong.
    pub why: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Failure { seed, life, requests, why } = self;
        write!(f, "seed {seed}, life {life}, after {requests} requests: {why}")
    }
}

/// How long a request may take without errors of the device.
const PATIENCE_US: Micros = 60_000_000;
/// Turns in a row in which nothing happens, before the shard is said to spin.
const IDLE_TURNS_MAX: u32 = 1_000;

/// The world.
pub struct World {
    plan: Plan,
    rng: Rng,
    options: Options,
    pub(super) workload: Workload,
    pub(super) oracle: Oracle,
    disk: SimDisk,
    shard: Option<Box<dyn Engine>>,
    /// Pages that clients hold on to, with the bytes that they had at first.
    held: Vec<(PageRef, Box<[u8]>)>,
    next_token: u64,
    idle_turns: u32,
    recovery_events: u64,
    life: u32,
    pub(super) tally: Tally,
}

type Outcome<T = ()> = std::result::Result<T, String>;

impl Tally {
    /// Adds another run's.
    pub fn add(&mut self, other: &Tally) {
        self.crashes += other.crashes;
        self.crashes_in_recovery += other.crashes_in_recovery;
        self.crashes_in_second_recovery += other.crashes_in_second_recovery;
        self.closes += other.closes;
        self.requests += other.requests;
        self.turns += other.turns;
        self.virtual_us += other.virtual_us;
        self.disk.add(&other.disk);
        self.oracle.add(&other.oracle);
        self.trace = mix(self.trace ^ other.trace);
    }
}

/// Runs a plan to its end. A panic of the engine is a failure like any other.
pub fn run(plan: &Plan) -> std::result::Result<Tally, Failure> {
    let mut world = World::new(plan.clone());
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.go()));
    let why = match result {
        Ok(Ok(())) => return Ok(world.sum_up()),
        Ok(Err(why)) => why,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            format!("panic: {}", text.unwrap_or_default())
        }
    };
    let failure = Failure { seed: plan.seed, life: world.life, requests: world.tally.requests, why };
    // What a panic left half done is not to be touched by destructors that assert.
    std::mem::forget(world);
    Err(failure)
}

impl World {
    /// The world of a plan, before anything has happened.
    pub fn new(plan: Plan) -> Self {
        let mut rng = Rng::new(plan.seed);
        let options = super::workload::options(&mut rng);
        let options = plan.options.clone().unwrap_or(options);
        let profile = Profile::random(&mut rng);
        let profile = plan.profile.clone().unwrap_or(profile);
        let disk = SimDisk::new(rng.next());
        let slow = rng.within(1, 8);
        let usual = Latency::default();
        let latency = Latency { flush: (usual.flush.0 * slow, usual.flush.1 * slow), ..usual };
        disk.set_latency(latency);
        disk.set_canary(plan.canary);
        let tolerance = tolerance(&options);
        World {
            workload: Workload::new(profile, options.clone(), rng.fork(2)),
            oracle: Oracle::new(tolerance),
            options,
            rng,
            disk,
            shard: None,
            held: Vec::new(),
            next_token: 0,
            idle_turns: 0,
            recovery_events: 40,
            life: 0,
            tally: Tally::default(),
            plan,
        }
    }

    /// All lives.
    fn go(&mut self) -> Outcome {
        self.begin()?;
        for life in 0..self.plan.lives {
            self.life = life;
            if life > 0 {
                self.inject();
            }
            self.live()?;
            self.end()?;
        }
        Ok(())
    }

    /// Opens the store for the first time.
    pub(super) fn begin(&mut self) -> Outcome {
        let opened = self.open()?;
        if opened.cut > self.oracle.last() {
            return Err(format!("a new store begins at {:?}", opened.cut));
        }
        Ok(())
    }

    fn inject(&mut self) {
        for fault in &self.plan.faults {
            let after = self.rng.below(fault.after + 1);
            self.disk.inject(Fault { after, ..fault.clone() });
        }
    }

    /// Opens what is on the disk, through up to two crashes in recovery.
    pub(super) fn open(&mut self) -> Outcome<Opened> {
        for depth in 0.. {
            let at = self.disk.events();
            if depth < 2 && self.rng.chance(self.plan.recovery_crash_percent) {
                self.disk.cut_power_after(self.rng.within(1, self.recovery_events));
            }
            let now = self.disk.now();
            let opened = (self.plan.open)(&mut self.disk.clone(), &self.options, self.rng.next(), now);
            self.check_disk()?;
            if self.disk.is_off() {
                self.tally.crashes_in_recovery += 1;
                self.tally.crashes_in_second_recovery += u64::from(depth > 0);
                let loss = Loss::random(&mut self.rng);
                let image = self.disk.crash(loss, &mut self.rng);
                self.replace_disk(image);
                continue;
            }
            let (mut shard, mut opened) = opened.map_err(|error| format!("recovery: {error}"))?;
            // A recovery that was crashed into may have begun to use the store again.
            opened.clean |= depth > 0;
            self.disk.keep_power();
            // Crashes come at any event of a recovery, mostly; some come to nothing, so that the end is reached.
            self.recovery_events = (self.disk.events() - at + 2).max(8);
            shard.set_canary(self.plan.canary);
            self.shard = Some(shard);
            return Ok(opened);
        }
        unreachable!("the loop ends with the third recovery")
    }

    fn replace_disk(&mut self, image: SimDisk) {
        self.tally.disk.add(&self.disk.counters());
        self.tally.trace = mix(self.tally.trace ^ self.disk.trace());
        self.tally.virtual_us += image.now() - self.tally.virtual_us.min(image.now());
        self.disk = image;
    }

    fn check_disk(&self) -> Outcome {
        self.disk.violation().map_or(Ok(()), |violation| Err(format!("breach of the disk seam: {violation}")))
    }

    /// Works until the power fails or the store is closed.
    fn live(&mut self) -> Outcome {
        let events = match self.rng.below(10) {
            0 => self.rng.within(1, 8),
            1..=5 => self.rng.within(1, 1 + self.plan.events_max / 4),
            _ => self.rng.within(1, self.plan.events_max),
        };
        if self.rng.one_in(10) {
            let until = self.disk.events() + events;
            while self.disk.events() < until {
                self.step()?;
            }
            return self.close();
        }
        self.disk.cut_power_after(events);
        while !self.disk.is_off() {
            self.step()?;
        }
        Ok(())
    }

    /// Asks for something, or lets time pass.
    pub(super) fn step(&mut self) -> Outcome {
        if self.oracle.outstanding() < self.workload.profile.in_flight && self.rng.chance(60) {
            let ask = self.workload.next();
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
        if let Some((since, _)) = self.oracle.oldest() {
            if self.disk.now() > since + PATIENCE_US {
                return Err(format!("no answer for {} s: {}", PATIENCE_US / 1_000_000, self.waiting()));
            }
        }
        self.turn()
    }

    fn waiting(&self) -> String {
        let oldest = self.oracle.oldest().map_or_else(|| "nobody".into(), |(_, what)| what);
        format!("{} wait, the first of them {oldest}", self.oracle.outstanding())
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

    fn answer(&mut self, token: Token, reply: crate::error::Result<Response>) -> Outcome {
        let asked_for = self.oracle.keys_of(token);
        self.oracle.on_reply(token, &reply)?;
        let kind = reply.as_ref().err().map_or(0, |error| error.kind() as u64 + 1);
        self.tally.trace = mix(self.tally.trace ^ token.0 ^ (kind << 32) ^ (self.disk.now() << 40));
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
    fn let_go(&mut self, count: usize) -> Outcome {
        for (page, bytes) in self.held.drain(..count.min(self.held.len())) {
            if page[..] != bytes[..] {
                return Err(format!("a page of {:?} changed while it was held", page.lsn()));
            }
        }
        Ok(())
    }

    /// Nobody asks for anything for a while.
    fn idle(&mut self) -> Outcome {
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

    /// Closes the store, with requests under way.
    pub(super) fn close(&mut self) -> Outcome {
        self.ask(Request::Close);
        if self.rng.one_in(2) {
            let late = self.workload.next();
            if late != Ask::Idle {
                let request = self.workload.request(late, &self.oracle);
                self.ask(request);
            }
        }
        self.turn()?;
        self.settle()?;
        for _ in 0..IDLE_TURNS_MAX {
            if self.shard().is_closed() {
                self.tally.closes += 1;
                return Ok(());
            }
            self.pass()?;
        }
        Err("Close was answered, and the shard is not closed".into())
    }

    /// Makes what is left of the disk, several times if planned, and goes on with the last.
    fn end(&mut self) -> Outcome {
        self.let_go(usize::MAX)?;
        self.oracle.on_crash();
        self.shard = None;
        let crashed = self.disk.clone();
        let was_off = crashed.is_off();
        for n in 0..self.plan.images {
            let loss = Loss::random(&mut self.rng);
            let image = crashed.crash(loss, &mut self.rng);
            self.replace_disk(image);
            self.tally.crashes += u64::from(was_off);
            let opened = self.open().map_err(|why| format!("after {loss:?}: {why}"))?;
            let cut = self.check(opened).map_err(|why| format!("after {loss:?}: {why}"))?;
            if n + 1 < self.plan.images {
                self.shard = None;
            } else {
                self.oracle.restart_at(cut, opened.cut);
                self.workload.on_restart();
            }
        }
        Ok(())
    }

    /// Opens the store again on the disk as it is.
    pub(super) fn reopen(&mut self, loss: Loss) -> Outcome {
        self.let_go(usize::MAX)?;
        self.oracle.on_crash();
        self.shard = None;
        let image = self.disk.crash(loss, &mut self.rng);
        self.replace_disk(image);
        let opened = self.open()?;
        let cut = self.check(opened)?;
        self.oracle.restart_at(cut, opened.cut);
        self.workload.on_restart();
        Ok(())
    }

    /// Holds the whole state against the model; returns the cut that it shows.
    fn check(&mut self, opened: Opened) -> Outcome<Lsn> {
        let universe = self.workload.profile.universe.clone();
        let mut all = Vec::with_capacity(universe.len());
        for keys in universe.chunks(self.options.vectored_pages_max) {
            let pages = self.read_now(keys)?;
            all.extend(keys.iter().copied().zip(pages));
        }
        self.oracle.judge_state(opened.cut, opened.clean, &all)
    }

    /// Reads pages past the judge, while nothing else is under way.
    pub(super) fn read_now(&mut self, keys: &[PageKey]) -> Outcome<SmallVec<[PageRef; 1]>> {
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
                    Effect::Reply(of, Ok(Response::Pages(pages))) if of == token => return Ok(pages),
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

    fn sum_up(mut self) -> Tally {
        self.replace_disk(self.disk.clone());
        self.tally.oracle = self.oracle.counters();
        self.tally.virtual_us = self.disk.now();
        self.tally
    }

    /// The disk, for faults and damage by hand.
    pub(super) fn disk(&self) -> &SimDisk {
        &self.disk
    }
}

/// What may be refused with these options, without any error of the device.
fn tolerance(options: &Options) -> Tolerance {
    let limits = options.limits(&options.geometry).expect("the options are good");
    Tolerance {
        io: false,
        full: options.data_bytes_max > 0,
        commit_bytes_max: limits.txn_bytes_max,
        read_pages_max: options.vectored_pages_max,
    }
}
