//! Raises the limit on open files of this process to what its connections need.
//!
//! 1. The soft limit is raised to the hard one. It is low (1,024) only for the sake of programs
//!    that use `select`, and with it a server would run out of descriptors at that many clients.
//! 2. If the hard limit is too low, the server says so at the start, and not only to a client that
//!    is refused later.

use crate::program::server::nbd::reserve;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Files, sockets and rings besides connections: about 20 for each shard, and some for all.
const OTHERS: u64 = 256;

/// Allows the process a descriptor for each of `connections`, up to the hard limit.
pub fn allow(connections: usize) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now =
        if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    let needed = (connections + reserve(connections)) as u64 + OTHERS;
    if let Some(now) = now.filter(|now| *now < needed) {
        warn!(
            limit = now,
            needed,
            "clients may be refused: the limit on open files is too low for this many connections; \
             raise it (`ulimit -Hn`, LimitNOFILE)"
        );
    }
}
