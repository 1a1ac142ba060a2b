//! A shard's thread from its first moment to its last, on any driver.
//!
//! ```text
//!   made a disk --ready--> waits for orders --begin (one thread only)--> began
//!      |                        |take: its shard
//!      |refused                 v
//!      v                    laps, opening --open--> laps --> ended
//!    ends                       |failed: ends, and so do all
//! ```
//! Invariants
//! 1. Whatever happens, the coordinator hears of it: refused; or ready, and then open or failed. A panic is a failure.
//! 2. A thread that panics ends all.
//! 3. `Shared::thread_ended` comes when the thread has let go of its files, and last.
//! 4. Such a thread never waits for another one: each may lead a flush that the other needs in order to end. What runs on
//!    it, tasks, wakers and destructors of callers included, can ask [`drives_a_shard`].

use super::driver::{Clock, Driver, Lap, Pace, Rig};
use super::machine::Begun;
use super::shared::Shared;
use crate::base::ShardId;
use crate::base::error::{Error, ErrorKind, Result};
use crate::engine::StateMachine;
use crate::engine::order::GlobalOrder;
use crate::io::{CancellableDisk, Disk, DiskReport, DiskWaker, Files};
use crate::mesh::Lanes;
use crossbeam_channel::{Receiver, Sender};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

thread_local! {
    /// From the thread's first moment to its very last.
    static IS_SHARD: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is a shard's, of any store, also while it begins or ends.
pub(crate) fn drives_a_shard() -> bool {
    IS_SHARD.with(Cell::get)
}

/// Laps between two looks at the executor.
const LAPS_MAX: usize = 64;

/// Opens the store on the disk of one of the threads, and makes the shards of all.
pub(super) type Opener<M> = Box<dyn FnOnce(&mut dyn Disk) -> Result<Begun<M>> + Send>;

/// What a thread tells the coordinator.
pub(super) enum News<M> {
    /// It has a disk.
    Ready(DiskReport),
    /// It can't have what its driver needs, and why.
    Refused(Error),
    /// The opener's result.
    Began(Result<Begun<M>>),
    /// Its shard is open.
    Open,
    /// Its shard can't be opened.
    Failed(Error),
}

/// What the coordinator tells a thread.
pub(super) enum Orders<M> {
    /// Run the opener.
    Begin(Opener<M>),
    /// Drive this shard.
    Take(Box<M>, Arc<GlobalOrder>),
}

/// Where a shard's thread sits.
pub(super) struct Seat<M: StateMachine> {
    pub(super) id: ShardId,
    pub(super) pin: Option<usize>,
    pub(super) pace: Pace,
    pub(super) clock: Clock,
    pub(super) requests_max: usize,
    pub(super) request_bytes_max: u64,
    pub(super) ring_entries: u32,
    pub(super) shards_count: u16,
    pub(super) shared: Arc<Shared>,
    pub(super) lanes: Lanes<M::Message>,
    pub(super) files: Arc<Files>,
    pub(super) news: Sender<News<M>>,
    pub(super) orders: Receiver<Orders<M>>,
}

/// A shard's thread with its shard.
pub(super) struct Drive<M: StateMachine, D: Disk> {
    driver: Option<Driver<M, D>>,
    /// Until the shard is open, or has failed.
    opening: Option<Sender<News<M>>>,
    shared: Arc<Shared>,
}

impl<M: StateMachine> Seat<M> {
    /// The thread can't have what its driver needs.
    pub(super) fn refuse(self, error: Error) {
        let _ = self.news.send(News::Refused(error));
    }

    /// The thread has its disk, and waits for its shard; `None`: there is none for it, and the thread ends.
    pub(super) fn sit<D: Disk>(self, mut disk: D, waker: DiskWaker, report: DiskReport) -> Option<Drive<M, D>> {
        let Seat { id, pace, clock, requests_max, request_bytes_max, shared, lanes, files, news, orders, .. } = self;
        let cancel = files.cancel().clone();
        // The disk has its own; the last of them holds the store's lock.
        drop(files);
        shared.ports[usize::from(id.get())].parking.set_waker(waker);
        let _ = news.send(News::Ready(report));
        while let Ok(next) = orders.recv() {
            match next {
                Orders::Begin(opener) => {
                    let began =
                        catch_unwind(AssertUnwindSafe(|| opener(&mut CancellableDisk::new(&mut disk, cancel.clone()))));
                    let began = began.unwrap_or_else(|_| Err(panicked()));
                    let _ = news.send(News::Began(began));
                }
                Orders::Take(machine, order) => {
                    let rig = Rig {
                        id,
                        machine: *machine,
                        shared: shared.clone(),
                        lanes,
                        order,
                        clock,
                        pace,
                        requests_max,
                        request_bytes_max,
                    };
                    let driver = Some(Driver::new(rig, disk));
                    return Some(Drive { driver, opening: Some(news), shared });
                }
            }
        }
        None
    }
}

/// What a shard's thread runs: `body`, and then that it has ended, whatever happened.
pub(super) fn occupy<M: StateMachine>(seat: Seat<M>, body: impl FnOnce(Seat<M>)) {
    IS_SHARD.set(true);
    let (shared, news) = (seat.shared.clone(), seat.news.clone());
    if catch_unwind(AssertUnwindSafe(|| body(seat))).is_err() {
        tracing::error!("a shard's thread panicked; the store is closed as after a crash");
        shared.fail(stopped_by_a_bug());
        let _ = news.send(News::Failed(panicked()));
        shared.abandon();
    }
    drop(news);
    shared.thread_ended();
}

fn stopped_by_a_bug() -> Error {
    Error::new(
        ErrorKind::Closed,
        "the thread of a shard panicked, which is a bug of corepage; reopen the store to recover",
    )
}

fn panicked() -> Error {
    Error::new(ErrorKind::Closed, "opening the store panicked")
}

impl<M: StateMachine, D: Disk> Drive<M, D> {
    /// Some laps; false: the shard has ended, and nothing is left to do.
    pub(super) fn go(&mut self) -> bool {
        match catch_unwind(AssertUnwindSafe(|| self.laps())) {
            Ok(true) => return true,
            Ok(false) => {}
            Err(_) => {
                tracing::error!("a shard panicked; the store is closed as after a crash");
                self.shared.fail(stopped_by_a_bug());
                tell(&mut self.opening, News::Failed(panicked()));
                self.shared.abandon();
            }
        }
        false
    }

    fn laps(&mut self) -> bool {
        let Some(driver) = &mut self.driver else { return false };
        for _ in 0..LAPS_MAX {
            let lap = driver.lap();
            if self.opening.is_some() {
                let news = match driver.machine().failure() {
                    Some(error) => News::Failed(error),
                    None if driver.machine().is_open() => News::Open,
                    None if lap == Lap::Ended => News::Failed(super::shared::closed()),
                    None => {
                        driver.rest_if(lap);
                        continue;
                    }
                };
                let failed = matches!(news, News::Failed(_));
                tell(&mut self.opening, news);
                if failed {
                    return false;
                }
            }
            if lap == Lap::Ended {
                return false;
            }
            driver.rest_if(lap);
        }
        true
    }
}

/// Tells the coordinator what has become of the shard, once.
fn tell<M>(opening: &mut Option<Sender<News<M>>>, news: News<M>) {
    if let Some(opening) = opening.take() {
        // Nobody listens if opening was given up.
        let _ = opening.send(news);
    }
}

impl<M: StateMachine, D: Disk> Drop for Drive<M, D> {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.end();
        }
    }
}
