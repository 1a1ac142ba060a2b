//! loom models of the watermark together with the parking words, as the event loop uses them.

use crate::base::sync::model::holds;
use crate::base::{Lsn, ShardId};
use crate::engine::order::GlobalOrder;
use crate::mesh::testing::CountingWaker;
use crate::mesh::{Parking, unpark_for_level};
use ::loom::sync::Arc;
use ::loom::thread;

fn parking() -> (Arc<Parking<CountingWaker>>, CountingWaker) {
    let (parking, waker) = (Parking::new(), CountingWaker::default());
    parking.set_waker(waker.clone());
    (Arc::new(parking), waker)
}

/// If this fails, a commit over two shards whose second part becomes durable last is acknowledged
/// only by chance.
#[test]
fn loom_a_risen_watermark_is_seen_by_a_parking_thread() {
    assert!(holds(None, move |verdict| {
        let (parking, waker) = parking();
        let order = Arc::new(GlobalOrder::new(Lsn::new(1), 2));
        let (shard, lsn) = (ShardId::new(0), order.allocate_lsns(ShardId::new(0), 1));
        let (theirs, raising) = (parking.clone(), order.clone());
        let raiser = thread::spawn(move || {
            raising.publish(shard, Lsn::MAX);
            unpark_for_level([&*theirs].into_iter(), raising.refresh().get());
        });
        let waits = parking.park(Some(lsn.get()), || order.watermark() >= lsn);
        raiser.join().unwrap();
        // If it is not woken, it waits for ever.
        verdict.expect(!waits || waker.wakes() == 1);
    }));
}

/// The model follows the event loop: one shard finds the watermark held back by another shard's
/// allocation and parks until its own commit is durable; the other unparks it once its allocation
/// has let the watermark rise.
#[test]
fn loom_a_commit_that_an_allocation_held_back_wakes_its_shard() {
    assert!(holds(None, |verdict| {
        let (parking, waker) = parking();
        let order = Arc::new(GlobalOrder::new(Lsn::new(1), 2));
        let (theirs, allocating) = (parking.clone(), order.clone());
        let allocator = thread::spawn(move || {
            let seen = allocating.watermark();
            let lsn = allocating.allocate_lsns(ShardId::new(1), 1);
            let watermark = allocating.watermark();
            if watermark > seen {
                unpark_for_level([&*theirs].into_iter(), watermark.get());
            }
            lsn
        });
        let lsn = order.allocate_lsns(ShardId::new(0), 1);
        order.publish(ShardId::new(0), Lsn::MAX);
        let durable = order.refresh() >= lsn;
        let waits = !durable && parking.park(Some(lsn.get()), || order.watermark() >= lsn);
        let not_durable = allocator.join().unwrap();
        verdict.expect(!waits || not_durable < lsn || waker.wakes() == 1);
    }));
}
