//! Durability: which flush method a store uses, and batches in which concurrent flushes share one
//! system call.

mod batch;
mod method;

pub(super) use batch::{
    Cover, FirstFailure, FlushBatch, FlushQueue, FlushWaiter, NextLeader, OpIdx, RemoteEvent,
    RemoteEvents,
};
pub use method::{FlushChoice, FlushMethod, choose};
