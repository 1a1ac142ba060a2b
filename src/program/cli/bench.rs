//! `corepage bench`: measures how fast a store is on this machine.
//!
//! ```text
//! prefill (write every page once) --> warm --> measure --> close, open, verify every page
//!   --> print --> remove what was made
//! ```
//! 1. It works on a volume of its own, `corepage-bench`, and removes it, even after an error or a
//!    signal; without `--dir` it uses a store of its own and removes that. Only if pages have wrong
//!    contents does everything stay, for examination.
//! 2. Standard output has results only; progress goes to stderr, and only to a terminal.
//! 3. A result that could not be verified is not reported: the exit code is 1. A verified one is
//!    printed whatever happens afterwards: if the volume can't be removed, that is a warning, and
//!    the exit code stays 0.
//! 4. SIGINT and SIGTERM end it cleanly; a second one ends it at once.

// Progress is measured by the clock.
#![allow(clippy::disallowed_methods)]

use super::interrupt::{Interrupt, Missing};
use super::{Failure, Format, memory, output, progress, size};
use crate::program::bench::{BenchVolume, CallSite, NAME, Operation, Outcome, Run};
use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, TableStyle};
use corepage::ShardStats;
use corepage::probe::{AvailableMemory, Machine};
use corepage::{Error, ErrorKind, Options};
use futures_lite::future::block_on;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Read random pages
    Read,
    /// Write random pages, each in a durable commit
    Write,
    /// Write 128 bytes of random pages, each in a durable commit
    Commit,
    /// Reads, then writes, at depths 1, 2, 4 … 256
    QdSweep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum From {
    /// Tasks on the shards' own threads
    Shard,
    /// Threads of their own (see --clients)
    Thread,
}

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// What to do
    workload: Workload,
    /// Directory of a store to use, made if it does not exist [default: a temporary one here]. Its
    /// volumes are left alone; its files keep the size that the benchmark's own volume needed
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Size of the volume that the benchmark uses
    #[arg(long, value_name = "SIZE", value_parser = size::parse_volume, default_value = "512M")]
    size: u64,
    /// Memory of the store: if it is less than the size, reads come from the device
    #[arg(long, value_name = "SIZE", value_parser = memory::parse_of_store, default_value = "64M")]
    memory: u64,
    /// How much of the data space must be live before it grows: the cost of overwriting depends on
    /// it most. The output says how much is live
    #[arg(long, value_name = "PERCENT", default_value_t = Options::default().fill_percent,
        value_parser = clap::value_parser!(u32).range(30..=85))]
    fill_percent: u32,
    /// Operations in flight at a time
    #[arg(long, value_name = "N", default_value_t = 32,
        value_parser = clap::value_parser!(u32).range(1..=65_536))]
    depth: u32,
    /// Threads that call the store, with --from thread
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=256))]
    clients: u32,
    /// How long to measure; for qd-sweep, how long at each depth
    #[arg(long, value_name = "SECONDS", default_value_t = 5,
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Where the store is called from
    #[arg(long, value_enum, default_value_t = From::Shard)]
    from: From,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,
}

/// Before an operation is measured, it runs for this fraction of the time, at most for a second.
const WARM_PART: u32 = 4;
const WARM_MAX: Duration = Duration::from_secs(1);

/// The interval at which the progress bar is updated.
const TICK: Duration = Duration::from_millis(200);

/// Depths of a sweep.
const DEPTHS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

impl Arguments {
    fn depth(&self) -> usize {
        match self.workload {
            Workload::QdSweep => DEPTHS[DEPTHS.len() - 1],
            _ => self.depth as usize,
        }
    }

    fn check(&self) -> Result<(), Failure> {
        let needed = (self.depth() as u64 + u64::from(self.clients)) * 4096;
        if self.size < needed {
            return Err(Failure::usage(format_args!(
                "--size: {} are too little for a depth of {}: each operation in flight needs a \
                 page of its own, so at least {} ({needed}) are needed",
                size::show(self.size),
                self.depth(),
                size::show(needed)
            )));
        }
        memory::check_of_store(self.memory, &AvailableMemory::look())?
            .into_iter()
            .for_each(output::warn);
        Ok(())
    }

    /// The measurements, in order.
    fn steps(&self) -> Vec<(Operation, usize)> {
        let at = |operation| DEPTHS.iter().map(move |depth| (operation, *depth));
        match self.workload {
            Workload::Read => vec![(Operation::Read, self.depth())],
            Workload::Write => vec![(Operation::Write, self.depth())],
            Workload::Commit => vec![(Operation::Commit, self.depth())],
            Workload::QdSweep => at(Operation::Read).chain(at(Operation::Write)).collect(),
        }
    }
}

/// One measurement, in numbers.
struct Point {
    operation: Operation,
    depth: usize,
    outcome: Outcome,
    /// What the store counted during the measurement.
    counted: ShardStats,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    arguments.check()?;
    let interrupt = Interrupt::watch()?;
    let stop = interrupt.flag().clone();
    // The directory is removed when it is dropped, however this ends.
    let (mut own, mut dir) = (None, arguments.dir.clone().unwrap_or_default());
    if arguments.dir.is_none() {
        let made = tempfile::Builder::new().prefix("corepage-bench-").tempdir_in(".");
        let made = made.map_err(|error| {
            Failure::new(format_args!(
                "no directory for the store can be made here ({error}): name one with --dir"
            ))
        })?;
        dir = made.path().to_path_buf();
        own = Some(made);
    }
    let machine = Machine::look(&dir);
    let options = Options {
        memory_bytes: arguments.memory,
        fill_percent: arguments.fill_percent,
        ..Options::default()
    };
    let again = interrupt.clone();
    let open = Box::new(move |dir: &Path, options| again.open(dir, options, Missing::Created));
    let made = BenchVolume::make(&dir, options, arguments.size, open)
        .map_err(|error| interrupt.explains(error))?;
    let mut bench = Arc::new(made);
    let store = bench.store.report().to_string();
    let outcome = prefill_and_measure(arguments, &mut bench, &stop);
    if let Err(error) = &outcome
        && error.kind() == ErrorKind::Corrupt
    {
        let dir = own.map_or(dir, tempfile::TempDir::keep);
        let dir = dir.display();
        let text = format_args!(
            "{error}; everything is left in {dir}, to be examined: `corepage verify --dir {dir}`"
        );
        return Err(Failure::new(text));
    }
    let bench = Arc::into_inner(bench)
        .ok_or_else(|| Failure::new("a task of the benchmark did not end"))?;
    let printed = outcome
        .map_err(|error| interrupt.explains(error))
        .and_then(|points| print(arguments, &points, &machine, &store));
    if own.is_some() {
        // Everything is removed with its directory.
        bench.close().unwrap_or_else(|error| {
            output::warn(format_args!("the store was not closed cleanly: {error}"))
        });
    } else if let Err(error) = bench.clear(&stop) {
        output::warn(format_args!(
            "the volume {NAME} may be left in {}, the next benchmark removes it: {error}",
            dir.display()
        ));
    }
    printed?;
    Ok(ExitCode::SUCCESS)
}

fn print(
    arguments: &Arguments,
    points: &[Point],
    machine: &Machine,
    store: &str,
) -> Result<(), Failure> {
    let text = match arguments.format {
        Format::Json => {
            serde_json::to_string_pretty(&in_json(arguments, points, machine, store))
                .map_err(Failure::new)?
                + "\n"
        }
        Format::Human => for_people(arguments, points, store),
    };
    output::print(&text)
}

/// Prefills, measures and verifies. `Corrupt`: some page has a wrong content.
fn prefill_and_measure(
    arguments: &Arguments,
    bench: &mut Arc<BenchVolume>,
    stop: &Arc<AtomicBool>,
) -> corepage::Result<Vec<Point>> {
    let watch = |bar: &ProgressBar, done: u64| {
        bar.set_position(done);
        if stop.load(Ordering::Relaxed) { Err(interrupted()) } else { Ok(()) }
    };
    let bar = progress::bar("writing every page once", bench.pages);
    bench.prefill(|done| watch(&bar, done))?;
    bar.finish_and_clear();
    let points = measure(arguments, bench, stop)?;
    let bar = progress::bar("verifying", bench.pages);
    let bench = Arc::get_mut(bench).expect("all that was measured has ended");
    let mut opened = false;
    bench.verify(|done| {
        // Restart the clock: closing and opening the store says nothing about how fast pages are
        // read.
        if !std::mem::replace(&mut opened, true) {
            bar.reset_eta();
        }
        watch(&bar, done)
    })?;
    bar.finish_and_clear();
    Ok(points)
}

fn interrupted() -> Error {
    Error::new(ErrorKind::Closed, "interrupted; there is no result")
}

/// A progress bar that follows the clock, since measurements take a fixed time. It disappears when
/// this is dropped.
struct Timed {
    bar: ProgressBar,
    /// Dropping it ends the thread.
    ends: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Timed {
    fn begin(what: &'static str, length: Duration) -> Timed {
        let bar = progress::bar(what, length.as_millis() as u64);
        let (ends, ended) = channel();
        let (own, begun) = (bar.clone(), Instant::now());
        let tick = move || {
            while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                own.set_position(begun.elapsed().min(length).as_millis() as u64);
            }
        };
        // Only a terminal shows it: elsewhere, or without a thread, it does not move.
        let shown = !bar.is_hidden();
        let thread = shown
            .then(|| std::thread::Builder::new().name("progress".into()).spawn(tick).ok())
            .flatten();
        Timed { bar, ends: Some(ends), thread }
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        self.ends = None;
        let _ = self.thread.take().map(JoinHandle::join);
        self.bar.finish_and_clear();
    }
}

fn measure(
    arguments: &Arguments,
    bench: &Arc<BenchVolume>,
    stop: &Arc<AtomicBool>,
) -> corepage::Result<Vec<Point>> {
    let steps = arguments.steps();
    let time = Duration::from_secs(arguments.seconds);
    let warming = WARM_MAX.min(time / WARM_PART);
    // Each kind of operation is warmed up once.
    let kinds = 1 + steps.windows(2).filter(|pair| pair[0].0 != pair[1].0).count() as u32;
    let _shown = Timed::begin("measuring", time * steps.len() as u32 + warming * kinds);
    let call_site = match arguments.from {
        From::Shard => CallSite::Shards,
        From::Thread => CallSite::Threads(arguments.clients as usize),
    };
    let (mut points, mut warm) = (Vec::new(), None);
    for (n, (operation, depth)) in steps.into_iter().enumerate() {
        let run = Run { operation, call_site, depth, time, seed: 1 + n as u64, stop: stop.clone() };
        if warm.replace(operation) != Some(operation) {
            Run { time: warming, ..run.clone() }.measure(bench)?;
        }
        let before = block_on(bench.store.stats())?;
        tracing::info!(operation = name(operation), depth, seconds = time.as_secs(), "measuring");
        let outcome = run.measure(bench)?;
        let counted = block_on(bench.store.stats())?.since(&before);
        if stop.load(Ordering::Relaxed) {
            return Err(interrupted());
        }
        points.push(Point { operation, depth, outcome, counted });
    }
    Ok(points)
}

fn name(operation: Operation) -> &'static str {
    match operation {
        Operation::Read => "read",
        Operation::Write => "write",
        Operation::Commit => "commit",
    }
}

fn latency(outcome: &Outcome) -> Value {
    json!({
        "p50": outcome.percentile(50.0),
        "p99": outcome.percentile(99.0),
        "p999": outcome.percentile(99.9),
        "max": outcome.latency.max() as f64 / 1000.0,
        "mean": outcome.latency.mean() / 1000.0,
    })
}

/// Existing keys are never changed; new ones may be added.
fn in_json(arguments: &Arguments, points: &[Point], machine: &Machine, store: &str) -> Value {
    let best = points.iter().max_by(|a, b| a.outcome.rate().total_cmp(&b.outcome.rate()));
    let from = if arguments.from == From::Shard { "shard" } else { "thread" };
    let workload = match arguments.workload {
        Workload::QdSweep => "qd-sweep",
        _ => best.map_or("", |best| name(best.operation)),
    };
    let point = |p: &Point| {
        json!({
            "workload": name(p.operation),
            "depth": p.depth,
            "ops_per_s": p.outcome.rate(),
            "operations": p.outcome.operations,
            "latency_us": latency(&p.outcome),
            "write_amplification": p.counted.write_amplification(),
            "live_share": p.counted.live_share(),
        })
    };
    let mut all = json!({
        "workload": workload,
        "ops_per_s": best.map(|best| best.outcome.rate()),
        "latency_us": best.map(|best| latency(&best.outcome)),
        "write_amplification": best.map(|best| best.counted.write_amplification()),
        "live_share": best.map(|best| best.counted.live_share()),
        "verified": true,
        "depth": best.map(|best| best.depth),
        "clients": arguments.clients,
        "from": from,
        "seconds": arguments.seconds,
        "size_bytes": arguments.size,
        "memory_bytes": arguments.memory,
        "dir": arguments.dir,
        "volume": NAME,
        "store": store,
        "machine": machine,
    });
    if arguments.workload == Workload::QdSweep {
        all["points"] = points.iter().map(point).collect();
    }
    all
}

fn for_people(arguments: &Arguments, points: &[Point], store: &str) -> String {
    let mut table = Table::new();
    table.load_style(TableStyle::new());
    table.set_header(["", "DEPTH", "OPS/S", "P50 µs", "P99 µs", "P99.9 µs", "MAX µs"]);
    for Point { operation, depth, outcome, .. } in points {
        let us = |us: f64| if us < 100.0 { format!("{us:.1}") } else { format!("{us:.0}") };
        let percentile = |percent| us(outcome.percentile(percent));
        let max = us(outcome.latency.max() as f64 / 1000.0);
        let (rate, depth) = (format!("{:.0}", outcome.rate()), depth.to_string());
        table.add_row([
            name(*operation).into(),
            depth,
            rate,
            percentile(50.0),
            percentile(99.0),
            percentile(99.9),
            max,
        ]);
    }
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    table
        .column_iter_mut()
        .skip(1)
        .for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let from = match arguments.from {
        From::Shard => "tasks on the shards".to_owned(),
        From::Thread => format!("{} thread(s)", arguments.clients),
    };
    let place = match &arguments.dir {
        Some(dir) => {
            format!("in {} on a volume of its own, {NAME}, which is deleted again; ", dir.display())
        }
        None => String::new(),
    };
    // Taken from the last point, since a sweep ends with writes.
    let written = points.last().filter(|point| point.operation != Operation::Read).map_or(
        String::new(),
        |Point { counted, .. }| {
            let (amplification, live) =
                (counted.write_amplification(), 100.0 * counted.live_share());
            format!(
                "; {amplification:.2} bytes written a byte with {live:.0} % of the data space live"
            )
        },
    );
    format!(
        "{}\n\n{place}from {from}; {} of pages, {} of memory{written}; all {} pages verified \
         after a close and a new start\n{store}\n",
        table.trim_fmt(),
        size::show(arguments.size),
        size::show(arguments.memory),
        arguments.size / 4096,
    )
}
