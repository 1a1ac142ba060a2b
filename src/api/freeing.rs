//! Frees the pages of deleted and shortened volumes in the background, on a thread of its own.
//!
//! ```text
//! record cut (durable) --add--> job --step--> step --> ... --last step--> record whole, or free
//!                                ^     |
//!                                '-----' Busy, Full, Conflict: the same step again after a pause
//! ```
//! Invariants
//! 1. A deletion is answered when its record is durable: nothing that happens here can delay the
//!    answer or take it back.
//! 2. A step that fails for a transient reason is retried as long as the store is open. What is
//!    left when the store closes or crashes, the next open finds in the catalog.
//! 3. The thread runs only while there are jobs. It does not keep the store open: when a caller
//!    drops the last handle, the thread is stopped first ([`Handles`]).
//!
//! It does *not* know which pages a record stands for: `catalog` does.

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

/// The pauses after a step that the store was too busy for: each is twice as long as the one before
/// it.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The number of pauses between two warnings about the same job: they are about a minute and a half
/// apart once pauses have grown.
const PAUSES_PER_WARNING: u32 = 100;

/// How far the pages beyond a volume's end are freed: all from its end, which was at `from_bytes`,
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

    /// The page to continue with if the volume now ends at `bytes`: never one of its own pages, and
    /// none is skipped.
    pub(super) fn go_on(cursor: Option<Cursor>, bytes: u64) -> PageId {
        let end = page_behind(bytes);
        cursor
            .filter(|cursor| cursor.from_bytes <= bytes)
            .map_or(end, |cursor| cursor.next.max(end))
    }
}

/// The first page that holds none of the first `bytes` bytes.
pub(super) fn page_behind(bytes: u64) -> PageId {
    PageId::new(bytes.div_ceil(BLOCK as u64))
}

/// What becomes of the number of a deleted volume once its pages are freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    /// Another volume may get it: no handle to the deleted one can exist.
    Free,
    /// No volume gets it before the next open.
    Kept,
}

/// The work for one record: its pages have to be freed.
#[derive(Clone, Copy)]
struct Job {
    number: Number,
    cursor: Option<Cursor>,
    /// Changes with the record: a step that began before must not end the job.
    generation: u64,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<PageKey, Job>,
    generations: u64,
    /// Whether the thread takes jobs.
    is_running: bool,
    /// Whether the last handle of a caller is gone.
    is_ending: bool,
    thread: Option<JoinHandle<()>>,
    /// Why the pages of some job were left to the next open.
    failed: Option<Error>,
}

/// The jobs of one store.
#[derive(Default)]
pub(super) struct Freeing {
    state: Mutex<State>,
    /// Notified when a job was added or has ended, or when everything ends.
    changed: Event,
    opener: Opener,
}

/// Shared by the handles of callers: when the last of them is dropped, the thread is stopped.
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
    // The state is plain data and consistent at every step, so a panic elsewhere does not
    // invalidate it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of records that have pages left to be freed.
    pub(super) fn count(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Adds a job for the record at `key`, or restarts it if the record has changed. `store` is for
    /// the thread.
    pub(super) fn add(self: &Arc<Self>, store: Store, key: PageKey, number: Number) {
        let mut state = self.lock();
        state.generations += 1;
        let generation = state.generations;
        let known = state.jobs.get(&key).map_or(number, |job| job.number);
        let number = if known == Number::Kept { known } else { number };
        state.jobs.insert(key, Job { number, cursor: None, generation });
        if state.is_running || state.is_ending {
            return;
        }
        // The previous thread has nothing left to do.
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
                tracing::warn!(%error, "its pages are freed when the store is next opened");
                state.jobs.clear();
                state.failed = Some(error);
            }
        }
    }

    /// Waits until there are no jobs.
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

    /// The result of all jobs; `None` while some are left.
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

    /// Stops the thread, and waits until it has released the store.
    fn end(&self) {
        let mut state = self.lock();
        state.is_ending = true;
        let thread = state.thread.take();
        drop(state);
        self.changed.notify(usize::MAX);
        let Some(thread) = thread else { return };
        let is_this = thread.thread().id() == std::thread::current().id();
        // On a shard's thread this would wait for a thread that may wait for the calling one; there
        // the store ends a little later instead.
        if !is_this && !crate::runtime::is_shard_thread() {
            drop(thread.join());
        }
    }

    /// The next job. If there is none, the thread ends, and the next `add` starts another.
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
            let step = async { Some(store.free_step(key, job.cursor, job.number).await) };
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
                        let volume = key.page.get();
                        tracing::warn!(%error, volume, "freeing the pages of a volume waits");
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
        // If the job has changed since the step began, it restarts with the current record.
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
                let volume = key.page.get();
                let what = "pages of a deleted or shortened volume are not freed";
                tracing::warn!(%error, volume, "{what}");
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

/// Whether the same step may succeed a little later.
fn passes(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Busy | ErrorKind::Full | ErrorKind::Conflict)
}

/// However the thread ends, this makes sure that no caller waits for it for ever.
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

    /// Continuing at the wrong page would free what a volume has gained again, or leave what it has
    /// lost.
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
        assert_eq!(Cursor::go_on(None, 4097).get(), 2, "a page that belongs to it in part stays");
    }
}
