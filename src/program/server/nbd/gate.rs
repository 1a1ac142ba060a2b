//! The gate in front of a connection's work: it limits the requests in flight, and holds their
//! memory.
//!
//! 1. At most `requests_max` requests are in flight. Each holds memory from [`Memory`], or the
//!    connection's own bytes, which one request at a time can have.
//! 2. A reply never waits for other connections, and a payload does not wait for those that keep
//!    their memory: without shared memory, and with its own bytes taken, it waits for the request
//!    of this connection that has them.
//! 3. A [`Pass`] gives back what it took when it is dropped, however the request ends, or earlier
//!    if the memory is no longer needed.

use super::memory::{Memory, Patience, REQUEST_BYTES, payload_charge};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The interval between two checks for shared memory while waiting for the connection's own bytes.
const OWN_LOOK: Duration = Duration::from_secs(1);

/// Counts requests in flight, and the memory that they hold.
pub struct Gate {
    requests_max: usize,
    memory: Arc<Memory>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    requests: usize,
    /// Bytes of the memory that all replies share.
    replies_bytes: usize,
    own_is_taken: bool,
    /// Requests that hold memory for writes.
    writes: usize,
}

/// Which memory a request holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Nothing,
    Own,
    Reply(usize),
    Write(usize),
}

/// The right of one request to be in flight.
pub struct Pass<'a> {
    gate: &'a Gate,
    held: Held,
}

impl Gate {
    /// Makes a gate with nothing in flight.
    pub fn new(requests_max: usize, memory: Arc<Memory>) -> Self {
        Gate { requests_max, memory, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The memory that all connections share.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    // The state is plain numbers, consistent at every step, so a panic elsewhere does not
    // invalidate it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until another request may be in flight; meanwhile calls `look` after each `pause`.
    pub fn enter_looking(&self, pause: Duration, look: impl Fn()) -> Pass<'_> {
        let full = |state: &mut State| state.requests >= self.requests_max.max(1);
        loop {
            let waited = self.changed.wait_timeout_while(self.lock(), pause, full);
            let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if !timeout.timed_out() {
                state.requests += 1;
                return Pass { gate: self, held: Held::Nothing };
            }
            drop(state);
            look();
        }
    }

    /// Waits until another request may be in flight.
    #[cfg(test)]
    pub fn enter(&self) -> Pass<'_> {
        self.enter_looking(Duration::from_secs(1), || ())
    }

    /// Whether this connection holds memory for writes that others wait for.
    pub fn keeps_others_waiting(&self) -> bool {
        self.lock().writes > 0 && self.memory.is_waited_for()
    }

    /// Waits until nothing is in flight.
    pub fn wait_idle(&self) {
        let busy = |state: &mut State| state.requests > 0;
        drop(self.changed.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner));
    }
}

impl Pass<'_> {
    /// Takes memory for a reply with `bytes` of data, or for a part of it.
    pub fn take_reply(&mut self, bytes: usize) {
        self.give_back();
        let gate = self.gate;
        let (wanted, own) = (bytes + REQUEST_BYTES, gate.memory.division().own_bytes);
        let mut state = gate.lock();
        loop {
            if let Some(given) = gate.memory.take_reply(state.replies_bytes, wanted, own) {
                state.replies_bytes += given;
                self.held = Held::Reply(given);
                return;
            }
            if !state.own_is_taken {
                state.own_is_taken = true;
                self.held = Held::Own;
                return;
            }
            state = gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for memory for work.
    pub fn take_work(&mut self, bytes: usize) {
        self.give_back();
        self.held = Held::Write(self.gate.memory.take_work(bytes));
        self.gate.lock().writes += 1;
    }

    /// Takes memory for a payload of `bytes`, or for a part of it. Returns for how much: for as
    /// much as the connection's own bytes allow if others keep the shared memory.
    pub fn take_payload(&mut self, bytes: usize, patience: Patience) -> usize {
        self.give_back();
        let gate = self.gate;
        loop {
            if let Some(taken) = gate.memory.take_payload(payload_charge(bytes), patience) {
                self.held = Held::Write(taken);
                gate.lock().writes += 1;
                return bytes;
            }
            let mut state = gate.lock();
            if !state.own_is_taken {
                state.own_is_taken = true;
                self.held = Held::Own;
                return bytes.min(gate.memory.own_payload_bytes_max());
            }
            drop(
                gate.changed.wait_timeout(state, OWN_LOOK).unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// The bytes of a reply's data for which the request holds memory.
    pub fn room(&self) -> usize {
        let held = match self.held {
            Held::Nothing | Held::Write(_) => 0,
            Held::Own => self.gate.memory.division().own_bytes,
            Held::Reply(bytes) => bytes,
        };
        held.saturating_sub(REQUEST_BYTES)
    }

    /// Gives back the memory, which is no longer needed; the request is still in flight.
    pub fn give_back(&mut self) {
        let gate = self.gate;
        match std::mem::replace(&mut self.held, Held::Nothing) {
            Held::Nothing => return,
            Held::Own => gate.lock().own_is_taken = false,
            Held::Reply(bytes) => {
                gate.lock().replies_bytes -= bytes;
                gate.memory.give_reply(bytes);
            }
            Held::Write(bytes) => {
                gate.lock().writes -= 1;
                gate.memory.give_write(bytes);
            }
        }
        gate.changed.notify_all();
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.give_back();
        self.gate.lock().requests -= 1;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Division;
    use super::*;

    /// Without this limit a client that never reads its replies would make the server's memory grow
    /// without bound.
    #[test]
    fn requests_and_bytes_in_flight_stay_within_the_limits() {
        let memory = Arc::new(Memory::new(Division::of(16 << 20)));
        let gate = Gate::new(2, memory.clone());
        let held = (gate.enter(), gate.enter());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(gate.enter()));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished(), "a third request got past a gate for two");
            drop(held);
            waiting.join().unwrap();
        });
        gate.wait_idle();
        let gate = Gate::new(64, memory.clone());
        let mut passes = Vec::new();
        loop {
            let mut pass = gate.enter();
            pass.take_reply(1 << 20);
            assert!(pass.room() >= 4096);
            passes.push(pass);
            if gate.lock().own_is_taken {
                break;
            }
        }
        assert!(
            memory.taken() <= memory.division().replies_bytes / 2,
            "one connection has more than it leaves"
        );
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.enter().take_reply(1));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished(), "a request got memory that there is not");
            passes.clear();
            waiting.join().unwrap();
        });
        gate.wait_idle();
        assert_eq!(memory.taken(), 0, "something was not given back");
    }
}
