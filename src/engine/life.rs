//! The life of a shard: opening, open, closing, closed.

use super::Token;
use crate::base::error::Error;

/// What closes the store.
pub(super) enum Closing {
    /// A caller, which is answered when the store is closed.
    Caller(Token),
    /// The leader, or a caller that has been answered.
    Leader,
}

/// Where a shard is between opening and closed.
pub(super) struct Life {
    /// Whether it still opens, and takes no requests yet.
    pub opening: bool,
    /// Whether the log has not been redone yet, or no new epoch has begun since.
    pub redoing: bool,
    /// The first failure, while opening.
    pub open_error: Option<Error>,
    /// What closes the store, if it is being closed.
    pub closing: Option<Closing>,
    /// Whether the shard has reported to the leader that no request is in progress any more.
    pub quiet: bool,
    pub closed: bool,
}

impl Life {
    /// Of a new store, which has nothing to redo.
    pub fn new() -> Self {
        Life {
            opening: true,
            redoing: false,
            open_error: None,
            closing: None,
            quiet: false,
            closed: false,
        }
    }
}
