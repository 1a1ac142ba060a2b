//! Accepts, counts and stops connections.
//!
//! 1. A connection is in the table from before its threads start until after they have ended.
//! 2. [`Server::stop`] accepts no new connections and no new requests (`ESHUTDOWN`), and answers
//!    those in flight; a client that does not take its replies is cut off after the grace time.
//!    When it returns true, the exports are no longer in use.
//!
//! It does *not* close the store.

use super::admission::{Admission, Peer};
use super::handshake::{Outcome, handshake};
use super::listener::Listener;
use super::socket::{Deadline, Socket};
use super::{Exports, Limits, Memory, transmission};
use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tracing::{debug, info, warn};

/// How long after the grace time requests may still wait for the store.
const STORE_WAIT: Duration = Duration::from_secs(30);
/// The pause between two attempts to accept when the process has run out of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A server at work.
pub struct Server<X: Exports> {
    shared: Arc<Shared<X>>,
    acceptors: Vec<(Arc<Listener>, JoinHandle<()>)>,
}

struct Shared<X> {
    exports: X,
    limits: Limits,
    memory: Arc<Memory>,
    stopping: Arc<AtomicBool>,
    connections: Mutex<Connections>,
    changed: Condvar,
}

struct Connections {
    next: u64,
    open: HashMap<u64, Arc<Socket>>,
    admission: Admission,
}

impl<X: Exports> Server<X> {
    /// Starts a thread for each listener.
    pub fn start(
        listeners: Vec<Listener>,
        exports: X,
        limits: Limits,
        memory: Arc<Memory>,
    ) -> io::Result<Self> {
        let admission = Admission::new(memory.division().connections_max);
        let shared = Arc::new(Shared {
            exports,
            limits,
            memory,
            stopping: Arc::default(),
            connections: Mutex::new(Connections { next: 0, open: HashMap::new(), admission }),
            changed: Condvar::new(),
        });
        let mut server = Server { shared, acceptors: Vec::new() };
        for listener in listeners {
            let (listener, shared) = (Arc::new(listener), server.shared.clone());
            let own = listener.clone();
            let work = move || {
                crate::program::server::persistently("NBD clients", || accept(&own, &shared))
            };
            let thread = std::thread::Builder::new()
                .name("nbd-accept".into())
                .spawn(work)
                .map_err(crate::program::server::no_thread)?;
            server.acceptors.push((listener, thread));
        }
        Ok(server)
    }

    #[cfg(test)]
    pub(super) fn exports_for_tests(&self) -> &X {
        &self.shared.exports
    }

    /// Stops the server: see the head of this file. Returns false if requests still wait for the
    /// store after a long time.
    pub fn stop(mut self) -> bool {
        self.shared.stopping.store(true, Ordering::Release);
        for (listener, thread) in self.acceptors.drain(..) {
            listener.wake();
            let _ = thread.join();
        }
        self.shared.shut_all(Shutdown::Read);
        if self.shared.wait_empty(self.shared.limits.grace) {
            return true;
        }
        warn!("some clients don't take their replies: cutting them off");
        self.shared.shut_all(Shutdown::Both);
        self.shared.wait_empty(STORE_WAIT)
    }
}

fn accept<X: Exports>(listener: &Listener, shared: &Arc<Shared<X>>) {
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        match accepted {
            Ok(socket) => shared.admit(socket),
            Err(e) => {
                warn!(error = %e, "can't accept a connection; trying again");
                std::thread::sleep(ACCEPT_RETRY);
            }
        }
    }
}

impl<X: Exports> Shared<X> {
    // The state is plain data, consistent at every step, so a panic elsewhere does not invalidate
    // it.
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a connection's thread, if there is room.
    fn admit(self: &Arc<Self>, socket: Socket) {
        let peer = socket.peer();
        let mut connections = self.lock();
        if let Err(refused) = connections.admission.enter(peer) {
            drop(connections);
            let (of_peer, open) = (refused.of_peer, refused.open);
            let what =
                "too many connections: a client is refused; `serve --connections` allows more";
            warn!(%peer, of_peer, open, "{what}");
            return;
        }
        let (id, socket) = (connections.next, Arc::new(socket));
        connections.next += 1;
        connections.open.insert(id, socket.clone());
        drop(connections);
        let entry = Entry { shared: self.clone(), id, peer };
        let run = move || {
            if let Err(e) = entry.shared.connection(id, &socket) {
                info!(connection = id, error = %e, "connection ended");
            }
            // The entry is removed only now that no request is in progress.
            socket.shut(Shutdown::Both);
            drop(entry);
        };
        if let Err(e) = std::thread::Builder::new().name("nbd-client".into()).spawn(run) {
            warn!(error = %e, "refused a client: no thread for it");
        }
    }

    fn connection(&self, id: u64, socket: &Socket) -> io::Result<()> {
        let mut stream =
            Deadline::with_pause(socket, self.limits.handshake, self.limits.handshake_pause);
        let outcome = handshake(&mut stream, &self.exports, self.limits.handshake_bytes_max)?;
        let Outcome::Chosen(name, export, agreed) = outcome else { return Ok(()) };
        stream.lift()?;
        debug!(connection = id, volume = name, ?agreed, "transmission begins");
        transmission::serve(socket, &export, agreed, &self.limits, &self.memory, &self.stopping)
    }

    fn shut_all(&self, how: Shutdown) {
        self.lock().open.values().for_each(|socket| socket.shut(how));
    }

    fn wait_empty(&self, limit: Duration) -> bool {
        let busy = |c: &mut Connections| !c.open.is_empty();
        let waited = self.changed.wait_timeout_while(self.lock(), limit, busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.open.is_empty()
    }
}

/// Removes a connection from the table however its thread ends.
struct Entry<X: Exports> {
    shared: Arc<Shared<X>>,
    id: u64,
    peer: Peer,
}

impl<X: Exports> Drop for Entry<X> {
    fn drop(&mut self) {
        let mut connections = self.shared.lock();
        connections.open.remove(&self.id);
        connections.admission.leave(self.peer);
        drop(connections);
        self.shared.changed.notify_all();
    }
}
