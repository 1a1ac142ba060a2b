//! Plans which shard runs on which core.
//!
//! Invariants
//! 1. [`plan`] is a pure function of the options, the machine and the store's geometry.
//! 2. If the options name no number of shards, the chosen one is feasible: the store has a virtual
//!    shard for each, memory and data space are sufficient, and control groups allow the processor
//!    time. A number that is named is not changed.
//!
//! It does *not* consider what else runs on the machine.

use crate::base::error::{Error, Result};
use crate::base::options::{Geometry, Options, SHARD_MEMORY_MIN, SHARDS_MAX};
use crate::engine::recovery::EXTENTS_MIN;
use rustix::thread::{CpuSet, sched_setaffinity};

/// How the shards are spread over the cores.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct CorePlan {
    pub(super) shards_count: u16,
    /// The core that each shard's thread is pinned to.
    pub(super) pins: Vec<Option<usize>>,
    /// Whether there are more shards than cores: then none may spin, since it would take time from
    /// another.
    pub(super) oversubscribed: bool,
    /// Thousandths of a processor that control groups allow, if that is less than the cores.
    pub(super) quota_millis: Option<u64>,
}

/// What the machine offers this process.
#[derive(Clone, Default, Debug)]
pub(super) struct Processors {
    /// The cores that it may use, in order; empty if they are not known.
    pub(super) allowed: Vec<usize>,
    /// Thousandths of a processor that control groups allow, if they limit it.
    pub(super) quota_millis: Option<u64>,
}

impl Processors {
    pub(super) fn detect() -> Processors {
        Processors {
            allowed: crate::ops::probe::allowed_cores(),
            quota_millis: crate::ops::probe::cpu_quota_millis(),
        }
    }
}

/// Plans for `options` on such a machine, for a store of this geometry.
///
/// # Errors
/// `Invalid` if a core is named that does not exist, or is named twice.
pub(super) fn plan(
    options: &Options,
    processors: &Processors,
    geometry: &Geometry,
) -> Result<CorePlan> {
    let allowed = &processors.allowed;
    let chosen = match &options.cores {
        Some(cores) => chosen(cores, allowed)?,
        None => allowed.clone(),
    };
    let cores_count = chosen.len().max(1);
    let quota_millis = processors.quota_millis.filter(|millis| *millis < cores_count as u64 * 1000);
    // A fraction of a processor is best used by one more shard. Named cores are used as they are.
    let timed = match (quota_millis, &options.cores) {
        (Some(millis), None) => millis.div_ceil(1000).max(1) as usize,
        _ => cores_count,
    };
    let in_memory = options.memory_bytes / SHARD_MEMORY_MIN;
    let in_space = match options.data_bytes_max {
        0 => u64::MAX,
        bytes => bytes / geometry.extent_bytes.max(1) / u64::from(EXTENTS_MIN),
    };
    let most =
        in_memory.min(in_space).min(geometry.vshards_count.into()).clamp(1, SHARDS_MAX.into());
    let shards_count = options.shards.unwrap_or((timed as u64).min(most) as u16);
    let whole = quota_millis.map_or(cores_count, |millis| (millis / 1000) as usize);
    let oversubscribed = usize::from(shards_count) > whole;
    // The scheduler spreads shards better than we could where there are more of them than cores,
    // and where processor time is limited: other processes with such a limit would be pinned to the
    // same first cores. Named cores are still pinned, since the others must be left alone.
    let scattered = options.cores.is_none()
        && (usize::from(shards_count) > cores_count || quota_millis.is_some());
    let pin =
        |shard: usize| if scattered { None } else { chosen.get(shard % cores_count).copied() };
    Ok(CorePlan {
        shards_count,
        pins: (0..usize::from(shards_count)).map(pin).collect(),
        oversubscribed,
        quota_millis,
    })
}

fn chosen(cores: &[usize], allowed: &[usize]) -> Result<Vec<usize>> {
    if cores.is_empty() {
        return Err(Error::invalid(
            "cores is an empty list: name at least one, or leave it out to use all",
        ));
    }
    for (at, core) in cores.iter().enumerate() {
        if !allowed.contains(core) {
            return Err(Error::invalid(format_args!(
                "core {core} is not one that this process may use; those are {allowed:?}"
            )));
        }
        if cores[..at].contains(core) {
            return Err(Error::invalid(format_args!(
                "core {core} is named twice; use shards to run several on a core"
            )));
        }
    }
    Ok(cores.to_vec())
}

/// Pins the calling thread to a core. Returns whether that worked.
pub(super) fn pin(core: usize) -> bool {
    let mut cores = CpuSet::new();
    core < CpuSet::MAX_CPU && {
        cores.set(core);
        sched_setaffinity(None, &cores).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(cores: Option<&[usize]>, shards: Option<u16>) -> Options {
        Options { cores: cores.map(<[usize]>::to_vec), shards, ..Options::default() }
    }

    fn stored(vshards_count: u32) -> Geometry {
        Geometry { vshards_count, ..Geometry::default() }
    }

    fn processors(allowed: &[usize], quota_millis: Option<u64>) -> Processors {
        Processors { allowed: allowed.to_vec(), quota_millis }
    }

    /// Two shards pinned to one core, or one that spins on another's core, silently halve the
    /// store's speed.
    #[test]
    fn each_shard_gets_a_core_of_its_own_if_there_are_enough() {
        let plan = |cores, shards| {
            plan(&options(cores, shards), &processors(&[0, 1, 4], None), &stored(256))
                .expect("it is lawful")
        };
        let all = plan(None, None);
        assert_eq!((all.shards_count, all.oversubscribed), (3, false));
        assert_eq!(all.pins, [Some(0), Some(1), Some(4)]);
        assert_eq!(plan(Some(&[4, 0]), None).pins, [Some(4), Some(0)]);
        assert_eq!(plan(None, Some(1)).pins, [Some(0)]);
        let crowd = plan(None, Some(5));
        assert!(crowd.oversubscribed && crowd.pins == [None; 5]);
        let kept_together = plan(Some(&[1]), Some(2));
        assert!(kept_together.oversubscribed && kept_together.pins == [Some(1); 2]);
    }

    /// The kernel halts 64 shards that have the time of two processors in the middle of their work,
    /// all at once, for most of each tenth of a second.
    #[test]
    fn a_quota_of_processor_time_bounds_the_shards() {
        let many: Vec<usize> = (0..64).collect();
        let with = |quota, cores, shards| {
            plan(&options(cores, shards), &processors(&many, quota), &stored(256))
                .expect("it is lawful")
        };
        let counts =
            |plan: CorePlan| (plan.shards_count, plan.oversubscribed, plan.quota_millis.is_some());
        assert_eq!(counts(with(None, None, None)), (64, false, false));
        assert_eq!(counts(with(Some(2000), None, None)), (2, false, true));
        assert_eq!(
            counts(with(Some(1500), None, None)),
            (2, true, true),
            "no spinning on time that it does not have"
        );
        assert_eq!(counts(with(Some(100), None, None)), (1, true, true));
        assert_eq!(
            counts(with(Some(64_000), None, None)),
            (64, false, false),
            "a quota that limits nothing"
        );
        assert_eq!(
            with(Some(2000), None, None).pins,
            [None; 2],
            "not the cores of all other processes with a quota"
        );
        // A named number is used as it is.
        assert_eq!(counts(with(Some(2000), None, Some(8))), (8, true, true));
        assert_eq!(with(Some(2000), Some(&[3, 4, 5]), None).pins, [Some(3), Some(4), Some(5)]);
    }

    /// A store that opens on the machine where it was made and not on a larger one breaks the
    /// promise that any number of cores will do.
    #[test]
    fn a_number_of_shards_that_nobody_named_is_one_that_the_store_can_have() {
        let machine = processors(&[0, 1, 2, 3], None);
        for (vshards, shards) in [(1, 1), (2, 2), (4, 4), (256, 4)] {
            let plan =
                plan(&options(None, None), &machine, &stored(vshards)).expect("it is lawful");
            assert_eq!((plan.shards_count, plan.oversubscribed), (shards, false));
            assert_eq!(plan.pins.len(), usize::from(shards));
        }
        let little = Options { memory_bytes: 5 << 20, ..Options::default() };
        assert_eq!(
            plan(&little, &machine, &stored(256)).expect("it is lawful").shards_count,
            2,
            "2 MiB each"
        );
        let bounded =
            Options { data_bytes_max: 40 * EXTENTS_MIN as u64 * (1 << 20), ..Options::default() };
        let shards = |extent_bytes| {
            let geometry = Geometry { extent_bytes, ..Geometry::default() };
            plan(&bounded, &machine, &geometry).expect("it is lawful").shards_count
        };
        assert_eq!(
            [8 << 20, 4 << 20, 16 << 20, 1 << 30].map(shards),
            [4, 4, 2, 1],
            "enough extents for the reserves of each shard"
        );
        assert_eq!(
            plan(&options(None, Some(4)), &machine, &stored(1))
                .expect("checked later")
                .shards_count,
            4
        );
    }

    /// A typing error in `--cores` must not run the store on other cores.
    #[test]
    fn cores_that_are_not_there_are_refused_by_name() {
        let refused = |cores: &[usize]| {
            plan(&options(Some(cores), None), &processors(&[0, 1], None), &stored(256))
                .expect_err("not lawful")
                .to_string()
        };
        assert!(refused(&[0, 7]).contains("core 7"));
        assert!(refused(&[1, 1]).contains("twice"));
        assert!(refused(&[]).contains("empty"));
    }
}
