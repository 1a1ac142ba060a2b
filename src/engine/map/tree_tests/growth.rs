//! Trees that grow, shrink and are emptied while some of their nodes are on the way from the
//! device.

use super::*;

/// If this fails, a node that was read while its tree grew is taken for its top: the next change
/// overwrites the root, and everything that the tree above it names is lost, checkpointed or not.
#[test]
fn a_node_that_arrives_late_is_part_of_its_tree_or_dropped() {
    let cases = if cfg!(miri) { 2 } else { 384 };
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let steps =
        proptest::collection::vec((0u8..20, any::<u16>()), 0..if cfg!(miri) { 30 } else { 300 });
    let overtaken = std::cell::Cell::new(0);
    let result = runner.run(&steps, |steps| {
        let mut store = Store::new();
        steps.into_iter().for_each(|(step, pick)| store.late_step(step, pick));
        while !store.reads.is_empty() {
            store.arrive(0);
        }
        (0..24).for_each(|pick| store.check(growing(pick)));
        store.reopen();
        (0..24).for_each(|pick| store.check(growing(pick)));
        store.check_leaks();
        // Nothing is left of what is freed, whether or not it was there.
        let (there, absent): (Vec<_>, Vec<_>) =
            (0..24).map(growing).partition(|key| store.model.contains_key(key));
        there.into_iter().for_each(|key| store.set(key, false));
        absent.into_iter().for_each(|key| store.come_to_nothing(key));
        store.check_leaks();
        prop_assert!(store.nodes.is_empty(), "nodes without an entry are kept");
        overtaken.set(overtaken.get() + store.overtaken);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    println!("{} nodes were overtaken", overtaken.get());
    assert!(
        cfg!(miri) || overtaken.get() >= 50,
        "{} nodes were overtaken: it tests nothing",
        overtaken.get()
    );
}

/// If this fails, a volume that was trimmed, holes and all, keeps nodes of its trees until it is
/// written to again.
#[test]
fn an_emptied_tree_leaves_nothing_whatever_is_in_memory() {
    let mut store = Store::new();
    let vshard = store.map.position(growing(0)).0;
    (0..4).for_each(|page| store.set(growing(page), true));
    store.reopen();
    (4..8).for_each(|page| store.come_to_nothing(growing(page)));
    (0..4).for_each(|page| store.set(growing(page), false));
    // A commit that waits still needs a leaf: it stays until it has ended.
    store.check(growing(7));
    let waits = store.map.pin(growing(7), &mut store.arena);
    store.capture(vshard);
    assert!(!store.nodes.is_empty(), "the tree above a leaf that is needed stays");
    store.map.unpin(waits);
    store.set(growing(0), false);
    store.capture(vshard);
    assert!(
        store.nodes.is_empty() && store.map.in_memory() == (0, 0),
        "{:?}",
        store.map.in_memory()
    );
}

/// The same in the shortest way: the only leaf of a tree is being read, the tree grows, a
/// checkpoint writes the new top, and memory is needed.
#[test]
fn a_top_that_is_read_while_its_tree_grows_is_dropped() {
    let mut store = Store::new();
    let (low, high) = (growing(0), growing(2));
    let vshard = store.map.position(low).0;
    assert_eq!(store.map.position(high).0, vshard);
    store.set(low, true);
    store.reopen();
    let Lookup::Load(at, child) = store.map.lookup(low) else { panic!("nothing is in memory") };
    store.begin_read(at, child);
    assert!(at.level == 0 && store.parents().is_empty(), "the top of the tree is a leaf");
    store.set(high, true);
    store.capture(vshard);
    while store.map.evict_one() {}
    store.arrive(0);
    assert_eq!((store.overtaken, store.map.in_memory()), (1, (0, 0)));
    store.set(low, true);
    store.capture(vshard);
    store.reopen();
    store.check(low);
    store.check(high);
}
