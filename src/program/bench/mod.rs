//! The benchmarks of the command line: they run operations on a store, measure how fast these are,
//! and verify the results.
//!
//! ```text
//! BenchVolume: a volume, prefilled (every page written, so that no first write is measured)
//!           └─ run: tasks on shards, or threads with a queue each ──> Outcome: rate, latencies
//!           └─ verify: closed, opened again, every page against what its only writer was told
//! ```
//! 1. Each page has one writer in a run, so that its expected content is known.
//! 2. A measurement covers what callers see: from before a call until after its answer. Making and
//!    checking pages is not included.
//! 3. A page that is read is checked against its number and its version's pattern.
//!
//! It prints nothing.

// Benchmarks take real time.
#![allow(clippy::disallowed_methods)]

mod bench_volume;
mod run;

pub use bench_volume::{BenchVolume, NAME};
pub use run::{CallSite, Operation, Outcome, Run};
