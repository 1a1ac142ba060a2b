//! Waits for a busy store without blocking other requests, as long as the client waits for the
//! answer.
//!
//! ```text
//! reply thread: block_on(work of the connection) ── parks until woken, or the next pause is over
//!                     └─ request: Busy ── pause 1 ms … 50 ms ── again, while the connection lives
//! ```
//! 1. A pause on a connection's reply thread delays only the request itself. On any other thread it
//!    blocks the thread.
//! 2. `Busy` and `Conflict` are not failures: requests are retried while the connection lives, and
//!    [`LAST_TRIES`] longer. A client that saw them would make a file system read-only. Without a
//!    connection, [`ALONE`] is the limit.
//! 3. Nothing is retried for a client that is gone: a late write would overwrite what it has
//!    written through its next connection.
//! 4. A warning that requests wait is logged at most once in [`WARNING_PAUSE`].

use super::proto::{Errno, Fault};
use corepage::{Error, ErrorKind};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tracing::warn;

/// The pauses between attempts: each is twice as long as the one before it.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// How long retries continue once the client has said goodbye or stopped sending, or the server
/// stops.
const LAST_TRIES: Duration = Duration::from_secs(1);
/// How long they continue where no connection is known, in a handshake.
const ALONE: Duration = Duration::from_secs(5);
/// Requests that wait longer than this are worth a warning.
const WARNING_AFTER: Duration = Duration::from_secs(1);
const WARNING_PAUSE: Duration = Duration::from_secs(10);

thread_local! {
    static HERE: RefCell<Option<Timers>> = const { RefCell::new(None) };
}

/// When the last warning was given.
static WARNED: Mutex<Option<Instant>> = Mutex::new(None);

/// What a connection knows about its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// The client waits for its answers.
    Waits,
    /// It has said goodbye or stopped sending, or the server stops.
    Ends,
    /// It takes no answers, and none of its requests may begin.
    IsGone,
}

type Look = Box<dyn Fn() -> Client>;

/// The pauses of this thread's requests.
struct Timers {
    sleeping: BTreeMap<(Instant, u64), Waker>,
    next: u64,
    client: Look,
}

/// Removes the timers from the thread, even after a panic.
struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        HERE.take();
    }
}

/// Runs the work of a connection on this thread; `client` tells what is known about its client.
pub fn block_on<T>(client: impl Fn() -> Client + 'static, work: impl Future<Output = T>) -> T {
    HERE.set(Some(Timers { sleeping: BTreeMap::new(), next: 0, client: Box::new(client) }));
    let _installed = Installed;
    let (parker, unparker) = parking::pair();
    let waker = Waker::from(unparker);
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(value) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        let next = HERE.with_borrow(|here| {
            here.as_ref()
                .and_then(|timers| timers.sleeping.first_key_value().map(|((end, _), _)| *end))
        });
        match next {
            Some(end) => drop(parker.park_deadline(end)),
            None => parker.park(),
        }
        for waker in due(Instant::now()) {
            waker.wake();
        }
    }
}

/// Returns the wakers whose pause is over, to be woken outside of the borrow.
fn due(now: Instant) -> Vec<Waker> {
    HERE.with_borrow_mut(|here| {
        let Some(timers) = here else { return Vec::new() };
        let mut due = Vec::new();
        while let Some(first) = timers.sleeping.first_entry().filter(|first| first.key().0 <= now) {
            due.push(first.remove());
        }
        due
    })
}

/// A pause that ends at a given time.
struct Pause {
    end: Instant,
    number: Option<u64>,
}

impl Future for Pause {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.end {
            return Poll::Ready(());
        }
        let registered = HERE.with_borrow_mut(|here| {
            let timers = here.as_mut()?;
            let number = *self.number.get_or_insert_with(|| {
                timers.next += 1;
                timers.next
            });
            timers.sleeping.insert((self.end, number), cx.waker().clone());
            Some(())
        });
        if registered.is_some() {
            return Poll::Pending;
        }
        std::thread::sleep(self.end.saturating_duration_since(Instant::now()));
        Poll::Ready(())
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let _ = HERE.try_with(|here| {
            if let Ok(mut here) = here.try_borrow_mut()
                && let Some(timers) = here.as_mut()
            {
                timers.sleeping.remove(&(self.end, number));
            }
        });
    }
}

/// The client of the connection whose thread this is; `None` if the thread belongs to no
/// connection.
fn client() -> Option<Client> {
    HERE.with_borrow(|here| here.as_ref().map(|timers| (timers.client)()))
}

/// Tracks how long a request has waited.
struct Wait {
    begun: Instant,
    pause: Duration,
    /// Since when the client no longer waits for the answer.
    ended: Option<Instant>,
}

impl Wait {
    fn is_over(&mut self, now: Instant) -> bool {
        match client() {
            None => now - self.begun >= ALONE,
            Some(Client::Waits) => false,
            Some(Client::Ends | Client::IsGone) => {
                now - *self.ended.get_or_insert(now) >= LAST_TRIES
            }
        }
    }
}

/// Makes an attempt, unless the client is gone, and repeats it while the store is busy. `fault`
/// converts any other error for the client.
pub async fn retry_busy<T, F: Future<Output = Result<T, Error>>>(
    mut attempt: impl FnMut() -> F,
    fault: impl Fn(Error) -> Fault,
) -> Result<T, Fault> {
    let mut wait: Option<Wait> = None;
    loop {
        if client() == Some(Client::IsGone) {
            return Err(Fault::new(Errno::Shutdown, "the client is gone"));
        }
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if matches!(error.kind(), ErrorKind::Busy | ErrorKind::Conflict) => error,
            Err(error) => return Err(fault(error)),
        };
        let now = Instant::now();
        let wait = wait.get_or_insert(Wait { begun: now, pause: PAUSE_MIN, ended: None });
        if wait.is_over(now) {
            return Err(Fault::new(
                Errno::Shutdown,
                format!("the connection ends, and the store is busy: {error}"),
            ));
        }
        warn_of(&error, now - wait.begun, now);
        let end = now + wait.pause;
        wait.pause = (wait.pause * 2).min(PAUSE_MAX);
        Pause { end, number: None }.await;
    }
}

fn warn_of(error: &Error, waited: Duration, now: Instant) {
    if waited < WARNING_AFTER {
        return;
    }
    let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
    if warned.is_none_or(|warned| now - warned >= WARNING_PAUSE) {
        *warned = Some(now);
        warn!(%error, seconds = waited.as_secs(), "a request waits for a busy store");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    fn busy() -> Error {
        Error::new(ErrorKind::Busy, "planted: busy")
    }

    fn fault(error: Error) -> Fault {
        Fault::new(Errno::Io, error.to_string())
    }

    /// A request that waits must not block those that need not wait.
    #[test]
    fn a_pause_on_a_reply_thread_is_the_requests_own() {
        let (tries, others) = (AtomicU32::new(0), AtomicU32::new(0));
        let executor = async_executor::LocalExecutor::new();
        let waits = async {
            let attempt = || async {
                // It stays busy until the other has had many turns: if that never gets one, this
                // test does not end.
                tries.fetch_add(1, Ordering::Relaxed);
                if others.load(Ordering::Relaxed) < 1000 { Err(busy()) } else { Ok(7) }
            };
            retry_busy(attempt, fault).await
        };
        let other = async {
            for _ in 0..1000 {
                others.fetch_add(1, Ordering::Relaxed);
                futures_lite::future::yield_now().await;
            }
        };
        let tasks = (executor.spawn(waits), executor.spawn(other));
        let result =
            block_on(|| Client::Waits, executor.run(futures_lite::future::zip(tasks.0, tasks.1)));
        assert!(matches!(result.0, Ok(7)), "{:?}", result.0);
        assert!(tries.load(Ordering::Relaxed) < 500, "it does not pause");
    }

    /// A connection whose client is gone must end, and a server must stop, even if the store stays
    /// busy for ever.
    #[test]
    fn nobody_waits_for_an_answer_that_nobody_waits_for() {
        let ended = Arc::new(AtomicBool::new(false));
        let (own, mut tries) = (ended.clone(), 0);
        let attempt = || {
            tries += 1;
            ended.store(tries > 3, Ordering::Relaxed);
            async { Err::<(), _>(busy()) }
        };
        let client = move || if own.load(Ordering::Relaxed) { Client::Ends } else { Client::Waits };
        let result = block_on(client, retry_busy(attempt, fault));
        assert!(matches!(result, Err(Fault { errno: Errno::Shutdown, .. })), "{result:?}");
        let failed = || async { Err::<(), _>(Error::new(ErrorKind::Io, "planted: broken")) };
        let result = block_on(|| Client::Waits, retry_busy(failed, fault));
        assert!(matches!(result, Err(Fault { errno: Errno::Io, .. })), "{result:?}");
    }

    /// The client may have written the same bytes through its next connection: a later attempt
    /// would undo that.
    #[test]
    fn nothing_is_tried_again_for_a_client_that_is_gone() {
        let (tries, gone_after) = (Arc::new(AtomicU32::new(0)), 3);
        let own = tries.clone();
        let client = move || {
            if own.load(Ordering::Relaxed) < gone_after { Client::Waits } else { Client::IsGone }
        };
        let attempt = || {
            tries.fetch_add(1, Ordering::Relaxed);
            async { Err::<(), _>(busy()) }
        };
        let result = block_on(client, retry_busy(attempt, fault));
        assert!(matches!(result, Err(Fault { errno: Errno::Shutdown, .. })), "{result:?}");
        assert_eq!(tries.load(Ordering::Relaxed), gone_after);
    }
}
