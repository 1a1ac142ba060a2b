//! Waking a thread that waits in its disk, from any thread.
//!
//! ```text
//!   awake --prepare--> asleep --wake: writes the eventfd--> notified --awake--> awake
//!     \--wake--> notified --prepare: says no--> awake
//! ```
//! Invariants
//! 1. A wake-up is kept until a wait has seen it: a `wake` before the wait ends that wait at once.
//! 2. What was written before `wake` is visible to the thread after the wait that it ended.
//! 3. Nobody makes a system call to wake a thread that does not sleep.
//!
//! It does *not* say why the thread was woken.

use parking::Unparker;
use rustix::event::EventfdFlags;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const AWAKE: u32 = 0;
const NOTIFIED: u32 = 1;
const ASLEEP: u32 = 2;

/// Ends the present or the next [`Disk::wait`](super::Disk::wait) of the disk that it comes from.
#[derive(Clone)]
pub struct DiskWaker(How);

#[derive(Clone)]
enum How {
    Park(Unparker),
    Event(Arc<Sleep>),
}

impl DiskWaker {
    /// Wakes the disk's thread. Make visible what it is to see before.
    pub fn wake(&self) {
        match &self.0 {
            How::Park(unparker) => {
                unparker.unpark();
            }
            How::Event(sleep) => sleep.wake(),
        }
    }

    pub(super) fn of_parker(unparker: Unparker) -> Self {
        DiskWaker(How::Park(unparker))
    }

    pub(super) fn of_sleep(sleep: Arc<Sleep>) -> Self {
        DiskWaker(How::Event(sleep))
    }
}

impl fmt::Debug for DiskWaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DiskWaker")
    }
}

/// A thread that sleeps in a ring with a read of this eventfd in it.
pub(super) struct Sleep {
    state: AtomicU32,
    event: OwnedFd,
}

impl Sleep {
    pub(super) fn new() -> std::io::Result<Sleep> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Sleep { state: AtomicU32::new(AWAKE), event })
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// The thread is about to sleep; false: it was woken already and must not.
    pub(super) fn prepare(&self) -> bool {
        if self.state.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            return true;
        }
        self.awake();
        false
    }

    /// The thread is awake again, and has seen all wake-ups until now.
    pub(super) fn awake(&self) {
        self.state.swap(AWAKE, Ordering::SeqCst);
    }

    fn wake(&self) {
        if self.state.swap(NOTIFIED, Ordering::SeqCst) == ASLEEP {
            self.ring();
        }
    }

    /// Completes the read of the eventfd. It can't fail: a counter that is full is readable, too.
    pub(super) fn ring(&self) {
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}
