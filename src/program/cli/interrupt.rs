//! Handles SIGTERM, SIGINT and SIGHUP for commands that have to end something first, and SIGXFSZ,
//! which ends nothing.
//!
//! 1. The first signal since [`Interrupt::watch`] reaches whoever waits, whenever that is; it is
//!    never lost.
//! 2. Further SIGTERM and SIGHUP change nothing: supervisors repeat them, and a clean end is
//!    already in progress. A second SIGINT, which a person sends, ends the process at once: the
//!    store is crash-safe. A SIGINT within [`SAME_PRESS`] of the first is the same key press,
//!    forwarded by a shell or a script in between.
//! 3. A SIGHUP that was ignored when the process started (`nohup`) stays ignored.
//! 4. While a store is being opened, the first signal cancels that, as soon as the device has
//!    answered the current operations.
//!
//! What to do about a signal is decided elsewhere.
// The time between key presses is real time.
#![allow(clippy::disallowed_methods)]

use super::Failure;
use super::system::is_ignored;
use corepage::{Error, ErrorKind, Options, Result, Store};
use event_listener::Event;
use futures_lite::future::{block_on, or};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// The least time between two SIGINT that are meant as two.
const SAME_PRESS: Duration = Duration::from_millis(500);

#[derive(Default)]
struct State {
    /// The first signal, or 0.
    signal: AtomicI32,
    came: Event,
}

/// Watches for the signals. Clones share the watch.
#[derive(Clone)]
pub(super) struct Interrupt {
    state: Arc<State>,
    flag: Arc<AtomicBool>,
}

/// What becomes of a store that is not there when it is opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Created,
    Refused,
}

impl Interrupt {
    /// Begins to watch: from now on the signals end the process only if it has already received
    /// one.
    pub(super) fn watch() -> std::io::Result<Interrupt> {
        let interrupt = Interrupt { state: Arc::default(), flag: Arc::default() };
        let mut watched = vec![SIGTERM, SIGINT];
        if !is_ignored(SIGHUP) {
            watched.push(SIGHUP);
        }
        let mut signals = Signals::new(&watched)?;
        for signal in watched {
            signal_hook::flag::register(signal, interrupt.flag.clone())?;
        }
        let state = interrupt.state.clone();
        let watch = move || {
            let mut pressed: Option<Instant> = None;
            for signal in signals.forever() {
                if state
                    .signal
                    .compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
                {
                    state.came.notify(usize::MAX);
                }
                if signal == SIGINT
                    && pressed.get_or_insert_with(Instant::now).elapsed() >= SAME_PRESS
                {
                    end_now(SIGINT);
                }
            }
        };
        let started = std::thread::Builder::new().name("corepage-signal".into()).spawn(watch);
        started.map_err(crate::program::server::no_thread)?;
        Ok(interrupt)
    }

    /// Set by the first signal.
    pub(super) fn flag(&self) -> &Arc<AtomicBool> {
        &self.flag
    }

    /// The first signal, if there was one.
    pub(super) fn signal(&self) -> Option<i32> {
        Some(self.state.signal.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    /// Waits for the first signal.
    pub(super) async fn wait(&self) -> i32 {
        loop {
            let came = self.state.came.listen();
            if let Some(signal) = self.signal() {
                return signal;
            }
            came.await;
        }
    }

    /// Opens a store, unless a signal arrives first.
    ///
    /// # Errors
    /// `Closed`: a signal arrived. Else as [`Store::open`].
    pub(super) fn open(&self, dir: &Path, options: Options, missing: Missing) -> Result<Store> {
        let interrupted = async {
            let signal = self.wait().await;
            let context = format_args!(
                "signal {signal} came while the store in {} was being opened; it is as after a \
                 crash: open it again",
                dir.display()
            );
            Err(Error::new(ErrorKind::Closed, context))
        };
        block_on(or(
            async {
                match missing {
                    Missing::Refused => Store::open_existing(dir, options).await,
                    Missing::Created => Store::open(dir, options).await,
                }
            },
            interrupted,
        ))
    }

    /// The failure of a command that could not open its store, which names the signal if that is
    /// why.
    pub(super) fn explains(&self, error: Error) -> Failure {
        let signal = self.signal().filter(|_| error.kind() == ErrorKind::Closed);
        Failure { signal, ..Failure::new(error) }
    }
}

/// Makes a write beyond the limit on file sizes (`ulimit -f`) fail with EFBIG, like any other
/// failed write, instead of killing the process. All commands call this before they open a store.
pub(super) fn survive_file_size_limit() {
    // A handler is set instead of "ignore", which child programs would inherit. If that fails,
    // nothing changes.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
}

/// The exit code that a shell shows for a process that a signal has ended.
fn code_of(signal: i32) -> i32 {
    128 + signal
}

/// Whether this is the first process of a container, which signals that it sends to itself don't
/// kill.
fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Ends the process at once, by the signal that it received.
fn end_now(signal: i32) {
    if !is_first_process() {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    signal_hook::low_level::exit(code_of(signal));
}

/// Ends the process by `signal`, after all destructors have run. Returns the exit code for the case
/// that it can't.
pub(super) fn die_of(signal: i32) -> ExitCode {
    if !is_first_process() {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    ExitCode::from(code_of(signal) as u8)
}
