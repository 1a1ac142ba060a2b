//! The clock that all shards of a store share. Shards do not read it: the event loop passes them
//! the time.

use crate::base::Micros;
use std::time::Instant;

/// Microseconds since the store's threads were started.
#[derive(Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads a clock")]
    pub(super) fn start() -> Self {
        Clock(Instant::now())
    }

    #[expect(clippy::disallowed_methods, reason = "the one place that reads a clock")]
    pub(super) fn now(self) -> Micros {
        self.0.elapsed().as_micros() as Micros
    }
}
