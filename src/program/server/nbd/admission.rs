//! Decides who may connect: how many connections there may be, and how peers share them. It only
//! counts, without I/O.
//!
//! ```text
//!   0 ─────────────────────────────── connections_max ──── connections_max + reserve
//!   first come, first served, by any peer              │ for peers that have fewer than are left
//! ```
//! 1. There are never more connections than `connections_max` plus the reserve, an eighth of it.
//! 2. One peer can have all `connections_max` while no other connects. Then it gets nothing of the
//!    reserve: however many it has, others still get in. Of the reserve no peer takes more than it
//!    leaves, so the next one finds some, too.
//!
//! It does *not* close connections, and knows nothing about what they do.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// Who connects: all connections of a peer share its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A machine, by its address; for IPv6 by the first 64 bits, since a machine can have all
    /// addresses below these.
    Machine(IpAddr),
    /// A user of this machine, over a socket file.
    User(u32),
    /// The socket does not tell.
    Unknown,
}

impl Peer {
    /// The machine with this address.
    pub fn machine(address: IpAddr) -> Peer {
        Peer::Machine(match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
            v4 => v4,
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Machine(IpAddr::V6(address)) => write!(f, "{address}/64"),
            Peer::Machine(address) => write!(f, "{address}"),
            Peer::User(id) => write!(f, "user {id}"),
            Peer::Unknown => f.write_str("an unknown peer"),
        }
    }
}

/// Why a client was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// How many connections are open.
    pub open: usize,
    /// How many of them belong to the refused client's peer.
    pub of_peer: usize,
}

/// The open connections of each peer.
#[derive(Debug)]
pub struct Admission {
    connections_max: usize,
    open: usize,
    by_peer: HashMap<Peer, usize>,
}

/// Connections beyond `connections_max` that are kept for peers with few.
pub fn reserve(connections_max: usize) -> usize {
    (connections_max / 8).max(1)
}

impl Admission {
    /// Makes a table without connections.
    pub fn new(connections_max: usize) -> Self {
        Admission { connections_max, open: 0, by_peer: HashMap::new() }
    }

    /// Admits a connection of `peer`, or says why not.
    pub fn enter(&mut self, peer: Peer) -> Result<(), Refused> {
        self.assert_state();
        let of_peer = self.by_peer.get(&peer).copied().unwrap_or(0);
        let left = self.connections_max + reserve(self.connections_max) - self.open;
        if self.open < self.connections_max || of_peer < left {
            self.open += 1;
            *self.by_peer.entry(peer).or_default() += 1;
            return Ok(());
        }
        Err(Refused { open: self.open, of_peer })
    }

    /// Records that a connection of `peer` has ended.
    pub fn leave(&mut self, peer: Peer) {
        let count = self.by_peer.get_mut(&peer).expect("whoever leaves has entered");
        *count -= 1;
        if *count == 0 {
            self.by_peer.remove(&peer);
        }
        self.open -= 1;
        self.assert_state();
    }

    fn assert_state(&self) {
        assert!(
            self.open <= self.connections_max + reserve(self.connections_max),
            "more connections than may be"
        );
        debug_assert_eq!(
            self.open,
            self.by_peer.values().sum::<usize>(),
            "a connection of no peer"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(last: u8) -> Peer {
        Peer::machine(IpAddr::from([10, 0, 0, last]))
    }

    /// One client that keeps opening connections and never closes any must not lock out all others.
    #[test]
    fn a_peer_that_takes_all_it_can_leaves_some_for_each_of_the_others() {
        let mut admission = Admission::new(64);
        let mut take_all =
            |peer: Peer| (0..1000).take_while(|_| admission.enter(peer).is_ok()).count();
        assert_eq!(take_all(machine(1)), 64, "alone it has all of them");
        let others: Vec<usize> = (2..=5).map(|last| take_all(machine(last))).collect();
        assert_eq!(others, [4, 2, 1, 1], "each takes no more of the reserve than it leaves");
        assert_eq!(take_all(machine(6)), 0, "there are bounds");
        admission.leave(machine(1));
        assert!(
            admission.enter(machine(6)).is_ok(),
            "what is given back goes to whoever has fewest"
        );
        assert_eq!(admission.enter(machine(1)), Err(Refused { open: 72, of_peer: 63 }));
    }

    /// A machine with 2^64 addresses must still be one peer, and an IPv4 client of a dual-stack
    /// socket must count as that client.
    #[test]
    fn a_machine_is_one_peer_whichever_of_its_addresses_it_uses() {
        let peer = |text: &str| Peer::machine(text.parse().unwrap());
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff::9"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        assert_eq!(peer("::ffff:10.0.0.1"), machine(1));
        assert_ne!(peer("10.0.0.1"), peer("10.0.0.2"));
        assert_eq!(
            (peer("2001:db8::7").to_string(), machine(3).to_string()),
            ("2001:db8::/64".into(), "10.0.0.3".into())
        );
    }
}
