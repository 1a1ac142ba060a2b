//! SIGTERM, SIGINT and SIGHUP, for commands that have something to end first; SIGXFSZ, which ends
//! nothing.
//!
//! 1. The first is told to whoever waits, at any time since [`Interrupt::watch`]; none is lost.
//! 2. SIGTERM and SIGHUP that come again change nothing: supervisors repeat them, and the end that
//!    is under way is the cleanest there is. A second SIGINT, which a person sends, ends the
//!    process at once: crash safety is for that. What comes within [`SAME_PRESS`] of the first is
//!    the same key press, sent on by a shell or a script in between.
//! 3. A SIGHUP that was ignored when the process started (`nohup`) stays ignored.
//! 4. While a store is being opened, the first ends that: no sooner than the device has answered
//!    what it was asked, and no later.
//!
//! Not here: what is to be done then.
// When a signal came, as a person sends them, is real time.
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

/// Between two SIGINT that are meant as two.
const SAME_PRESS: Duration = Duration::from_millis(500);

#[derive(Default)]
struct State {
    /// The first signal, or 0.
    signal: AtomicI32,
    came: Event,
}

/// Watches for the signals. Clones are the same watch.
#[derive(Clone)]
pub(super) struct Interrupt {
    state: Arc<State>,
    flag: Arc<AtomicBool>,
}

impl Interrupt {
    /// From now on the signals end nothing by themselves but a process that was told before.
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

    /// The first signal, if it has come.
    pub(super) fn signal(&self) -> Option<i32> {
        Some(self.state.signal.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    /// Waits for it.
    pub(super) async fn wait(&self) -> i32 {
        loop {
            let came = self.state.came.listen();
            if let Some(signal) = self.signal() {
                return signal;
            }
            came.await;
        }
    }

    /// Opens a store, unless a signal comes first; `existing`: only one that is there.
    ///
    /// # Errors
    /// `Closed`: a signal came. And as [`Store::open`].
    pub(super) fn open(&self, dir: &Path, options: Options, existing: bool) -> Result<Store> {
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
                match existing {
                    true => Store::open_existing(dir, options).await,
                    false => Store::open(dir, options).await,
                }
            },
            interrupted,
        ))
    }

    /// The end of a command that could not open its store: of the signal, if that is why.
    pub(super) fn explains(&self, error: Error) -> Failure {
        let signal = self.signal().filter(|_| error.kind() == ErrorKind::Closed);
        Failure { signal, ..Failure::new(error) }
    }
}

/// A write beyond the limit of file sizes (`ulimit -f`) fails with EFBIG, and is handled like any
/// other failed write, instead of killing the process. For all commands, before a store is opened.
pub(super) fn survive_file_size_limit() {
    // A handler instead of "ignored", which programs that are started from here would inherit.
    // Where it can't be set, things are as they were.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
}

/// What a shell shows for a process that a signal has ended.
fn code_of(signal: i32) -> i32 {
    128 + signal
}

/// The first process of a container is not killed by signals that it sends to itself.
fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Ends the process at once, by the signal that asks for it.
fn end_now(signal: i32) {
    if !is_first_process() {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    signal_hook::low_level::exit(code_of(signal));
}

/// Ends the process by `signal`, once all that has a destructor is gone; the exit code for where it
/// can't.
pub(super) fn die_of(signal: i32) -> ExitCode {
    if !is_first_process() {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
    }
    ExitCode::from(code_of(signal) as u8)
}
