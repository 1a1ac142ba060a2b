//! `corepage verify`: reads a closed store whole and names what is damaged.
//!
//! 1. Exit code 0: every byte that the store refers to was read and is as it was written; 1:
//!    something is damaged, and the list says what; 2: the store could not be checked (there is
//!    none, it is in use, or may not be read), or the answer could not be written.
//! 2. Standard output has only the result; progress goes to stderr: a bar to a terminal, lines if
//!    requested.
//! 3. Existing keys of the JSON are never changed; new ones may be added.
//!
//! It changes and repairs nothing.

// Its speed is measured in real time.
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

/// The exit code if the store could not be checked.
const UNCHECKED: u8 = 2;
/// The interval between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the store
    #[arg(long, value_name = "DIR", default_value = "./corepage-data")]
    dir: PathBuf,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,
    /// Report the progress on stderr every five seconds, even if that is not a terminal
    #[arg(long)]
    progress: bool,
}

/// Verifies, and prints the result.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let mut shown = Shown::new(arguments, begun);
    let outcome = corepage::verify_with(&arguments.dir, |progress| shown.tell(progress));
    let bytes_read = shown.end();
    let unchecked = |failure: Failure| Failure { code: UNCHECKED, ..failure };
    let report = match outcome {
        Ok(report) => report,
        Err(error) => {
            if arguments.format == Format::Json {
                let error = error.to_string();
                let all = json!({ "state": "unchecked", "dir": arguments.dir, "error": error });
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
            "the store {dir} is damaged: the list says what that affects and how to repair it"
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
        json!({
            "structure": damage.structure,
            "file": damage.file.to_string(),
            "offset": damage.offset,
            "what": damage.what,
            "affects": damage.affects,
            "volume_bytes": damage.bytes,
            "mend": damage.mend.name(),
            "mended_by": damage.mend.to_string(),
        })
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

/// Shows the progress.
struct Shown {
    terminal: bool,
    /// `None` until there is something to show.
    bar: Option<ProgressBar>,
    lines: bool,
    begun: Instant,
    next_line: Instant,
    last: VerifyProgress,
}

impl Shown {
    fn new(arguments: &Arguments, now: Instant) -> Shown {
        let terminal = std::io::stderr().is_terminal();
        Shown {
            terminal,
            bar: None,
            lines: arguments.progress && !terminal,
            begun: now,
            next_line: now + LINE_EVERY,
            last: VerifyProgress::default(),
        }
    }

    fn tell(&mut self, progress: VerifyProgress) {
        self.last = progress;
        let VerifyProgress { bytes_done: done, bytes_total: total, .. } = progress;
        // Nothing can be shown until the total is known.
        if total == 0 {
            return;
        }
        // A store that is damaged, or was not closed cleanly, may have more to read than it
        // reports.
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

    /// Ends the display. Returns the number of bytes read.
    fn end(self) -> u64 {
        self.bar.inspect(ProgressBar::finish_and_clear);
        self.last.bytes_done
    }
}
