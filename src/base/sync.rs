//! The atomics for everything that threads share without locks: the processor's, or loom's in its
//! models.
//!
//! `RUSTFLAGS="--cfg corepage_loom" cargo test --release --lib loom` checks the models; loom's own
//! `--cfg loom` would break packages that we depend on. Types that loom lacks have a replacement
//! here, which is at most as strong as the original.
//!
//! It does *not* contain protocols: those are in `engine` and `mesh`.

#[cfg(not(all(test, corepage_loom)))]
mod real {
    use crossbeam::atomic::AtomicCell;
    use crossbeam::queue::ArrayQueue;

    pub(crate) use atomic_waker::AtomicWaker;
    pub(crate) use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence,
    };
    pub(crate) use std::sync::{Mutex, MutexGuard};

    /// A bounded lock-free queue.
    pub(crate) type Queue<T> = ArrayQueue<T>;
    /// Hands one value from a thread to another.
    pub(crate) type Hand<T> = AtomicCell<Option<Box<T>>>;
}

#[cfg(all(test, corepage_loom))]
mod stand_ins {
    use std::collections::VecDeque;
    use std::task::Waker;

    pub(crate) use loom::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence,
    };
    pub(crate) use loom::sync::{Mutex, MutexGuard};

    /// A queue whose length is known without the lock, so that checking for emptiness is just an
    /// atomic load.
    pub(crate) struct Queue<T> {
        capacity: usize,
        len: AtomicU64,
        items: Mutex<VecDeque<T>>,
    }

    impl<T> Queue<T> {
        pub(crate) fn new(capacity: usize) -> Self {
            Queue { capacity, len: AtomicU64::new(0), items: Mutex::new(VecDeque::new()) }
        }

        pub(crate) fn push(&self, item: T) -> Result<(), T> {
            let mut items = self.items.lock().unwrap();
            if items.len() == self.capacity {
                return Err(item);
            }
            items.push_back(item);
            drop(items);
            self.len.fetch_add(1, Ordering::Release);
            Ok(())
        }

        pub(crate) fn pop(&self) -> Option<T> {
            if self.is_empty() {
                return None;
            }
            let item = self.items.lock().unwrap().pop_front()?;
            self.len.fetch_sub(1, Ordering::Release);
            Some(item)
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.len.load(Ordering::Acquire) == 0
        }
    }

    /// Hands one value from a thread to another.
    pub(crate) struct Hand<T>(Mutex<Option<Box<T>>>);

    impl<T> Default for Hand<T> {
        fn default() -> Self {
            Hand(Mutex::new(None))
        }
    }

    impl<T> Hand<T> {
        pub(crate) fn store(&self, value: Option<Box<T>>) {
            *self.0.lock().unwrap() = value;
        }

        pub(crate) fn take(&self) -> Option<Box<T>> {
            self.0.lock().unwrap().take()
        }
    }

    /// One waker, set by one thread and woken by others.
    pub(crate) struct AtomicWaker(Mutex<Option<Waker>>);

    impl Default for AtomicWaker {
        fn default() -> Self {
            AtomicWaker(Mutex::new(None))
        }
    }

    impl AtomicWaker {
        pub(crate) fn register(&self, waker: &Waker) {
            *self.0.lock().unwrap() = Some(waker.clone());
        }

        pub(crate) fn wake(&self) {
            let waker = self.0.lock().unwrap().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

#[cfg(not(all(test, corepage_loom)))]
pub(crate) use real::*;
#[cfg(all(test, corepage_loom))]
pub(crate) use stand_ins::*;

/// Runs models and tells whether they held. A model that can't fail checks nothing, so each has
/// mutants.
#[cfg(all(test, corepage_loom))]
pub(crate) mod model {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Records whether everything has held so far. A panic in a model would take loom down with it.
    #[derive(Clone, Default)]
    pub(crate) struct Verdict(Arc<AtomicBool>);

    impl Verdict {
        pub(crate) fn expect(&self, holds: bool) {
            if !holds {
                self.0.store(true, Ordering::SeqCst);
            }
        }
    }

    /// The lowest bound on preemptions in any model: nearly all known bugs of this kind need no
    /// more than two (Musuvathi and Qadeer, "Iterative context bounding for systematic testing of
    /// multithreaded programs", PLDI 2007).
    const PREEMPTIONS_MIN: usize = 3;

    /// Runs `model` in every order of its steps with at most this many `preemptions`; `None` runs
    /// all orders. Returns whether it held.
    pub(crate) fn holds(
        preemptions: Option<usize>,
        model: impl Fn(&Verdict) + Sync + Send + 'static,
    ) -> bool {
        assert!(
            preemptions.is_none_or(|bound| bound >= PREEMPTIONS_MIN),
            "a bound of {preemptions:?} shows too little"
        );
        let verdict = Verdict::default();
        let theirs = verdict.clone();
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemptions;
        builder.check(move || model(&theirs));
        !verdict.0.load(Ordering::SeqCst)
    }
}
