//! Requests of foreign threads that wait for their reply.
//!
//! Invariants
//! 1. A slot lives from `register` until both sides are done with it: the reply has come, and the future has taken
//!    it or was dropped. Dropping a future never undoes its request, and leaks nothing.
//! 2. Keys carry a generation (`sharded-slab`): a late reply can't reach a later request in the same slot.
//! 3. The first completion counts; others are ignored.
//!
//! Nothing here waits: tables and slots are lock-free.

use crate::error::{Error, ErrorKind, Result};
use crate::shard::{Response, Token};
use atomic_waker::AtomicWaker;
use crossbeam_utils::atomic::AtomicCell;
use sharded_slab::Slab;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};

const WAITING: u8 = 0;
const ANSWERED: u8 = 1;
const ABANDONED: u8 = 2;

#[derive(Default)]
struct Slot {
    state: AtomicU8,
    waker: AtomicWaker,
    result: AtomicCell<Option<Box<Result<Response>>>>,
}

/// The table.
#[derive(Default)]
pub(crate) struct InFlight {
    slots: Slab<Slot>,
}

impl InFlight {
    /// A new request: its token, and the future of its reply.
    pub(crate) fn register(self: &Arc<Self>) -> Result<(Token, Reply)> {
        let key = self.slots.insert(Slot::default()).ok_or_else(|| {
            Error::new(ErrorKind::Busy, "too many requests are under way; wait for some replies and try again")
        })?;
        Ok((Token(key as u64), Reply { table: self.clone(), key, done: false }))
    }

    /// The reply has come.
    pub(crate) fn complete(&self, token: Token, result: Result<Response>) {
        let key = token.0 as usize;
        let Some(slot) = self.slots.get(key) else { return };
        if slot.state.load(Ordering::Acquire) == WAITING {
            slot.result.store(Some(Box::new(result)));
        }
        match slot.state.compare_exchange(WAITING, ANSWERED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => slot.waker.wake(),
            Err(ABANDONED) => {
                drop(slot);
                self.slots.remove(key);
            }
            Err(_) => {}
        }
    }
}

/// The reply to a request, to come.
pub(crate) struct Reply {
    table: Arc<InFlight>,
    key: usize,
    done: bool,
}

impl Future for Reply {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let closed = || Error::new(ErrorKind::Closed, "the reply was taken already");
        if self.done {
            return Poll::Ready(Err(closed()));
        }
        let result = {
            let Some(slot) = self.table.slots.get(self.key) else { return Poll::Ready(Err(closed())) };
            slot.waker.register(cx.waker());
            if slot.state.load(Ordering::Acquire) != ANSWERED {
                return Poll::Pending;
            }
            slot.result.take()
        };
        self.done = true;
        self.table.slots.remove(self.key);
        Poll::Ready(result.map_or_else(|| Err(closed()), |result| *result))
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let answered = match self.table.slots.get(self.key) {
            Some(slot) => slot.state.compare_exchange(WAITING, ABANDONED, Ordering::AcqRel, Ordering::Acquire).is_err(),
            None => false,
        };
        if answered {
            self.table.slots.remove(self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Lsn;
    use futures_lite::future::{block_on, poll_once};

    fn committed(lsn: u64) -> Result<Response> {
        Ok(Response::Committed(Lsn::new(lsn)))
    }

    /// A reply that goes to another caller would tell it of a commit that is not its own.
    #[test]
    fn each_request_gets_its_own_reply() {
        let table = Arc::new(InFlight::default());
        let (a, mut reply_a) = table.register().expect("there is room");
        let (b, reply_b) = table.register().expect("there is room");
        assert!(block_on(poll_once(&mut reply_a)).is_none());
        table.complete(b, committed(2));
        table.complete(a, committed(1));
        table.complete(a, committed(9));
        assert!(matches!(block_on(reply_b), Ok(Response::Committed(lsn)) if lsn == Lsn::new(2)));
        assert!(matches!(block_on(reply_a), Ok(Response::Committed(lsn)) if lsn == Lsn::new(1)));
    }

    /// Callers give up all the time; each must cost nothing afterwards.
    #[test]
    fn a_dropped_future_leaks_nothing() {
        let table = Arc::new(InFlight::default());
        for early in [true, false] {
            let (token, reply) = table.register().expect("there is room");
            if early {
                drop(reply);
                table.complete(token, committed(1));
            } else {
                table.complete(token, committed(1));
                drop(reply);
            }
            assert!(!table.slots.contains(token.0 as usize));
        }
    }
}
