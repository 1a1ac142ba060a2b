//! Servers: they hold the same handles as every other caller, and know nothing about the engine
//! behind them.
//!
//! 1. This tree belongs to the program, not to the library, so the compiler ensures that only the
//!    public API is used.
//! 2. Whatever a client sends can end its own connection and nothing else.
//!
//! It does *not* open or close the store: `cli::serve` does.

// Timeouts of handshakes and of a stop use real time, and no simulation ever replays this.
#![allow(clippy::disallowed_methods)]

pub mod control;
pub mod nbd;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// The pause before a thread's work restarts after a panic: recurring panics must not occupy a
/// core.
const PANIC_PAUSE: Duration = Duration::from_millis(100);

/// Runs `work` to its end, and restarts it whenever it panics: without the thread that accepts, no
/// client could connect any more.
fn persistently(what: &str, mut work: impl FnMut()) {
    while catch_unwind(AssertUnwindSafe(&mut work)).is_err() {
        tracing::error!(
            "the thread of {what} panicked and continues; this is a bug of corepage, please report \
             it"
        );
        std::thread::sleep(PANIC_PAUSE);
    }
}

/// The error for a thread that can't be started, with what to do.
pub fn no_thread(error: std::io::Error) -> std::io::Error {
    let limits = "raise the limit on threads (`ulimit -u`, pids.max of a control group, TasksMax= \
                  of a systemd unit)";
    std::io::Error::new(error.kind(), format!("a thread can't be started: {error}; {limits}"))
}

#[cfg(test)]
mod tests {
    /// A server that looks healthy and accepts no client is worse than one that has ended.
    #[test]
    fn work_that_panics_is_begun_again() {
        let mut rounds = 0;
        super::persistently("a test", || {
            rounds += 1;
            assert!(rounds > 2, "planted: round {rounds} panics");
        });
        assert_eq!(rounds, 3);
    }
}
