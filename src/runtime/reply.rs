//! The pending reply to a request from another thread.

use crate::base::error::{Error, Result};
use crate::engine::Response;
use crate::mesh;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A future of the reply. Dropping it does not undo the request.
#[must_use = "the request is under way whether this is awaited or not"]
pub(crate) struct Reply(pub(super) mesh::Reply<Result<Response>>);

impl Future for Reply {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let taken = || Err(Error::internal("the reply has already been taken"));
        Pin::new(&mut self.0).poll(cx).map(|reply| reply.unwrap_or_else(taken))
    }
}
