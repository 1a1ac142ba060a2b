//! Waits for futures on a plain thread.

use crossbeam::sync::{Parker, Unparker};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

struct Unparks(Unparker);

impl Wake for Unparks {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

thread_local! {
    /// A parker that is kept from one call to the next, so that a call allocates nothing.
    static KEPT: Cell<Option<(Parker, Waker)>> = const { Cell::new(None) };
}

/// Polls a future on this thread until it is ready, and parks the thread in between.
///
/// Calls may be nested: each parks on its own parker, so that the inner one can't take a wake-up of
/// the outer one.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let (parker, waker) = KEPT.try_with(Cell::take).ok().flatten().unwrap_or_else(|| {
        let parker = Parker::new();
        let waker = Waker::from(Arc::new(Unparks(parker.unparker().clone())));
        (parker, waker)
    });
    let mut future = pin!(future);
    let value = loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            break value;
        }
        parker.park();
    };
    let _ = KEPT.try_with(|kept| kept.set(Some((parker, waker))));
    value
}

/// The result of whichever future is ready first; `a` if both are.
pub(super) async fn first_of<T>(a: impl Future<Output = T>, b: impl Future<Output = T>) -> T {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|cx| match a.as_mut().poll(cx) {
        Poll::Pending => b.as_mut().poll(cx),
        ready => ready,
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_listener::Event;

    /// If the inner call took the wake-up of the outer one, a blocking call made in a future would
    /// hang its caller.
    #[test]
    fn a_nested_call_leaves_the_wake_up_of_the_outer_one() {
        let (outer, inner) = (Event::new(), Event::new());
        let mut heard = pin!(outer.listen());
        let mut polls = 0;
        block_on(poll_fn(|cx| {
            polls += 1;
            let ready = heard.as_mut().poll(cx);
            if polls == 1 {
                assert!(ready.is_pending());
                let within = inner.listen();
                outer.notify(1);
                inner.notify(1);
                block_on(within);
            }
            ready
        }));
        assert_eq!(polls, 2);
    }

    /// If a thread sleeps through a wake-up from another one, its caller hangs.
    #[test]
    fn other_threads_wake_it() {
        let event = Event::new();
        std::thread::scope(|scope| {
            for _ in 0..100 {
                let listener = event.listen();
                scope.spawn(|| event.notify(1));
                block_on(listener);
            }
        });
    }

    #[test]
    fn the_first_result_counts() {
        assert_eq!(block_on(first_of(std::future::pending(), async { 2 })), 2);
        assert_eq!(block_on(first_of(async { 1 }, async { 2 })), 1);
    }
}
