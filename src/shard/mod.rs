//! One core's share of the store, as a state machine without I/O, clock or randomness.

mod event;

pub use event::{Change, Commit, Effect, PageRef, Request, Response, Token};
