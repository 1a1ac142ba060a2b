//! The gate in front of a connection's work: how much may be in flight.
//!
//! 1. The sums never pass the limits, except that a lone request may be larger than `bytes_max`: it would never get in.
//! 2. A [`Pass`] gives back what it took when it is dropped, whatever became of the request.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Counts requests and bytes in flight.
pub struct Gate {
    requests_max: usize,
    bytes_max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    requests: usize,
    bytes: usize,
}

/// The right of one request to be in flight.
pub struct Pass<'a> {
    gate: &'a Gate,
    bytes: usize,
}

impl Gate {
    /// A gate with nothing in flight.
    pub fn new(requests_max: usize, bytes_max: usize) -> Self {
        Gate { requests_max, bytes_max, state: Mutex::default(), changed: Condvar::new() }
    }

    // The state is plain numbers, right at every step: a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a request with `bytes` of payload may be in flight.
    pub fn enter(&self, bytes: usize) -> Pass<'_> {
        let full =
            |s: &mut State| s.requests > 0 && (s.requests >= self.requests_max || s.bytes + bytes > self.bytes_max);
        let mut state = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        state.requests += 1;
        state.bytes += bytes;
        Pass { gate: self, bytes }
    }

    /// Waits until nothing is in flight.
    pub fn wait_idle(&self) {
        let busy = |s: &mut State| s.requests > 0;
        drop(self.changed.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.requests -= 1;
        state.bytes -= self.bytes;
        drop(state);
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without this bound a client that never reads its replies makes the server's memory grow without limit.
    #[test]
    fn requests_and_bytes_in_flight_stay_within_the_limits() {
        let gate = Gate::new(2, 100);
        let first = gate.enter(1000);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(gate.enter(1)));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished(), "a request got past a full gate");
            drop(first);
            waiting.join().unwrap();
        });
        let held = (gate.enter(1), gate.enter(1));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(gate.enter(1)));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished(), "a third request got past a gate for two");
            drop(held);
            waiting.join().unwrap();
        });
        gate.wait_idle();
    }
}
