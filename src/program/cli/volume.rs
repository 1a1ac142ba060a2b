//! `corepage volume`: lists, creates, resizes and deletes volumes.
//!
//! 1. If a server has the store open, the command asks it through its control socket; else it opens
//!    the store itself, and closes it cleanly. Listing only reads: no file is made or written.
//! 2. An action that loses data needs `--yes`, or a yes at the terminal.
//! 3. A volume is deleted, or shortened, once that is durable: the command reports this, whatever
//!    happens to the freeing of its pages. A server frees them in the background. For a store that
//!    it has opened itself, the command waits for that; SIGINT and SIGTERM end the wait, and the
//!    next open of the store continues.

use super::control::Connection;
use super::interrupt::{Interrupt, Missing};
use super::{Failure, Format, output, size};
use crate::program::server::control::{self, Request, SOCKET_NAME, VolumeLine};
use crate::program::server::no_thread;
use comfy_table::{CellAlignment, Table, TableStyle};
use corepage::{Options, Store};
use futures_lite::future::{block_on, or};
use serde_json::Value;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// Directory of the store
    #[arg(long, value_name = "DIR", default_value = "./corepage-data", global = true)]
    dir: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Create a volume; all of it reads as zeros, and takes no space yet
    Create {
        /// Its name: up to 255 bytes, no control characters
        #[arg(value_parser = size::parse_name)]
        name: String,
        /// Its size, for example 10G: a multiple of 4 KiB below 8 EiB; K, M, G, T (or KB, KiB ...)
        /// are powers of 1024
        #[arg(value_parser = size::parse_volume)]
        size: u64,
    },
    /// List the volumes
    List {
        /// How to print it
        #[arg(long, value_enum, default_value_t = Format::Human)]
        format: Format,
    },
    /// Make a volume larger or smaller; clients that connect from then on see the new size
    Resize {
        /// Its name
        #[arg(value_parser = size::parse_name)]
        name: String,
        /// Its new size, for example 20G: a multiple of 4 KiB below 8 EiB
        #[arg(value_parser = size::parse_volume)]
        size: u64,
        /// Lose the data beyond the new end without asking
        #[arg(long)]
        yes: bool,
    },
    /// Delete a volume with all its data. A server frees its pages in the background (`stat
    /// --format json` counts such volumes); without a server this command waits for that, unless it
    /// is interrupted: then the next start continues
    Delete {
        /// Its name
        #[arg(value_parser = size::parse_name)]
        name: String,
        /// Delete without asking
        #[arg(long)]
        yes: bool,
    },
}

/// Where the store is open: in a server, or here.
enum Access {
    Server(Connection),
    Own(Store, Interrupt),
}

impl Access {
    fn open(dir: &Path) -> Result<Access, Failure> {
        if let Some(connection) = Connection::open(&dir.join(SOCKET_NAME))? {
            return Ok(Access::Server(connection));
        }
        if dir.exists() && !dir.is_dir() {
            return Err(Failure::new(format_args!(
                "{} is not a directory, so no store is in it",
                dir.display()
            )));
        }
        if !dir.join("meta").exists() {
            return Err(Failure::new(format_args!(
                "there is no store in {}: `corepage serve --dir {0}` makes one, with a volume",
                dir.display()
            )));
        }
        // Watch only from now on: a signal ends a command that waits for a server as usual.
        let interrupt = Interrupt::watch()?;
        // Open it with as many shards as it has: each additional one would get log files of its
        // own.
        let shards = corepage::inspect(dir).ok().map(|found| found.shards);
        let options = Options { shards, ..Options::default() };
        let store = interrupt
            .open(dir, options, Missing::Refused)
            .map_err(|error| interrupt.explains(error))?;
        Ok(Access::Own(store, interrupt))
    }

    fn ask(&mut self, request: &Request) -> Result<Value, Failure> {
        match self {
            Access::Server(connection) => connection.ask(request),
            Access::Own(store, _) => Ok(control::perform(store, request)?),
        }
    }

    fn volumes(&mut self) -> Result<Vec<VolumeLine>, Failure> {
        let volumes = self.ask(&Request::Volumes)?;
        serde_json::from_value(volumes)
            .map_err(|error| Failure::new(format_args!("the server answers oddly: {error}")))
    }

    /// Waits until the pages of what was deleted are freed.
    fn wait_freed(&self) -> Result<(), Failure> {
        let Access::Own(store, interrupt) = self else { return Ok(()) };
        let freed = async {
            if let Err(error) = store.wait_freed().await {
                output::warn(format_args!(
                    "not all pages could be freed, the next open of the store tries again: {error}"
                ));
            }
            Ok(())
        };
        let interrupted = async {
            interrupt.wait().await;
            Err(Failure::new(
                "interrupted: the rest of its pages is freed when the store is next opened",
            ))
        };
        block_on(or(freed, interrupted))
    }

    /// Asks whether data may be lost. A signal counts as a no.
    fn confirm(&self, what: &str) -> Result<(), Failure> {
        if !std::io::stdin().is_terminal() {
            return Err(Failure::usage(format_args!("{what}: confirm that with --yes")));
        }
        output::STDERR.say(&format!("{what}. Go on? [y/N] "));
        let answer = match self {
            // Signals end the command as usual, since it has no store open.
            Access::Server(_) => read_answer()?,
            Access::Own(_, interrupt) => block_on(or(async { Ok(typed().await?) }, async {
                let signal = Some(interrupt.wait().await);
                Err(Failure { signal, ..Failure::new("interrupted: nothing was done") })
            }))?,
        };
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Failure::new("nothing was done")),
        }
    }

    fn close(self) -> Result<(), Failure> {
        match self {
            Access::Server(_) => Ok(()),
            Access::Own(store, _) => Ok(block_on(store.close())?),
        }
    }
}

/// Lists the volumes of a store that no server has open, by reading only.
fn look(dir: &Path) -> Result<Vec<VolumeLine>, Failure> {
    let found = corepage::inspect(dir)?;
    if !found.clean {
        output::warn(format_args!(
            "the store was not closed cleanly: these are its volumes as of the last checkpoint; \
             `corepage serve` finds what came after it"
        ));
    }
    let line = |volume: corepage::VolumeSummary| VolumeLine {
        name: volume.name,
        bytes: volume.bytes,
        number: volume.number,
    };
    Ok(found.volumes.into_iter().map(line).collect())
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if let Action::List { format } = arguments.action
        && Connection::open(&arguments.dir.join(SOCKET_NAME))?.is_none()
        && arguments.dir.join("meta").exists()
    {
        output::print(&list(&look(&arguments.dir)?, format)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut access = Access::open(&arguments.dir)?;
    let outcome = act(&arguments.action, &mut access).and_then(|()| access.wait_freed());
    let closed = access.close();
    outcome?;
    closed?;
    Ok(ExitCode::SUCCESS)
}

fn act(action: &Action, access: &mut Access) -> Result<(), Failure> {
    let said = match action {
        Action::List { format } => list(&access.volumes()?, *format)?,
        Action::Create { name, size } => {
            access.ask(&Request::Create { name: name.clone(), bytes: *size })?;
            format!("created {name}, {} ({size} bytes)\n", size::show(*size))
        }
        Action::Resize { name, size, yes } => {
            let before = access
                .volumes()?
                .into_iter()
                .find(|volume| volume.name == *name)
                .map(|volume| volume.bytes);
            if let Some(before) = before.filter(|before| before > size && !yes) {
                let lost = size::show(before - size);
                access.confirm(&format!("the last {lost} of {name} will be lost"))?;
            }
            access.ask(&Request::Resize { name: name.clone(), bytes: *size })?;
            format!("{name} has {} now ({size} bytes)\n", size::show(*size))
        }
        Action::Delete { name, yes } => {
            // If there is no such volume, nothing can be lost: the error below names those that
            // exist.
            if access.volumes()?.iter().any(|volume| volume.name == *name) && !yes {
                access.confirm(&format!("{name} and all that is in it will be lost"))?;
            }
            access.ask(&Request::Delete { name: name.clone() })?;
            format!("deleted {name}\n")
        }
    };
    output::print(&said)
}

fn list(volumes: &[VolumeLine], format: Format) -> Result<String, Failure> {
    if format == Format::Json {
        return Ok(serde_json::to_string_pretty(volumes).map_err(Failure::new)? + "\n");
    }
    if volumes.is_empty() {
        return Ok("no volumes\n".into());
    }
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(["NAME", "SIZE", "BYTES"]);
    for volume in volumes {
        table.add_row([volume.name.clone(), size::show(volume.bytes), volume.bytes.to_string()]);
    }
    table.column_iter_mut().for_each(|column| {
        column.set_padding((0, 2));
    });
    table
        .column_iter_mut()
        .skip(1)
        .for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    Ok(table.trim_fmt() + "\n")
}

fn read_answer() -> std::io::Result<String> {
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer)
}

/// Reads the answer on a thread of its own: only a key ends that read, and a signal must not wait
/// for a key.
async fn typed() -> std::io::Result<String> {
    let cell = std::sync::Arc::new(async_lock::OnceCell::new());
    let own = cell.clone();
    let read = move || drop(own.set_blocking(read_answer()));
    std::thread::Builder::new().name("corepage-answer".into()).spawn(read).map_err(no_thread)?;
    match cell.wait().await {
        Ok(answer) => Ok(answer.clone()),
        Err(error) => Err(std::io::Error::new(error.kind(), error.to_string())),
    }
}
