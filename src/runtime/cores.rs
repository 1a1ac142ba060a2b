//! Which shard runs on which core.

use crate::error::{Error, Result};
use crate::options::{Options, SHARDS_MAX};

/// How the shards are spread over the cores.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    pub(super) shards_count: u16,
    /// For each shard the core that its thread is pinned to.
    pub(super) pins: Vec<Option<usize>>,
    /// More shards than cores: none may spin, it would spin on the time of another.
    pub(super) crowded: bool,
}

/// The cores that this thread may use, in order; empty if that can't be found out.
pub(super) fn allowed() -> Vec<usize> {
    let mut ids: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
    ids.sort_unstable();
    ids
}

/// Plans for `options` on a machine with the cores `allowed`.
///
/// # Errors
/// `Invalid`: a core that is not there, or twice; more shards than virtual shards.
pub(super) fn plan(options: &Options, allowed: &[usize]) -> Result<Plan> {
    let chosen = match &options.cores {
        Some(cores) => chosen(cores, allowed)?,
        None => allowed.to_vec(),
    };
    let cores_count = chosen.len().max(1);
    let most = usize::from(SHARDS_MAX).min(options.geometry.vshards_count as usize);
    let shards_count = options.shards.map_or(cores_count.min(most), usize::from);
    let crowded = shards_count > cores_count;
    let pin = |shard: usize| match crowded {
        // The scheduler spreads them better than we could, unless it is to leave some cores alone.
        true if options.cores.is_none() => None,
        _ => chosen.get(shard % cores_count).copied(),
    };
    Ok(Plan { shards_count: shards_count as u16, pins: (0..shards_count).map(pin).collect(), crowded })
}

fn chosen(cores: &[usize], allowed: &[usize]) -> Result<Vec<usize>> {
    if cores.is_empty() {
        return Err(Error::invalid("cores is an empty list: name at least one, or leave it out to use all"));
    }
    for (at, core) in cores.iter().enumerate() {
        if !allowed.contains(core) {
            return Err(Error::invalid(format_args!(
                "core {core} is not one that this process may use; those are {allowed:?}"
            )));
        }
        if cores[..at].contains(core) {
            return Err(Error::invalid(format_args!("core {core} is named twice; shards says how many shards to run")));
        }
    }
    Ok(cores.to_vec())
}

/// Pins the calling thread to a core; whether that worked.
pub(super) fn pin(core: usize) -> bool {
    core_affinity::set_for_current(core_affinity::CoreId { id: core })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(cores: Option<&[usize]>, shards: Option<u16>) -> Options {
        Options { cores: cores.map(<[usize]>::to_vec), shards, ..Options::default() }
    }

    /// Two shards pinned to one core, or one that spins on the core of another, halve the store's speed unnoticed.
    #[test]
    fn each_shard_gets_a_core_of_its_own_if_there_are_enough() {
        let plan = |cores, shards| plan(&options(cores, shards), &[0, 1, 4]).expect("it is lawful");
        let all = plan(None, None);
        assert_eq!((all.shards_count, all.crowded), (3, false));
        assert_eq!(all.pins, [Some(0), Some(1), Some(4)]);
        assert_eq!(plan(Some(&[4, 0]), None).pins, [Some(4), Some(0)]);
        assert_eq!(plan(None, Some(1)).pins, [Some(0)]);
        let crowd = plan(None, Some(5));
        assert!(crowd.crowded && crowd.pins == [None; 5]);
        let kept_together = plan(Some(&[1]), Some(2));
        assert!(kept_together.crowded && kept_together.pins == [Some(1); 2]);
    }

    /// A typing error in `--cores` must not run the store somewhere else.
    #[test]
    fn cores_that_are_not_there_are_refused_by_name() {
        let refused = |cores: &[usize]| plan(&options(Some(cores), None), &[0, 1]).expect_err("not lawful").to_string();
        assert!(refused(&[0, 7]).contains("core 7"));
        assert!(refused(&[1, 1]).contains("twice"));
        assert!(refused(&[]).contains("empty"));
    }
}
