//! From many small transfers to few large ones: pure planning, no I/O.
//!
//! Given blocks with their places, in any order: sort them, put neighbours into one vectored operation of at most
//! `blocks_max` blocks. The same plan serves writes (batches of dirty pages, checkpoints) and reads.

use crate::types::Place;

/// Consecutive blocks, one vectored operation.
#[derive(Debug, PartialEq, Eq)]
pub struct Run<T> {
    /// Where the first block lies.
    pub place: Place,
    /// What goes to, or comes from, each of the consecutive blocks.
    pub items: Vec<T>,
}

/// Sorts `blocks` by place and merges neighbours into runs of at most `blocks_max`.
pub fn plan<T>(mut blocks: Vec<(Place, T)>, blocks_max: usize) -> Vec<Run<T>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ExtentNo;
    use proptest::prelude::*;

    proptest! {
        /// A block left out, doubled or put elsewhere would be lost or bent data.
        #[test]
        fn every_block_goes_to_its_place_once(
            places in proptest::collection::btree_set((0u32..3, 0u32..64), 0..100), max in 1usize..65,
        ) {
            let place = |(e, b): &(u32, u32)| Place { extent: ExtentNo::new(*e), block: *b };
            let blocks: Vec<_> = places.iter().rev().map(|p| (place(p), *p)).collect();
            let runs = plan(blocks, max);
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
    }

    /// Neighbours that aren't merged cost a device operation each.
    #[test]
    fn neighbours_are_merged() {
        let at = |block| Place { extent: ExtentNo::new(0), block };
        let runs = plan(vec![(at(3), 'd'), (at(1), 'b'), (at(2), 'c'), (at(7), 'h')], 64);
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0].items, vec!['b', 'c', 'd']);
    }
}
