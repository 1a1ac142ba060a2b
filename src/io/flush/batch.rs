//! Flush rounds: one flush under way for a file, over all disks; or, where one flush stands for all files, for a disk.
//!
//! ```text
//!   join --nothing under way--> the caller leads: syncs the round's files, then calls `end`
//!     \--a round under way----> waits for the *next* round, which begins when this one ends
//! ```
//! Invariants
//! 1. A round covers what had completed before it was joined: whoever comes while one is under way goes into the next,
//!    which is submitted after that.
//! 2. At most one round is under way for these files. The kernel tells a lost write to one caller only, so of two
//!    flushes at a time one would report success for what the other knows to be lost.
//! 3. A failed round is never repeated and called good: its error is the answer to everybody in it, to everybody who
//!    waits, and to everybody who comes later; where one flush stands for all files, in all rounds of the store.
//! 4. Each waiter is told exactly once, also when the leader panics.
//!
//! Rounds over all shards, where one flush stands for all files, were measured and left out: the kernel merges the
//! flushes that are under way at a time by itself, so they gained nothing on idle cores, and on busy ones each shard
//! waited for another shard's thread to get its turn (0.4-0.9 k/s instead of 6-8 k/s with two and three shards).
//!
//! It does *not* make system calls: the leader does, in its ring or on its thread.

use crate::base::error::{Error, Result};
use crate::io::store_file::StoreFile;
use crate::io::waker::DiskWaker;
use smallvec::SmallVec;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// What other threads tell a disk that runs on a ring.
pub(in crate::io) enum Mail {
    /// A part of the operation with this key is done.
    Done(u32, Result<()>),
    /// This disk is to lead a round.
    Lead(Round),
}

/// The place where it finds that.
pub(in crate::io) struct Mailbox {
    mail: Mutex<Vec<Mail>>,
    any: AtomicBool,
    waker: DiskWaker,
}

impl Mailbox {
    pub(in crate::io) fn new(waker: DiskWaker) -> Arc<Mailbox> {
        Arc::new(Mailbox { mail: Mutex::new(Vec::new()), any: AtomicBool::new(false), waker })
    }

    pub(in crate::io) fn post(&self, mail: Mail) {
        lock(&self.mail).push(mail);
        self.any.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether something may be in it: one load, no lock.
    pub(in crate::io) fn has_mail(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    pub(in crate::io) fn take(&self) -> Vec<Mail> {
        let mut mail = lock(&self.mail);
        self.any.store(false, Ordering::Relaxed);
        std::mem::take(&mut mail)
    }
}

/// Who is told how a round ended.
pub(in crate::io) enum Waiter {
    /// An operation of a disk on a ring, which can also lead rounds.
    Ring(Arc<Mailbox>, u32),
    /// Anybody else; called on the leader's thread.
    Call(Box<dyn FnOnce(Result<()>) + Send>),
}

impl Waiter {
    fn tell(self, result: Result<()>) {
        match self {
            Waiter::Ring(mailbox, key) => mailbox.post(Mail::Done(key, result)),
            Waiter::Call(call) => call(result),
        }
    }
}

/// The files to be synced by a round.
type RoundFiles = SmallVec<[Arc<StoreFile>; 1]>;

#[derive(Default)]
struct State {
    /// A round is under way; `flying` waits for it.
    under_way: bool,
    flying: Vec<Waiter>,
    next: Vec<Waiter>,
    next_files: RoundFiles,
}

/// The first failure, of all rounds that have it in common.
pub(in crate::io) type Failure = Arc<OnceLock<Error>>;

/// The rounds of one file, or of one disk.
#[derive(Default)]
pub(in crate::io) struct Rounds {
    state: Mutex<State>,
    failed: Failure,
}

impl Rounds {
    pub(in crate::io) fn with(failed: Failure) -> Arc<Rounds> {
        Arc::new(Rounds { state: Mutex::default(), failed })
    }

    /// Asks for a flush. `Some`: nothing is under way, the caller has to lead this round now. `exactly`: this very file
    /// must be synced, not just any of them.
    pub(in crate::io) fn join(self: &Arc<Self>, file: &Arc<StoreFile>, exactly: bool, waiter: Waiter) -> Option<Round> {
        if let Some(error) = self.failed.get() {
            waiter.tell(Err(error.clone()));
            return None;
        }
        let mut state = lock(&self.state);
        if state.under_way {
            state.next.push(waiter);
            let known = state.next_files.iter().any(|other| Arc::ptr_eq(other, file));
            if state.next_files.is_empty() || (exactly && !known) {
                state.next_files.push(file.clone());
            }
            return None;
        }
        state.under_way = true;
        state.flying.push(waiter);
        Some(Round { rounds: Some(self.clone()), files: SmallVec::from_iter([file.clone()]) })
    }
}

/// The right and the duty to sync these files now, and then to say how it went.
#[must_use]
pub(in crate::io) struct Round {
    /// `None` once ended.
    rounds: Option<Arc<Rounds>>,
    files: RoundFiles,
}

/// Whether a leader leads the next round, too.
pub(in crate::io) enum Leader<'a> {
    /// Yes: its ring is at hand.
    Stays,
    /// Only if no other disk with a ring waits for it.
    Leaves(Option<&'a Arc<Mailbox>>),
}

impl Round {
    /// What is to be synced.
    pub(in crate::io) fn files(&self) -> &RoundFiles {
        &self.files
    }

    /// Ends the round. `Some`: others wait already, lead the next one.
    #[must_use]
    pub(in crate::io) fn end(mut self, result: Result<()>, leader: Leader<'_>) -> Option<Round> {
        self.finish(result, leader)
    }

    fn finish(&mut self, result: Result<()>, leader: Leader<'_>) -> Option<Round> {
        let rounds = self.rounds.take()?;
        // Before anybody is told: whoever is may be the last to hold the files, and expect them closed.
        for file in self.files.drain(..) {
            if result.is_ok() {
                file.set_settled();
            }
        }
        let result = match (result, rounds.failed.get()) {
            (Ok(()), Some(error)) => Err(error.clone()),
            (Err(error), None) => Err(rounds.failed.get_or_init(|| error).clone()),
            (result, _) => result,
        };
        let mut state = lock(&rounds.state);
        let mut told = std::mem::take(&mut state.flying);
        let mut next = None;
        if result.is_err() {
            state.under_way = false;
            told.append(&mut state.next);
            state.next_files.clear();
        } else if state.next.is_empty() {
            state.under_way = false;
        } else {
            state.flying = std::mem::take(&mut state.next);
            let files = std::mem::take(&mut state.next_files);
            next = Some(Round { rounds: Some(rounds.clone()), files });
        }
        if let Leader::Leaves(own) = leader
            && let Some(round) = next.take()
        {
            let other = state.flying.iter().find_map(|waiter| match waiter {
                Waiter::Ring(mailbox, _) if !own.is_some_and(|own| Arc::ptr_eq(own, mailbox)) => Some(mailbox.clone()),
                _ => None,
            });
            match other {
                Some(mailbox) => mailbox.post(Mail::Lead(round)),
                None => next = Some(round),
            }
        }
        drop(state);
        for waiter in told {
            waiter.tell(result.clone());
        }
        next
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        if self.rounds.is_some() {
            let cause = std::io::Error::other("the thread that flushed them panicked");
            let next = self.finish(Err(Error::io("flushing files of the store", cause)), Leader::Stays);
            debug_assert!(next.is_none(), "nothing follows a failed round");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
