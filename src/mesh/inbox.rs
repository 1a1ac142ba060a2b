//! The bounded lock-free inbox of one thread.
//!
//! Invariants
//! 1. After `close` nothing stays in the inbox: the thread that closes it takes everything out, and
//!    whoever pushes checks afterwards whether it is closed, and if so takes everything out, too.
//!    One of the two sees the item.
//!
//! It does *not* wake the thread: that is [`Parking`](super::Parking).

use crate::base::sync::{AtomicBool, Ordering, Queue, fence};

/// A bounded queue that many threads push to and one thread pops from.
pub(crate) struct Inbox<T> {
    queue: Queue<T>,
    closed: AtomicBool,
}

impl<T> Inbox<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Inbox { queue: Queue::new(capacity), closed: AtomicBool::new(false) }
    }

    /// Pushes an item; returns it if the inbox is full. Afterwards the caller must check
    /// [`is_closed`](Self::is_closed), and take everything out if it is.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        self.queue.push(item)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn pop(&self) -> Option<T> {
        self.queue.pop()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Closes the inbox. The caller then takes out what is left in it, and never pops again.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::{Verdict, holds};
    use ::loom::sync::Arc;
    use ::loom::thread;
    use std::sync::atomic::AtomicUsize;

    fn refuse(inbox: &Inbox<u32>, refused: &AtomicUsize) {
        while inbox.pop().is_some() {
            refused.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn closing(push: fn(&Inbox<u32>), look: bool) -> bool {
        holds(None, move |verdict: &Verdict| {
            let (inbox, refused) =
                (Arc::new(Inbox::new(4)), std::sync::Arc::new(AtomicUsize::new(0)));
            let (theirs, counts) = (inbox.clone(), refused.clone());
            let sender = thread::spawn(move || {
                push(&theirs);
                if look && theirs.is_closed() {
                    refuse(&theirs, &counts);
                }
            });
            inbox.close();
            refuse(&inbox, &refused);
            sender.join().unwrap();
            // The request is refused exactly once.
            verdict.expect(refused.load(Ordering::SeqCst) == 1);
        })
    }

    /// If a closed inbox keeps a request, its caller waits for ever.
    #[test]
    fn loom_nothing_stays_in_a_closed_inbox() {
        assert!(closing(|inbox| inbox.push(1).unwrap(), true));
    }

    #[test]
    fn loom_mutants_of_the_inbox_are_caught() {
        assert!(!closing(|inbox| inbox.push(1).unwrap(), false), "a sender that does not check");
        assert!(
            !closing(|inbox| inbox.queue.push(1).unwrap(), true),
            "a sender that does not fence"
        );
    }
}
