//! Where a shard is between opening and its end.

use super::Token;
use crate::base::error::Error;

/// Who closes the store.
pub(super) enum Closing {
    /// A caller, who is answered when it is closed.
    Caller(Token),
    /// The leader; or the caller has been answered.
    Leader,
}

/// Opening, open, closing, closed.
pub(super) struct Life {
    /// No requests yet.
    pub opening: bool,
    /// The log has not been redone yet, or no new epoch has begun since.
    pub redoing: bool,
    /// The first failure, while opening.
    pub open_error: Option<Error>,
    /// The store closes.
    pub closing: Option<Closing>,
    /// The leader has been told that no request is under way any more.
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
