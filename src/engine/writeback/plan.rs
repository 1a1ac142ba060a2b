//! Merges many small transfers into few large ones: pure planning, no I/O.
//!
//! Given blocks with their places, in any order, it sorts them and puts neighbours into one
//! vectored operation of at most `blocks_max` blocks. Writes (of groups, dirty pages, checkpoints)
//! never meet in a block; reads may, and bridge small gaps by reading blocks that no request needs.

use crate::base::BlockAddr;

/// Consecutive blocks, one vectored operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Run<T> {
    /// The place of the first block.
    pub place: BlockAddr,
    /// What goes to, or comes from, each of the consecutive blocks.
    pub items: Vec<T>,
}

/// The writes of `blocks`, each of at most `blocks_max` neighbours.
///
/// # Panics
/// If two blocks have the same place: one of them would be lost.
pub fn writes<T>(blocks: Vec<(BlockAddr, T)>, blocks_max: usize) -> Vec<Run<T>> {
    let runs = runs(blocks, blocks_max);
    for pair in runs.windows(2) {
        let (first, next) = (&pair[0], &pair[1]);
        let end = first.place.block + first.items.len() as u32;
        assert!(
            first.place.extent != next.place.extent || end <= next.place.block,
            "{} blocks are written to {:?}, and others to {:?}",
            first.items.len(),
            first.place,
            next.place
        );
    }
    runs
}

/// The reads of `blocks`, each of at most `blocks_max` blocks, with gaps of at most `gap_max`
/// blocks read too (`None`). A place may occur twice: a damaged map may name anything.
pub fn reads<T>(
    blocks: Vec<(BlockAddr, T)>,
    gap_max: u32,
    blocks_max: usize,
) -> Vec<Run<Option<T>>> {
    bridge(runs(blocks, blocks_max), gap_max, blocks_max)
}

/// Sorts `blocks` by place and merges neighbours into runs of at most `blocks_max`.
fn runs<T>(mut blocks: Vec<(BlockAddr, T)>, blocks_max: usize) -> Vec<Run<T>> {
    blocks.sort_by_key(|(place, _)| *place);
    let mut runs: Vec<Run<T>> = Vec::new();
    for (place, item) in blocks {
        if let Some(run) = runs.last_mut()
            && run.items.len() < blocks_max
            && run.place.extent == place.extent
            && run.place.block + run.items.len() as u32 == place.block
        {
            run.items.push(item);
        } else {
            runs.push(Run { place, items: vec![item] });
        }
    }
    runs
}

/// Puts something into the gaps between neighbouring runs of one extent that are at most `gap_max`
/// blocks wide, so that one operation reads them all: `None` stands for a block that no request
/// needs.
fn bridge<T>(runs: Vec<Run<T>>, gap_max: u32, blocks_max: usize) -> Vec<Run<Option<T>>> {
    let mut bridged: Vec<Run<Option<T>>> = Vec::new();
    for run in runs {
        if let Some(last) = bridged.last_mut()
            && last.place.extent == run.place.extent
            && let end = last.place.block + last.items.len() as u32
            && let Some(gap) = run.place.block.checked_sub(end)
            && gap <= gap_max
            && last.items.len() + gap as usize + run.items.len() <= blocks_max
        {
            last.items.extend((0..gap).map(|_| None));
            last.items.extend(run.items.into_iter().map(Some));
        } else {
            bridged
                .push(Run { place: run.place, items: run.items.into_iter().map(Some).collect() });
        }
    }
    bridged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ExtentNo;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 3 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// A block left out, doubled or put elsewhere would be lost or corrupt data.
        #[test]
        fn every_block_goes_to_its_place_once(
            places in proptest::collection::btree_set((0u32..3, 0u32..64), 0..100),
            max in 1usize..65,
        ) {
            let place = |(e, b): &(u32, u32)| BlockAddr { extent: ExtentNo::new(*e), block: *b };
            let blocks: Vec<_> = places.iter().rev().map(|p| (place(p), *p)).collect();
            let runs = writes(blocks, max);
            let mut seen = Vec::new();
            for run in &runs {
                prop_assert!(run.items.len() <= max);
                for (i, item) in run.items.iter().enumerate() {
                    prop_assert_eq!((run.place.extent.get(), run.place.block + i as u32), *item);
                    seen.push(*item);
                }
            }
            prop_assert_eq!(seen, places.into_iter().collect::<Vec<_>>());
        }

        /// A bridge that is off by one gives each page after it the bytes of another.
        #[test]
        fn bridged_blocks_stay_at_their_places(
            places in proptest::collection::btree_set((0u32..3, 0u32..64), 0..100),
            max in 1usize..65,
            gap in 0u32..5,
        ) {
            let place = |(e, b): &(u32, u32)| BlockAddr { extent: ExtentNo::new(*e), block: *b };
            let blocks: Vec<_> = places.iter().map(|p| (place(p), *p)).collect();
            let mut seen = Vec::new();
            for run in reads(blocks, gap, max) {
                prop_assert!(run.items.len() <= max);
                let is_wanted = |item: Option<&Option<_>>| item.is_some_and(Option::is_some);
                prop_assert!(is_wanted(run.items.first()), "a run begins with a wanted block");
                prop_assert!(is_wanted(run.items.last()), "a run ends with a wanted block");
                let widest = run.items.split(Option::is_some).map(<[_]>::len).max();
                prop_assert!(widest.unwrap_or(0) <= gap as usize);
                for (i, item) in run.items.iter().enumerate() {
                    if let Some(item) = item {
                        let block = run.place.block + i as u32;
                        prop_assert_eq!((run.place.extent.get(), block), *item);
                        seen.push(*item);
                    }
                }
            }
            prop_assert_eq!(seen, places.into_iter().collect::<Vec<_>>());
        }
    }

    /// A damaged map may name one block for two pages. A gap of less than nothing would count as
    /// the widest there is, or stop the shard.
    #[test]
    fn a_block_that_is_asked_for_twice_is_read_twice() {
        let at = |block| BlockAddr { extent: ExtentNo::new(0), block };
        let reads = reads(vec![(at(1), 'a'), (at(2), 'b'), (at(2), 'c')], 1, 64);
        let read: Vec<_> = reads.into_iter().map(|run| run.items).collect();
        assert_eq!(read, vec![vec![Some('a'), Some('b')], vec![Some('c')]]);
    }

    /// Two pages that are written to one block: one of them is lost, and its checksum says so only
    /// when it is read.
    #[test]
    #[should_panic(expected = "and others to")]
    fn two_pages_are_not_written_to_one_block() {
        let at = |block| BlockAddr { extent: ExtentNo::new(0), block };
        writes(vec![(at(1), 'a'), (at(2), 'b'), (at(2), 'c')], 64);
    }

    /// Neighbours that aren't merged cost a device operation each.
    #[test]
    fn neighbours_are_merged() {
        let at = |block| BlockAddr { extent: ExtentNo::new(0), block };
        let runs = writes(vec![(at(3), 'd'), (at(1), 'b'), (at(2), 'c'), (at(7), 'h')], 64);
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0].items, vec!['b', 'c', 'd']);
    }
}
