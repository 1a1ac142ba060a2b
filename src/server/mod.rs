//! Servers: they hold the same handles as every other caller, and know nothing of the engine behind them.
//!
//! 1. This tree belongs to the program, not to the library, so the compiler sees to it that only the public API is used.
//! 2. What a client sends can end its own connection and nothing else.
//!
//! Does not open or close the store: `cli::serve` does.

// Timeouts of handshakes and of a stop are real time, and nothing here is ever replayed by a simulation.
#![allow(clippy::disallowed_methods)]

pub mod control;
pub mod nbd;
