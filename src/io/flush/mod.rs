//! Durability: which way of flushing a store uses, and batches in which flushes that are asked for at a time share one
//! system call.

mod batch;
mod method;

pub(super) use batch::{Failure, Leader, Mail, Mailbox, Round, Rounds, Waiter};
pub use method::{FlushChoice, FlushMethod, choose};
