//! One ring: its set-up, its system calls, and the count of entries that the kernel has.
//!
//! Invariants
//! 1. At most `depth` counted entries are with the kernel at a time, fewer than its completion
//!    queue holds, so that no completion ever overflows.
//! 2. An entry in the submission queue stays there until the kernel has taken it: a refused `enter`
//!    loses none.
//! 3. The set-up flags ask for one issuing thread, so the owner of a ring is not `Send`.
//!
//! It does *not* know what the entries mean.
#![allow(unsafe_code)]

use crate::base::Micros;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, cqueue, squeue};
use std::io;
use std::time::Duration;

/// Completion entries beyond twice the depth, for the entries that are not counted, with a margin.
const CQ_SPARE: u32 = 4;
/// How often, and after which pause, creating a ring is retried while locked memory or another
/// resource is short: 100 ms in all.
const NO_ROOM_TRIES: u32 = 20;
const NO_ROOM_PAUSE: Duration = Duration::from_millis(5);
/// The sleep after the kernel has refused, for now, to take entries or to wait.
const REFUSED_PAUSE: Duration = Duration::from_millis(1);
/// How often a call that does not wait is repeated when signals interrupt it; after that the next
/// turn repeats it.
const INTERRUPTED_TRIES: u32 = 3;

/// Whether an entry counts against the depth of its ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Counted {
    Yes,
    /// The read of the eventfd and the timer.
    No,
}

/// Whether completions are polled for at the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RingMode {
    /// The device interrupts.
    Interrupts,
    /// The device is asked (IOPOLL); such a ring takes reads and writes only.
    Polled,
}

pub(super) struct Ring {
    ring: IoUring,
    depth: u32,
    /// Counted entries that are with the kernel or in the submission queue.
    in_flight: u32,
    mode: RingMode,
    broken: Option<io::Error>,
    /// System calls so far.
    pub(super) calls: u64,
}

impl Ring {
    /// Creates a ring for `depth` entries at a time.
    ///
    /// The kernel returns the locked memory of a closed ring some milliseconds later. A server that
    /// restarts at once, after a crash for instance, may not find any yet, so this retries for a
    /// short time.
    #[allow(clippy::disallowed_methods, reason = "the kernel tells nobody when it is done")]
    pub(super) fn new(depth: u32, mode: RingMode) -> io::Result<Ring> {
        for _ in 0..NO_ROOM_TRIES {
            match Self::try_new(depth, mode) {
                Err(e) if is_transient(&e) => {
                    std::thread::sleep(NO_ROOM_PAUSE);
                }
                made => return made,
            }
        }
        Self::try_new(depth, mode)
    }

    fn try_new(depth: u32, mode: RingMode) -> io::Result<Ring> {
        // The flags with the cheapest completions come first; older kernels know fewer.
        let flags: [fn(&mut Builder) -> &mut Builder; 3] = [
            |b| {
                b.setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag()
                    .setup_submit_all()
            },
            |b| b.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all(),
            |b| b,
        ];
        let mut refused = None;
        for set in flags {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_cqsize((2 * depth + CQ_SPARE).next_power_of_two());
            if mode == RingMode::Polled {
                builder.setup_iopoll();
            }
            set(&mut builder);
            match builder.build(depth) {
                Ok(ring) => {
                    return Ok(Ring { ring, depth, in_flight: 0, mode, broken: None, calls: 0 });
                }
                // This kernel does not know one of the flags.
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
                    refused = Some(e)
                }
                Err(e) => return Err(e),
            }
        }
        Err(refused.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
    }

    /// An error that our use of the ring can't cause, after which the state of what is in flight is
    /// unknown.
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

    /// Whether the ring can take another counted entry now.
    pub(super) fn has_room(&mut self) -> bool {
        self.in_flight < self.depth && self.has_slot()
    }

    /// Whether the ring can take an entry that is not counted now.
    pub(super) fn has_slot(&mut self) -> bool {
        !self.ring.submission().is_full()
    }

    /// Puts an entry into the submission queue, which must have room.
    ///
    /// # Safety
    /// * The memory that the entry points to is valid, and belongs to the kernel, until its
    ///   completion is reaped.
    /// * For a counted entry, [`completed`](Self::completed) is called once its completion is
    ///   reaped.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry, counted: Counted) {
        // SAFETY: as the caller promises.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "an entry was put into a full submission queue");
        self.in_flight += u32::from(counted == Counted::Yes);
        assert!(
            self.in_flight <= self.depth,
            "more entries with the kernel than the completion queue has room for"
        );
    }

    /// Records that a counted entry has completed.
    pub(super) fn completed(&mut self) {
        assert!(self.in_flight > 0, "an entry that was not with the kernel completed");
        self.in_flight -= 1;
    }

    /// Whether there is something to submit or to collect that needs a system call.
    fn wants_call(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty()
            || queue.taskrun()
            || queue.cq_overflow()
            || (self.mode == RingMode::Polled && self.in_flight > 0)
    }

    /// Whether the submission queue has entries that the kernel has not taken yet.
    pub(super) fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Submits the submission queue and lets the kernel post completions. Never waits.
    pub(super) fn submit(&mut self) {
        for _ in 0..INTERRUPTED_TRIES {
            if !self.wants_call() {
                return;
            }
            self.calls += 1;
            match self.ring.submit() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) => return,
                Err(e) if is_transient(&e) => return,
                Err(e) => {
                    self.broken.get_or_insert(e);
                    return;
                }
            }
        }
    }

    /// Submits, and waits for a completion or until `timeout_us` has passed. May return early for
    /// no reason. Returns false if the kernel refused to wait: then this has slept for a moment,
    /// unless a completion has arrived, so that a loop around it does not spin.
    pub(super) fn wait(&mut self, timeout_us: Option<Micros>) -> bool {
        self.calls += 1;
        let outcome = match timeout_us {
            None => self.ring.submit_and_wait(1),
            Some(us) => {
                let time = timespec(us);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        match outcome {
            Ok(_) => {}
            Err(e) if is_transient(&e) => {
                // The kernel may have refused because completions have not been reaped.
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

    /// Whether a completion has arrived.
    pub(super) fn has_completion(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Appends the completions that have arrived: user data and result.
    pub(super) fn reap(&mut self, out: &mut Vec<(u64, i32)>) {
        if self.mode == RingMode::Polled || !self.has_completion() {
            // The kernel may need a system call to post completions.
            if self.in_flight > 0 && self.wants_call() {
                self.submit();
            }
        }
        out.extend(
            self.ring.completion().map(|entry: cqueue::Entry| (entry.user_data(), entry.result())),
        );
    }
}

/// A duration in the kernel's layout.
pub(super) fn timespec(us: Micros) -> Timespec {
    let time = Duration::from_micros(us);
    Timespec::new().sec(time.as_secs()).nsec(time.subsec_nanos())
}

#[allow(clippy::disallowed_methods, reason = "a ring that refuses to wait can't be waited in")]
fn pause(timeout_us: Option<Micros>) {
    std::thread::sleep(
        timeout_us.map_or(REFUSED_PAUSE, |us| REFUSED_PAUSE.min(Duration::from_micros(us))),
    );
}

/// Whether a refusal is transient: no memory for now, or completions have to be reaped first.
fn is_transient(e: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::AGAIN, Errno::BUSY, Errno::NOMEM]
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&e.raw_os_error())
}
