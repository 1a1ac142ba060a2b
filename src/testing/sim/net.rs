//! The queues between the shards of a run: first in, first out for each pair, each message after a
//! delay of its own.
//!
//! Invariants
//! 1. Between two shards nothing is lost, doubled or overtaken; between different pairs anything
//!    goes.
//! 2. A [`Mark`] is reached when everything is delivered that had been sent from one shard when it
//!    was made.
//!
//! It does *not* look into messages or know shards.

use crate::base::Micros;
use std::collections::VecDeque;

/// The queues of some number of shards.
pub struct Net<M> {
    shards: usize,
    queues: Vec<Queue<M>>,
    most: usize,
}

struct Queue<M> {
    under_way: VecDeque<(Micros, M)>,
    delivered: u64,
}

/// What one shard had sent to each other at some time.
#[derive(Clone, Debug)]
pub struct Mark {
    from: usize,
    sent: Vec<u64>,
}

impl<M> Net<M> {
    /// Queues between `shards` shards, all empty.
    pub fn new(shards: usize) -> Self {
        let queue = || Queue { under_way: VecDeque::new(), delivered: 0 };
        Net {
            shards,
            queues: std::iter::repeat_with(queue).take(shards * shards).collect(),
            most: 0,
        }
    }

    /// Sends a message that arrives at `at`, or when the one before it does, if that is later.
    pub fn send(&mut self, from: usize, to: usize, at: Micros, message: M) {
        let queue = &mut self.queues[from * self.shards + to].under_way;
        let at = queue.back().map_or(at, |&(before, _)| at.max(before));
        queue.push_back((at, message));
        self.most = self.most.max(queue.len());
    }

    /// When the next message for `to` arrives.
    pub fn next_for(&self, to: usize) -> Option<Micros> {
        let heads = (0..self.shards)
            .filter_map(|from| self.queues[from * self.shards + to].under_way.front());
        heads.map(|&(at, _)| at).min()
    }

    /// How many messages of `from` have arrived at `to`.
    pub fn arrived(&self, from: usize, to: usize, now: Micros) -> usize {
        let queue = &self.queues[from * self.shards + to].under_way;
        queue.partition_point(|&(at, _)| at <= now)
    }

    /// Takes the oldest message of `from` to `to`.
    ///
    /// # Panics
    /// If there is none.
    pub fn take(&mut self, from: usize, to: usize) -> M {
        let queue = &mut self.queues[from * self.shards + to];
        queue.delivered += 1;
        queue.under_way.pop_front().expect("a message has arrived").1
    }

    /// Everything that `from` has sent until now.
    pub fn mark(&self, from: usize) -> Mark {
        let sent = |queue: &Queue<M>| queue.delivered + queue.under_way.len() as u64;
        let queues = &self.queues[from * self.shards..(from + 1) * self.shards];
        Mark { from, sent: queues.iter().map(sent).collect() }
    }

    /// Whether everything that had been sent then is delivered.
    pub fn reached(&self, mark: &Mark) -> bool {
        let queues = &self.queues[mark.from * self.shards..(mark.from + 1) * self.shards];
        queues.iter().zip(&mark.sent).all(|(queue, &sent)| queue.delivered >= sent)
    }

    /// Messages in flight.
    pub fn under_way(&self) -> usize {
        self.queues.iter().map(|queue| queue.under_way.len()).sum()
    }

    /// The most messages that were ever in flight between two shards.
    pub fn most(&self) -> usize {
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails, messages overtake each other, and runs condemn protocols that may rely on
    /// their order.
    #[test]
    fn messages_of_a_pair_keep_their_order_and_marks_wait_for_all_of_them() {
        let mut net = Net::new(2);
        net.send(0, 1, 50, 'a');
        net.send(0, 1, 10, 'b');
        let mark = net.mark(0);
        net.send(0, 1, 60, 'c');
        net.send(1, 0, 5, 'd');
        assert_eq!((net.next_for(1), net.next_for(0)), (Some(50), Some(5)));
        assert_eq!(
            (net.arrived(0, 1, 49), net.arrived(0, 1, 50), net.arrived(0, 1, 60)),
            (0, 2, 3)
        );
        assert!(!net.reached(&mark));
        assert_eq!(net.take(0, 1), 'a');
        assert!(!net.reached(&mark));
        assert_eq!(net.take(0, 1), 'b');
        assert!(net.reached(&mark) && !net.reached(&net.mark(1)));
        assert_eq!((net.under_way(), net.most()), (2, 3));
    }
}
