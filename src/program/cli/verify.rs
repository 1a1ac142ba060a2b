//! `corepage verify`: reads a closed store whole and names what is damaged.
//!
//! 1. Exit code 0: every byte the store refers to was read and is the one written; 1: something is
//!    damaged, and the list says what; 2: it could not be checked (no store there, in use, no right
//!    to read it), or the answer could not be written.
//! 2. Standard output holds the result only; how far it is goes to stderr: a bar to a terminal,
//!    lines if they are asked for.
//! 3. The JSON's keys stay; new ones may come.
//!
//! Changes nothing, and repairs nothing.

// How fast it goes is real time.
#![allow(clippy::disallowed_methods)]

use super::{Failure, Format, output, progress, size};
use corepage::{Damage, VerifyProgress, VerifyReport};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The exit code of a store that could not be checked.
const UNCHECKED: u8 = 2;
/// Between two lines that say how far it is.
const LINE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the store
    #[arg(long, value_name = "DIR", default_value = "./corepage-data")]
    dir: PathBuf,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,
    /// Say every five seconds how far it is, on stderr, also where that is no terminal
    #[arg(long)]
    progress: bool,
}

/// Prints what was found.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let mut shown = Shown::new(arguments.progress, begun);
    let outcome = corepage::verify_with(&arguments.dir, |progress| shown.tell(progress));
    let bytes_read = shown.end();
    let unchecked = |failure: Failure| Failure { code: UNCHECKED, ..failure };
    let report = match outcome {
        Ok(report) => report,
        Err(error) => {
            if arguments.format == Format::Json {
                let all = json!({ "state": "unchecked", "dir": arguments.dir, "error": error.to_string() });
                output::print(&in_lines(&all)?).map_err(unchecked)?;
            }
            return Err(unchecked(error.into()));
        }
    };
    let printed = match arguments.format {
        Format::Human => output::print(&for_people(&report)),
        Format::Json => {
            output::print(&in_lines(&in_json(arguments, &report, bytes_read, begun.elapsed()))?)
        }
    };
    if !report.is_whole() {
        let dir = arguments.dir.display();
        let text = format!(
            "the store {dir} is damaged: the list says what that affects and what mends it"
        );
        return Err(Failure::new(match printed {
            Ok(()) => text,
            Err(failure) => format!("{text}; and {}", failure.text),
        }));
    }
    printed.map_err(unchecked)?;
    Ok(ExitCode::SUCCESS)
}

fn for_people(report: &VerifyReport) -> String {
    let mut text = String::new();
    for damage in &report.damaged {
        let _ = writeln!(text, "damaged: {damage}");
    }
    if report.damaged_more > 0 {
        let _ = writeln!(text, "damaged: {} more, which are not listed", report.damaged_more);
    }
    text + &format!("{report}\n")
}

fn in_lines(value: &Value) -> Result<String, Failure> {
    Ok(serde_json::to_string_pretty(value).map_err(Failure::new)? + "\n")
}

fn in_json(arguments: &Arguments, report: &VerifyReport, bytes_read: u64, took: Duration) -> Value {
    let damage = |damage: &Damage| {
        json!({ "structure": damage.structure, "file": damage.file.to_string(), "offset": damage.offset,
                "what": damage.what, "affects": damage.affects, "volume_bytes": damage.bytes,
                "mend": damage.mend.name(), "mended_by": damage.mend.to_string() })
    };
    json!({
        "state": if report.is_whole() { "whole" } else { "damaged" },
        "dir": arguments.dir,
        "closed_cleanly": report.clean,
        "notes": report.notes,
        "damaged_count": report.damaged_count(),
        "damaged": report.damaged.iter().map(damage).collect::<Vec<_>>(),
        "pages": report.pages,
        "nodes": report.nodes,
        "summaries": report.extents,
        "log_groups": report.groups,
        "bytes_read": bytes_read,
        "seconds": took.as_secs_f64(),
    })
}

/// How far it is, for whoever watches.
struct Shown {
    terminal: bool,
    /// Once something can be said.
    bar: Option<ProgressBar>,
    lines: bool,
    begun: Instant,
    next_line: Instant,
    last: VerifyProgress,
}

impl Shown {
    fn new(asked: bool, now: Instant) -> Shown {
        let terminal = std::io::stderr().is_terminal();
        Shown {
            terminal,
            bar: None,
            lines: asked && !terminal,
            begun: now,
            next_line: now + LINE_EVERY,
            last: VerifyProgress::default(),
        }
    }

    fn tell(&mut self, progress: VerifyProgress) {
        self.last = progress;
        let VerifyProgress { bytes_done: done, bytes_total: total, .. } = progress;
        // Until it is known how much there is nothing can be said of a part.
        if total == 0 {
            return;
        }
        // A store that was damaged, or not closed cleanly, may have more to read than it says.
        let total = total.max(done);
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| progress::bytes("verifying", total));
            if bar.length() != Some(total) {
                bar.set_length(total);
            }
            bar.set_position(done);
        }
        if self.lines && Instant::now() >= self.next_line {
            let now = Instant::now();
            let seconds = now.duration_since(self.begun).as_secs_f64();
            let left = seconds * (total - done) as f64 / done.max(1) as f64;
            let (read, all, rate) =
                (size::show(done), size::show(total), size::show((done as f64 / seconds) as u64));
            output::STDERR.say(&format!(
                "verifying: {read} of {all} read, {rate}/s, about {left:.0} s left\n"
            ));
            self.next_line = now + LINE_EVERY;
        }
    }

    /// Bytes that were read.
    fn end(self) -> u64 {
        self.bar.inspect(ProgressBar::finish_and_clear);
        self.last.bytes_done
    }
}
