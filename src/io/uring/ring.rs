//! One ring: its set-up, its system calls, and the count of what the kernel has.
//!
//! Invariants
//! 1. At most `depth` counted entries are with the kernel at a time, fewer than its completion queue holds, so that no
//!    completion ever waits outside of it.
//! 2. An entry in the submission queue stays there until the kernel has taken it: a refused `enter` loses none.
//! 3. The set-up flags ask for one issuing thread. Whoever owns a ring is not `Send`.
//!
//! It does *not* know what the entries mean.
#![allow(unsafe_code)]

use crate::base::Micros;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, cqueue, squeue};
use std::io;
use std::time::Duration;

/// Completion entries beyond the depth: for the read of the eventfd, and to be far from the brim.
const SPARE: u32 = 4;
/// How often to try again for want of locked memory or another thing that passes, and after how long; together 100 ms.
const NO_ROOM_TRIES: u32 = 20;
const NO_ROOM_PAUSE: Duration = Duration::from_millis(5);
/// How long to sleep when the kernel refuses to take entries, or to wait, just now.
const REFUSED_PAUSE: Duration = Duration::from_millis(1);
/// A call that does not wait is repeated so often if a signal has interrupted it; then the next lap does it.
const INTERRUPTED_TRIES: u32 = 3;

pub(super) struct Ring {
    ring: IoUring,
    depth: u32,
    /// With the kernel or in the submission queue, the uncounted ones left out.
    in_flight: u32,
    polled: bool,
    broken: Option<io::Error>,
    /// System calls so far.
    pub(super) calls: u64,
}

impl Ring {
    /// A ring for `depth` entries at a time.
    ///
    /// The kernel gives the locked memory of a closed ring back some milliseconds later. So a server that is started
    /// again at once, after a crash for instance, may find no room yet: that is waited for, a little.
    #[allow(clippy::disallowed_methods, reason = "the kernel tells nobody when it is done")]
    pub(super) fn new(depth: u32, polled: bool) -> io::Result<Ring> {
        for _ in 0..NO_ROOM_TRIES {
            match Self::try_new(depth, polled) {
                Err(e) if later(&e) => {
                    std::thread::sleep(NO_ROOM_PAUSE);
                }
                made => return made,
            }
        }
        Self::try_new(depth, polled)
    }

    fn try_new(depth: u32, polled: bool) -> io::Result<Ring> {
        // What makes completions cheapest first; older kernels know less.
        let flags: [fn(&mut Builder) -> &mut Builder; 3] = [
            |b| b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all(),
            |b| b.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
            |b| b,
        ];
        let mut refused = None;
        for set in flags {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_cqsize((2 * depth + SPARE).next_power_of_two());
            if polled {
                builder.setup_iopoll();
            }
            set(&mut builder);
            match builder.build(depth) {
                Ok(ring) => return Ok(Ring { ring, depth, in_flight: 0, polled, broken: None, calls: 0 }),
                // A flag that this kernel does not know.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => refused = Some(e),
                Err(e) => return Err(e),
            }
        }
        Err(refused.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
    }

    /// What no set-up of ours can cause, and after which nothing can be said of what is in flight.
    pub(super) fn broken(&self) -> Option<&io::Error> {
        self.broken.as_ref()
    }

    pub(super) fn get(&self) -> &IoUring {
        &self.ring
    }

    pub(super) fn entries(&self) -> u32 {
        self.ring.params().sq_entries()
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether one more entry can go in now.
    pub(super) fn has_room(&mut self) -> bool {
        self.in_flight < self.depth && self.has_slot()
    }

    /// The same for one that is not counted.
    pub(super) fn has_slot(&mut self) -> bool {
        !self.ring.submission().is_full()
    }

    /// Puts an entry into the submission queue, which must have room.
    ///
    /// # Safety
    /// * What the entry points to is valid, and belongs to the kernel, until its completion was taken.
    /// * For an entry that is counted, [`completed`](Self::completed) is called once its completion was taken.
    pub(super) unsafe fn put(&mut self, entry: &squeue::Entry, counted: bool) {
        // SAFETY: as the caller promises.
        let put = unsafe { self.ring.submission().push(entry) };
        assert!(put.is_ok(), "an entry was put into a full submission queue");
        self.in_flight += u32::from(counted);
    }

    /// A counted entry has come back.
    pub(super) fn completed(&mut self) {
        self.in_flight -= 1;
    }

    /// Whether the kernel has something to take or to say that needs a system call.
    fn wants_call(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow() || (self.polled && self.in_flight > 0)
    }

    /// Entries that the kernel has not taken yet.
    pub(super) fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Hands over what is in the submission queue and lets the kernel post what has completed. Never waits.
    pub(super) fn submit(&mut self) {
        for _ in 0..INTERRUPTED_TRIES {
            if !self.wants_call() {
                return;
            }
            self.calls += 1;
            match self.ring.submit() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) => return,
                Err(e) if later(&e) => return,
                Err(e) => {
                    self.broken.get_or_insert(e);
                    return;
                }
            }
        }
    }

    /// The same, and waits for a completion, or until `timeout_us` has passed. May return early, for no reason. False: the
    /// kernel refused it, and this has slept a moment instead, so that whoever waits in a loop does not spin.
    pub(super) fn wait(&mut self, timeout_us: Option<Micros>) -> bool {
        self.calls += 1;
        let outcome = match timeout_us {
            None => self.ring.submit_and_wait(1),
            Some(us) => {
                let time = Timespec::new().sec(us / 1_000_000).nsec((us % 1_000_000) as u32 * 1000);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        match outcome {
            Ok(_) => {}
            Err(e) if later(&e) => {
                // What has completed may be what keeps the kernel from taking more.
                if !self.has_completion() {
                    pause(timeout_us);
                }
                return false;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::TIME.raw_os_error()) => {}
            Err(e) => {
                self.broken.get_or_insert(e);
            }
        }
        true
    }

    /// Whether a completion is there.
    pub(super) fn has_completion(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Appends the completions that are there: whose, and the result.
    pub(super) fn take(&mut self, out: &mut Vec<(u64, i32)>) {
        if self.polled || !self.has_completion() {
            // Nothing there: perhaps the kernel only waits for a call to post it.
            if self.in_flight > 0 && self.wants_call() {
                self.submit();
            }
        }
        out.extend(self.ring.completion().map(|entry: cqueue::Entry| (entry.user_data(), entry.result())));
    }
}

#[allow(clippy::disallowed_methods, reason = "a ring that refuses to wait can't be waited in")]
fn pause(timeout_us: Option<Micros>) {
    std::thread::sleep(timeout_us.map_or(REFUSED_PAUSE, |us| REFUSED_PAUSE.min(Duration::from_micros(us))));
}

/// Refusals that pass: no memory just now, or completions have to be taken first.
fn later(e: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::AGAIN, Errno::BUSY, Errno::NOMEM].map(|errno| Some(errno.raw_os_error())).contains(&e.raw_os_error())
}
