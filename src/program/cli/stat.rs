//! `corepage stat`: shows what a running server does, one line a second.
//!
//! 1. Each line describes the second before it.
//! 2. JSON lines have everything that the server reports; the table has what fits into a line.

// A line a second takes real time.
#![allow(clippy::disallowed_methods)]

use super::control::Connection;
use super::{Failure, Format, output};
use crate::program::server::control::{Request, SOCKET_NAME};
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Lines between two headers.
const HEAD_EVERY: u64 = 20;

/// Commits that are answered when they are durable have columns apart from buffered ones: the
/// difference is a flush.
const HEAD: &str = "  reads commits    dev read     dev write    hit    read us     buffered us    durable us   \
     commits  check-  extents\n\x20    /s      /s  MiB/s     /s  MiB/s     /s    %   P50    P99    \
     P50    P99    P50    P99  /flush  points free/all\n";

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the store whose server to ask
    #[arg(long, value_name = "DIR", default_value = "./corepage-data", conflicts_with = "connect")]
    dir: PathBuf,
    /// The control socket of the server
    #[arg(long, value_name = "SOCKET")]
    connect: Option<PathBuf>,
    /// Lines to print [default: no limit]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Print a line for each shard, after the one for all
    #[arg(long)]
    shards: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,
}

/// Prints until it has printed all lines, or the server or the reader is gone.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let socket = arguments.connect.clone().unwrap_or_else(|| arguments.dir.join(SOCKET_NAME));
    let mut connection = Connection::open(&socket)?.ok_or_else(|| {
        Failure::new(format_args!(
            "no server answers at {}; `corepage serve --dir DIR` makes a socket control.sock in \
             DIR while it runs",
            socket.display()
        ))
    })?;
    // The first answer is the baseline.
    let request = Request::Stats { shards: arguments.shards };
    connection.ask(&request)?;
    let mut out = std::io::stdout();
    for n in 0..arguments.count.unwrap_or(u64::MAX) {
        std::thread::sleep(Duration::from_secs(1));
        let told = connection.ask(&request)?;
        let text = match arguments.format {
            Format::Json => format!("{told}\n"),
            Format::Human if n % HEAD_EVERY == 0 => HEAD.to_owned() + &lines(&told),
            Format::Human => lines(&told),
        };
        if !output::written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))? {
            // The reader is gone.
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the line for all shards, and those of single shards, if requested, with their numbers at
/// the end.
fn lines(told: &Value) -> String {
    let seconds = told["seconds"].as_f64().unwrap_or(1.0).max(0.001);
    let shards = told["shards"].as_array().map(Vec::as_slice).unwrap_or_default();
    let each =
        shards.iter().enumerate().map(|(n, shard)| format!("{} s{n}\n", line(shard, seconds)));
    format!("{}\n{}", line(told, seconds), each.collect::<String>())
}

fn line(told: &Value, seconds: f64) -> String {
    let interval = &told["interval"];
    let count = |name: &str| interval[name].as_u64().unwrap_or(0);
    let rate = |name: &str| (count(name) as f64 / seconds).round() as u64;
    let mib = |name: &str| count(name) as f64 / seconds / f64::from(1 << 20);
    let hits = match count("page_reads").saturating_sub(count("absent_reads")) {
        0 => "-".into(),
        stored => format!("{:.0}", 100.0 * count("cache_hits") as f64 / stored as f64),
    };
    // Without a flush of the log there is no ratio.
    let per_flush = match count("log_flushes") {
        0 => "-".into(),
        _ => format!("{:.1}", told["commits_per_flush"].as_f64().unwrap_or(0.0)),
    };
    let us = |what: &str, percentile: &str| match interval[what]["count"].as_u64() {
        None | Some(0) => "-".into(),
        Some(_) => interval[what][percentile].to_string(),
    };
    format!(
        "{:>7} {:>7} {:>6.1} {:>6} {:>6.1} {:>6} {:>4} {:>5} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} \
         {:>7} {:>4}/{}",
        rate("page_reads"),
        rate("commits"),
        mib("device_bytes_read"),
        rate("device_reads"),
        mib("device_bytes_written"),
        rate("device_writes"),
        hits,
        us("read_latency", "p50_us"),
        us("read_latency", "p99_us"),
        us("buffered_latency", "p50_us"),
        us("buffered_latency", "p99_us"),
        us("commit_latency", "p50_us"),
        us("commit_latency", "p99_us"),
        per_flush,
        count("checkpoints"),
        count("extents_free"),
        count("extents_total"),
    )
}
