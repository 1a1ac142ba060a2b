//! A process that forks while it has a store open: the child has copies of all handles and
//! descriptors, and none of the threads.
//!
//! If these fail, a store that was closed can't be opened again until some child of long life ends,
//! a child takes its parent's lock away (two processes then write to one store), or hangs and
//! panics over handles that it has inherited.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

mod common;

use common::role::Run;
use common::surroundings::in_forked_child;
use corepage::{ErrorKind, Options, PageId, Store};
use futures_lite::future::block_on;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn options(run: Run) -> Options {
    run.with(Options { memory_bytes: 16 << 20, ..Options::default() })
}

fn runs() -> Vec<Run> {
    Run::all().into_iter().filter(|run| run.shards < 4).collect()
}

/// Waits until `path` is there, a minute at most.
fn wait_for(path: &Path) -> Result<(), String> {
    for _ in 0..6000 {
        if path.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(format!("{} does not come", path.display()))
}

#[test]
fn the_lock_of_a_closed_store_does_not_live_on_in_a_forked_child() {
    for run in runs() {
        let dir = common::scratch("fork");
        let (begun, over) = (dir.path().join("begun"), dir.path().join("over"));
        let store = block_on(Store::open(dir.path().join("store"), options(run))).expect("a store");
        let (child_begun, child_over) = (begun.clone(), over.clone());
        // It lives on with copies of all descriptors until the store was closed and opened again.
        let child = std::thread::spawn(move || {
            in_forked_child(move || {
                std::fs::write(&child_begun, "").map_err(|error| error.to_string())?;
                wait_for(&child_over)
            });
        });
        wait_for(&begun).expect("the child runs");
        block_on(store.close()).expect("it closes");
        drop(store);
        let again = block_on(Store::open(dir.path().join("store"), options(run)));
        std::fs::write(&over, "").expect("the child is told");
        child.join().expect("the child ends well");
        block_on(again.expect("it is closed, whatever children there are").close())
            .expect("it closes");
    }
}

#[test]
fn a_forked_child_is_told_whose_its_handles_are_and_takes_nothing_from_its_parent() {
    for run in runs() {
        let dir = common::scratch("fork");
        let path = dir.path().join("store");
        let store = block_on(Store::open(&path, options(run))).expect("a store");
        let volume = block_on(store.create_volume("v", 1 << 20)).expect("a volume");
        block_on(volume.write(PageId::new(1), vec![1; 4096])).expect("it is written");
        // The parent's own handles, so that the child drops the last ones that there are in it.
        let handles = Arc::new(Mutex::new(Some((store, volume))));
        let (inherited, child_path) = (handles.clone(), path.clone());
        in_forked_child(move || {
            let taken = inherited.lock().map_err(|error| error.to_string())?.take();
            let (store, volume) = taken.ok_or("nothing was inherited")?;
            let outcomes = [
                block_on(volume.read(PageId::new(1))).map(drop),
                block_on(volume.write(PageId::new(1), vec![2; 4096])).map(drop),
                block_on(store.flush()).map(drop),
                block_on(store.close()),
                // Its parent has it open.
                block_on(Store::open(&child_path, options(run))).map(drop),
            ];
            for (number, outcome) in outcomes.into_iter().enumerate() {
                match outcome {
                    Err(error) if error.kind() == ErrorKind::InUse => {}
                    other => return Err(format!("operation {number}: {other:?}")),
                }
            }
            drop((store, volume));
            Ok(())
        });
        let locked = block_on(Store::open(&path, options(run))).expect_err("its lock is held");
        assert_eq!(locked.kind(), ErrorKind::InUse, "{locked}");
        let (store, volume) =
            handles.lock().expect("no panic").take().expect("they are the parent's still");
        let read = block_on(volume.read(PageId::new(1))).expect("it is read");
        assert!(read.iter().all(|byte| *byte == 1), "the child has written");
        drop(read);
        block_on(volume.write(PageId::new(1), vec![3; 4096])).expect("the parent goes on");
        block_on(store.close()).expect("it closes");
    }
}
