//! The control socket of a running server: figures, and volumes made, resized and deleted while they are served.
//!
//! ```text
//! client ── one line of JSON ──> thread of the connection ──> store
//!        <── one line of JSON ──
//! ```
//! 1. A request is one line of at most [`LINE_BYTES_MAX`] bytes, and gets one line: `{"ok": …}` or `{"error": …}`.
//! 2. At most [`CONNECTIONS_MAX`] clients, each with a thread; one that says nothing for [`PATIENCE`] is cut off.
//! 3. Only the owner of the store can connect: the socket has mode 0600.
//!
//! It knows nothing of what the figures mean.

use super::nbd::{Listener, Socket};
use corepage::metrics::ShardStats;
use corepage::{Error, Store};
use futures_lite::future::block_on;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// The socket's name in the directory of the store.
pub const SOCKET_NAME: &str = "control.sock";

const LINE_BYTES_MAX: u64 = 4096;
const CONNECTIONS_MAX: usize = 16;
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries to accept when the process has run out of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What can be asked.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Counters since the store was opened, and since this connection asked last.
    Stats,
    /// All volumes.
    Volumes,
    /// A new volume.
    Create { name: String, bytes: u64 },
    /// Another size.
    Resize { name: String, bytes: u64 },
    /// Away with it.
    Delete { name: String },
}

/// A volume, as it is told.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct VolumeLine {
    pub name: String,
    pub bytes: u64,
    pub number: u8,
}

/// Does what is asked, of a store that is open here.
pub fn perform(store: &Store, request: &Request) -> Result<Value, Error> {
    match request {
        Request::Stats => return block_on(store.stats()).map(|total| json!({ "total": total })),
        Request::Volumes => {
            let volumes = block_on(store.volumes())?;
            let line =
                |v: &corepage::Volume| VolumeLine { name: v.name().into(), bytes: v.bytes(), number: v.id().get() };
            return Ok(json!(volumes.iter().map(line).collect::<Vec<_>>()));
        }
        Request::Create { name, bytes } => block_on(store.create_volume(name, *bytes)).map(drop)?,
        Request::Resize { name, bytes } => block_on(store.resize_volume(name, *bytes))?,
        Request::Delete { name } => block_on(store.delete_volume(name))?,
    }
    Ok(Value::Null)
}

/// A control socket at work.
pub struct Control {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    store: Store,
    count: AtomicUsize,
    stopping: AtomicBool,
    sockets: Mutex<Vec<Weak<Socket>>>,
}

impl Control {
    /// Takes requests from now on.
    pub fn start(listener: Listener, store: Store) -> io::Result<Control> {
        let listener = Arc::new(listener);
        let (count, stopping, sockets) = Default::default();
        let shared = Arc::new(Shared { store, count, stopping, sockets });
        let (own, at) = (shared.clone(), listener.clone());
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || accept(&at, &own))?;
        Ok(Control { shared, listener, thread: Some(thread) })
    }
}

impl Drop for Control {
    /// Ends it: what is being done for clients is finished, nothing more is begun.
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.listener.wake();
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
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(socket);
    let mut last: Option<(Instant, ShardStats)> = None;
    loop {
        let mut line = Vec::new();
        if lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let (answer, goes_on) = match serde_json::from_slice(&line) {
            _ if line.last() != Some(&b'\n') => {
                (json!({ "error": "a request is one line of at most 4096 bytes" }), false)
            }
            Err(error) => (json!({ "error": format!("not a request: {error}") }), true),
            Ok(Request::Stats) => (said(stats(&shared.store, &mut last)), true),
            Ok(request) => (said(perform(&shared.store, &request)), true),
        };
        let mut out = socket;
        out.write_all(format!("{answer}\n").as_bytes())?;
        if !goes_on {
            return Ok(());
        }
    }
}

fn said(result: Result<Value, Error>) -> Value {
    match result {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// Totals, and what was counted since the last time; the first time since the store was opened.
fn stats(store: &Store, last: &mut Option<(Instant, ShardStats)>) -> Result<Value, Error> {
    let (now, total) = (Instant::now(), block_on(store.stats())?);
    let seconds = last.as_ref().map(|(then, _)| now.duration_since(*then).as_secs_f64());
    let interval = last.as_ref().map_or_else(|| total.clone(), |(_, before)| total.since(before));
    let (per_flush, iops) = (interval.commits_per_flush(), total.iops(Duration::from_secs(1)));
    let answer = json!({ "seconds": seconds, "interval": interval, "iops": iops, "commits_per_flush": per_flush, "total": total });
    *last = Some((now, total));
    Ok(answer)
}
