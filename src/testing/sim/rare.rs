//! Counts rare events: nothing shows that a promise is kept if no run has put it to the test.
//!
//! It does *not* check anything: all these events are allowed.

/// The list of events: each a line of documentation and a name.
macro_rules! rare_events {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// The number of rare events in a run, by kind.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Rare {
            $($(#[$doc])+ pub $name: u64,)+
        }

        impl Rare {
            /// Adds the counts of another run.
            pub fn add(&mut self, other: &Rare) {
                $(self.$name += other.$name;)+
            }

            /// All of them, by name.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)+]
            }
        }
    };
}

rare_events! {
    /// Lives of a store with at least ten times as many pages as fit into its memory.
    lives_of_ten_memories,
    /// A hundred times as many.
    lives_of_hundred_memories,
    /// A thousand times as many.
    lives_of_thousand_memories,
    /// Lives of a store with a tree of three levels or more.
    lives_with_three_levels,
    /// Lives with the smallest valid memory.
    lives_in_least_memory,
    /// Recoveries after a crash, of a large store with the smallest valid memory.
    recoveries_in_least_memory,
    /// Reads during which a checkpoint ended.
    reads_outlasted_checkpoint,
    /// Reads during which as much was read as the memory holds.
    reads_outlasted_memory,
    /// Reads of a map node during which its tree grew.
    reads_outlasted_growth,
    /// Reads of a map node whose parent left memory meanwhile, or was no longer in it.
    reads_orphaned,
    /// Reads of a map node for which the map named another place, or none, when it arrived.
    reads_stale,
    /// Reads of a map node that were orphaned or stale, and outlasted a checkpoint as well.
    reads_orphaned_by_checkpoint,
    /// Checkpoints that waited for memory, and ended.
    checkpoints_starved,
    /// Times when commits of a shard waited for memory.
    commits_short_of_memory,
    /// Requests refused with `Busy` while clients held pages.
    busy_by_pins,
    /// Requests refused with `Busy` while no page was pinned.
    busy_without_pins,
    /// Pages that were held on to through a crash or a close, and were whole afterwards.
    pins_outlasted_store,
    /// Pages given back after a checkpoint had ended while they were held.
    pins_outlasted_checkpoint,
    /// Segments by which logs got longer.
    segments_added,
    /// Answers that no client took.
    answers_dropped,
    /// Stores that were abandoned with requests in progress: the process dies, the machine keeps
    /// running.
    stores_abandoned,
    /// Reads of pages that were never written.
    absent_reads,
    /// Deadlines at which a shard found nothing to do.
    turns_for_nothing,
}
