//! The SPSC rings between each pair of shards, seen from one of them.
//!
//! ```text
//!   send --> [outbox, while the ring is full] --> ring --> take, at the other end
//! ```
//! Invariants
//! 1. Between two shards messages arrive in the order in which they were sent, each once: what is sent while the
//!    outbox holds something goes behind it.
//! 2. A sender whose ring is full says so before it tries again; a receiver that has made room looks for that, and
//!    wakes the sender. So what is in an outbox never waits for ever.
//! 3. Each ring has one end here and one there; ends are never cloned.
//!
//! The outbox is not bounded here: the shards' protocol bounds what is under way between two of them.

use crate::base::ShardId;
use crate::base::sync::{AtomicBool, Ordering, fence};
use rtrb::{Consumer, Producer, RingBuffer};
use std::collections::VecDeque;
use std::sync::Arc;

/// Messages that a ring holds: enough for some laps of the receiver, so that outboxes are the exception.
const RING_MESSAGES: usize = 512;
/// Messages taken from one ring in one lap.
const TAKE_MAX: usize = 512;

/// Whether a sender waits for room in a ring.
struct Full(AtomicBool);

impl Full {
    /// The sender's ring is full: says so, and then `again` tries once more, in case room was made meanwhile.
    fn wait(&self, again: impl FnOnce()) {
        self.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        again();
    }

    /// The receiver has made room; whether the sender waits for that, and is to be woken.
    fn made_room(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::AcqRel)
    }
}

struct Outgoing<T> {
    ring: Producer<T>,
    outbox: VecDeque<T>,
    full: Arc<Full>,
    /// Something went into the ring since the receiver was last looked at.
    fresh: bool,
}

struct Incoming<T> {
    ring: Consumer<T>,
    full: Arc<Full>,
}

/// One shard's ends of all its rings. `None` stands for itself.
pub(crate) struct Lanes<T> {
    outgoing: Vec<Option<Outgoing<T>>>,
    incoming: Vec<Option<Incoming<T>>>,
    /// Messages in outboxes.
    held_back: usize,
}

impl<T> Lanes<T> {
    /// The lanes of `shards_count` shards, in their order.
    pub(crate) fn all(shards_count: u16) -> Vec<Lanes<T>> {
        Self::with_capacity(shards_count, RING_MESSAGES)
    }

    fn with_capacity(shards_count: u16, capacity: usize) -> Vec<Lanes<T>> {
        let count = usize::from(shards_count);
        let mut all: Vec<Lanes<T>> = (0..count)
            .map(|_| Lanes {
                outgoing: (0..count).map(|_| None).collect(),
                incoming: (0..count).map(|_| None).collect(),
                held_back: 0,
            })
            .collect();
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                let (producer, consumer) = RingBuffer::new(capacity);
                let full = Arc::new(Full(AtomicBool::new(false)));
                let outbox = VecDeque::new();
                all[from].outgoing[to] = Some(Outgoing { ring: producer, outbox, full: full.clone(), fresh: false });
                all[to].incoming[from] = Some(Incoming { ring: consumer, full });
            }
        }
        all
    }

    /// Sends to another shard.
    ///
    /// # Panics
    /// If it is sent to the shard itself, or to one that does not exist.
    pub(crate) fn send(&mut self, to: ShardId, message: T) {
        let lane = self.outgoing[usize::from(to.get())].as_mut().expect("a shard does not send to itself");
        if lane.outbox.is_empty() {
            match lane.ring.push(message) {
                Ok(()) => lane.fresh = true,
                Err(rtrb::PushError::Full(message)) => {
                    lane.outbox.push_back(message);
                    self.held_back += 1;
                }
            }
        } else {
            lane.outbox.push_back(message);
            self.held_back += 1;
        }
    }

    /// Moves what was held back into the rings as far as they have room, and names to `rouse` each shard for which
    /// something new is in its ring. To be called before each wait, and after the last `send` of a lap.
    pub(crate) fn hand_over(&mut self, mut rouse: impl FnMut(ShardId)) {
        for (to, lane) in self.outgoing.iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            if !lane.outbox.is_empty() {
                self.held_back -= lane.refill();
            }
            if std::mem::take(&mut lane.fresh) {
                rouse(ShardId::new(to as u16));
            }
        }
    }

    /// Takes what has arrived, bounded; `rouse` is told of the senders that wait for the room made.
    pub(crate) fn take(&mut self, mut message: impl FnMut(ShardId, T), mut rouse: impl FnMut(ShardId)) -> bool {
        let mut any = false;
        for (from, lane) in self.incoming.iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            let from = ShardId::new(from as u16);
            let mut taken = 0;
            while taken < TAKE_MAX
                && let Ok(next) = lane.ring.pop()
            {
                message(from, next);
                taken += 1;
            }
            if taken == 0 {
                continue;
            }
            any = true;
            if lane.full.made_room() {
                rouse(from);
            }
        }
        any
    }

    /// Whether something has arrived, or room for what is held back.
    pub(crate) fn has_work(&self) -> bool {
        self.incoming.iter().flatten().any(|lane| !lane.ring.is_empty())
            || self.held_back > 0
                && self.outgoing.iter().flatten().any(|lane| !lane.outbox.is_empty() && !lane.ring.is_full())
    }

    /// Whether everything sent to shards that still listen is in their rings.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.held_back == 0
            || self.outgoing.iter().flatten().all(|lane| lane.outbox.is_empty() || lane.ring.is_abandoned())
    }
}

impl<T> Outgoing<T> {
    /// Messages that went from the outbox into the ring.
    fn refill(&mut self) -> usize {
        let before = self.outbox.len();
        self.push_all();
        if !self.outbox.is_empty() {
            let full = self.full.clone();
            full.wait(|| self.push_all());
        }
        let moved = before - self.outbox.len();
        self.fresh |= moved > 0;
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

    const A: ShardId = ShardId::new(0);
    const B: ShardId = ShardId::new(1);

    /// A vote that overtakes its prepare, or one that is lost, is a commit that hangs.
    #[test]
    fn messages_arrive_in_order_and_once_however_full_the_rings_are() {
        const MESSAGES: u64 = 20_000;
        let mut lanes = Lanes::with_capacity(2, 4).into_iter();
        let (mut a, mut b) = (lanes.next().expect("two"), lanes.next().expect("two"));
        let (to_a, woken_a) = crossbeam_channel::unbounded();
        let (to_b, woken_b) = crossbeam_channel::unbounded();
        let receiver = std::thread::spawn(move || {
            let mut next = 0;
            while next < MESSAGES {
                let got = b.take(
                    |from, n: u64| {
                        assert_eq!((from, n), (A, next));
                        next += 1;
                    },
                    |_| to_a.send(()).expect("it listens"),
                );
                if !got && !b.has_work() {
                    woken_b.recv_timeout(std::time::Duration::from_secs(20)).expect("a wake-up was lost");
                }
            }
        });
        for n in 0..MESSAGES {
            a.send(B, n);
            // In bursts, so that the outbox fills up.
            if n % 64 == 63 {
                a.hand_over(|_| to_b.send(()).expect("it listens"));
            }
        }
        loop {
            a.hand_over(|_| {
                let _ = to_b.send(());
            });
            if a.is_handed_over() {
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

    /// A shard that has ended must not keep the others from ending.
    #[test]
    fn what_is_held_back_for_a_shard_that_is_gone_holds_nobody_up() {
        let mut lanes = Lanes::with_capacity(2, 1).into_iter();
        let (mut a, b) = (lanes.next().expect("two"), lanes.next().expect("two"));
        (0..3).for_each(|n| a.send(B, n));
        a.hand_over(|_| {});
        assert!(!a.is_handed_over());
        drop(b);
        assert!(a.is_handed_over());
    }
}

#[cfg(all(test, corepage_loom))]
mod loom {
    use super::*;
    use crate::base::sync::model::holds;
    use ::loom::thread;

    fn making_room(made_room: fn(&Full) -> bool, wait: fn(&Full, &mut dyn FnMut())) -> bool {
        holds(None, move |verdict| {
            let full = ::loom::sync::Arc::new(Full(AtomicBool::new(false)));
            let room = ::loom::sync::Arc::new(AtomicBool::new(false));
            let (theirs, making) = (full.clone(), room.clone());
            let receiver = thread::spawn(move || {
                making.store(true, Ordering::Release);
                made_room(&theirs)
            });
            let mut sent = false;
            wait(&full, &mut || sent = room.load(Ordering::Acquire));
            let woken = receiver.join().unwrap();
            // Otherwise what is in the outbox waits for ever.
            verdict.expect(sent || woken);
        })
    }

    /// A message that stays in an outbox is a commit over two shards that hangs.
    #[test]
    fn loom_a_sender_that_waits_for_room_gets_it() {
        assert!(making_room(Full::made_room, |full, again| full.wait(again)));
    }

    #[test]
    fn loom_mutants_of_waiting_for_room_are_caught() {
        let unfenced = |full: &Full| full.0.load(Ordering::Relaxed) && full.0.swap(false, Ordering::AcqRel);
        assert!(!making_room(unfenced, |full, again| full.wait(again)), "a receiver that does not fence");
        assert!(!making_room(Full::made_room, |full, _| full.wait(|| {})), "a sender that does not try again");
    }
}
