//! Durability: which way of flushing a store uses, and batches in which flushes that are asked for
//! at a time share one system call.

mod batch;
mod method;

pub(super) use batch::{
    Cover, FirstFailure, FlushBatch, FlushQueue, FlushWaiter, NextLeader, OpIdx, RemoteEvent,
    RemoteEvents,
};
pub use method::{FlushChoice, FlushMethod, choose};
