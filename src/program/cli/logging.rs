//! The log on stderr: which lines are logged, how many of a kind, and what a panic writes there.
//!
//! 1. `RUST_LOG` selects the lines. A value that makes no sense is refused and does not mean the
//!    default: whoever set it would look for lines that never appear.
//! 2. Lines of one kind (from one place in the code) are limited: [`BURST`] at once, then one in
//!    each [`PERIOD`], preceded by the number of lines left out. `debug` and `trace` are not
//!    limited.
//! 3. Nothing that happens to stderr ends or delays a thread (see `output`).
//! 4. A panic is one line that names the thread and the place: it is a bug of the program, and a
//!    report needs both.
//!
//! It does *not* know what the lines mean.

// The log of a running process uses real time.
#![allow(clippy::disallowed_methods)]

use super::Failure;
use super::output::STDERR;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::BTreeMap;
use std::fmt;
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{DefaultFields, Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent};
use tracing_subscriber::registry::LookupSpan;

/// Lines of a kind at once: enough to see several clients fail, few enough not to fill a disk.
const BURST: u32 = 10;
/// After the burst, one line of a kind is logged in this time.
const PERIOD: Duration = Duration::from_secs(10);
/// Where lines come from, for `RUST_LOG`.
const TARGETS: [&str; 2] = ["corepage", "glommio"];

/// Begins to log at `level`, or as `RUST_LOG` selects.
///
/// # Errors
/// `RUST_LOG` is not a valid filter.
pub fn start(level: &str) -> Result<(), Failure> {
    let filter = filter(
        std::env::var_os("RUST_LOG").as_deref().map(|text| text.to_string_lossy()).as_deref(),
        level,
    )?;
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    let ansi = std::io::stderr().is_terminal() && !set("NO_COLOR") && !dumb;
    // If stderr is broken, the log library would report that on stderr, with a panic.
    let subscriber = tracing_subscriber::fmt()
        .fmt_fields(DefaultFields::new())
        .with_env_filter(filter)
        .with_writer(|| &STDERR)
        .with_ansi(ansi)
        .log_internal_errors(false)
        .event_format(Bounded {
            format: Format::default().with_ansi(ansi),
            kinds: Mutex::default(),
            begun: Instant::now(),
        });
    subscriber.init();
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let trace = Backtrace::capture();
        let trace = match trace.status() {
            BacktraceStatus::Captured => format!("\n{trace}"),
            _ => String::new(),
        };
        let name = thread.name().unwrap_or("without a name");
        STDERR.say(&format!(
            "error: a bug in corepage, please report it: thread {name}: {panic}{trace}\n"
        ));
    }));
    Ok(())
}

/// The filter that `RUST_LOG` sets.
fn filter(text: Option<&str>, level: &str) -> Result<EnvFilter, Failure> {
    let Some(text) = text.filter(|text| !text.trim().is_empty()) else {
        return Ok(EnvFilter::new(level));
    };
    let refused = |why: &dyn fmt::Display| {
        Failure::usage(format_args!(
            "RUST_LOG={text}: {why}; use error, warn, info, debug, trace or off, or corepage=debug"
        ))
    };
    for word in
        text.split(',').map(str::trim).filter(|word| !word.contains(['=', '[']) && !word.is_empty())
    {
        // A word that is not a level would be taken for the name of some module, and none of our
        // lines would be logged.
        if word.parse::<LevelFilter>().is_err()
            && !TARGETS.iter().any(|target| word.starts_with(target))
        {
            return Err(refused(&format_args!("{word} is not a level")));
        }
    }
    text.parse().map_err(|error| refused(&error))
}

/// Lines of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Kind {
    /// How much of the burst is used.
    used: u32,
    /// When the use was last reduced.
    since: Duration,
    left_out: u64,
}

impl Kind {
    /// Counts a line at `now`. Returns `None` if it is one too many, else how many were left out
    /// before it.
    fn one_more(&mut self, now: Duration) -> Option<u64> {
        let periods = now.saturating_sub(self.since).as_nanos() / PERIOD.as_nanos();
        self.used = self.used.saturating_sub(u32::try_from(periods).unwrap_or(u32::MAX));
        if self.used == 0 {
            self.since = now;
        } else {
            self.since += PERIOD * u32::try_from(periods).unwrap_or(u32::MAX);
        }
        if self.used >= BURST {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// A format for lines that leaves out those beyond the limit of their kind.
struct Bounded<F> {
    format: F,
    /// The state of each kind, as many as there are places in the code that log.
    kinds: Mutex<BTreeMap<usize, Kind>>,
    begun: Instant,
}

impl<F> Bounded<F> {
    /// How many lines like this were left out before it; `None` if this one must be left out.
    fn admit(&self, event: &Event<'_>) -> Option<u64> {
        if *event.metadata().level() > Level::INFO {
            return Some(0);
        }
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        kinds
            .entry(number(&event.metadata().callsite()))
            .or_default()
            .one_more(self.begun.elapsed())
    }
}

/// A number for a place in the code: its address, which is unique.
fn number(place: &Identifier) -> usize {
    std::ptr::from_ref(place.0).cast::<()>().addr()
}

impl<S, F> FormatEvent<S, DefaultFields> for Bounded<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: FormatEvent<S, DefaultFields>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, DefaultFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        match self.admit(event) {
            // An empty line is not written.
            None => return Ok(()),
            Some(0) => {}
            Some(count) => writeln!(writer, "({count} lines like the next one were left out)")?,
        }
        self.format.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that had run out of descriptors once logged ten lines a second until the log's
    /// disk was full as well.
    #[test]
    fn lines_of_a_kind_are_bounded_and_those_left_out_are_counted() {
        let mut kind = Kind::default();
        let written = |kind: &mut Kind, from: u64, seconds: u64| {
            // Ten a second.
            let times =
                (0..seconds * 10).map(|tenth| Duration::from_millis((from * 1000) + tenth * 100));
            times.filter_map(|now| kind.one_more(now)).collect::<Vec<_>>()
        };
        assert_eq!(written(&mut kind, 100, 1), [0; BURST as usize], "the first second: all");
        let hour = written(&mut kind, 101, 3600);
        assert!((355..=361).contains(&hour.len()), "{} lines in an hour", hour.len());
        assert!(hour[1..].iter().all(|left_out| *left_out == 99), "{hour:?}");
        // After a long silence a burst is logged again.
        let again = written(&mut kind, 10_000, 1);
        assert_eq!(again.len(), BURST as usize);
    }

    /// A user who sets RUST_LOG to see what is wrong must not get the default instead.
    #[test]
    fn a_filter_that_cannot_be_meant_is_refused() {
        for good in [
            "",
            " ",
            "warn",
            "INFO",
            "debug,glommio=off",
            "corepage::server=trace",
            "off",
            "corepage",
            "2",
        ] {
            assert!(filter(Some(good), "info").is_ok(), "{good}");
        }
        assert!(filter(None, "info").is_ok());
        for bad in ["wran", "verbose", "corepage=loud", "info,verbos", "=", "corepage=debug=x"] {
            let failure = filter(Some(bad), "info").expect_err(bad);
            assert!(failure.text.contains(bad) && failure.code == 2, "{}", failure.text);
        }
    }
}
