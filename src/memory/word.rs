//! The state word of a run of blocks: the number of its pins, and whether its frame is gone.
//!
//! ```text
//!   0 --pin--> 1 --pin--> 2 ... --release--> 1 --release--> 0 --orphan--> returned
//!              \--orphan--> ORPHAN | 1 --release--> returned
//! ```
//! Invariants
//! 1. Of all releases and the one orphaning, exactly one returns true, the last, so that its caller
//!    returns the run.
//! 2. A caller that gets true, or sees no pins, also sees everything that was done through the
//!    released pins.

use crate::base::sync::{AtomicU32, Ordering, fence};

/// Set when the frame is gone while pins are left.
pub(super) const ORPHAN: u32 = 1 << 31;
/// Far above any use and far below [`ORPHAN`]: if it is reached, pins are leaking in a loop.
const PINS_MAX: u32 = 1 << 30;

/// The state word of one run.
#[derive(Default)]
pub(super) struct Word(AtomicU32);

impl Word {
    /// Called when the run is handed out.
    #[inline]
    pub(super) fn begin(&self) {
        // Relaxed: the run came back through the queue, which orders everything that its former
        // users did before this.
        self.0.store(0, Ordering::Relaxed);
    }

    /// Adds a pin. The caller holds the frame or a pin.
    #[inline]
    pub(super) fn pin(&self) {
        // Relaxed, as in Arc: the caller has access to the bytes already.
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        if before & !ORPHAN >= PINS_MAX {
            self.0.fetch_sub(1, Ordering::Relaxed);
            panic!("{PINS_MAX} pins of one frame: some code leaks them");
        }
    }

    /// The number of pins. Only the frame reads it.
    #[inline]
    pub(super) fn pins(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Called when the frame is dropped. True: there are no pins, and the caller has to return the
    /// run.
    #[inline]
    pub(super) fn orphan(&self) -> bool {
        // Without pins nothing else can change the word, so no read-modify-write is needed.
        self.pins() == 0 || self.0.fetch_or(ORPHAN, Ordering::AcqRel) == 0
    }

    /// Called when a pin is dropped. True: it was the last reference, and the caller has to return
    /// the run.
    #[inline]
    pub(super) fn release(&self) -> bool {
        let is_last = self.0.fetch_sub(1, Ordering::Release) == ORPHAN | 1;
        if is_last {
            fence(Ordering::Acquire);
        }
        is_last
    }
}

#[cfg(all(test, corepage_loom))]
// Loom hands out the bytes that it watches as pointers.
#[allow(unsafe_code)]
mod loom {
    use super::*;
    use crate::base::sync::model::{self, Verdict};
    use ::loom::cell::UnsafeCell;
    use ::loom::sync::Arc;
    use ::loom::thread;
    use std::sync::atomic::{AtomicU32 as Real, Ordering as RealOrdering};

    type Step = fn(&Word) -> bool;

    /// A run with its bytes; loom ends the model if two threads access them at the same time.
    struct Run {
        word: Word,
        bytes: UnsafeCell<u32>,
        returned: Real,
    }

    impl Run {
        fn read(&self) {
            // SAFETY: the caller holds a pin or the frame; loom checks here that no other thread
            // writes meanwhile.
            self.bytes.with(|bytes| assert!(unsafe { *bytes } < 10));
        }

        /// Returns the run: the next owner writes at once.
        fn give_back(&self) {
            self.returned.fetch_add(1, RealOrdering::SeqCst);
            // SAFETY: the word told the caller that it is the last; loom checks here that it is.
            self.bytes.with_mut(|bytes| unsafe { *bytes = 9 });
        }
    }

    /// Two pins are read and dropped on threads of their own, one of them after a clone of it,
    /// while the frame tries to write and is then dropped.
    fn pins_and_frame(verdict: &Verdict, orphan: Step, release: Step) {
        let run = Arc::new(Run {
            word: Word::default(),
            bytes: UnsafeCell::new(0),
            returned: Real::new(0),
        });
        let threads: Vec<_> = [false, true]
            .into_iter()
            .map(|clones| {
                run.word.pin();
                let run = run.clone();
                thread::spawn(move || {
                    if clones {
                        run.word.pin();
                        run.read();
                        if release(&run.word) {
                            run.give_back();
                        }
                    }
                    run.read();
                    if release(&run.word) {
                        run.give_back();
                    }
                })
            })
            .collect();
        if run.word.pins() == 0 {
            // SAFETY: the frame sees no pins; loom checks here that no other thread accesses the
            // bytes.
            run.bytes.with_mut(|bytes| unsafe { *bytes = 1 });
        }
        if orphan(&run.word) {
            run.give_back();
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        verdict.expect(run.returned.load(RealOrdering::SeqCst) == 1);
    }

    fn holds(orphan: Step, release: Step) -> bool {
        model::holds(Some(3), move |verdict| pins_and_frame(verdict, orphan, release))
    }

    /// A run that is returned twice has two owners; one that is never returned is lost memory; one
    /// that is returned early is written while it is read.
    #[test]
    fn loom_a_run_is_returned_once_and_by_the_last() {
        assert!(holds(Word::orphan, Word::release));
    }

    #[test]
    fn loom_a_frame_that_marks_too_late_is_caught() {
        let looks_then_sets: Step = |word| {
            let pins = word.pins();
            word.0.fetch_or(ORPHAN, Ordering::AcqRel);
            pins == 0
        };
        assert!(
            !holds(looks_then_sets, Word::release),
            "the last pin is released between the check and the mark"
        );
    }

    /// Loom itself reports that a read and a write are not ordered.
    #[test]
    #[should_panic(expected = "Causality violation")]
    fn loom_a_release_that_releases_nothing_is_caught() {
        let relaxed: Step = |word| word.0.fetch_sub(1, Ordering::Relaxed) == ORPHAN | 1;
        holds(Word::orphan, relaxed);
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn loom_a_pin_that_does_not_know_of_the_frame_is_caught() {
        let forgets: Step = |word| word.0.fetch_sub(1, Ordering::AcqRel) == 1;
        holds(Word::orphan, forgets);
    }
}
