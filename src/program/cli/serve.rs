//! `corepage serve`: runs a store, its volumes and their server, from start to clean end.
//!
//! ```text
//! check arguments --> plan listeners --> control socket --> open store --> make volumes --> bind
//!   --> serve --signal, failure--> stop --> close
//! ```
//!
//! 1. Until the store is open, a refused start leaves nothing behind; from then on the store is
//!    closed cleanly on every exit path.
//! 2. The line `listening on …` is printed, and the supervisor notified, only when clients can
//!    connect.
//! 3. A signal while the store is being opened cancels that as soon as the device has answered; the
//!    process dies of the signal.
//! 4. SIGTERM, SIGINT and SIGHUP end it cleanly; `interrupt` says which of them ends it at once
//!    when repeated.
//! 5. If the store stops taking writes, the server ends with exit code 1, unless `--on-failure
//!    stay` is given: the supervisor then starts it again, and opening the store again is the
//!    remedy.

use super::control::Connection;
use super::interrupt::{Interrupt, Missing};
use super::{Failure, descriptors, memory, output, size, supervisor};
use crate::program::server::control::{Control, Place, SOCKET_NAME};
use crate::program::server::nbd::{
    Address, CONNECTIONS_LIMIT, Division, Limits, Listener, Memory, Plan, Server, StoreExports,
};
use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use corepage::probe::AvailableMemory;
use corepage::{Driver, Options, Store, Volume};
use futures_lite::future::{block_on, or};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use tracing::{error, info, warn};

/// The volume that a new store gets if none is requested.
const DEFAULT_VOLUME: (&str, u64) = ("disk", 1 << 30);

/// The names of the drivers, with their help texts.
fn driver_names() -> impl TypedValueParser<Value = Driver> {
    let name = |name: &'static str, help: &'static str| PossibleValue::new(name).help(help);
    let names = [
        name(
            "auto",
            "io_uring where it can be used, else portable; the report says which, and why",
        ),
        name("ring", "io_uring, or no start"),
        name("portable", "Plain system calls on threads"),
    ];
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Driver>())
}

/// What to do when the store stops taking writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnFailure {
    /// End with exit code 1, for a supervisor that starts the server again
    Exit,
    /// Continue to answer reads; writes fail until the server is restarted
    Stay,
}

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory of the store; made if it does not exist
    #[arg(long, value_name = "DIR", default_value = "./corepage-data")]
    dir: PathBuf,
    /// Serve only an existing store, and never create one: for a directory on a disk that may not
    /// be mounted
    #[arg(long)]
    existing: bool,
    /// Memory of the server, 16M or more, for example 512M or 4GiB: seven eighths for pages, page
    /// map and log, the rest for data sent by and to clients. The process takes up to 16 MiB more
    /// for its code and its threads, 4 MiB for each shard, and for each 4 MiB of data 72 bytes in
    /// each shard and 72 bytes once. With io_uring the seven eighths are taken at the start, else
    /// as they are used. More than is available is refused [default: 256M, or half of what the
    /// machine or its control group has left, if that is less]
    #[arg(long, value_name = "SIZE", value_parser = memory::parse)]
    memory: Option<u64>,
    /// How much of the data space must be live before it grows, 30 to 85: a lower value takes more
    /// disk space and makes overwriting faster
    #[arg(long, value_name = "PERCENT", default_value_t = Options::default().fill_percent,
        value_parser = clap::value_parser!(u32).range(30..=85))]
    fill_percent: u32,
    /// How pages reach the disk
    #[arg(long, default_value = "auto", value_parser = driver_names())]
    driver: Driver,
    /// Cores to run on, with one shard on each, for example 0,1 [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cores: Option<Vec<usize>>,
    /// Shards, 1 to 64, if not one on each core; more shards than cores work, but don't poll. Each
    /// needs at least 2M of memory
    #[arg(long, value_name = "N")]
    shards: Option<u16>,
    /// Keep every core busy polling: gives the lowest latency, at the cost of the cores
    #[arg(long)]
    poll: bool,
    /// Where to listen: unix:PATH or tcp:HOST:PORT of this machine (port 0: any); may be repeated
    #[arg(long, value_name = "ADDRESS", default_value = "tcp:127.0.0.1:10809")]
    nbd: Vec<Address>,
    /// Connections at a time, 1 to 4096, each with two threads, 16 KiB or more of the memory and up
    /// to 64 KiB besides. When all are taken, an eighth more is kept for other peers (machines or,
    /// on a socket file, users) than those that took them [default: 128; below 64M of memory one
    /// for each 512K]
    #[arg(long, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_LIMIT)))]
    connections: Option<u32>,
    /// Also listen on addresses that other machines can reach: without password or encryption, for
    /// anyone there
    #[arg(long)]
    allow_remote: bool,
    /// A volume to create if it does not exist
    #[arg(long, value_name = "NAME", value_parser = size::parse_name, requires = "size")]
    volume: Option<String>,
    /// Its size, 4K or more, for example 10G: a multiple of 4 KiB below 8 EiB; K, M, G, T (or KB,
    /// KiB ...) are powers of 1024. An existing volume keeps its size
    #[arg(long, value_name = "SIZE", value_parser = size::parse_volume, requires = "volume")]
    size: Option<u64>,
    /// What to do when a write or a flush of the log has failed, or a bug has stopped the store
    #[arg(long, value_enum, default_value_t = OnFailure::Exit)]
    on_failure: OnFailure,
}

impl Arguments {
    /// Where other machines can connect.
    fn remote_hosts(&self) -> impl Iterator<Item = IpAddr> {
        self.nbd.iter().filter_map(Address::remote)
    }

    /// Checks the arguments as a whole. Returns the options, and how the memory is divided.
    fn check(&self) -> Result<(Options, Division), Failure> {
        if let Some(host) = self.remote_hosts().next()
            && !self.allow_remote
        {
            return Err(Failure::usage(format_args!(
                "--nbd: {host} can be reached from other machines, and NBD here has neither \
                 password nor encryption: use 127.0.0.1 and a tunnel (ssh -L), or insist with \
                 --allow-remote"
            )));
        }
        let (bytes, warning) = memory::choose(self.memory, self.shards, &AvailableMemory::look())?;
        if let Some(warning) = warning {
            warn!("{warning}");
        }
        let division = self.divide(bytes)?;
        let options = Options {
            memory_bytes: division.engine_bytes,
            driver: self.driver,
            cores: self.cores.clone(),
            shards: self.shards,
            poll: self.poll,
            fill_percent: self.fill_percent,
            ..Options::default()
        };
        Ok((options, division))
    }
}

impl Arguments {
    /// Divides the memory.
    fn divide(&self, bytes: u64) -> Result<Division, Failure> {
        let Some(count) = self.connections else { return Ok(Division::of(bytes)) };
        Division::with_connections(bytes, count).map_err(|needed| {
            let needed = size::show(needed);
            Failure::usage(format_args!(
                "--connections {count} needs --memory of {needed} at least: they get an eighth of \
                 it"
            ))
        })
    }
}

/// Runs until a signal comes.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let (options, division) = arguments.check()?;
    // Checked first: such a server also has the port, which would be a misleading error.
    if let Some(server) = Connection::open(&arguments.dir.join(SOCKET_NAME))? {
        let (server, dir) = (server.server(), arguments.dir.display());
        return Err(Failure::new(format_args!(
            "the store in {dir} is in use: {server} serves it, stop that one first"
        )));
    }
    let plans =
        arguments.nbd.iter().map(|a| a.plan(&arguments.dir)).collect::<Result<Vec<_>, _>>()?;
    descriptors::allow(division.connections_max);
    // Watch before the store is open, so that no signal can end the process in between without
    // closing the store.
    let interrupt = Interrupt::watch()?;
    supervisor::opening();
    let (missing, made) = match arguments.existing {
        true => (Missing::Refused, Directories(Vec::new())),
        false => (Missing::Created, Directories::make(&arguments.dir)),
    };
    let control = control(&arguments.dir);
    let store = match interrupt.open(&arguments.dir, options, missing) {
        Ok(store) => store,
        Err(error) => {
            drop(control);
            made.remove();
            return Err(interrupt.explains(error));
        }
    };
    let outcome = serve(arguments, division, plans, &store, control.as_ref(), || {
        wait(arguments, &store, &interrupt)
    });
    drop(control);
    let closed = block_on(store.close());
    outcome?;
    closed?;
    info!("closed cleanly");
    Ok(ExitCode::SUCCESS)
}

/// Waits for a signal, or for a failure of the store.
fn wait(arguments: &Arguments, store: &Store, interrupt: &Interrupt) -> Result<(), Failure> {
    let failed =
        block_on(or(async { Err(store.failed().await) }, async { Ok(interrupt.wait().await) }));
    if let Err(error) = failed {
        match arguments.on_failure {
            OnFailure::Exit => return Err(Failure::new(error)),
            OnFailure::Stay => {
                let what = "writes fail from now on; reads are still answered (--on-failure stay)";
                error!(%error, "{what}")
            }
        }
    }
    let signal = block_on(interrupt.wait());
    info!(signal, "closing the store; a second SIGINT (Ctrl-C) ends the process at once");
    Ok(())
}

fn serve(
    arguments: &Arguments,
    division: Division,
    plans: Vec<Plan>,
    store: &Store,
    control: Option<&Control>,
    wait: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let volumes = volumes(arguments, store)?;
    let listeners = plans.into_iter().map(Plan::bind).collect::<Result<Vec<_>, _>>()?;
    let lines = listening(&listeners, &volumes);
    for host in arguments.remote_hosts() {
        output::warn(format_args!(
            "anyone who reaches {host} can read, change and erase all volumes: no password, no \
             encryption"
        ));
    }
    let memory = Arc::new(Memory::new(division));
    let exports = StoreExports::new(store.clone(), &memory);
    let server = Server::start(listeners, exports, Limits::default(), memory)?;
    if let Some(control) = control {
        control.opened(store.clone());
    }
    report(&arguments.dir, store, &lines);
    supervisor::ready(&lines.join("; "));
    let outcome = wait();
    supervisor::stopping();
    if !server.stop() {
        error!("some requests got no answer from the store");
    }
    outcome
}

/// Opens the control socket, before the store is open, so that a command that connects meanwhile
/// gets an answer. A server without a control socket still serves.
fn control(dir: &Path) -> Option<Control> {
    if !dir.is_dir() {
        // Opening the store reports why.
        return None;
    }
    let started = Place::bind(dir).and_then(Control::start);
    started
        .inspect_err(
            |error| warn!(%error, "no control socket: `stat` and `volume` can't reach this server"),
        )
        .ok()
}

/// The directories that were made for a store.
struct Directories(Vec<PathBuf>);

impl Directories {
    /// Makes `dir` and its missing parents. Opening the store makes them durable, or reports what
    /// is wrong.
    fn make(dir: &Path) -> Directories {
        let missing =
            dir.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists());
        let missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        let made =
            missing.into_iter().rev().take_while(|missing| std::fs::create_dir(missing).is_ok());
        Directories(made.collect())
    }

    /// Removes those of them that are empty.
    fn remove(self) {
        self.0.iter().rev().for_each(|dir| drop(std::fs::remove_dir(dir)));
    }
}

/// Returns all volumes, after creating the requested one, or a first one.
fn volumes(arguments: &Arguments, store: &Store) -> Result<Vec<Volume>, Failure> {
    let volumes = block_on(store.volumes())?;
    let (name, bytes) = match (&arguments.volume, arguments.size) {
        (Some(name), Some(bytes)) => (name.as_str(), bytes),
        // A store in which all volumes were deleted gets none.
        _ if volumes.is_empty() && store.recovery().recovered_lsn.get() == 0 => DEFAULT_VOLUME,
        _ => return Ok(volumes),
    };
    match volumes.iter().find(|v| v.name() == name) {
        None => {
            block_on(store.create_volume(name, bytes))?;
            Ok(block_on(store.volumes())?)
        }
        Some(volume) => {
            // It was resized since its unit file was written: that must neither keep the service
            // down nor resize it back.
            if volume.bytes() != bytes {
                let (has, said) = (size::show(volume.bytes()), size::show(bytes));
                warn!(
                    "the volume {name} has {has}, not {said} as --size says; it keeps its size \
                     (`corepage volume resize`)"
                );
            }
            Ok(volumes)
        }
    }
}

/// One line for each listener.
fn listening(listeners: &[Listener], volumes: &[Volume]) -> Vec<String> {
    let names: Vec<_> =
        volumes.iter().map(|v| format!("{} {}", v.name(), size::show(v.bytes()))).collect();
    listeners.iter().map(|l| format!("listening on {l} (volumes: {})", names.join(", "))).collect()
}

/// Reports what was found and where clients can connect. The server continues even if stdout can't
/// be written.
fn report(dir: &Path, store: &Store, lines: &[String]) {
    let text = format!(
        "store {}: {}; {}\n{}\n",
        dir.display(),
        store.report(),
        store.recovery(),
        lines.join("\n")
    );
    if let Err(failure) = output::print(&text) {
        warn!("{}; clients can connect all the same", failure.text);
    }
}
