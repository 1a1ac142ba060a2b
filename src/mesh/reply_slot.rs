//! A slot for the reply to one request: one side, the answerer, completes it; the other side, the
//! asker, waits for it.
//!
//! ```text
//!            complete                    put
//!   waiting ----------> being answered ------> answered --poll--> taken: the asker frees the slot
//!      |drop                 |drop                |drop: the asker frees the slot
//!      v                     v
//!   abandoned           abandoned: the answerer frees the slot, now or when it answers
//! ```
//! Invariants
//! 1. The first completion counts; later ones do nothing.
//! 2. The asker takes the result once, or it is dropped with the slot.
//! 3. Exactly one side is told to free the slot, and after that neither touches it again.

use crate::base::sync::{AtomicU8, AtomicWaker, Hand, Ordering};
use std::task::Waker;

const WAITING: u8 = 0;
const ANSWERING: u8 = 1;
const ANSWERED: u8 = 2;
const ABANDONED: u8 = 3;

/// The slot for one reply.
pub(crate) struct ReplySlot<T> {
    state: AtomicU8,
    waker: AtomicWaker,
    result: Hand<T>,
}

/// The result of [`ReplySlot::complete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Completed {
    /// The asker has been woken.
    Delivered,
    /// The asker has gone: the caller frees the slot.
    Free,
    /// It was completed before.
    Ignored,
}

/// The result of [`ReplySlot::poll`].
pub(crate) enum Polled<T> {
    Pending,
    /// The result, unless it was taken before; the caller frees the slot.
    Free(Option<Box<T>>),
}

/// The result of [`ReplySlot::abandon`]: who frees the slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Abandoned {
    /// The answerer will free the slot.
    Left,
    /// The caller frees the slot.
    Free,
}

impl<T> Default for ReplySlot<T> {
    fn default() -> Self {
        ReplySlot {
            state: AtomicU8::new(WAITING),
            waker: AtomicWaker::default(),
            result: Hand::default(),
        }
    }
}

impl<T> ReplySlot<T> {
    /// Stores the reply, and wakes the asker.
    pub(crate) fn complete(&self, result: T) -> Completed {
        match self.state.compare_exchange(WAITING, ANSWERING, Ordering::Acquire, Ordering::Acquire)
        {
            Ok(_) => {}
            Err(ABANDONED) => return Completed::Free,
            Err(ANSWERING | ANSWERED) => return Completed::Ignored,
            Err(state) => unreachable!("{state} is not a state of a slot"),
        }
        self.result.store(Some(Box::new(result)));
        match self.state.compare_exchange(ANSWERING, ANSWERED, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => {
                self.waker.wake();
                Completed::Delivered
            }
            Err(_) => Completed::Free,
        }
    }

    /// Takes the reply if it has arrived; if not, wakes `waker` when it does.
    pub(crate) fn poll(&self, waker: &Waker) -> Polled<T> {
        if self.state.load(Ordering::Acquire) != ANSWERED {
            self.waker.register(waker);
            if self.state.load(Ordering::Acquire) != ANSWERED {
                return Polled::Pending;
            }
        }
        Polled::Free(self.result.take())
    }

    /// Called when the asker gives up waiting for the reply.
    pub(crate) fn abandon(&self) -> Abandoned {
        match self.state.swap(ABANDONED, Ordering::AcqRel) {
            ANSWERED => Abandoned::Free,
            WAITING | ANSWERING => Abandoned::Left,
            state => {
                unreachable!("a slot in state {state} is abandoned: its asker is already gone")
            }
        }
    }
}

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::*;

    /// A slot that is abandoned twice would be freed twice, and two requests would get its place.
    #[test]
    #[should_panic(expected = "its asker is already gone")]
    fn a_slot_is_abandoned_once() {
        let slot = ReplySlot::<u32>::default();
        assert_eq!(slot.abandon(), Abandoned::Left);
        slot.abandon();
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::{self, Verdict};
    use ::loom::sync::Arc;
    use ::loom::thread;
    use std::sync::atomic::{AtomicUsize, Ordering as Real};
    use std::task::Wake;

    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Real::SeqCst);
        }
    }

    /// One answerer, and one asker that checks and then waits or goes; the slot is freed once,
    /// whatever happens.
    fn exchange(
        verdict: &Verdict,
        complete: fn(&ReplySlot<u32>) -> Completed,
        poll: fn(&ReplySlot<u32>, &Waker) -> Polled<u32>,
        goes: bool,
    ) {
        let slot = Arc::new(ReplySlot::default());
        let freed = std::sync::Arc::new(AtomicUsize::new(0));
        let (theirs, counts) = (slot.clone(), freed.clone());
        let answerer = thread::spawn(move || {
            if complete(&theirs) == Completed::Free {
                counts.fetch_add(1, Real::SeqCst);
            }
        });
        let bell = std::sync::Arc::new(Bell::default());
        let waker = Waker::from(bell.clone());
        let taken = match poll(&slot, &waker) {
            Polled::Free(result) => {
                verdict.expect(result.as_deref() == Some(&7));
                freed.fetch_add(1, Real::SeqCst);
                true
            }
            Polled::Pending => false,
        };
        if !taken && goes && slot.abandon() == Abandoned::Free {
            freed.fetch_add(1, Real::SeqCst);
        }
        answerer.join().unwrap();
        if taken || goes {
            verdict.expect(freed.load(Real::SeqCst) == 1);
            return;
        }
        // If it is not woken, the asker waits for ever.
        verdict.expect(bell.0.load(Real::SeqCst) == 1);
        verdict.expect(matches!(poll(&slot, &waker), Polled::Free(Some(result)) if *result == 7));
    }

    fn holds(
        complete: fn(&ReplySlot<u32>) -> Completed,
        poll: fn(&ReplySlot<u32>, &Waker) -> Polled<u32>,
        goes: bool,
    ) -> bool {
        model::holds(None, move |verdict| exchange(verdict, complete, poll, goes))
    }

    /// If a slot is freed twice, two requests get its place; if it is never freed, it leaks; if a
    /// reply is lost, its caller hangs.
    #[test]
    fn loom_each_reply_is_taken_once_and_each_slot_freed_once() {
        for goes in [false, true] {
            assert!(holds(|slot| slot.complete(7), ReplySlot::poll, goes));
        }
    }

    /// Two completions race: a reply, and the end of the shard that gives up.
    #[test]
    fn loom_the_first_completion_counts() {
        assert!(model::holds(None, |verdict| {
            let slot = Arc::new(ReplySlot::default());
            let theirs = slot.clone();
            let other = thread::spawn(move || theirs.complete(8));
            let own = slot.complete(7);
            let counted =
                [own, other.join().unwrap()].map(|c| u32::from(c == Completed::Delivered));
            verdict.expect(counted.iter().sum::<u32>() == 1);
            let wanted = if counted[0] == 1 { 7 } else { 8 };
            // The result must be that of the completion that counted.
            verdict.expect(
                matches!(slot.poll(Waker::noop()), Polled::Free(Some(result)) if *result == wanted),
            );
        }));
    }

    #[test]
    fn loom_mutants_of_the_slot_are_caught() {
        let early = |slot: &ReplySlot<u32>| {
            slot.state.store(ANSWERED, Ordering::Release);
            slot.result.store(Some(Box::new(7)));
            slot.waker.wake();
            Completed::Delivered
        };
        assert!(!holds(early, ReplySlot::poll, false), "answered before the result is there");
        let deaf = |slot: &ReplySlot<u32>, waker: &Waker| {
            if slot.state.load(Ordering::Acquire) == ANSWERED {
                return Polled::Free(slot.result.take());
            }
            slot.waker.register(waker);
            Polled::Pending
        };
        assert!(!holds(|slot| slot.complete(7), deaf, false), "an asker that does not check again");
        let blind = |slot: &ReplySlot<u32>| {
            slot.result.store(Some(Box::new(7)));
            slot.state.store(ANSWERED, Ordering::Release);
            slot.waker.wake();
            Completed::Delivered
        };
        assert!(
            !holds(blind, ReplySlot::poll, true),
            "an answerer that does not see that the asker has gone"
        );
    }
}
