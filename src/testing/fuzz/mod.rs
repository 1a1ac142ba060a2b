//! Fuzz targets of the library: they take any bytes, and panic if these lead to a broken promise.
//!
//! [`log`] decodes a log with arbitrary contents and compares its end with a simple model. [`open`]
//! opens a damaged store, which refuses, or serves only what was written.
//!
//! Each target is one function. `scripts/fuzz` runs it under libFuzzer (`tests/fuzz/`); the tests
//! here run the stored corpus and some thousands of mutations of it. The targets of the server are
//! beside it: `server::nbd::fuzz`.
//!
//! It does *not* exist in a release: it is compiled for tests and under `--cfg fuzzing`, which
//! cargo-fuzz sets.

#![allow(missing_docs)]

mod input;
pub mod log;
pub(crate) mod memory;
pub mod open;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::replay;
    use crate::testing::sim::canary::{self, Canary};

    #[test]
    fn log_decodes_the_corpus_and_mutations_of_it() {
        replay::run("log", 4000, log::log);
    }

    /// A target that can't fail checks nothing.
    #[test]
    fn log_finds_planted_bugs() {
        for bug in [Canary::GapIgnored, Canary::PartIgnored, Canary::PlacedUnchecked] {
            canary::plant(Some(bug));
            let found = std::panic::catch_unwind(|| replay::run("log", 4000, log::log));
            canary::plant(None);
            assert!(found.is_err() && canary::take_fired() > 0, "{bug:?} was not found");
        }
    }

    #[test]
    fn open_survives_the_corpus_and_mutations_of_it() {
        replay::run("open", 2000, open::open);
        replay::run("open", 200, open::open_each);
    }
}
