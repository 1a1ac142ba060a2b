//! SIGINT and SIGTERM, for commands that have something to end first.
//!
//! 1. The first is told to whoever waits, at any time since [`Interrupt::watch`]; none is lost.
//! 2. A second one ends the process at once, with exit code 1: crash safety is for that.
//! 3. While a store is being opened, the first ends that: no sooner than the device has answered what it was asked, and no
//!    later.
//!
//! Not here: what is to be done then.

use super::Failure;
use corepage::{Error, ErrorKind, Options, Result, Store};
use event_listener::Event;
use futures_lite::future::{block_on, or};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

const SIGNALS: [i32; 2] = [SIGTERM, SIGINT];

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
        let mut signals = Signals::new(SIGNALS)?;
        for signal in SIGNALS {
            // In this order: the first signal finds the flag not set yet.
            signal_hook::flag::register_conditional_shutdown(signal, 1, interrupt.flag.clone())?;
            signal_hook::flag::register(signal, interrupt.flag.clone())?;
        }
        let state = interrupt.state.clone();
        let watch = move || {
            if let Some(signal) = signals.forever().next() {
                state.signal.store(signal, Ordering::SeqCst);
                state.came.notify(usize::MAX);
            }
        };
        std::thread::Builder::new().name("corepage-signal".into()).spawn(watch)?;
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

    /// Opens a store, unless a signal comes first.
    ///
    /// # Errors
    /// `Closed`: a signal came. And as [`Store::open`].
    pub(super) fn open(&self, dir: &Path, options: Options) -> Result<Store> {
        let interrupted = async {
            let signal = self.wait().await;
            let context = format_args!(
                "signal {signal} came while the store in {} was being opened; it is as after a crash: open it again",
                dir.display()
            );
            Err(Error::new(ErrorKind::Closed, context))
        };
        block_on(or(Store::open(dir, options), interrupted))
    }

    /// The end of a command that could not open its store: of the signal, if that is why.
    pub(super) fn explains(&self, error: Error) -> Failure {
        let signal = self.signal().filter(|_| error.kind() == ErrorKind::Closed);
        Failure { signal, ..Failure::new(error) }
    }
}
