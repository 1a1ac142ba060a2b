//! What shards say to each other. Drivers carry messages and never look into them.
//!
//! Between two shards messages arrive in the order in which they were sent, each once.

/// A message from one shard to another.
#[derive(Debug)]
pub enum Message {
    /// Somebody waits until everything below this is durable: close what you have open.
    Nudge(crate::types::Lsn),
}
