//! What the tests with real processes share: a server to start, kill and stop, tools to look for,
//! rng from a seed.
//!
//! 1. No process outlives its guard: [`Served`] kills by id when it is dropped.
//! 2. A missing tool is said loudly, and is a failure where COREPAGE_REQUIRE_TOOLS=1 is set (as
//!    `scripts/check` does).

// Each test uses a part of this, in real time.
#![allow(dead_code, missing_docs, clippy::disallowed_methods)]

pub mod device;
pub mod guest;
pub mod history;
pub mod logged;
pub mod nbd;
pub mod recording;
pub mod replay;
pub mod role;
pub mod scratch;
pub mod surroundings;
pub mod workload;

pub use corepage::testing::random::Rng;
pub use scratch::scratch;
use std::hash::Hasher;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long a start, with recovery, may take on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long a clean stop may take.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// `corepage` with `arguments`, with little to say on stderr.
pub fn corepage(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_corepage"));
    command.args(arguments).env("RUST_LOG", "error").stdin(Stdio::null());
    command
}

/// Whether `tool` is there; without it the test can't show anything.
pub fn has_tool(tool: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|d| d.join(tool).exists())
    });
    found || skip(format_args!("{tool} is not installed"))
}

/// Says loudly that a test can't show anything here, and fails where that must not be. Returns
/// false.
pub fn skip(why: impl std::fmt::Display) -> bool {
    assert_ne!(
        std::env::var("COREPAGE_REQUIRE_TOOLS").as_deref(),
        Ok("1"),
        "{why}, and this is required"
    );
    skipped(format_args!("{why}; set COREPAGE_REQUIRE_TOOLS=1 to make this a failure"));
    false
}

/// Says that a test, or a part of it, shows nothing here: past the test harness, which keeps what
/// passing tests print to itself. Else its line says `ok` and nothing more.
pub fn skipped(why: impl std::fmt::Display) {
    let thread = std::thread::current();
    // In one piece: other tests write, too. Without a stderr there is nobody to tell.
    let line = format!("SKIPPED {}: {why}\n", thread.name().unwrap_or("a part of a test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Whether this kernel has FUSE; no package brings it, so it is never required.
pub fn has_fuse() -> bool {
    let there = std::path::Path::new("/dev/fuse").exists();
    if !there {
        skipped("this machine has no /dev/fuse");
    }
    there
}

/// Runs a command to its end, and shows what it said if it fails.
pub fn run(command: &mut Command) {
    let shown = format!("{command:?}");
    let output = command.output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{shown}: {}\n{out}\n{err}", output.status);
}

/// A part of a URI with its percent-encoded bytes decoded.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = if *first == b'%' { tail.get(..2) } else { None };
        let decoded = code.and_then(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 16).ok());
        bytes.push(decoded.unwrap_or(*first));
        rest = if decoded.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).expect("a path of ours is UTF-8")
}

/// A running `corepage serve`.
pub struct Served {
    child: Child,
    /// Its lines on stdout up to the last listener's.
    pub lines: Vec<String>,
    /// Where it listens, as URIs.
    pub uris: Vec<String>,
}

impl Served {
    /// Serves `dir` on a free TCP port.
    pub fn start(dir: &Path) -> Served {
        Served::start_with(dir, &["--nbd", "tcp:127.0.0.1:0"])
    }

    /// Serves `dir` with these arguments, and waits until it listens on each `--nbd` among them.
    pub fn start_with(dir: &Path, arguments: &[&str]) -> Served {
        Served::start_without(&[], dir, arguments)
    }

    /// Serves `dir` on a free TCP port with this driver and number of shards.
    pub fn start_as(run: role::Run, dir: &Path) -> Served {
        let run = run.arguments();
        let arguments: Vec<&str> =
            ["--nbd", "tcp:127.0.0.1:0"].into_iter().chain(run.iter().map(|a| &a[..])).collect();
        Served::start_with(dir, &arguments)
    }

    /// The same in hostile surroundings.
    pub fn start_without(
        these: &[surroundings::Without],
        dir: &Path,
        arguments: &[&str],
    ) -> Served {
        let mut command = corepage(&["serve", "--dir"]);
        surroundings::start_without(&mut command, these);
        command.arg(dir).args(arguments);
        Served::spawn(command, arguments.iter().filter(|a| **a == "--nbd").count())
    }

    /// Starts it, and waits until it listens on `wanted` addresses.
    pub fn spawn(mut command: Command, wanted: usize) -> Served {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("corepage starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut served = Served { child, lines: Vec::new(), uris: Vec::new() };
        let (sender, lines) = mpsc::channel();
        // To the end of the stream, so that the server never finds its stdout closed.
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).for_each(|l| drop(sender.send(l)))
        });
        let end = Instant::now() + START_LIMIT;
        while served.uris.len() < wanted {
            let left = end.saturating_duration_since(Instant::now());
            let line = lines
                .recv_timeout(left)
                .unwrap_or_else(|e| panic!("no `listening` line: {e}; {:?}", served.lines));
            if let Some(rest) = line.strip_prefix("listening on ") {
                served.uris.push(rest.split(" (").next().unwrap_or(rest).to_owned());
            }
            served.lines.push(line);
        }
        served
    }

    /// The first address, as HOST:PORT or as a socket's path.
    pub fn address(&self) -> String {
        let uri = &self.uris[0];
        uri.strip_prefix("nbd+unix:///?socket=")
            .map_or_else(|| uri.trim_start_matches("nbd://").to_owned(), percent_decoded)
    }

    /// The number of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// A client in transmission on the default export.
    pub fn client(&self) -> nbd::Client {
        nbd::Client::go(&self.address(), "")
    }

    /// Kills it at once, as a crash of the process would.
    pub fn kill(mut self) {
        self.child.kill().expect("the server was still running");
        self.child.wait().expect("a killed process ends");
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .expect("the server was still running");
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(mut self) -> ExitStatus {
        self.terminate();
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + STOP_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                return status;
            }
            assert!(Instant::now() < end, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many kills a kill loop makes: 20, or what COREPAGE_KILLS says.
pub fn kills_count() -> u64 {
    std::env::var("COREPAGE_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20)
}

/// A seed: `usual`, or another with COREPAGE_SEED, for a long run that is not to repeat
/// the short one.
pub fn seed(usual: u64) -> u64 {
    let other = std::env::var("COREPAGE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    Rng::of(&[other]).draw().wrapping_mul(u64::from(other != 0)) ^ usual
}

/// Says now and then how far a long kill loop is.
pub fn progress(round: u64, what: impl FnOnce() -> String) {
    if kills_count() > 20 && (round + 1).is_multiple_of(25) {
        println!("{} of {} kills: {}", round + 1, kills_count(), what());
    }
}

/// Path of everything below `dir` with the bytes of files as a sum, to show that nothing has
/// changed.
pub fn snapshot(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut all = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten() {
            let entry = entry.expect("a directory entry");
            let kind = entry.file_type().expect("its kind");
            let mut sum = std::hash::DefaultHasher::new();
            if kind.is_file() {
                sum.write(&std::fs::read(entry.path()).expect("its bytes"));
            } else if kind.is_dir() {
                open.push(entry.path());
            }
            all.push((entry.path(), sum.finish()));
        }
    }
    all.sort();
    all
}
