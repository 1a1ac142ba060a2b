//! Frees the pages of deleted and shortened volumes in the background, on a thread of its own.
//!
//! ```text
//! record cut (durable) ──add──> job ──step──> step ── … ──last step──> record whole again, or free ──> job done
//!                                ^     │
//!                                └─────┘ Busy, Full, Conflict: pause from 1 ms up to 1 s, then the same step again
//! ```
//! Invariants
//! 1. A deletion is answered when its record is durable: nothing that happens here can take the
//!    answer back or delay it.
//! 2. A step that fails for a reason that passes is tried again for as long as the store is open.
//!    What is left when the store is closed or has crashed is found in the catalog by the next
//!    open.
//! 3. The thread runs only while there are jobs. It does not keep the store open: the last handle
//!    that a caller drops stops it first ([`Handles`]).
//!
//! Does not know which pages a record stands for: `catalog` does.

use super::Store;
use super::wait::{block_on, first_of};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{BLOCK, PageId, PageKey};
use crate::io::Opener;
use event_listener::{Event, Listener};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Pauses after a step that the store was too busy for: each is twice the one before it.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Pauses between two warnings about the same job: about a minute and a half apart once pauses have
/// grown.
const PAUSES_PER_WARNING: u32 = 100;

/// How far the pages behind a volume's end are freed: all from its end, which was at `from_bytes`,
/// up to `next`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    from_bytes: u64,
    next: PageId,
}

impl Cursor {
    pub(super) fn new(from_bytes: u64, next: PageId) -> Cursor {
        Cursor { from_bytes, next }
    }

    /// The page to go on with if the volume ends at `bytes` now: never one of its own, and none is
    /// passed over.
    pub(super) fn go_on(cursor: Option<Cursor>, bytes: u64) -> PageId {
        let end = page_behind(bytes);
        cursor
            .filter(|cursor| cursor.from_bytes <= bytes)
            .map_or(end, |cursor| cursor.next.max(end))
    }
}

/// The first page that has none of the first `bytes` bytes.
pub(super) fn page_behind(bytes: u64) -> PageId {
    PageId::new(bytes.div_ceil(BLOCK as u64))
}

/// A record whose pages are to be freed.
#[derive(Clone, Copy)]
struct Job {
    /// The number of the volume is free afterwards: no handle to it can exist.
    frees_number: bool,
    cursor: Option<Cursor>,
    /// Changes when the record has changed: a step that began before must not end the job.
    generation: u64,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<PageKey, Job>,
    generations: u64,
    /// The thread takes jobs.
    is_running: bool,
    /// No caller has a handle any more.
    is_ending: bool,
    thread: Option<JoinHandle<()>>,
    /// Why pages of some job were left to the next open.
    failed: Option<Error>,
}

/// The jobs of one store.
#[derive(Default)]
pub(super) struct Freeing {
    state: Mutex<State>,
    /// A job was added or has ended, or all of it ends.
    changed: Event,
    opener: Opener,
}

/// Shared by the handles of callers: when the last of them goes, the thread is stopped.
pub(super) struct Handles(pub(super) Arc<Freeing>);

impl Drop for Handles {
    fn drop(&mut self) {
        // A forked child has no such thread.
        if self.0.opener.is_here() {
            self.0.end();
        }
    }
}

impl Freeing {
    // Plain data, right at every step: a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many records have pages left to be freed.
    pub(super) fn count(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Takes on the record at `key`, or begins again with it if it has changed. `store` is for the
    /// thread.
    pub(super) fn add(self: &Arc<Self>, store: Store, key: PageKey, frees_number: bool) {
        let mut state = self.lock();
        state.generations += 1;
        let generation = state.generations;
        let known = state.jobs.get(&key).is_none_or(|job| job.frees_number);
        state
            .jobs
            .insert(key, Job { frees_number: frees_number && known, cursor: None, generation });
        if state.is_running || state.is_ending {
            return;
        }
        // The one before has nothing left to do.
        let before = state.thread.take();
        let own = self.clone();
        let work = move || {
            drop(before.map(JoinHandle::join));
            let _running = Running(&own);
            own.work(&store);
        };
        match std::thread::Builder::new().name("corepage-free".into()).spawn(work) {
            Ok(thread) => {
                state.is_running = true;
                state.thread = Some(thread);
            }
            Err(source) => {
                let error =
                    Error::no_thread("a thread that frees the pages of a deleted volume", source);
                tracing::warn!(%error, "its pages are freed when the store is opened next");
                state.jobs.clear();
                state.failed = Some(error);
            }
        }
    }

    /// Returns when there are no jobs.
    pub(super) async fn wait(&self) -> Result<()> {
        if !self.opener.is_here() {
            return Err(self.opener.refusal());
        }
        loop {
            let changed = self.changed.listen();
            if let Some(result) = self.result() {
                return result;
            }
            changed.await;
        }
    }

    /// What came of the jobs, if there are none left.
    fn result(&self) -> Option<Result<()>> {
        let mut state = self.lock();
        match state.failed.take() {
            Some(error) => Some(Err(error)),
            None => state.jobs.is_empty().then_some(Ok(())),
        }
    }

    async fn ending(&self) {
        loop {
            let changed = self.changed.listen();
            if self.lock().is_ending {
                return;
            }
            changed.await;
        }
    }

    /// Stops the thread, and waits until it has let go of the store.
    fn end(&self) {
        let mut state = self.lock();
        state.is_ending = true;
        let thread = state.thread.take();
        drop(state);
        self.changed.notify(usize::MAX);
        let Some(thread) = thread else { return };
        let is_this = thread.thread().id() == std::thread::current().id();
        // On a shard's thread it would wait for a thread that may wait for this one; there the
        // store ends a little later.
        if !is_this && !crate::runtime::is_shard_thread() {
            drop(thread.join());
        }
    }

    /// The next job, or none: then the thread ends, and the next `add` starts another.
    fn next(&self) -> Option<(PageKey, Job)> {
        let mut state = self.lock();
        let next = if state.is_ending {
            None
        } else {
            state.jobs.first_key_value().map(|(key, job)| (*key, *job))
        };
        state.is_running = next.is_some();
        next
    }

    fn work(&self, store: &Store) {
        let (mut pause, mut pauses) = (PAUSE_MIN, 0);
        while let Some((key, job)) = self.next() {
            let step = async { Some(store.free_step(key, job.cursor, job.frees_number).await) };
            let ended = async {
                self.ending().await;
                None
            };
            let Some(result) = block_on(first_of(step, ended)) else { return };
            match result {
                Ok(cursor) => {
                    (pause, pauses) = (PAUSE_MIN, 0);
                    self.stepped(key, job.generation, cursor);
                }
                Err(error) if passes(error.kind()) => {
                    if pauses % PAUSES_PER_WARNING == PAUSES_PER_WARNING - 1 {
                        tracing::warn!(%error, volume = key.page.get(), "freeing the pages of a volume waits");
                    }
                    pauses = pauses.wrapping_add(1);
                    self.pause(pause);
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(error) => self.give_up(key, error),
            }
        }
    }

    fn stepped(&self, key: PageKey, generation: u64, cursor: Option<Cursor>) {
        let mut state = self.lock();
        // Another one than the step was made for: it begins with the record as it is now.
        let Some(job) = state.jobs.get_mut(&key).filter(|job| job.generation == generation) else {
            return;
        };
        job.cursor = cursor;
        if cursor.is_none() {
            state.jobs.remove(&key);
            drop(state);
            self.changed.notify(usize::MAX);
        }
    }

    fn give_up(&self, key: PageKey, error: Error) {
        let mut state = self.lock();
        match error.kind() {
            ErrorKind::Closed => state.jobs.clear(),
            _ => {
                tracing::warn!(%error, volume = key.page.get(), "pages of a deleted or shortened volume are left");
                state.jobs.remove(&key);
            }
        }
        state.failed = Some(error);
        drop(state);
        self.changed.notify(usize::MAX);
    }

    fn pause(&self, pause: Duration) {
        let changed = self.changed.listen();
        if !self.lock().is_ending {
            changed.wait_timeout(pause);
        }
    }
}

/// What the same step may not meet a little later.
fn passes(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Busy | ErrorKind::Full | ErrorKind::Conflict)
}

/// Whatever ends the thread, nobody waits for it.
struct Running<'a>(&'a Freeing);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if std::thread::panicking() {
            state.is_running = false;
            state.jobs.clear();
            state.failed =
                Some(Error::internal("the thread that frees pages panicked; reopen the store"));
        }
        drop(state);
        self.0.changed.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Going on at the wrong page frees what a volume has gained again, or leaves what it has lost.
    #[test]
    fn freeing_goes_on_behind_the_end_of_the_volume_as_it_is_now() {
        let cursor = |from: u64, next| {
            Some(Cursor { from_bytes: from * BLOCK as u64, next: PageId::new(next) })
        };
        let first = |cursor, pages: u64| Cursor::go_on(cursor, pages * BLOCK as u64).get();
        assert_eq!(first(None, 10), 10);
        assert_eq!(first(cursor(10, 50), 10), 50, "where it stopped");
        assert_eq!(first(cursor(10, 50), 80), 80, "it has grown beyond that");
        assert_eq!(first(cursor(10, 50), 20), 50, "it has grown less far");
        assert_eq!(first(cursor(10, 50), 5), 5, "it has shrunk again");
        assert_eq!(Cursor::go_on(None, 4097).get(), 2, "a page that is its own in part stays");
    }
}
