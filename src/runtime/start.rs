//! Starts a store: a coordinator opens the files, starts a thread for each shard, has one of them
//! begin to open the store, hands each thread its shard, and waits until all are open.
//!
//! Invariants
//! 1. Nothing in the store is touched before every thread has what its driver needs, so the
//!    portable driver can still be used instead.
//! 2. If one shard can't be opened, all threads have ended and the files are released before the
//!    error is returned.
//! 3. A caller that gives up leaves no store open: everything ends as soon as the device has
//!    answered, as in a crash.
//! 4. The number of shards is settled once the store's geometry is known, before any thread is
//!    started.

use super::bootstrap::{self, Bootstrap};
use super::clock::Clock;
use super::cores::{self, CorePlan, Processors};
use super::event_loop::PollPolicy;
use super::handle::Runtime;
use super::opening::{OpenGuard, PendingOpen};
use super::report::RuntimeReport;
use super::shard_thread::{
    BootstrapTask, StartupCommand, StartupStatus, ThreadContext, thread_main,
};
use super::shared::RuntimeShared;
use super::{portable, ring};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::options::{Driver, Geometry, Limits, Options};
use crate::base::{Micros, ShardId};
use crate::engine::StateMachine;
use crate::engine::recovery;
use crate::format::fresh;
use crate::io::{
    Access, CancellableDisk, Creation, DiskReport, FileId, FileOptions, Files, PortableDisk,
    PortableOptions,
};
use crate::mesh::Channels;
use crossbeam::channel::{Receiver, Sender};
use event_listener::Event;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// How long a shard polls after its last event: longer than a read from a fast device takes, short
/// enough not to starve the kernel worker that completes a durable write.
const POLL_US: Micros = 50;

/// A shard's own thread, and one that its executor starts.
const THREADS_PER_RING_SHARD: usize = 2;
/// The stack of a thread that only waits.
const TRIAL_STACK_BYTES: usize = 64 << 10;

/// The function that makes the shards; tests replace it.
pub(super) type BootstrapFn<M> =
    fn(&mut dyn crate::io::Disk, &Options, u16, Micros) -> Result<Bootstrap<M>>;

/// Opens the store in `dir` without blocking the caller. Dropping the future cancels that, and
/// waits for the operations at the device.
pub(crate) async fn start(dir: PathBuf, options: Options, mode: OpenMode) -> Result<Runtime> {
    start_in_mode(dir, options, mode, bootstrap::bootstrap).await
}

/// Which store to open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum OpenMode {
    /// The existing one, or a new one.
    CreateIfMissing,
    /// Only an existing one.
    MustExist,
}

/// Opens a store with shards of any kind.
#[cfg(test)]
pub(super) async fn start_with<M: StateMachine>(
    dir: PathBuf,
    options: Options,
    bootstrap_fn: BootstrapFn<M>,
) -> Result<Runtime> {
    start_in_mode(dir, options, OpenMode::CreateIfMissing, bootstrap_fn).await
}

async fn start_in_mode<M: StateMachine>(
    dir: PathBuf,
    options: Options,
    mode: OpenMode,
    bootstrap_fn: BootstrapFn<M>,
) -> Result<Runtime> {
    let (send, result) = crossbeam::channel::bounded(1);
    let ready = Arc::new(Event::new());
    let opening = Arc::<PendingOpen>::default();
    let (wake, own) = (ready.clone(), opening.clone());
    let body = move || {
        let opened =
            catch_unwind(AssertUnwindSafe(|| open(&dir, &options, mode, bootstrap_fn, &own)));
        let opened = opened.unwrap_or_else(|_| Err(Error::internal("opening the store panicked")));
        // If the caller has gone, the runtime is dropped here, which ends the store.
        let _ = send.send(opened);
        wake.notify(usize::MAX);
    };
    let thread = std::thread::Builder::new().name("corepage-open".into()).spawn(body);
    let mut guard = OpenGuard::new(
        opening,
        thread.map_err(|e| Error::no_thread("the thread that opens the store", e))?,
    );
    loop {
        let listener = ready.listen();
        match result.try_recv() {
            Ok(result) => {
                guard.finish();
                return result;
            }
            Err(crossbeam::channel::TryRecvError::Empty) => listener.await,
            Err(_) => return Err(Error::internal("opening the store panicked")),
        }
    }
}

/// Why the threads of one driver have not opened the store.
enum StartError {
    /// The driver can't run here; the store was not touched.
    DriverUnavailable(Error),
    Failed(Error),
}

fn open<M: StateMachine>(
    dir: &Path,
    options: &Options,
    mode: OpenMode,
    bootstrap_fn: BootstrapFn<M>,
    opening: &PendingOpen,
) -> Result<Runtime> {
    let processors = Processors::detect();
    let checked = |geometry: &Geometry| {
        let plan = cores::plan(options, &processors, geometry)?;
        options.limits(geometry, plan.shards_count).map(|_| plan)
    };
    // What is known to be wrong is refused before a directory is made. An existing store has a
    // geometry of its own.
    let existing = mode == OpenMode::MustExist;
    if !existing && !dir.join(FileId::Meta.to_string()).exists() {
        checked(&options.geometry)?;
    }
    let creation = if existing { Creation::Refused } else { Creation::Allowed };
    let files = FileOptions { cancel: opening.cancel.clone(), creation, ..FileOptions::default() };
    let files = Files::open(dir, Access::ReadWrite, &files)?;
    let stored = stored_geometry(&files)?;
    let plan = checked(stored.as_ref().unwrap_or(&options.geometry))?;
    if stored.is_none() {
        if existing {
            return Err(files.no_store());
        }
        check_room(&files, &options.limits(&options.geometry, plan.shards_count)?)?;
    }
    let opened = open_on_threads(&files, options, &plan, bootstrap_fn, opening);
    if opened.is_err() {
        // No caller has used the store, so it holds nothing.
        files.remove_creation();
    }
    opened
}

/// Checks, before its first file is made, that the file system has room for a new store.
fn check_room(files: &Files, limits: &Limits) -> Result<()> {
    let needed = fresh::store_bytes(&limits.geometry, limits.shards_count, limits.data_extents_max);
    // What an interrupted creation has left is reused.
    let room = files.room();
    let Some(free) = room.free.filter(|free| free.saturating_add(room.used) < needed) else {
        return Ok(());
    };
    let context = format_args!(
        "a new store with {} shards takes {} MiB in {} (and up to {} more as its logs \
         grow), where {} MiB are free; free some space, or open it with fewer shards",
        limits.shards_count,
        needed.div_ceil(1 << 20),
        files.path().display(),
        fresh::log_growth_bytes(&limits.geometry, limits.shards_count) >> 20,
        free >> 20
    );
    let cause = std::io::Error::from(rustix::io::Errno::NOSPC);
    Err(Error::io(context, cause).with_kind(ErrorKind::Full))
}

/// Starts the threads of the requested or the best available driver, and opens the store on them.
fn open_on_threads<M: StateMachine>(
    files: &Arc<Files>,
    options: &Options,
    plan: &CorePlan,
    bootstrap_fn: BootstrapFn<M>,
    opening: &PendingOpen,
) -> Result<Runtime> {
    let why = match options.driver {
        Driver::Portable => None,
        Driver::Ring | Driver::Auto => {
            let launched = match ring::probe() {
                Ok(()) => {
                    check_threads(THREADS_PER_RING_SHARD * usize::from(plan.shards_count))?;
                    ThreadLauncher::new(options, plan, DriverKind::Ring, files).run(
                        files,
                        bootstrap_fn,
                        opening,
                    )
                }
                Err(why) => {
                    Err(StartError::DriverUnavailable(Error::new(ErrorKind::Unsupported, why)))
                }
            };
            match launched {
                Ok(runtime) => return Ok(runtime),
                Err(StartError::Failed(error)) => return Err(error),
                Err(StartError::DriverUnavailable(error)) if options.driver == Driver::Ring => {
                    return Err(error);
                }
                Err(StartError::DriverUnavailable(error)) => Some(error.to_string()),
            }
        }
    };
    if let Some(why) = &why {
        tracing::warn!("portable driver: {why}");
    }
    match ThreadLauncher::new(options, plan, DriverKind::Portable, files).run(
        files,
        bootstrap_fn,
        opening,
    ) {
        Ok(mut runtime) => {
            runtime.report_mut().disk.fallback = why;
            Ok(runtime)
        }
        Err(StartError::DriverUnavailable(error) | StartError::Failed(error)) => Err(error),
    }
}

/// Checks that `count` threads can be started: an executor panics if it can't start its own thread.
fn check_threads(count: usize) -> Result<()> {
    let (end, ended) = crossbeam::channel::bounded::<()>(0);
    let start = |_| {
        let ended = ended.clone();
        let thread = std::thread::Builder::new()
            .stack_size(TRIAL_STACK_BYTES)
            .spawn(move || ended.recv().is_ok());
        thread.map_err(|e| Error::no_thread(format_args!("{count} threads for the shards"), e))
    };
    let mut threads = Vec::new();
    let started =
        (0..count).map(start).try_for_each(|thread| thread.map(|thread| threads.push(thread)));
    drop(end);
    threads.into_iter().for_each(|thread: JoinHandle<bool>| drop(thread.join()));
    started
}

/// The geometry of the store in these files, if there is one.
fn stored_geometry(files: &Arc<Files>) -> Result<Option<Geometry>> {
    let mut disk = PortableDisk::with_files(files.clone(), &PortableOptions { workers_count: 1 })?;
    recovery::stored_geometry(&mut CancellableDisk::new(&mut disk, files.cancel().clone()))
}

/// The driver whose threads are started, once it is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum DriverKind {
    Ring,
    Portable,
}

impl DriverKind {
    fn name(self) -> &'static str {
        match self {
            DriverKind::Ring => "io_uring",
            DriverKind::Portable => "portable",
        }
    }

    /// How long the threads spin unless an option says otherwise: the portable driver's I/O threads
    /// need the cores.
    fn poll_us(self) -> Micros {
        match self {
            DriverKind::Ring => POLL_US,
            DriverKind::Portable => 0,
        }
    }
}

/// Starts the threads of one driver.
struct ThreadLauncher<'a> {
    options: &'a Options,
    plan: &'a CorePlan,
    driver: DriverKind,
    clock: Clock,
    shared: Arc<RuntimeShared>,
    threads: Vec<JoinHandle<()>>,
}

impl<'a> ThreadLauncher<'a> {
    fn new(options: &'a Options, plan: &'a CorePlan, driver: DriverKind, files: &Files) -> Self {
        let (count, bytes) = (plan.shards_count, options.request_bytes_max(plan.shards_count));
        let shared = Arc::new(RuntimeShared::new(
            count,
            options.requests_max,
            bytes,
            files.cancel().clone(),
        ));
        ThreadLauncher { options, plan, driver, clock: Clock::start(), shared, threads: Vec::new() }
    }

    fn poll_policy(&self) -> PollPolicy {
        match () {
            () if self.plan.oversubscribed => PollPolicy::SpinFor(0),
            () if self.options.poll => PollPolicy::SpinForever,
            () => PollPolicy::SpinFor(self.driver.poll_us()),
        }
    }

    fn run<M: StateMachine>(
        mut self,
        files: &Arc<Files>,
        bootstrap_fn: BootstrapFn<M>,
        opening: &PendingOpen,
    ) -> std::result::Result<Runtime, StartError> {
        opening.threads_starting(&self.shared);
        let (status, statuses) = crossbeam::channel::unbounded();
        let mut commands = Vec::new();
        let result = self.spawn_threads(files, &status, &mut commands);
        drop(status);
        let result = result.and_then(|()| self.open_shards(&statuses, &commands, bootstrap_fn));
        drop(commands);
        opening.threads_settled();
        match result {
            Ok((bootstrap, disk)) => Ok(self.runtime(bootstrap, disk)),
            Err(error) => {
                match &error {
                    // The files are needed for another attempt, with the other driver.
                    StartError::DriverUnavailable(_) => self.shared.end_threads(),
                    StartError::Failed(_) => self.shared.abandon(),
                }
                self.threads.into_iter().for_each(|thread| drop(thread.join()));
                Err(error)
            }
        }
    }

    fn spawn_threads<M: StateMachine>(
        &mut self,
        files: &Arc<Files>,
        status: &Sender<StartupStatus<M>>,
        commands: &mut Vec<Sender<StartupCommand<M>>>,
    ) -> std::result::Result<(), StartError> {
        let channels = Channels::all(self.plan.shards_count);
        for (shard, (channels, pin)) in channels.into_iter().zip(&self.plan.pins).enumerate() {
            let (give, take) = crossbeam::channel::unbounded();
            commands.push(give);
            let context = ThreadContext {
                id: ShardId::new(shard as u16),
                pin: *pin,
                poll_policy: self.poll_policy(),
                clock: self.clock,
                requests_max: self.options.requests_max,
                request_bytes_max: self.options.request_bytes_max(self.plan.shards_count),
                ring_entries: self.options.ring_entries,
                shards_count: self.plan.shards_count,
                shared: self.shared.clone(),
                channels,
                files: files.clone(),
                status: status.clone(),
                commands: take,
            };
            let main = match self.driver {
                DriverKind::Ring => ring::thread,
                DriverKind::Portable => portable::thread,
            };
            let body = move || thread_main(context, main);
            let thread = std::thread::Builder::new().name(format!("corepage-s{shard}")).spawn(body);
            let thread =
                thread.map_err(|e| StartError::Failed(Error::no_thread("a shard's thread", e)))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    fn open_shards<M: StateMachine>(
        &self,
        statuses: &Receiver<StartupStatus<M>>,
        commands: &[Sender<StartupCommand<M>>],
        bootstrap_fn: BootstrapFn<M>,
    ) -> std::result::Result<(Bootstrap<M>, DiskReport), StartError> {
        let mut disk = None;
        for _ in commands {
            let StartupStatus::Ready(report) = recv_status(statuses)? else {
                unreachable!("no commands were given")
            };
            disk = disk.or(Some(report));
        }
        let (options, shards_count, now) =
            (self.options.clone(), self.plan.shards_count, self.clock.now());
        let task: BootstrapTask<M> =
            Box::new(move |disk| bootstrap_fn(disk, &options, shards_count, now));
        let _ = commands[0].send(StartupCommand::Bootstrap(task));
        let StartupStatus::Bootstrapped(bootstrap) = recv_status(statuses)? else {
            unreachable!("one thread has commands, and has not failed")
        };
        let mut bootstrap = bootstrap.map_err(StartError::Failed)?;
        assert_eq!(bootstrap.shards.len(), commands.len(), "a shard for each thread");
        for (shard, give) in std::mem::take(&mut bootstrap.shards).into_iter().zip(commands) {
            let _ = give.send(StartupCommand::TakeShard(Box::new(shard), bootstrap.order.clone()));
        }
        for _ in commands {
            let StartupStatus::Open = recv_status(statuses)? else {
                unreachable!("each thread has its shard")
            };
        }
        Ok((bootstrap, disk.unwrap_or_else(DiskReport::none)))
    }

    fn runtime<M>(self, bootstrap: Bootstrap<M>, disk: DiskReport) -> Runtime {
        let poll_us = match self.poll_policy() {
            PollPolicy::SpinFor(us) => Some(us),
            PollPolicy::SpinForever => None,
        };
        let report = RuntimeReport {
            driver: self.driver.name(),
            pins: self.plan.pins.clone(),
            quota_millis: self.plan.quota_millis,
            poll_us,
            disk,
        };
        let recovery = &bootstrap.recovery;
        tracing::info!(
            created = recovery.created,
            clean = recovery.clean,
            groups = recovery.groups_scanned,
            torn = recovery.groups_torn,
            recovered_lsn = recovery.recovered_lsn.get(),
            applied = recovery.commits_applied,
            dropped = recovery.commits_dropped,
            epoch = recovery.epoch,
            driver = report.driver,
            shards = self.plan.shards_count,
            "store opened"
        );
        Runtime::new(
            self.shared,
            self.threads,
            bootstrap.shard_map,
            bootstrap.order,
            bootstrap.recovery,
            report,
            bootstrap.txn_bytes_max,
        )
    }
}

fn recv_status<M>(
    statuses: &Receiver<StartupStatus<M>>,
) -> std::result::Result<StartupStatus<M>, StartError> {
    match statuses.recv() {
        Ok(StartupStatus::Refused(error)) => Err(StartError::DriverUnavailable(error)),
        Ok(StartupStatus::Failed(error)) => Err(StartError::Failed(error)),
        Ok(status) => Ok(status),
        Err(_) => Err(StartError::Failed(Error::internal(
            "the shards' threads ended while they opened the store, without reporting why",
        ))),
    }
}
