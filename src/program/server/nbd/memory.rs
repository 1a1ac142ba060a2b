//! The memory of connections: one budget for all of them, a stated share of the server's memory.
//!
//! ```text
//!  --memory ─┬─ 7/8: the engine (pages, map nodes, log buffers, and their tables)
//!            └─ 1/8: connections ─┬─ of each: a buffer for what it sends, and `own_bytes` for one reply
//!                                 ├─ replies: shared; nobody takes more than he leaves
//!                                 └─ writes:  shared; work first, then payloads, each in the order of asking
//! ```
//! 1. Payloads, replies that wait for their client, and the memory that requests need while they
//!    run are counted before they are allocated. The total never exceeds the budget.
//! 2. A client that does not read can hold memory for replies for ever, so no request waits for it:
//!    a connection that gets none answers in pieces of `own_bytes`, which no other connection can
//!    take.
//! 3. Requests wait in order for memory for writes and other work. It comes back: the store
//!    finishes what was begun, and while others wait, a client is cut off that takes too long for a
//!    payload, or takes no replies while its own writes, which the same thread carries out, wait
//!    behind them. That takes half a minute, and a crowd of such clients would be cut off one after
//!    the other: so a payload does not wait once memory has been short for [`STUCK`]. It is then
//!    taken in pieces of `own_bytes`. Work, which is never divided into pieces, goes before
//!    payloads.
//!
//! The threads' stacks, the program itself and what the allocator keeps are not in the budget, but
//! in the constant that `serve --help` states.

use super::admission::reserve;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The share of the memory that connections get, and its bounds: below the lower one requests would
/// be served page by page, and above the upper one more memory makes nothing faster.
const CONNECTIONS_SHARE: u64 = 8;
const CONNECTIONS_BYTES_MIN: u64 = 4 * MIB;
const CONNECTIONS_BYTES_MAX: u64 = 256 * MIB;
/// By default there is one connection for this much memory, and no more than `CONNECTIONS_DEFAULT`.
const BYTES_PER_CONNECTION: u64 = 512 * KIB;
const CONNECTIONS_DEFAULT: u64 = 128;
/// The most connections that can be requested: each has two threads.
pub const CONNECTIONS_LIMIT: u32 = 4096;
/// The least size of each shared pool.
const POOL_BYTES_MIN: u64 = MIB;
/// The buffers of one connection: headers arrive in bunches of up to 64 KiB; larger pieces of a
/// reply make it no faster.
const INPUT_BYTES: (u64, u64) = (8 * KIB, 64 * KIB);
const OWN_BYTES: (u64, u64) = (8 * KIB, 1024 * KIB);
/// What every request that carries data takes besides: its task, and lists of pages.
pub const REQUEST_BYTES: usize = 2 << 10;
/// Changes, spans and page ids besides the payload of a write: 256 bytes a page.
const LISTS_SHARE: usize = 16;
const PAGE: usize = 4096;
/// The share of the memory for writes that payloads leave to work: as much as the largest work
/// takes, if that is at most an eighth.
const KEPT_FOR_WORK_SHARE: usize = 8;
const KEPT_FOR_WORK_MAX: usize = MIB as usize;
/// Once memory has been short, or a payload has waited, for this long, payloads stop waiting: it is
/// longer than a busy store takes for a commit, and short for a client that waits for a write.
const STUCK: Duration = Duration::from_secs(1);
/// How long memory counts as waited for after a request has given up.
const WANTED: Duration = Duration::from_secs(60);

/// How the memory of a server is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// `Options::memory_bytes` of the store.
    pub engine_bytes: u64,
    /// Connections at a time, not counting those kept for peers that have few (`admission`).
    pub connections_max: usize,
    /// Bytes of each connection for what its client sends.
    pub input_bytes: usize,
    /// Bytes of each connection for one reply.
    pub own_bytes: usize,
    /// Bytes for the replies of all connections.
    pub replies_bytes: usize,
    /// Bytes for the payloads and work of all connections.
    pub writes_bytes: usize,
}

impl Division {
    /// Divides `memory_bytes`, at least 16 MiB, for the default number of connections.
    pub fn of(memory_bytes: u64) -> Division {
        let count = (memory_bytes / BYTES_PER_CONNECTION).clamp(1, CONNECTIONS_DEFAULT);
        Division::divide(memory_bytes, count)
    }

    /// Divides it for `connections`, at most [`CONNECTIONS_LIMIT`]. Fails with the memory that they
    /// need.
    pub fn with_connections(memory_bytes: u64, connections: u32) -> Result<Division, u64> {
        let places = places(u64::from(connections.min(CONNECTIONS_LIMIT)));
        let needed =
            (places * (INPUT_BYTES.0 + OWN_BYTES.0) + 2 * POOL_BYTES_MIN).div_ceil(MIB) * MIB;
        if Division::share(memory_bytes) < needed {
            return Err(needed * CONNECTIONS_SHARE);
        }
        Ok(Division::divide(memory_bytes, u64::from(connections)))
    }

    /// The share of all connections.
    fn share(memory_bytes: u64) -> u64 {
        (memory_bytes / CONNECTIONS_SHARE).clamp(CONNECTIONS_BYTES_MIN, CONNECTIONS_BYTES_MAX)
    }

    fn divide(memory_bytes: u64, count: u64) -> Division {
        let all = Division::share(memory_bytes);
        let places = places(count);
        let pages = |bytes: u64| bytes / PAGE as u64 * PAGE as u64;
        let input = pages(all / 8 / places).clamp(INPUT_BYTES.0, INPUT_BYTES.1);
        let own = pages(all / 4 / places).clamp(OWN_BYTES.0, OWN_BYTES.1);
        let shared = all.saturating_sub(places * (input + own));
        Division {
            engine_bytes: memory_bytes.saturating_sub(all),
            connections_max: count as usize,
            input_bytes: input as usize,
            own_bytes: own as usize,
            replies_bytes: (shared / 2) as usize,
            writes_bytes: (shared / 2) as usize,
        }
    }

    /// The most that connections can take.
    #[cfg(test)]
    fn connections_bytes(&self) -> usize {
        let places = places(self.connections_max as u64) as usize;
        places * (self.input_bytes + self.own_bytes) + self.replies_bytes + self.writes_bytes
    }
}

/// Connections if `count` are allowed at a time, including those kept for peers that have few.
fn places(count: u64) -> u64 {
    count + reserve(count as usize) as u64
}

/// The memory that connections share.
pub struct Memory {
    division: Division,
    /// [`STUCK`], except in tests.
    stuck: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    replies_free: usize,
    writes_free: usize,
    /// The next number for a request that waits for memory for writes.
    next: u64,
    work: VecDeque<u64>,
    payloads: VecDeque<u64>,
    /// Since when a request has lacked memory, and the smallest amount that was requested in vain.
    starved: Option<(Instant, usize)>,
    /// When a request last gave up waiting.
    gave_up: Option<Instant>,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Whether `bytes` are free; records it if they are not.
    fn has(&mut self, bytes: usize) -> bool {
        let has = self.writes_free >= bytes;
        if !has {
            let (since, least) = self.starved.unwrap_or_else(|| (Instant::now(), bytes));
            self.starved = Some((since, least.min(bytes)));
        }
        has
    }
}

/// The charge for a payload of `bytes` bytes.
pub fn payload_charge(bytes: usize) -> usize {
    bytes + bytes / LISTS_SHARE + REQUEST_BYTES
}

/// Whether a payload may wait for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    Left,
    /// A part of it has waited before.
    Spent,
}

impl Memory {
    /// Makes the memory, with all of it free.
    pub fn new(division: Division) -> Memory {
        let state = State {
            replies_free: division.replies_bytes,
            writes_free: division.writes_bytes,
            next: 0,
            work: VecDeque::new(),
            payloads: VecDeque::new(),
            starved: None,
            gave_up: None,
        };
        Memory { division, stuck: STUCK, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// How it is divided.
    pub fn division(&self) -> &Division {
        &self.division
    }

    /// The part of the memory for writes that payloads never take: clients that stop within a
    /// payload must not block work.
    fn kept_for_work(&self) -> usize {
        (self.division.writes_bytes / KEPT_FOR_WORK_SHARE).min(KEPT_FOR_WORK_MAX)
    }

    /// The largest payload, in whole pages, that can be taken as a whole.
    pub fn payload_bytes_max(&self) -> usize {
        let all = self.division.writes_bytes - self.kept_for_work();
        let bytes = all.saturating_sub(REQUEST_BYTES) / (LISTS_SHARE + 1) * LISTS_SHARE;
        (bytes / PAGE * PAGE).max(PAGE)
    }

    /// The largest payload, in whole pages, for which a connection's own bytes are enough.
    pub fn own_payload_bytes_max(&self) -> usize {
        let bytes =
            self.division.own_bytes.saturating_sub(REQUEST_BYTES) / (LISTS_SHARE + 1) * LISTS_SHARE;
        (bytes / PAGE * PAGE).max(PAGE)
    }

    // The state is plain numbers, consistent at every step, so a panic elsewhere does not
    // invalidate it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes memory for a reply of a connection that holds `held` bytes: `wanted`, or less, but at
    /// least `least`; never more than stays free afterwards, so that the next connection finds
    /// some, however many stalled ones there are.
    pub fn take_reply(&self, held: usize, wanted: usize, least: usize) -> Option<usize> {
        let mut state = self.lock();
        let given = (state.replies_free.saturating_sub(held) / 2).min(wanted);
        if given < least.min(wanted) {
            return None;
        }
        state.replies_free -= given;
        Some(given)
    }

    /// Gives it back.
    pub fn give_reply(&self, bytes: usize) {
        let mut state = self.lock();
        state.replies_free += bytes;
        assert!(
            state.replies_free <= self.division.replies_bytes,
            "more memory was given back than taken"
        );
    }

    /// Waits in order for memory for work. Returns how much was taken: at most all there is.
    pub fn take_work(&self, bytes: usize) -> usize {
        let bytes = bytes.min(self.division.writes_bytes);
        let mut state = self.lock();
        let number = state.number();
        state.work.push_back(number);
        let waits = |state: &mut State| state.work.front() != Some(&number) || !state.has(bytes);
        state = self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
        state.work.pop_front();
        self.give(state, bytes);
        bytes
    }

    /// Waits in order for memory for a payload. Returns how much was taken, at most all there is,
    /// or `None` if that takes too long, or if there is none and its patience is spent.
    pub fn take_payload(&self, bytes: usize, patience: Patience) -> Option<usize> {
        let kept = self.kept_for_work();
        let bytes = bytes.min(self.division.writes_bytes - kept);
        let mut state = self.lock();
        let number = state.number();
        state.payloads.push_back(number);
        let mut begun = None;
        loop {
            let is_next = state.payloads.front() == Some(&number) && state.work.is_empty();
            if state.has(bytes + kept) && is_next {
                state.payloads.pop_front();
                self.give(state, bytes);
                return Some(bytes);
            }
            let now = Instant::now();
            let begun = *begun.get_or_insert(now);
            // Later requests don't repeat the whole wait if earlier ones have waited in vain.
            let since = state.starved.map_or(begun, |(since, _)| since.min(begun));
            let left = self.stuck.saturating_sub(now.saturating_duration_since(since));
            if left.is_zero() || patience == Patience::Spent {
                state.payloads.retain(|waiting| *waiting != number);
                state.gave_up = Some(now);
                drop(state);
                self.changed.notify_all();
                return None;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn give(&self, mut state: MutexGuard<'_, State>, bytes: usize) {
        state.writes_free -= bytes;
        drop(state);
        self.changed.notify_all();
    }

    /// Gives it back.
    pub fn give_write(&self, bytes: usize) {
        let mut state = self.lock();
        state.writes_free += bytes;
        if state.starved.is_some_and(|(_, least)| state.writes_free >= least) {
            state.starved = None;
        }
        assert!(
            state.writes_free <= self.division.writes_bytes,
            "more memory was given back than taken"
        );
        drop(state);
        self.changed.notify_all();
    }

    /// Whether a request waits for memory for writes, or has recently given up.
    pub fn is_waited_for(&self) -> bool {
        let state = self.lock();
        let is_wanted = state.gave_up.is_some_and(|gave_up| gave_up.elapsed() < WANTED);
        is_wanted || !state.work.is_empty() || !state.payloads.is_empty()
    }

    /// The bytes that are taken from both pools.
    #[cfg(any(test, fuzzing))]
    pub fn taken(&self) -> usize {
        let state = self.lock();
        self.division.replies_bytes + self.division.writes_bytes
            - state.replies_free
            - state.writes_free
    }
}

#[cfg(test)]
mod tests {
    use super::super::transmission::WORK_BYTES;
    use super::*;

    /// If the parts did not add up, `--memory` would not be a limit.
    #[test]
    fn what_is_divided_is_all_of_the_memory_and_no_more() {
        for mib in [16, 17, 24, 33, 64, 100, 256, 1000, 4096, 1 << 16] {
            let division = Division::of(mib * MIB);
            let sum = division.engine_bytes + division.connections_bytes() as u64;
            assert!(sum <= mib * MIB && sum + 8 * KIB > mib * MIB, "{mib} MiB: {division:?}");
            assert!(division.engine_bytes >= mib * MIB / 4 * 3, "{mib} MiB: {division:?}");
            let shared = division.replies_bytes.min(division.writes_bytes);
            assert!(division.own_bytes >= 8192 && shared >= 1 << 20, "{mib} MiB: {division:?}");
        }
        assert_eq!(Division::of(16 * MIB).connections_max, 32);
        assert_eq!(Division::of(64 * MIB).connections_max, 128);
    }

    /// Each requested connection must have its buffers; if the memory is not enough, the error says
    /// how much would be.
    #[test]
    fn any_number_of_connections_fits_into_the_memory_or_the_memory_that_it_needs_is_told() {
        for count in [1, 7, 128, 1024, CONNECTIONS_LIMIT] {
            let needed = Division::with_connections(16 * MIB, count)
                .map_or_else(|needed| needed, |_| 16 * MIB);
            assert!(
                Division::with_connections(needed - 8 * MIB, count).is_err() || needed <= 32 * MIB,
                "{count}"
            );
            let division =
                Division::with_connections(needed, count).expect("as much as was asked for");
            let (pool, sum) = (
                division.replies_bytes.min(division.writes_bytes),
                division.connections_bytes() as u64,
            );
            assert_eq!(division.connections_max, count as usize);
            assert!(pool >= MIB as usize, "{count}: {division:?}");
            assert!(division.engine_bytes + sum <= needed, "{count}: {division:?}");
        }
        assert_eq!(Division::with_connections(64 * MIB, 1024), Err(160 * MIB));
        assert!(Division::with_connections(256 * MIB, 1024).is_ok(), "at the default memory");
    }

    /// A handle may pin a quarter of the memory, and a read that finds no pins left waits behind
    /// all that find some. If this fails, a client that constantly requests CACHE may wait for ever
    /// for its reads.
    #[test]
    fn what_a_connection_has_under_way_pins_less_than_it_may() {
        for mib in [16, 17, 24, 33, 64, 100, 256, 1000, 4096, 1 << 16] {
            let division = Division::of(mib * MIB);
            let may_pin = division.engine_bytes as usize / (PAGE + 512) / 4;
            let requests = super::super::Limits::default().requests_max;
            let caching = requests.min(division.writes_bytes / WORK_BYTES);
            // A connection takes no more of the memory for replies than it leaves free; its reads
            // may begin and end within pages.
            let reads = (division.replies_bytes / 2 + division.own_bytes) / PAGE + 2 * requests;
            let pins = caching * super::super::volume::CACHE_PAGES + reads;
            assert!(
                pins <= may_pin,
                "{mib} MiB: {caching} CACHEs and reads of {reads} pages pin {pins} of {may_pin}"
            );
        }
    }

    /// Neither one client that never reads nor a hundred of them may leave the others with nothing.
    #[test]
    fn however_many_hold_memory_for_replies_the_next_one_gets_some_or_has_its_own() {
        let memory = Memory::new(Division::of(64 * MIB));
        let all = memory.division().replies_bytes;
        let first = memory.take_reply(0, 1 << 30, 4096).expect("there is some");
        assert!(first <= all / 2, "{first} of {all} for one connection");
        assert_eq!(memory.take_reply(first, 4096, 4096), None, "it has had its share");
        let mut given = vec![first];
        while let Some(more) = memory.take_reply(0, 1 << 30, 4096) {
            given.push(more);
        }
        assert!(given.len() >= 8, "{given:?}");
        given.into_iter().for_each(|bytes| memory.give_reply(bytes));
        assert_eq!(memory.taken(), 0);
        assert_eq!(
            memory.take_reply(0, 4096, 1 << 20),
            Some(4096),
            "small ones get what they want"
        );
    }

    /// Clients that stop within a payload keep its memory until they are cut off: no other may wait
    /// for that, nor for those that queue behind them and may do the same.
    #[test]
    fn a_payload_is_not_waited_for_when_nothing_moves_and_work_goes_before_payloads() {
        let mut memory = Memory::new(Division::of(16 * MIB));
        memory.stuck = Duration::from_millis(1);
        let all = memory.take_payload(usize::MAX, Patience::Left).expect("all of it is free");
        assert_eq!(memory.take_payload(4096, Patience::Left), None, "nothing moves");
        assert!(memory.is_waited_for(), "who keeps it is to be cut off");
        assert_eq!(memory.lock().payloads.len(), 0, "who has given up does not wait");
        let work = memory.take_work(memory.kept_for_work());
        assert!(work >= WORK_BYTES, "frees and zeroing go on all the same");
        memory.give_write(work);
        let order = Mutex::new(Vec::new());
        memory.stuck = Duration::from_secs(3600);
        std::thread::scope(|scope| {
            let (memory, order) = (&memory, &order);
            scope.spawn(move || {
                let taken = memory.take_payload(all, Patience::Left).expect("it moves");
                order.lock().unwrap().push("payload");
                memory.give_write(taken);
            });
            while memory.lock().payloads.is_empty() {
                std::thread::yield_now();
            }
            scope.spawn(move || {
                let taken = memory.take_work(all);
                order.lock().unwrap().push("work");
                memory.give_write(taken);
            });
            while memory.lock().work.is_empty() {
                std::thread::yield_now();
            }
            memory.give_write(all);
        });
        assert_eq!((order.into_inner().unwrap(), memory.taken()), (vec!["work", "payload"], 0));
        let own = memory.own_payload_bytes_max();
        assert!(own >= PAGE && payload_charge(own) <= memory.division().own_bytes);
    }

    /// If small writes could overtake a large one for ever, a file system's large write would time
    /// out under load.
    #[test]
    fn memory_for_writes_is_given_in_the_order_of_asking() {
        let memory = Memory::new(Division::of(16 * MIB));
        let all = memory.take_work(usize::MAX);
        assert_eq!(all, memory.division().writes_bytes);
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (number, bytes) in [all, 4096, all].into_iter().enumerate() {
                let (memory, order) = (&memory, &order);
                scope.spawn(move || {
                    let taken = memory.take_work(bytes);
                    order.lock().unwrap().push(number);
                    memory.give_write(taken);
                });
                while memory.lock().work.len() <= number {
                    std::thread::yield_now();
                }
            }
            assert!(memory.is_waited_for());
            memory.give_write(all / 2);
            assert!(order.lock().unwrap().is_empty(), "a smaller one has overtaken the first");
            memory.give_write(all - all / 2);
        });
        assert_eq!((order.into_inner().unwrap(), memory.taken()), (vec![0, 1, 2], 0));
        assert!(!memory.is_waited_for());
        assert!(payload_charge(memory.payload_bytes_max()) <= memory.division().writes_bytes);
    }
}
