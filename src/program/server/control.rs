//! The control socket of a running server: it reports figures, and creates, resizes and deletes
//! volumes while they are served.
//!
//! ```text
//! client ── one line of JSON ──> thread of the connection ──> store
//!        <── one line of JSON ──
//! ```
//! 1. A request is one line of at most [`LINE_BYTES_MAX`] bytes, and gets one line: `{"ok": …}` or
//!    `{"error": …}`.
//! 2. There are at most [`CONNECTIONS_MAX`] clients, each with a thread; one that does not send a
//!    whole line, or take its answer, within [`PATIENCE`] is cut off.
//! 3. Only the owner of the store can connect: the socket has mode 0600.
//! 4. It exists before the store is open: until then each request is answered with the progress of
//!    opening.
//! 5. Requests to a busy store are retried for up to [`BUSY_LIMIT`]. A stopping server does not
//!    wait for requests: changes of volumes that have begun continue in the store, or at its next
//!    open.
//!
//! It does *not* know what the figures mean.

mod place;

pub use place::{Place, Reachable, SOCKET_NAME};

use super::nbd::{Deadline, Listener, Socket};
use corepage::ShardStats;
use corepage::{Error, ErrorKind, Store};
use event_listener::Event;
use futures_lite::FutureExt;
use futures_lite::future::block_on;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

const LINE_BYTES_MAX: u64 = 4096;
const CONNECTIONS_MAX: usize = 16;
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a request waits for a busy store, and how long between attempts.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// The time for a line to a refused client; a fresh socket has room for it anyway.
const REFUSAL_LIMIT: Duration = Duration::from_millis(10);
/// The pause between two attempts to accept when the process has run out of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The requests.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Returns counters since the store was opened, and since the last such request on this
    /// connection; of each shard, too, if requested.
    Stats {
        #[serde(default)]
        shards: bool,
    },
    /// Lists all volumes.
    Volumes,
    /// Creates a volume.
    Create { name: String, bytes: u64 },
    /// Resizes a volume.
    Resize { name: String, bytes: u64 },
    /// Deletes a volume.
    Delete { name: String },
}

/// A volume, as it is reported.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct VolumeLine {
    pub name: String,
    pub bytes: u64,
    pub number: u8,
}

/// The progress of a server that is still opening its store.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Opening {
    /// Seconds since it began.
    pub seconds: f64,
    /// Bytes that the process has read from the device and written to it, if the kernel reports
    /// them.
    pub read_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
}

impl Opening {
    fn now(begun: Instant) -> Opening {
        let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
        let field = |name| io.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        let (read_bytes, written_bytes) = (field("read_bytes:"), field("write_bytes:"));
        Opening { seconds: begun.elapsed().as_secs_f64(), read_bytes, written_bytes }
    }
}

/// Carries out a request on a store that is open here.
pub fn perform(store: &Store, request: &Request) -> Result<Value, Error> {
    block_on(retry_busy(store, request))
}

/// Retries a request while the store is busy, within limits.
async fn retry_busy(store: &Store, request: &Request) -> Result<Value, Error> {
    let begun = Instant::now();
    loop {
        match attempt(store, request).await {
            Err(error) if error.kind() == ErrorKind::Busy && begun.elapsed() < BUSY_LIMIT => {
                std::thread::sleep(BUSY_PAUSE);
                // This lets a caller that also waits for something else notice it.
                futures_lite::future::yield_now().await;
            }
            result => return result,
        }
    }
}

async fn attempt(store: &Store, request: &Request) -> Result<Value, Error> {
    match request {
        Request::Stats { .. } => return stats(store, Detail::wanted(request), &mut None).await,
        Request::Volumes => {
            let line = |v: &corepage::Volume| VolumeLine {
                name: v.name().into(),
                bytes: v.bytes(),
                number: v.id().get(),
            };
            return Ok(json!(store.volumes().await?.iter().map(line).collect::<Vec<_>>()));
        }
        Request::Create { name, bytes } => store.create_volume(name, *bytes).await.map(drop)?,
        Request::Resize { name, bytes } => store.resize_volume(name, *bytes).await?,
        Request::Delete { name } => store.delete_volume(name).await?,
    }
    Ok(Value::Null)
}

/// A control socket at work.
pub struct Control {
    shared: Arc<Shared>,
    place: Arc<Place>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Set once the store is open.
    store: OnceLock<Store>,
    begun: Instant,
    count: AtomicUsize,
    stopping: AtomicBool,
    /// Notified when `stopping` is set.
    stops: Event,
    sockets: Mutex<Vec<Weak<Socket>>>,
}

impl Control {
    /// Begins to take requests, and answers that the store is being opened until it [is
    /// open](Self::opened).
    pub fn start(place: Place) -> io::Result<Control> {
        let place = Arc::new(place);
        let (store, count, stopping, sockets) = Default::default();
        let shared = Arc::new(Shared {
            store,
            begun: Instant::now(),
            count,
            stopping,
            stops: Event::new(),
            sockets,
        });
        let (own, at) = (shared.clone(), place.clone());
        let work = move || super::persistently("control clients", || accept(&at.listener, &own));
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(work)
            .map_err(super::no_thread)?;
        Ok(Control { shared, place, thread: Some(thread) })
    }

    /// Called when the store is open: requests now go to it.
    pub fn opened(&self, store: Store) {
        let _ = self.shared.store.set(store);
    }
}

impl Drop for Control {
    /// Ends it: clients that wait for the store are told that the server stops, and no new request
    /// begins.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.stops.notify(usize::MAX);
        self.place.listener.wake();
        let _ = self.thread.take().map(JoinHandle::join);
        for socket in self.shared.lock().drain(..).filter_map(|socket| socket.upgrade()) {
            socket.shut(Shutdown::Both);
        }
        while self.shared.count.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Socket>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Waits for an answer of the store, or until the server stops.
    fn unless_stopping(
        &self,
        work: impl Future<Output = Result<Value, Error>>,
    ) -> Result<Value, Error> {
        let stops = async {
            let stops = self.stops.listen();
            if !self.stopping.load(Ordering::Acquire) {
                stops.await;
            }
            let text = "the server is stopping; whether this was done shows when the store is \
                        served again";
            Err(Error::new(ErrorKind::Closed, text))
        };
        block_on(work.or(stops))
    }
}

/// Counts a client down however its thread ends.
struct Counted(Arc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
    }
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        let socket = match accepted {
            Ok(socket) => Arc::new(socket),
            Err(error) => {
                warn!(%error, "can't accept a control connection; trying again");
                std::thread::sleep(ACCEPT_RETRY);
                continue;
            }
        };
        if shared.count.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            shared.count.fetch_sub(1, Ordering::AcqRel);
            warn!(max = CONNECTIONS_MAX, "refused a control client: too many");
            refuse(&socket);
            continue;
        }
        let counted = Counted(shared.clone());
        let mut sockets = shared.lock();
        sockets.retain(|socket| socket.strong_count() > 0);
        sockets.push(Arc::downgrade(&socket));
        drop(sockets);
        let serve = move || {
            if let Err(error) = serve(&socket, &counted.0) {
                debug!(%error, "a control connection ended");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("control-client".into()).spawn(serve) {
            warn!(%error, "refused a control client: no thread for it");
        }
    }
}

fn serve(socket: &Socket, shared: &Shared) -> io::Result<()> {
    let mut lines = BufReader::new(Deadline::new(socket, PATIENCE));
    let mut last = None;
    loop {
        let line = request(&mut lines, PATIENCE)?;
        if line.is_empty() {
            return Ok(());
        }
        let (answer, goes_on) = match serde_json::from_slice(&line) {
            _ if line.last() != Some(&b'\n') => {
                (json!({ "error": "a request is one line of at most 4096 bytes" }), false)
            }
            Err(error) => (json!({ "error": format!("not a request: {error}") }), true),
            Ok(request) => match shared.store.get() {
                None => (json!({ "opening": Opening::now(shared.begun) }), true),
                Some(store) => match request {
                    Request::Stats { .. } => {
                        let counted = stats(store, Detail::wanted(&request), &mut last);
                        (to_response(shared.unless_stopping(counted)), true)
                    }
                    request => {
                        (to_response(shared.unless_stopping(retry_busy(store, &request))), true)
                    }
                },
            },
        };
        let out = lines.get_mut();
        out.restart(PATIENCE);
        out.write_all(format!("{answer}\n").as_bytes())?;
        if !goes_on {
            return Ok(());
        }
    }
}

/// Tells a client that there are too many clients, without waiting for one that does not take the
/// answer.
fn refuse(socket: &Socket) {
    let text = format!(
        "the server has {CONNECTIONS_MAX} control clients, which is the most; try again when one \
         has ended"
    );
    let _ = Deadline::new(socket, REFUSAL_LIMIT)
        .write_all(format!("{}\n", json!({ "error": text })).as_bytes());
}

/// Reads the next line, which must be complete within `patience`. Returns an empty one at the end.
fn request(lines: &mut BufReader<Deadline<'_>>, patience: Duration) -> io::Result<Vec<u8>> {
    lines.get_mut().restart(patience);
    let mut line = Vec::new();
    lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    Ok(line)
}

fn to_response(result: Result<Value, Error>) -> Value {
    match result {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// The last report to a connection: its time, and the counters of each shard.
type LastSample = (Instant, Vec<ShardStats>);

/// Which counters are reported.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Detail {
    Totals,
    EachShard,
}

impl Detail {
    fn wanted(request: &Request) -> Detail {
        match request {
            Request::Stats { shards: true } => Detail::EachShard,
            _ => Detail::Totals,
        }
    }
}

/// Returns totals, and what was counted since the last report or, the first time, since the store
/// was opened.
async fn stats(
    store: &Store,
    detail: Detail,
    last: &mut Option<LastSample>,
) -> Result<Value, Error> {
    let (now, shards) = (Instant::now(), store.shard_stats().await?);
    let before = last.take();
    let seconds = before.as_ref().map(|(then, _)| now.duration_since(*then).as_secs_f64());
    let before = before.map(|(_, shards)| shards).unwrap_or_default();
    let mut answer = figures(&sum(&shards), &sum(&before));
    answer["seconds"] = json!(seconds);
    answer["volumes_freeing"] = json!(store.freeing_count());
    if detail == Detail::EachShard {
        let none = ShardStats::default();
        let each = shards
            .iter()
            .enumerate()
            .map(|(n, shard)| figures(shard, before.get(n).unwrap_or(&none)));
        answer["shards"] = each.collect();
    }
    *last = Some((now, shards));
    Ok(answer)
}

fn sum(shards: &[ShardStats]) -> ShardStats {
    let mut total = ShardStats::default();
    shards.iter().for_each(|shard| total.add(shard));
    total
}

/// Returns the counters, those since `before`, and what follows from them.
fn figures(total: &ShardStats, before: &ShardStats) -> Value {
    let interval = total.since(before);
    let iops = total.iops(Duration::from_secs(1));
    let (per_flush, hits) = (interval.commits_per_flush(), interval.hit_ratio());
    let (written, live) = (interval.write_amplification(), interval.live_share());
    json!({ "interval": interval, "iops": iops, "commits_per_flush": per_flush, "hit_ratio": hits,
            "write_amplification": written, "live_share": live, "total": total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// If this fails, sixteen clients that send a byte now and then keep all others away.
    #[test]
    fn a_line_that_comes_in_drops_is_not_waited_for() {
        let (server, mut client) = UnixStream::pair().expect("a pair of sockets");
        let dripping = std::thread::spawn(move || {
            // This ends when the other side is gone.
            while client.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let socket = Socket::Unix(server);
        let mut lines = BufReader::new(Deadline::new(&socket, PATIENCE));
        let refused =
            request(&mut lines, Duration::from_millis(100)).expect_err("it was waited for");
        assert!(
            matches!(refused.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock),
            "{refused}"
        );
        drop(lines);
        drop(socket);
        dripping.join().expect("it ends");
    }

    /// A command that connects while the server opens its store must be able to tell that from a
    /// store that another process has open.
    #[test]
    fn a_store_that_is_being_opened_is_said_to_be_and_then_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        let control = Control::start(Place::bind(dir.path()).expect("a socket")).expect("a thread");
        let client = UnixStream::connect(dir.path().join(SOCKET_NAME)).expect("it is there");
        let mut lines = BufReader::new(client.try_clone().expect("another handle"));
        let mut ask = move || -> Value {
            (&client).write_all(b"{\"ask\":\"volumes\"}\n").expect("it is read");
            let mut line = String::new();
            lines.read_line(&mut line).expect("an answer");
            serde_json::from_str(&line).expect("JSON")
        };
        let opening: Opening =
            serde_json::from_value(ask()["opening"].take()).expect("how far it has come");
        assert!(opening.seconds >= 0.0 && opening.written_bytes.is_some());
        let options =
            corepage::Options { memory_bytes: 8 << 20, shards: Some(1), ..Default::default() };
        let store = block_on(Store::open(dir.path().join("store"), options)).expect("a store");
        control.opened(store.clone());
        assert_eq!(ask()["ok"], json!([]));
        drop(control);
        block_on(store.close()).expect("a clean close");
    }
}
