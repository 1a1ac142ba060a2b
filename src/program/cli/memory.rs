//! Decides how much memory a server takes: the given amount, or one that suits the machine.
//!
//! 1. More than is available is refused before anything is made: the kernel would kill this process
//!    later, or another one.
//! 2. A server starts in a small container without `--memory`: the default is smaller where less is
//!    available.
//! 3. Messages give sizes in the units that people type.
//!
//! It does *not* know what the memory is for, nor how a server divides it.

use super::{Failure, size};
use corepage::probe::{AvailableMemory, Room};

const MIB: u64 = 1 << 20;
/// The default, where that much is available.
pub const DEFAULT: u64 = 256 * MIB;
/// With less there would be too little for pages besides what connections need.
pub const MIN: u64 = 16 * MIB;
/// What a process takes on top for its code, threads and rings, as `serve --help` says.
const PROCESS_BYTES: u64 = 16 * MIB;
const SHARD_BYTES: u64 = 4 * MIB;
/// The least memory for each shard (`Options::memory_bytes`). A server gives the engine seven
/// eighths of its memory, or all but 4 MiB if it has little.
const SHARD_MEMORY_MIN: u64 = 2 * MIB;
const CONNECTIONS_BYTES_MIN: u64 = 4 * MIB;

/// Parses the argument `--memory` of a server.
pub fn parse(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes < MIN => {
            Err(format!("too little for a server: {} is the least", size::show(MIN)))
        }
        bytes => Ok(bytes),
    }
}

/// Parses an argument `--memory` that a store gets as a whole.
pub fn parse_of_store(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes < SHARD_MEMORY_MIN => {
            Err(format!("too little for a store: {} is the least", size::show(SHARD_MEMORY_MIN)))
        }
        bytes => Ok(bytes),
    }
}

/// Checks that a store can have this much memory. Returns a warning if that leaves little to other
/// programs.
///
/// # Errors
/// The store can't have it.
pub fn check_of_store(bytes: u64, room: &AvailableMemory) -> Result<Option<String>, Failure> {
    let said = |text| {
        format!(
            "--memory: {}, and {} for the process: {text}",
            size::show(bytes),
            size::show(PROCESS_BYTES)
        )
    };
    match room.judge(bytes.saturating_add(PROCESS_BYTES)) {
        Room::Enough => Ok(None),
        Room::Tight(text) => Ok(Some(said(text))),
        Room::Lacking(text) => Err(Failure::new(format_args!("{}; give less", said(text)))),
    }
}

/// The least memory for this many shards.
fn least(shards: u64) -> u64 {
    let engine = SHARD_MEMORY_MIN * shards;
    (engine + CONNECTIONS_BYTES_MIN).max((engine * 8).div_ceil(7).next_multiple_of(MIB)).max(MIN)
}

/// The memory that a server with this many shards takes, with a warning if that leaves little to
/// other programs.
///
/// # Errors
/// It is too little for the shards, or more than is available.
pub fn choose(
    asked: Option<u64>,
    shards: Option<u16>,
    room: &AvailableMemory,
) -> Result<(u64, Option<String>), Failure> {
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let named = shards.map_or(0, u64::from);
    if let Some(bytes) = asked.filter(|bytes| *bytes < least(named)) {
        let (have, need) = (size::show(bytes), size::show(least(named)));
        return Err(Failure::usage(format_args!(
            "--memory: {have} are too little for {named} shards, {need} are the least"
        )));
    }
    let half = room.most().map_or(u64::MAX, |(most, _)| most / 2 / MIB * MIB);
    let bytes = asked.unwrap_or(DEFAULT.min(half).max(least(named)));
    // This is the number of shards that will run if none is given.
    let count = shards.map_or(cores.min(bytes / SHARD_MEMORY_MIN).max(1), u64::from);
    let all = bytes.saturating_add(PROCESS_BYTES + SHARD_BYTES * count);
    let which = if asked.is_some() { "--memory" } else { "memory (without --memory)" };
    let (bytes_said, rest) = (size::show(bytes), size::show(all - bytes));
    let said = |text| format!("{which}: {bytes_said}, and {rest} for the process: {text}");
    match room.judge(all) {
        Room::Enough => Ok((bytes, None)),
        Room::Tight(text) => Ok((bytes, Some(said(text)))),
        Room::Lacking(text) => Err(Failure::new(format_args!(
            "{}; give less with --memory, {} are the least",
            said(text),
            size::show(least(named))
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn machine(available: u64, group: Option<u64>) -> AvailableMemory {
        AvailableMemory {
            available_bytes: Some(available),
            group_limit_bytes: group,
            ..Default::default()
        }
    }

    /// A server with more memory than there is used to run until the kernel killed some process, or
    /// left a store of 390 MB behind.
    #[test]
    fn what_cannot_be_had_is_refused_and_most_of_it_warned_of() {
        let chosen = |asked, room: &AvailableMemory| choose(Some(asked), Some(2), room);
        let room = machine(20 * GIB, None);
        assert_eq!(chosen(4 * GIB, &room).unwrap(), (4 * GIB, None));
        let (bytes, warning) = chosen(17 * GIB, &room).unwrap();
        assert!(
            bytes == 17 * GIB
                && warning.is_some_and(|text| text.contains("80 %") && text.contains("20.0 GiB"))
        );
        for (asked, room) in [
            (30 * GIB, room),
            (GIB, machine(20 * GIB, Some(512 * MIB))),
            (u64::MAX, machine(GIB, None)),
        ] {
            let failure = chosen(asked, &room).expect_err("it can't be had");
            assert!(
                failure.text.contains("--memory")
                    && failure.text.contains("16.0 MiB are the least"),
                "{}",
                failure.text
            );
        }
        assert_eq!(
            chosen(GIB, &AvailableMemory::default()).unwrap(),
            (GIB, None),
            "what is not known is no limit"
        );
    }

    /// A server without `--memory` used to be killed in a container of 256 MiB as soon as it was
    /// used.
    #[test]
    fn the_default_suits_a_small_container() {
        assert_eq!(choose(None, Some(2), &machine(20 * GIB, None)).unwrap(), (DEFAULT, None));
        assert_eq!(
            choose(None, Some(2), &machine(20 * GIB, Some(256 * MIB))).unwrap(),
            (128 * MIB, None)
        );
        assert_eq!(choose(None, Some(1), &machine(20 * GIB, Some(64 * MIB))).unwrap().0, 32 * MIB);
        assert!(choose(None, Some(1), &machine(20 * GIB, Some(30 * MIB))).is_err());
    }

    /// A user who types "8M" must not have to divide 16777216 to see what would be enough.
    #[test]
    fn the_least_is_said_in_the_unit_typed() {
        assert!(parse("8M").unwrap_err().contains("16.0 MiB"));
        assert_eq!(parse("16M"), Ok(16 * MIB));
        let failure =
            choose(Some(16 * MIB), Some(16), &machine(GIB, None)).expect_err("two MiB each");
        assert!(
            failure.text.contains("16 shards") && failure.text.contains("37.0 MiB"),
            "{}",
            failure.text
        );
    }
}
