//! When dirty pages go to their places: late, at an even pace, and all of them once the store is
//! idle. Whole shards on a disk in memory, driven by one thread.
//!
//! If this fails, every small commit costs the device a page, or commits stall while a checkpoint
//! writes its pages, or a store that does nothing opens slowly.

use super::overwrite_tests::Volume;
use crate::Geometry;
use crate::base::options::Options;

/// Logs of four segments of 256 KiB, and memory for many more pages than the tests have.
fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 1 << 20,
        segment_bytes: 256 << 10,
        segments_count: 4,
        vshards_count: 16,
    };
    Options { geometry, memory_bytes: 64 << 20, ..Options::default() }
}

#[test]
fn a_page_that_changes_often_is_written_once_a_checkpoint() {
    const PAGES: u64 = 64;
    let mut volume = Volume::filled(&options(), 2, PAGES);
    volume.patch(20_000);
    let before = volume.stats();
    volume.patch(60_000);
    let stats = volume.stats().since(&before);
    let checkpoints = stats.checkpoints / 2;
    assert!(checkpoints > 4, "too little was committed for a comparison: {stats:?}");
    assert!(
        stats.pages_written <= (checkpoints + 2) * PAGES,
        "{} pages were written in {checkpoints} checkpoints of {PAGES} pages",
        stats.pages_written
    );
    assert!(stats.pages_written * 20 <= stats.commits, "{stats:?}");
}

/// All clients wait for one flush that takes longer than the window: that is not idleness.
#[test]
fn a_slow_device_makes_no_page_due() {
    let mut volume = Volume::filled(&options(), 2, 64);
    volume.tick = 20_000;
    volume.patch(2_000);
    let before = volume.stats();
    volume.patch(20_000);
    let stats = volume.stats().since(&before);
    assert!(stats.pages_written * 20 <= stats.commits, "{stats:?}");
}

#[test]
fn an_idle_store_becomes_clean_with_one_checkpoint() {
    let mut volume = Volume::filled(&options(), 2, 256);
    volume.patch(100);
    let before = volume.stats();
    volume.rest(10_000_000);
    let stats = volume.stats().since(&before);
    for shard in &volume.all.shards {
        assert!(shard.writeback.is_idle(), "pages are dirty in {shard:#?}");
        assert_eq!(shard.map.dirty_count(), 0, "map nodes are dirty in {shard:#?}");
    }
    assert_eq!(stats.checkpoints, 2, "one checkpoint of two shards");
    let before = volume.stats();
    volume.rest(60_000_000);
    let stats = volume.stats().since(&before);
    assert_eq!((stats.checkpoints, stats.pages_written), (0, 0), "an idle store rests");
}

#[test]
fn a_checkpoint_spreads_its_pages_over_time_if_nobody_waits() {
    const PAGES: u64 = 1024;
    let mut volume = Volume::filled(&options(), 1, PAGES);
    while volume.all.shards[0].ctx.checkpoint.active {
        volume.patch(64);
    }
    let begun = volume.stats().checkpoints;
    while !volume.all.shards[0].ctx.checkpoint.wants_pages {
        volume.patch(64);
        assert!(volume.stats().checkpoints < begun + 2, "its pages were not waited for");
    }
    let (before, at) = (volume.stats().pages_written, volume.now);
    volume.patch(64);
    let written = volume.stats().pages_written - before;
    assert!(volume.now - at < 100_000, "{} us are no moment", volume.now - at);
    assert!(written < PAGES / 2, "{written} pages were written in {} us", volume.now - at);
}
