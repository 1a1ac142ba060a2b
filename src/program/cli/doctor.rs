//! `corepage doctor`: reports what this machine offers, how the engine uses it, and which commands
//! would improve it.
//!
//! 1. Exit code 0: a store can run here, though perhaps slower than it could; 1: it can't, and the
//!    table says why.
//! 2. It changes nothing and leaves nothing behind; a store in the directory may be in use.
//! 3. Existing keys of the JSON are never changed; new ones may be added.
//!
//! Commands are printed below the table, each on a line of its own however narrow the terminal is,
//! so that they can be copied.

use super::{Failure, Format, memory, output, size};
use comfy_table::{ContentArrangement, LineStyle, Table, TableStyle};
use corepage::probe::{AutoDriver, AvailableMemory, Finding, Level, Machine, Suggestion};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

/// Columns if the width of the terminal is not known.
const WIDTH_UNKNOWN: u16 = 100;
/// Below this width three columns are too narrow to read, and each subject gets lines of its own.
const WIDTH_TABLE_MIN: u16 = 72;
/// The most columns: wider lines are hard to follow.
const WIDTH_MAX: u16 = 120;

/// There is a line below the header and one at the end.
const STYLE: TableStyle = TableStyle::new()
    .header_separator(LineStyle::none().fill('─').junction('─'))
    .bottom_border(LineStyle::none().fill('─').junction('─'));

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the store, or where it will be; need not exist
    #[arg(long, value_name = "DIR", default_value = "./corepage-data")]
    dir: PathBuf,
    /// Check whether a server could take this much memory, for example 4G [default: as for `serve`]
    #[arg(long, value_name = "SIZE", value_parser = memory::parse)]
    memory: Option<u64>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Human)]
    format: Format,
}

/// The JSON form.
#[derive(Debug, Serialize)]
struct Report<'a> {
    corepage: &'static str,
    can_run: bool,
    driver: &'a AutoDriver,
    machine: &'a Machine,
    findings: &'a [Finding],
}

/// Probes the machine, and prints the result.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let machine = Machine::look(&arguments.dir);
    let (mut findings, driver) = (machine.advice(), machine.driver());
    findings.push(memory(arguments.memory, &machine.memory));
    let can_run = findings.iter().all(|finding| finding.level < Level::Fatal);
    let text = match arguments.format {
        Format::Human => human(&machine, &driver, &findings, width()),
        Format::Json => {
            let corepage = env!("CARGO_PKG_VERSION");
            let report = Report {
                corepage,
                can_run,
                driver: &driver,
                machine: &machine,
                findings: &findings,
            };
            serde_json::to_string_pretty(&report).map_err(Failure::new)? + "\n"
        }
    };
    output::print(&text)?;
    Ok(ExitCode::from(u8::from(!can_run)))
}

/// Checks the memory of a server as `serve` would with the same argument.
fn memory(asked: Option<u64>, room: &AvailableMemory) -> Finding {
    let known =
        |bytes: Option<u64>, what: &str| bytes.map(|bytes| format!("{}{what}", size::show(bytes)));
    let here = [
        known(room.total_bytes, ""),
        known(room.available_bytes, " available"),
        known(room.group_limit_bytes, " allowed by control groups"),
        known(room.process_limit_bytes, " allowed by limits of the process"),
    ];
    let here = here.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let here = if here.is_empty() { "unknown".to_owned() } else { here };
    let suggest = |what: &str| vec![Suggestion { what: what.to_owned(), command: None }];
    let (level, used, suggestions) = match memory::choose(asked, None, room) {
        Ok((bytes, None)) => {
            (Level::Good, format!("{} for a server", size::show(bytes)), Vec::new())
        }
        Ok((bytes, Some(warning))) => {
            let what = format!("less, or a machine with more: {warning}");
            (Level::Improvable, format!("{} for a server", size::show(bytes)), suggest(&what))
        }
        Err(failure) => (
            Level::Fatal,
            format!("no server: {}", failure.text),
            suggest("a smaller --memory, or a machine with more"),
        ),
    };
    Finding { subject: "memory", level, found: here, used, suggestions }
}

/// The width of the terminal, or the value of COLUMNS.
fn width() -> u16 {
    let stdout = std::io::stdout();
    let own = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok()).flatten();
    let own = own.map(|size| size.ws_col).filter(|columns| *columns > 0);
    let said = || std::env::var("COLUMNS").ok()?.parse().ok().filter(|columns| *columns > 0);
    own.or_else(said).unwrap_or(WIDTH_UNKNOWN).min(WIDTH_MAX)
}

fn human(machine: &Machine, driver: &AutoDriver, findings: &[Finding], width: u16) -> String {
    let directory = &machine.directory;
    let mut out = format!("corepage {} in {}", env!("CARGO_PKG_VERSION"), directory.path.display());
    if directory.path != directory.looked_at {
        let _ = write!(out, " (not there yet; looked at {})", directory.looked_at.display());
    }
    out.push_str("\n\n");
    out.push_str(&if width < WIDTH_TABLE_MIN {
        stacked(findings, width)
    } else {
        table(findings, width)
    });
    out.push_str(&commands(findings, width));
    let verdict = match findings.iter().map(|finding| finding.level).max() {
        Some(Level::Fatal) => "A store can't run here: see the lines marked ✗.".to_owned(),
        _ => format!("A store can run here; driver: {driver}."),
    };
    out + &filled(&verdict, "", width)
}

fn mark(level: Level) -> &'static str {
    match level {
        Level::Good => "✓",
        Level::Improvable => "!",
        Level::Fatal => "✗",
    }
}

fn table(findings: &[Finding], width: u16) -> String {
    let mut table = Table::new();
    table.load_style(STYLE).set_width(width);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["", "What is here", "What is used"]);
    for finding in findings {
        let subject = format!("{} {}", mark(finding.level), finding.subject);
        table.add_row([&subject, &finding.found, &finding.used]);
    }
    table.trim_fmt() + "\n"
}

/// The layout for narrow terminals.
fn stacked(findings: &[Finding], width: u16) -> String {
    let mut out = String::new();
    for finding in findings {
        let _ = writeln!(out, "{} {}", mark(finding.level), finding.subject);
        out.push_str(&filled(&finding.found, "    ", width));
        out.push_str(&filled(&format!("→ {}", finding.used), "    ", width));
    }
    out
}

/// Lists what would be better, with the commands.
fn commands(findings: &[Finding], width: u16) -> String {
    let mut out = String::new();
    for finding in findings.iter().filter(|finding| !finding.suggestions.is_empty()) {
        for better in &finding.suggestions {
            out.push_str(&filled(&format!("{}: {}", finding.subject, better.what), "  ", width));
            if let Some(command) = &better.command {
                let _ = writeln!(out, "      {command}");
            }
        }
    }
    if out.is_empty() { "\n".to_owned() } else { format!("\nWhat would be better:\n{out}\n") }
}

/// Fills `text` into lines of at most `width`, each after `indent`.
fn filled(text: &str, indent: &str, width: u16) -> String {
    let mut out = String::new();
    let mut line = indent.to_owned();
    for word in text.split(' ') {
        let is_fresh = line.len() == indent.len();
        if !is_fresh && line.chars().count() + 1 + word.chars().count() > usize::from(width) {
            let _ = writeln!(out, "{line}");
            line = indent.to_owned();
        } else if !is_fresh {
            line.push(' ');
        }
        line.push_str(word);
    }
    out + &line + "\n"
}
