//! The SPSC rings between each pair of threads, seen from one of them.
//!
//! ```text
//!   send --> [outbox, while the ring is full] --> ring --> receive, at the other end
//! ```
//! Invariants
//! 1. Between two threads messages arrive in the order in which they were sent, each once: a
//!    message that is sent while the outbox holds others is queued behind them.
//! 2. A sender whose ring is full sets a flag before it tries again; a receiver that has made room
//!    checks the flag, and wakes the sender. So nothing stays in an outbox for ever.
//! 3. Each ring has one end at each of its two threads; ends are never cloned.
//!
//! Threads are numbered from zero. The outbox has no bound of its own: the protocol above limits
//! the messages in flight between two threads.

use crate::base::sync::{AtomicBool, Ordering, fence};
use rtrb::{Consumer, Producer, RingBuffer};
use std::collections::VecDeque;
use std::sync::Arc;

/// Messages that a ring holds: enough for several rounds of the receiver, so that outboxes are
/// rarely used.
const RING_MESSAGES: usize = 512;
/// The most messages that one round takes from one ring.
const TAKE_MAX: usize = 512;
const _: () = assert!(TAKE_MAX >= RING_MESSAGES, "one round empties a ring");

/// Whether the sender waits for room in a ring: set by the sender, cleared by the receiver.
struct SenderWaits(AtomicBool);

impl SenderWaits {
    /// Announces that the sender waits, and then calls `again` to try again, in case room was made
    /// in the meantime.
    fn wait(&self, again: impl FnOnce()) {
        self.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        again();
    }

    /// Called when the receiver has made room. Returns whether the sender waits for that and must
    /// be woken.
    fn made_room(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel)
    }
}

struct Outgoing<T> {
    ring: Producer<T>,
    outbox: VecDeque<T>,
    sender_waits: Arc<SenderWaits>,
    /// Whether anything went into the ring since the receiver was last unparked.
    unannounced: bool,
}

struct Incoming<T> {
    ring: Consumer<T>,
    sender_waits: Arc<SenderWaits>,
}

/// One thread's ends of all its rings. `None` stands for the thread itself.
pub(crate) struct Channels<T> {
    outgoing: Vec<Option<Outgoing<T>>>,
    incoming: Vec<Option<Incoming<T>>>,
    /// Messages in all outboxes.
    outboxes_len: usize,
}

impl<T> Channels<T> {
    /// Makes the channels of `threads_count` threads, in the order of the threads.
    pub(crate) fn all(threads_count: u16) -> Vec<Channels<T>> {
        Self::with_capacity(threads_count, RING_MESSAGES)
    }

    fn with_capacity(threads_count: u16, capacity: usize) -> Vec<Channels<T>> {
        let count = usize::from(threads_count);
        let mut all: Vec<Channels<T>> = (0..count)
            .map(|_| Channels {
                outgoing: (0..count).map(|_| None).collect(),
                incoming: (0..count).map(|_| None).collect(),
                outboxes_len: 0,
            })
            .collect();
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                let (producer, consumer) = RingBuffer::new(capacity);
                let sender_waits = Arc::new(SenderWaits(AtomicBool::new(false)));
                let outbox = VecDeque::new();
                all[from].outgoing[to] = Some(Outgoing {
                    ring: producer,
                    outbox,
                    sender_waits: sender_waits.clone(),
                    unannounced: false,
                });
                all[to].incoming[from] = Some(Incoming { ring: consumer, sender_waits });
            }
        }
        all
    }

    /// Sends to another thread.
    ///
    /// # Panics
    /// If `to` is the thread itself, or does not exist.
    pub(crate) fn send(&mut self, to: usize, message: T) {
        let channel = self.outgoing[to].as_mut().expect("a thread does not send to itself");
        if channel.outbox.is_empty() {
            match channel.ring.push(message) {
                Ok(()) => channel.unannounced = true,
                Err(rtrb::PushError::Full(message)) => {
                    channel.outbox.push_back(message);
                    self.outboxes_len += 1;
                }
            }
        } else {
            channel.outbox.push_back(message);
            self.outboxes_len += 1;
        }
    }

    /// Moves messages from the outboxes into the rings as far as these have room, and calls
    /// `unpark` for each thread whose ring got something new. Must be called before each wait, and
    /// after the last `send` of a round.
    pub(crate) fn flush(&mut self, mut unpark: impl FnMut(usize)) {
        for (to, channel) in self.outgoing.iter_mut().enumerate() {
            let Some(channel) = channel else { continue };
            if !channel.outbox.is_empty() {
                self.outboxes_len =
                    self.outboxes_len.checked_sub(channel.refill()).expect("outboxes are counted");
            }
            if std::mem::take(&mut channel.unannounced) {
                unpark(to);
            }
        }
        debug_assert_eq!(
            self.outboxes_len,
            self.outgoing.iter().flatten().map(|channel| channel.outbox.len()).sum::<usize>()
        );
    }

    /// Passes the messages that have arrived to `message`, up to [`TAKE_MAX`] from each thread, and
    /// calls `unpark` for the senders that wait for the room. Returns whether there were any.
    pub(crate) fn receive(
        &mut self,
        mut message: impl FnMut(usize, T),
        mut unpark: impl FnMut(usize),
    ) -> bool {
        let mut any = false;
        for (from, channel) in self.incoming.iter_mut().enumerate() {
            let Some(channel) = channel else { continue };
            let mut taken = 0;
            while taken < TAKE_MAX
                && let Ok(next) = channel.ring.pop()
            {
                message(from, next);
                taken += 1;
            }
            if taken == 0 {
                continue;
            }
            any = true;
            if channel.sender_waits.made_room() {
                unpark(from);
            }
        }
        any
    }

    /// Whether a message has arrived, or a ring has room for its outbox.
    pub(crate) fn has_work(&self) -> bool {
        self.incoming.iter().flatten().any(|channel| !channel.ring.is_empty())
            || self.outboxes_len > 0
                && self
                    .outgoing
                    .iter()
                    .flatten()
                    .any(|channel| !channel.outbox.is_empty() && !channel.ring.is_full())
    }

    /// Whether everything sent to threads that still listen is in their rings.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outboxes_len == 0
            || self
                .outgoing
                .iter()
                .flatten()
                .all(|channel| channel.outbox.is_empty() || channel.ring.is_abandoned())
    }
}

impl<T> Outgoing<T> {
    /// Moves messages from the outbox into the ring. Returns how many.
    fn refill(&mut self) -> usize {
        let before = self.outbox.len();
        self.push_all();
        if !self.outbox.is_empty() {
            let sender_waits = self.sender_waits.clone();
            sender_waits.wait(|| self.push_all());
        }
        let moved = before - self.outbox.len();
        self.unannounced |= moved > 0;
        moved
    }

    fn push_all(&mut self) {
        while let Some(message) = self.outbox.pop_front() {
            if let Err(rtrb::PushError::Full(message)) = self.ring.push(message) {
                self.outbox.push_front(message);
                return;
            }
        }
    }
}

#[cfg(all(test, not(corepage_loom)))]
mod tests {
    use super::*;

    const A: usize = 0;
    const B: usize = 1;

    /// If a vote is lost or overtakes its prepare, a commit hangs.
    #[test]
    fn messages_arrive_in_order_and_once_however_full_the_rings_are() {
        const MESSAGES: u64 = 20_000;
        let mut channels = Channels::with_capacity(2, 4).into_iter();
        let (mut a, mut b) = (channels.next().expect("two"), channels.next().expect("two"));
        let (to_a, woken_a) = crossbeam::channel::unbounded();
        let (to_b, woken_b) = crossbeam::channel::unbounded();
        let receiver = std::thread::spawn(move || {
            let mut next = 0;
            while next < MESSAGES {
                let got = b.receive(
                    |from, n: u64| {
                        assert_eq!((from, n), (A, next));
                        next += 1;
                    },
                    |_| to_a.send(()).expect("it listens"),
                );
                if !got && !b.has_work() {
                    woken_b
                        .recv_timeout(std::time::Duration::from_secs(20))
                        .expect("a wake-up was lost");
                }
            }
        });
        for n in 0..MESSAGES {
            a.send(B, n);
            // Messages go in bursts, so that the outbox fills up.
            if n % 64 == 63 {
                a.flush(|_| to_b.send(()).expect("it listens"));
            }
        }
        loop {
            a.flush(|_| {
                let _ = to_b.send(());
            });
            if a.is_flushed() {
                break;
            }
            if !a.has_work() {
                woken_a
                    .recv_timeout(std::time::Duration::from_secs(20))
                    .expect("a sender with an outbox was forgotten");
            }
        }
        receiver.join().expect("all arrived");
    }

    /// A thread that has ended must not keep the others from ending.
    #[test]
    fn what_is_held_back_for_a_thread_that_is_gone_holds_nobody_up() {
        let mut channels = Channels::with_capacity(2, 1).into_iter();
        let (mut a, b) = (channels.next().expect("two"), channels.next().expect("two"));
        (0..3).for_each(|n| a.send(B, n));
        a.flush(|_| {});
        assert!(!a.is_flushed());
        drop(b);
        assert!(a.is_flushed());
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::holds;
    use ::loom::thread;

    fn making_room(
        made_room: fn(&SenderWaits) -> bool,
        wait: fn(&SenderWaits, &mut dyn FnMut()),
    ) -> bool {
        holds(None, move |verdict| {
            let full = ::loom::sync::Arc::new(SenderWaits(AtomicBool::new(false)));
            let room = ::loom::sync::Arc::new(AtomicBool::new(false));
            let (theirs, making) = (full.clone(), room.clone());
            let receiver = thread::spawn(move || {
                making.store(true, Ordering::Release);
                made_room(&theirs)
            });
            let mut sent = false;
            wait(&full, &mut || sent = room.load(Ordering::Acquire));
            let woken = receiver.join().unwrap();
            // If neither holds, the message in the outbox waits for ever.
            verdict.expect(sent || woken);
        })
    }

    /// If a message stays in an outbox, a commit over two shards hangs.
    #[test]
    fn loom_a_sender_that_waits_for_room_gets_it() {
        assert!(making_room(SenderWaits::made_room, |full, again| full.wait(again)));
    }

    #[test]
    fn loom_mutants_of_waiting_for_room_are_caught() {
        let unfenced = |full: &SenderWaits| {
            full.0.load(Ordering::Relaxed) && full.0.swap(false, Ordering::AcqRel)
        };
        assert!(
            !making_room(unfenced, |full, again| full.wait(again)),
            "a receiver that does not fence"
        );
        assert!(
            !making_room(SenderWaits::made_room, |full, _| full.wait(|| {})),
            "a sender that does not try again"
        );
    }
}
