//! The command line: arguments in, an exit code out.
//!
//! 1. Exit codes: 0 done, 1 failed, 2 wrong arguments. `verify` returns 1 for a damaged store and 2
//!    for one that could not be checked, `doctor` 1 for a machine on which no store can run. If a
//!    signal ends a command before there is anything to end cleanly, the command dies of that
//!    signal.
//! 2. A failure goes to stderr as one line `error: …` that says what to do; results go to stdout,
//!    logs to stderr.
//! 3. Arguments are checked as a whole before anything is touched.
//!
//! What the commands do is in files of their own.

mod allocator;
mod bench;
mod control;
mod descriptors;
mod doctor;
mod interrupt;
mod logging;
mod memory;
mod output;
mod progress;
mod serve;
mod size;
mod stat;
mod supervisor;
mod system;
mod verify;
mod volume;

use clap::{Parser, Subcommand, ValueEnum};
use std::fmt;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  corepage serve
      A store in ./corepage-data with a volume `disk` of 1 GiB, exported at nbd://127.0.0.1:10809
  corepage serve --dir /srv/store --volume scratch --size 20G --nbd unix:/run/corepage.sock
      One more volume, exported on a Unix socket
  nbdcopy --flush disk.img nbd://127.0.0.1:10809/disk
      Copies an image in (from Debian's libnbd-bin)
  corepage doctor --dir /srv/store
      Says what this machine gives for a store there, and which commands would make it better
  corepage volume create scratch 20G --dir /srv/store
      One more volume, also while the store is served
  corepage stat --dir /srv/store
      What the server does, one line a second
  corepage bench qd-sweep
      Reads and writes at depths 1 to 256 in a store that is made for it and removed
  corepage verify --dir /srv/store
      Reads a closed store whole and names what is damaged

Logs go to stderr; RUST_LOG sets how much (error, warn, info, debug).";

/// A crash-safe page store, and a server for it.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXAMPLES, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Open a store, create what is missing, and export its volumes until SIGTERM or SIGINT
    Serve(serve::Arguments),
    /// Report what this machine offers, how it is used, and which commands would improve it
    Doctor(doctor::Arguments),
    /// List, create, resize and delete volumes, even while a server has the store open
    Volume(volume::Arguments),
    /// Show what a running server does, one line a second
    Stat(stat::Arguments),
    /// Measure a store on this machine, and verify what was written
    Bench(bench::Arguments),
    /// Read all of a closed store and name what is damaged
    Verify(verify::Arguments),
}

/// How to print a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people
    Human,
    /// For programs
    Json,
}

/// Why a command ends early, and with which exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    code: u8,
    /// The signal that ended it.
    signal: Option<i32>,
}

impl Failure {
    /// A failure with exit code 1.
    fn new(text: impl fmt::Display) -> Self {
        Failure { text: text.to_string(), code: 1, signal: None }
    }

    /// A failure of the arguments, with exit code 2.
    fn usage(text: impl fmt::Display) -> Self {
        Failure { text: text.to_string(), code: 2, signal: None }
    }
}

impl From<corepage::Error> for Failure {
    fn from(error: corepage::Error) -> Self {
        Failure::new(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(error)
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    allocator::bound();
    interrupt::survive_file_size_limit();
    match Arguments::try_parse()
        .map_or_else(|said| usage(&said), |arguments| run(&arguments.command))
    {
        Ok(code) => code,
        Err(failure) => {
            output::STDERR.say(&format!("error: {}\n", failure.text));
            if let Some(signal) = failure.signal {
                // All destructors have run. The sender of the signal sees that it ended the
                // process.
                return interrupt::die_of(signal);
            }
            ExitCode::from(failure.code)
        }
    }
}

/// Prints the requested help, or what is wrong with the arguments, as `error: …`.
fn usage(said: &clap::Error) -> Result<ExitCode, Failure> {
    if said.use_stderr() {
        // If stderr accepts nothing, nothing can be reported.
        let _ = said.print();
        return Ok(ExitCode::from(said.exit_code() as u8));
    }
    output::written(said.print())?;
    Ok(ExitCode::SUCCESS)
}

fn run(command: &Command) -> Result<ExitCode, Failure> {
    // A server logs what it does; the other commands log only what goes wrong.
    logging::start(if matches!(command, Command::Serve(_)) { "info" } else { "warn" })?;
    match command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Doctor(arguments) => doctor::run(arguments),
        Command::Volume(arguments) => volume::run(arguments),
        Command::Stat(arguments) => stat::run(arguments),
        Command::Bench(arguments) => bench::run(arguments),
        Command::Verify(arguments) => verify::run(arguments),
    }
}
