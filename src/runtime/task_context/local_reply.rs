//! The future of the reply to a request that a task has sent to its own shard.

use super::{PendingRequest, TaskContext};
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::Response;
use crate::runtime::shared::closed;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The pending reply to a request that stays on its thread.
#[must_use = "the request is under way whether this is awaited or not"]
pub(crate) struct LocalReply {
    pub(super) local: TaskContext,
    /// `None` if the request was refused, or the reply was taken.
    pub(super) key: Option<usize>,
}

impl Future for LocalReply {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let Some(key) = self.key else { return Poll::Ready(Err(self.refusal())) };
        let mut replies = self.local.0.replies.borrow_mut();
        if let PendingRequest::InFlight(_, waker) | PendingRequest::Deferred(.., waker) =
            &mut replies[key]
        {
            match waker {
                Some(known) => known.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        let PendingRequest::Answered(result) = replies.remove(key) else {
            unreachable!("only a drop abandons a reply")
        };
        drop(replies);
        self.key = None;
        Poll::Ready(result)
    }
}

impl LocalReply {
    fn refusal(&self) -> Error {
        if self.local.0.is_closed() {
            return closed();
        }
        let most = self.local.0.requests_max;
        Error::new(
            ErrorKind::Busy,
            format_args!("{most} requests of this shard's tasks are under way; await some"),
        )
    }
}

impl Drop for LocalReply {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut replies = self.local.0.replies.borrow_mut();
        let unwanted = match replies[key] {
            PendingRequest::Answered(_) => replies.try_remove(key),
            PendingRequest::Deferred(number, ..) => {
                self.local.0.deferred.borrow_mut().remove(&number);
                replies.try_remove(key)
            }
            PendingRequest::InFlight(bytes, _) | PendingRequest::Abandoned(bytes) => {
                Some(std::mem::replace(&mut replies[key], PendingRequest::Abandoned(bytes)))
            }
        };
        drop(replies);
        drop(unwanted);
    }
}
