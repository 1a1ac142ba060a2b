//! Starting: a coordinator opens the files, starts a thread for each shard, has one of them begin to open the store,
//! deals out the shards, and waits until all are open.
//!
//! Invariants
//! 1. Nothing of the store is touched before every thread has what its driver needs; so the portable driver can still
//!    be taken instead.
//! 2. If one shard can't be opened, all threads have ended, and the files are let go, when the error is returned.
//! 3. A caller who gives up leaves no store open: all ends as soon as the device has answered, as after a crash.
//! 4. The number of shards is settled when the store's geometry is known, before there are threads.

use super::cores::{self, Plan, Processors};
use super::driver::{Clock, Pace};
use super::handle::Runtime;
use super::machine::{self, Begun};
use super::opening::{Guard, Opening};
use super::report::RuntimeReport;
use super::seat::{News, Opener, Orders, Seat, occupy};
use super::shared::Shared;
use super::{portable, ring};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::options::{Driver, Geometry, Limits, Options};
use crate::base::{Micros, ShardId};
use crate::engine::StateMachine;
use crate::engine::recovery;
use crate::format::fresh;
use crate::io::portable::{PortableDisk, PortableOptions};
use crate::io::{Access, CancellableDisk, DiskReport, FileId, FileOptions, Files};
use crate::mesh::Lanes;
use crossbeam_channel::{Receiver, Sender};
use event_listener::Event;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// How long a shard polls after the last thing that happened: longer than a read of a fast device takes, short enough
/// not to starve the kernel worker that completes a durable write.
const POLL_US: Micros = 50;

/// A shard's thread, and one that its executor starts.
const THREADS_PER_RING_SHARD: usize = 2;
/// The stack of a thread that only waits.
const TRIAL_STACK_BYTES: usize = 64 << 10;

/// What the tests replace.
pub(super) type Begin<M> = fn(&mut dyn crate::io::Disk, &Options, u16, Micros) -> Result<Begun<M>>;

/// Opens the store in `dir`, without blocking the caller. Dropping the future gives it up, and waits for what is at the
/// device.
pub(super) async fn start(dir: PathBuf, options: Options, what: Wanted) -> Result<Runtime> {
    start_wanted(dir, options, what, machine::begin).await
}

/// Which store to open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wanted {
    /// The one that is there, or a new one.
    Any,
    /// One that is there.
    Existing,
}

/// The same with shards of any kind.
#[cfg(test)]
pub(super) async fn start_with<M: StateMachine>(dir: PathBuf, options: Options, begin: Begin<M>) -> Result<Runtime> {
    start_wanted(dir, options, Wanted::Any, begin).await
}

async fn start_wanted<M: StateMachine>(
    dir: PathBuf,
    options: Options,
    wanted: Wanted,
    begin: Begin<M>,
) -> Result<Runtime> {
    let (send, result) = crossbeam_channel::bounded(1);
    let ready = Arc::new(Event::new());
    let opening = Arc::<Opening>::default();
    let (wake, own) = (ready.clone(), opening.clone());
    let body = move || {
        let opened = catch_unwind(AssertUnwindSafe(|| open(&dir, &options, wanted, begin, &own)));
        let opened = opened.unwrap_or_else(|_| Err(Error::new(ErrorKind::Closed, "opening the store panicked")));
        // If nobody listens any more, the runtime is dropped here, and the store closed.
        let _ = send.send(opened);
        wake.notify(usize::MAX);
    };
    let thread = std::thread::Builder::new().name("corepage-open".into()).spawn(body);
    let mut guard = Guard::new(opening, thread.map_err(|e| Error::no_thread("the thread that opens the store", e))?);
    loop {
        let listener = ready.listen();
        match result.try_recv() {
            Ok(result) => {
                guard.finish();
                return result;
            }
            Err(crossbeam_channel::TryRecvError::Empty) => listener.await,
            Err(_) => return Err(Error::new(ErrorKind::Closed, "opening the store panicked")),
        }
    }
}

/// Why the threads of one driver did not get going.
enum Stop {
    /// The driver can't run here; nothing was touched.
    Refused(Error),
    Failed(Error),
}

fn open<M: StateMachine>(
    dir: &Path,
    options: &Options,
    wanted: Wanted,
    begin: Begin<M>,
    opening: &Opening,
) -> Result<Runtime> {
    let processors = Processors::look();
    let checked = |geometry: &Geometry| {
        let plan = cores::plan(options, &processors, geometry)?;
        options.limits(geometry, plan.shards_count).map(|_| plan)
    };
    // What can be known to be wrong is refused before a directory is made. A store that is there has a geometry of its own.
    let existing = wanted == Wanted::Existing;
    if !existing && !dir.join(FileId::Meta.to_string()).exists() {
        checked(&options.geometry)?;
    }
    let files = FileOptions { cancel: opening.cancel.clone(), existing, ..FileOptions::default() };
    let files = Files::open(dir, Access::ReadWrite, &files)?;
    let stored = stored_geometry(&files)?;
    let plan = checked(stored.as_ref().unwrap_or(&options.geometry))?;
    if stored.is_none() {
        if existing {
            return Err(files.no_store());
        }
        check_room(&files, &options.limits(&options.geometry, plan.shards_count)?)?;
    }
    let opened = drive(&files, options, &plan, begin, opening);
    if opened.is_err() {
        // Nobody was given the store: it holds nothing.
        files.remove_creation();
    }
    opened
}

/// Whether the file system has room for a new store: before its first file is made.
fn check_room(files: &Files, limits: &Limits) -> Result<()> {
    let needed = fresh::store_bytes(&limits.geometry, limits.shards_count, limits.data_extents_max);
    // What a creation that was cut short has left is used.
    let (have, free) = files.room();
    let Some(free) = free.filter(|free| free.saturating_add(have) < needed) else { return Ok(()) };
    let context = format_args!(
        "a new store with {} shards takes {} MiB in {}, where {} MiB are free; make room, or open it with fewer shards",
        limits.shards_count,
        needed.div_ceil(1 << 20),
        files.path().display(),
        free >> 20
    );
    let cause = std::io::Error::from(rustix::io::Errno::NOSPC);
    Err(Error::io(context, cause).with_kind(ErrorKind::Full))
}

/// Starts the threads of the driver that is wanted, or can be had, and opens the store on them.
fn drive<M: StateMachine>(
    files: &Arc<Files>,
    options: &Options,
    plan: &Plan,
    begin: Begin<M>,
    opening: &Opening,
) -> Result<Runtime> {
    let why = match options.driver {
        Driver::Portable => None,
        Driver::Ring | Driver::Auto => {
            let launched = match ring::probe() {
                Ok(()) => {
                    check_threads(THREADS_PER_RING_SHARD * usize::from(plan.shards_count))?;
                    Launch::new(options, plan, true, files).run(files, begin, opening)
                }
                Err(why) => Err(Stop::Refused(Error::new(ErrorKind::Unsupported, why))),
            };
            match launched {
                Ok(runtime) => return Ok(runtime),
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Refused(error)) if options.driver == Driver::Ring => return Err(error),
                Err(Stop::Refused(error)) => Some(error.to_string()),
            }
        }
    };
    if let Some(why) = &why {
        tracing::warn!("portable driver: {why}");
    }
    match Launch::new(options, plan, false, files).run(files, begin, opening) {
        Ok(mut runtime) => {
            runtime.report.disk.fallback = why;
            Ok(runtime)
        }
        Err(Stop::Refused(error) | Stop::Failed(error)) => Err(error),
    }
}

/// Whether so many threads can be started: an executor that gets none for itself panics.
fn check_threads(count: usize) -> Result<()> {
    let (end, ended) = crossbeam_channel::bounded::<()>(0);
    let start = |_| {
        let ended = ended.clone();
        let thread = std::thread::Builder::new().stack_size(TRIAL_STACK_BYTES).spawn(move || ended.recv().is_ok());
        thread.map_err(|e| Error::no_thread(format_args!("{count} threads for the shards"), e))
    };
    let mut threads = Vec::new();
    let started = (0..count).map(start).try_for_each(|thread| thread.map(|thread| threads.push(thread)));
    drop(end);
    threads.into_iter().for_each(|thread: JoinHandle<bool>| drop(thread.join()));
    started
}

/// The geometry of the store in these files, if there is one.
fn stored_geometry(files: &Arc<Files>) -> Result<Option<Geometry>> {
    let mut disk = PortableDisk::with_files(files.clone(), &PortableOptions { workers_count: 1 })?;
    recovery::stored_geometry(&mut CancellableDisk::new(&mut disk, files.cancel().clone()))
}

/// The threads of one driver, being started.
struct Launch<'a> {
    options: &'a Options,
    plan: &'a Plan,
    ring: bool,
    clock: Clock,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl<'a> Launch<'a> {
    fn new(options: &'a Options, plan: &'a Plan, ring: bool, files: &Files) -> Self {
        let (count, bytes) = (plan.shards_count, options.request_bytes_max(plan.shards_count));
        let shared = Arc::new(Shared::new(count, options.requests_max, bytes, files.cancel().clone()));
        Launch { options, plan, ring, clock: Clock::start(), shared, threads: Vec::new() }
    }

    fn pace(&self) -> Pace {
        match () {
            () if self.plan.crowded => Pace::For(0),
            () if self.options.poll => Pace::WithoutEnd,
            () => Pace::For(if self.ring { POLL_US } else { 0 }),
        }
    }

    fn run<M: StateMachine>(
        mut self,
        files: &Arc<Files>,
        begin: Begin<M>,
        opening: &Opening,
    ) -> std::result::Result<Runtime, Stop> {
        opening.launch(&self.shared);
        let (news, heard) = crossbeam_channel::unbounded();
        let mut orders = Vec::new();
        let result = self.seat_all(files, &news, &mut orders);
        drop(news);
        let result = result.and_then(|()| self.open_all(&heard, &orders, begin));
        drop(orders);
        opening.landed();
        match result {
            Ok((begun, disk)) => Ok(self.runtime(begun, disk)),
            Err(stop) => {
                match &stop {
                    // The files are needed for another try, with the other driver.
                    Stop::Refused(_) => self.shared.end_threads(),
                    Stop::Failed(_) => self.shared.abandon(),
                }
                self.threads.into_iter().for_each(|thread| drop(thread.join()));
                Err(stop)
            }
        }
    }

    fn seat_all<M: StateMachine>(
        &mut self,
        files: &Arc<Files>,
        news: &Sender<News<M>>,
        orders: &mut Vec<Sender<Orders<M>>>,
    ) -> std::result::Result<(), Stop> {
        let lanes = Lanes::all(self.plan.shards_count);
        for (shard, (lanes, pin)) in lanes.into_iter().zip(&self.plan.pins).enumerate() {
            let (give, take) = crossbeam_channel::unbounded();
            orders.push(give);
            let seat = Seat {
                id: ShardId::new(shard as u16),
                pin: *pin,
                pace: self.pace(),
                clock: self.clock,
                requests_max: self.options.requests_max,
                request_bytes_max: self.options.request_bytes_max(self.plan.shards_count),
                ring_entries: self.options.ring_entries,
                shards_count: self.plan.shards_count,
                shared: self.shared.clone(),
                lanes,
                files: files.clone(),
                news: news.clone(),
                orders: take,
            };
            let ring = self.ring;
            let body = move || occupy(seat, if ring { ring::thread } else { portable::thread });
            let thread = std::thread::Builder::new().name(format!("corepage-s{shard}")).spawn(body);
            let thread = thread.map_err(|e| Stop::Failed(Error::no_thread("a shard's thread", e)))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    fn open_all<M: StateMachine>(
        &self,
        heard: &Receiver<News<M>>,
        orders: &[Sender<Orders<M>>],
        begin: Begin<M>,
    ) -> std::result::Result<(Begun<M>, DiskReport), Stop> {
        let mut disk = None;
        for _ in orders {
            let News::Ready(report) = hear(heard)? else { unreachable!("no orders were given") };
            disk = disk.or(Some(report));
        }
        let (options, shards_count, now) = (self.options.clone(), self.plan.shards_count, self.clock.now());
        let opener: Opener<M> = Box::new(move |disk| begin(disk, &options, shards_count, now));
        let _ = orders[0].send(Orders::Begin(opener));
        let News::Began(begun) = hear(heard)? else { unreachable!("one thread has orders, and has not failed") };
        let mut begun = begun.map_err(Stop::Failed)?;
        assert_eq!(begun.machines.len(), orders.len(), "a shard for each thread");
        for (machine, give) in std::mem::take(&mut begun.machines).into_iter().zip(orders) {
            let _ = give.send(Orders::Take(Box::new(machine), begun.order.clone()));
        }
        for _ in orders {
            let News::Open = hear(heard)? else { unreachable!("each thread has its shard") };
        }
        Ok((begun, disk.unwrap_or_else(DiskReport::none)))
    }

    fn runtime<M>(self, begun: Begun<M>, disk: DiskReport) -> Runtime {
        let poll_us = match self.pace() {
            Pace::For(us) => Some(us),
            Pace::WithoutEnd => None,
        };
        let report = RuntimeReport {
            driver: if self.ring { "io_uring" } else { "portable" },
            pins: self.plan.pins.clone(),
            quota_millis: self.plan.quota_millis,
            poll_us,
            disk,
        };
        let recovery = &begun.recovery;
        tracing::info!(
            created = recovery.created,
            clean = recovery.clean,
            groups = recovery.groups_scanned,
            torn = recovery.groups_torn,
            cut = recovery.cut.get(),
            applied = recovery.commits_applied,
            dropped = recovery.commits_dropped,
            epoch = recovery.epoch,
            driver = report.driver,
            shards = self.plan.shards_count,
            "store opened"
        );
        Runtime::new(self.shared, self.threads, begun.deal, begun.order, begun.recovery, report, begun.txn_bytes_max)
    }
}

fn hear<M>(heard: &Receiver<News<M>>) -> std::result::Result<News<M>, Stop> {
    match heard.recv() {
        Ok(News::Refused(error)) => Err(Stop::Refused(error)),
        Ok(News::Failed(error)) => Err(Stop::Failed(error)),
        Ok(news) => Ok(news),
        Err(_) => {
            Err(Stop::Failed(Error::new(ErrorKind::Closed, "the shards' threads ended while they opened the store")))
        }
    }
}
