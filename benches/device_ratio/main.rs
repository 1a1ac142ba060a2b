//! Device ratio: the engine beside what the device gives, in one run, in alternating rounds.
//!
//! Goals: ratios that hold on a noisy machine (medians of rounds; reference and engine in turn, on
//! one file system and one core), data verified after each workload, after a close and a new start;
//! blocks that have been written before. Not goals: records, other engines, several machines.
//!
//! `cargo bench --bench device_ratio [-- --small] [--dir DIR] [--rounds N] [WORKLOAD ...]`;
//! `scripts/bench` says more.

// A bench measures time.
#![allow(clippy::disallowed_methods)]

mod clients;
mod reference;
mod report;
mod workloads;

use clap::Parser;
use report::{Report, Row};
use rustix::thread::CpuSet;
use std::path::PathBuf;
use std::time::Duration;

/// Bytes of a page.
pub const PAGE: usize = 4096;

#[derive(Parser)]
struct Arguments {
    /// Tiny sizes: shows that it works, not how fast
    #[arg(long)]
    small: bool,
    /// Where the files go [default: a temporary directory in the current one]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Alternating rounds of engine and reference
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Milliseconds of one measurement
    #[arg(long, default_value_t = 1500)]
    ms: u64,
    /// Only the engine: for a profiler
    #[arg(long)]
    alone: bool,
    /// Where the medians go, a row a line, for scripts/record
    #[arg(long)]
    rows: Option<PathBuf>,
    /// read, commit, latency, overwrite, idle [default: all]
    workloads: Vec<String>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sizes of a run, and where it is.
pub struct Plan {
    /// Pages of the volume that is read.
    pub pages: u64,
    /// Pages of the volume that is patched.
    pub hot_pages: u64,
    /// One measurement.
    pub time: Duration,
    /// Overwrites before they are measured: long enough that the space is written again, compaction
    /// included.
    pub warm: Duration,
    /// The store is idle for so long.
    pub idle: Duration,
    /// Commits of one measurement of latency.
    pub commits: usize,
    /// Alternating rounds.
    pub rounds: usize,
    /// No references.
    pub alone: bool,
    /// A directory of its own.
    pub dir: PathBuf,
    /// What shards on one core, and references, are pinned to.
    pub core: usize,
    /// Shards where all cores are used.
    pub shards: u16,
}

type Workload = fn(&Plan) -> Vec<Row>;

const WORKLOADS: [(&str, Workload); 5] = [
    ("read", workloads::cold_reads),
    ("commit", workloads::commits),
    ("latency", workloads::latency),
    ("overwrite", workloads::overwrites),
    ("idle", workloads::idle),
];

fn plan(arguments: &Arguments, dir: PathBuf) -> Plan {
    let allowed = rustix::thread::sched_getaffinity(None).ok();
    let first = allowed.and_then(|cores| (0..CpuSet::MAX_CPU).find(|core| cores.is_set(*core)));
    let (core, shards) =
        (first.unwrap_or(0), allowed.map_or(1, |cores| cores.count().clamp(1, 64)) as u16);
    let (rounds, alone) = (arguments.rounds.max(1), arguments.alone);
    let time = Duration::from_millis(arguments.ms);
    match arguments.small {
        true => Plan {
            pages: 16 << 10,
            hot_pages: 2 << 10,
            time: Duration::from_millis(150),
            warm: Duration::from_millis(150),
            idle: Duration::from_millis(500),
            commits: 50,
            rounds: 1,
            alone,
            dir,
            core,
            shards,
        },
        false => Plan {
            pages: 512 << 10,
            hot_pages: 16 << 10,
            time,
            warm: 8 * time,
            idle: Duration::from_secs(5),
            commits: 2000,
            rounds,
            alone,
            dir,
            core,
            shards,
        },
    }
}

fn main() {
    // `cargo test` gives no `--bench`, and arguments that are meant for other programs.
    let measures = std::env::args().any(|argument| argument == "--bench");
    let arguments = if measures {
        Arguments::parse()
    } else {
        Arguments::parse_from(["", "--small", "--alone"])
    };
    let unknown =
        arguments.workloads.iter().find(|name| WORKLOADS.iter().all(|(known, _)| known != name));
    if let Some(unknown) = unknown {
        let known: Vec<_> = WORKLOADS.iter().map(|(name, _)| *name).collect();
        panic!("no workload {unknown}: there are {}", known.join(", "));
    }
    let parent =
        arguments.dir.clone().unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")));
    let dir = tempfile::Builder::new()
        .prefix("corepage-bench-")
        .tempdir_in(parent)
        .expect("a directory can be made");
    let plan = plan(&arguments, dir.path().to_path_buf());
    let mut report = Report::begin(&plan, arguments.small);
    for (name, workload) in WORKLOADS {
        if arguments.workloads.is_empty() || arguments.workloads.iter().any(|wanted| wanted == name)
        {
            report.add(workload(&plan));
        }
    }
    if let Some(rows) = &arguments.rows {
        std::fs::write(rows, report.rows()).expect("the rows can be written");
    }
    report.end();
}
