//! Open files of this process: as many as its connections need.
//!
//! 1. The soft limit is raised to the hard one. It is low (1,024) only for programs that use
//!    `select`, and with it a server ran out of descriptors at that many clients.
//! 2. A hard limit that does not do is said at the start, not to the client that is refused later.

use crate::program::server::nbd::reserve;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Files, sockets and rings that are no connections: about 20 for each shard, and some for all.
const OTHERS: u64 = 256;

/// Lets the process have a descriptor for each of `connections`, as far as the hard limit goes.
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
            "clients may be refused: the limit of open files is too low for so many connections; \
             raise it (`ulimit -Hn`, LimitNOFILE)"
        );
    }
}
