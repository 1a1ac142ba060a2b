//! This test program again as a child with a role, to be killed; and the ways in which a store can
//! be run.
//!
//! 1. A child ends with its guard.
//! 2. All that a child printed before its death is read.

use super::{scratch, skip};
use corepage::{Driver, Geometry, Options, Store};
use futures_lite::future::block_on;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const ROLE: &str = "COREPAGE_TEST_ROLE";
const STORE: &str = "COREPAGE_TEST_STORE";
const RUN: &str = "COREPAGE_TEST_RUN";

/// Whether io_uring can be used here, found out by using it.
pub fn ring_works() -> bool {
    static WORKS: OnceLock<bool> = OnceLock::new();
    *WORKS.get_or_init(|| {
        let dir = scratch("ring-works");
        let options = Options {
            driver: Driver::Ring,
            shards: Some(1),
            ..Run { ring: true, shards: 1 }.options()
        };
        match block_on(Store::open(dir.path().join("store"), options)) {
            Ok(_) => true,
            Err(e) => skip(format_args!(
                "io_uring does not work here, so the portable driver runs in its place ({e})"
            )),
        }
    })
}

/// How a store is run: driver and shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub ring: bool,
    pub shards: u16,
}

impl Run {
    /// Ring and portable driver, each with 1, 2 and 4 shards; without the ring where it does not
    /// work.
    pub fn all() -> Vec<Run> {
        let drivers = if ring_works() { vec![true, false] } else { vec![false] };
        drivers.into_iter().flat_map(|ring| [1, 2, 4].map(|shards| Run { ring, shards })).collect()
    }

    /// Another one for each step of a long life of one store: 2 -> 1 -> 3 -> 2 -> 4 shards, two
    /// steps of three on the ring, or all as COREPAGE_TEST_DRIVER says.
    pub fn of_step(step: u64) -> Run {
        let ring = match std::env::var("COREPAGE_TEST_DRIVER").as_deref() {
            Ok("ring") => true,
            Ok("portable") => false,
            _ => step % 3 != 2,
        };
        Run { ring: ring && ring_works(), shards: [2, 1, 3, 2, 4][step as usize % 5] }
    }

    fn driver(self) -> Driver {
        if self.ring { Driver::Ring } else { Driver::Portable }
    }

    /// A store that is made quickly, and whose log is recycled often.
    pub fn options(self) -> Options {
        let geometry = Geometry {
            extent_bytes: 1 << 20,
            segment_bytes: 4 << 20,
            segments_count: 4,
            ..Geometry::default()
        };
        self.with(Options { geometry, memory_bytes: 128 << 20, ..Options::default() })
    }

    /// `options`, run so.
    pub fn with(self, options: Options) -> Options {
        Options { driver: self.driver(), shards: Some(self.shards), ..options }
    }

    /// The same for `corepage serve`.
    pub fn arguments(self) -> Vec<String> {
        let driver = if self.ring { "ring" } else { "portable" };
        ["--driver", driver, "--shards", &self.shards.to_string()].map(str::to_owned).into()
    }
}

/// What a child is told.
pub struct Task {
    pub role: String,
    pub dir: PathBuf,
    pub run: Run,
}

impl Task {
    /// In the child; `None` in a run of the tests as such.
    pub fn of_this_process() -> Option<Task> {
        let (role, dir, run) =
            (std::env::var(ROLE).ok()?, std::env::var_os(STORE)?, std::env::var(RUN).ok()?);
        let (driver, shards) = run.split_once(' ')?;
        let run = Run { ring: driver == "ring", shards: shards.parse().ok()? };
        Some(Task { role, dir: dir.into(), run })
    }
}

/// One line in one `write`, so that a kill can't cut it in two.
pub fn say(line: impl std::fmt::Display) {
    std::io::stdout().lock().write_all(format!("{line}\n").as_bytes()).expect("the parent reads");
    // In a guest, it is out only when the console's buffer is empty: what is tried must be heard
    // before it is done.
    let _ = rustix::termios::tcdrain(std::io::stdout());
}

fn is_word(line: &str) -> bool {
    line == "ready" || line == "dumped"
}

/// A child at work.
pub struct Role {
    child: Child,
    is_killed: bool,
    lines: Option<JoinHandle<Vec<(u64, String)>>>,
    heard: Receiver<String>,
}

impl Role {
    /// Starts the test `child` of the caller's module in a role, on the store in `dir`.
    #[track_caller]
    pub fn start(role: &str, dir: &Path, run: Run) -> Role {
        Role::start_stamped(role, dir, run, || 0)
    }

    /// The same, with a stamp on each line that is made after the line was heard.
    #[track_caller]
    pub fn start_stamped(
        role: &str,
        dir: &Path,
        run: Run,
        stamp: impl Fn() -> u64 + Send + 'static,
    ) -> Role {
        Role::listen(Role::command(role, dir, run), stamp)
    }

    /// What starts the test `child` of the caller's module in a role, for [`listen`](Self::listen).
    #[track_caller]
    pub fn command(role: &str, dir: &Path, run: Run) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        let module =
            Path::new(std::panic::Location::caller().file()).file_stem().expect("a file of tests");
        let child = format!("{}::child", module.display());
        command.args(["--exact", &child, "--nocapture"]).env(ROLE, role).env(STORE, dir);
        command.env(RUN, format!("{} {}", if run.ring { "ring" } else { "portable" }, run.shards));
        command
    }

    /// Starts a process that says what the child says.
    pub fn listen(mut command: Command, stamp: impl Fn() -> u64 + Send + 'static) -> Role {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (sender, heard) = channel();
        let lines = std::thread::spawn(move || {
            // A line that a power cut left unfinished is none: half a number is another number.
            let lines = std::iter::from_fn(|| {
                let mut line = String::new();
                stdout.read_line(&mut line).ok()?;
                line.strip_suffix('\n').map(str::to_owned)
            });
            // A guest's console ends lines its own way.
            let lines = lines.map(|line| (stamp(), line.trim_end_matches('\r').to_owned()));
            // All of them until it is ready, to tell why it is not; then only the words waited for:
            // there may be a million.
            let mut ready = false;
            let pass_on = |(_, line): &(u64, String)| {
                if is_word(line) || !ready {
                    _ = sender.send(line.clone());
                }
                ready |= is_word(line);
            };
            lines.inspect(pass_on).collect()
        });
        Role { child, is_killed: false, lines: Some(lines), heard }
    }

    /// Whether it has said by now that it is where its role wants it.
    pub fn is_there(&self) -> bool {
        self.heard.try_iter().any(|line| is_word(&line))
    }

    /// Waits for the child's word, `ready` or `dumped`, that it is where its role wants it.
    pub fn wait(&self) {
        let end = Instant::now() + Duration::from_secs(120);
        let mut said = Vec::new();
        loop {
            match self.heard.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if is_word(&line) => return,
                Ok(line) => said.push(line),
                Err(why) => panic!(
                    "the child does not say that it is ready ({why}); it said:\n{}",
                    said.join("\n")
                ),
            }
        }
    }

    /// Kills it, and does not wait: what it has begun may keep it from its end.
    pub fn kill_only(&mut self) {
        if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
            assert!(
                self.is_killed || status.success(),
                "the child failed before it was killed: {status}"
            );
        }
        self.child.kill().expect("the child can be killed");
        self.is_killed = true;
    }

    /// Kills it, and gives back all that it said.
    pub fn kill(self) -> Vec<String> {
        self.kill_stamped().into_iter().map(|(_, line)| line).collect()
    }

    /// The same with stamps.
    pub fn kill_stamped(mut self) -> Vec<(u64, String)> {
        self.kill_only();
        self.child.wait().expect("a killed process ends");
        self.lines.take().expect("killed once").join().expect("its lines were read")
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
