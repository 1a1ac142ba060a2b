//! Tests the protocol against an export in memory, with the faults that a real store does not show
//! on demand: a client that sends rubbish, one that never reads, an export that stalls, fails or
//! panics.
//!
//! If these fail, one client can hang or end the work of others. `tests/fast/nbd_protocol.rs` tests
//! requests against a real store.

mod handshake;
mod listener;
mod memory;
mod requests;

use super::handshake::{Outcome, handshake};
use super::holes::Holes;
use super::memory::{Division, Memory as Budget};
use super::pause;
use super::proto::{self, Agreed, Errno, Extent, ExtentKind, Fault, option, reply};
use super::socket::Socket;
use super::{Address, Export, Exports, Limits, Server, transmission};
use bytes::Bytes;
use corepage::Durability;
use event_listener::Event;
use std::io::{self, Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SIZE: u64 = 64 << 20;

/// An export in memory; `stall` delays its flushes, `fault` makes its next writes fail, `shrunk`
/// removes bytes at its end. While it is `busy` its writes are retried, like those of a store;
/// reads from `unreadable` on fail.
#[derive(Clone, Default)]
struct Memory {
    data: Arc<Mutex<Vec<u8>>>,
    stall: Arc<AtomicBool>,
    go_on: Arc<Event>,
    fault: Arc<AtomicU32>,
    shrunk: Arc<AtomicU64>,
    busy: Arc<AtomicBool>,
    tries: Arc<AtomicU32>,
    unreadable: Arc<AtomicU64>,
    reads: Arc<AtomicU32>,
}

impl Memory {
    fn new() -> Self {
        Memory { data: Arc::new(Mutex::new(vec![0; SIZE as usize])), ..Memory::default() }
    }
}

impl Export for Memory {
    fn bytes(&self) -> u64 {
        SIZE
    }
    fn bytes_now(&self) -> u64 {
        SIZE - self.shrunk.load(Ordering::Relaxed)
    }
    fn is_deleted(&self) -> bool {
        self.bytes_now() == 0
    }
    fn write_bytes_max(&self) -> usize {
        1 << 20
    }
    async fn read(&self, offset: u64, into: &mut [u8], holes: &mut Holes) -> Result<(), Fault> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let unreadable = self.unreadable.load(Ordering::Relaxed);
        if unreadable > 0 && offset + into.len() as u64 > unreadable {
            return Err(Fault::new(Errno::Io, "planted: unreadable"));
        }
        into.copy_from_slice(&self.data.lock().unwrap()[offset as usize..][..into.len()]);
        let zeros = |page: &[u8]| page.len() == 4096 && page.iter().all(|b| *b == 0);
        let absent = into.chunks(4096).enumerate().filter(|(_, page)| zeros(page));
        absent.for_each(|(n, _)| holes.add(n * 4096..(n + 1) * 4096));
        Ok(())
    }
    async fn write(&self, offset: u64, data: Bytes, _: Durability) -> Result<(), Fault> {
        let attempt = || async {
            self.tries.fetch_add(1, Ordering::Relaxed);
            match self.busy.load(Ordering::Relaxed) {
                true => Err(corepage::Error::new(corepage::ErrorKind::Busy, "planted: busy")),
                false => Ok(()),
            }
        };
        pause::retry_busy(attempt, |error| Fault::new(Errno::Io, error.to_string())).await?;
        match self.fault.load(Ordering::Relaxed) {
            0 => self.data.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data),
            28 => return Err(Fault::new(Errno::NoSpace, "planted: full")),
            _ => panic!("planted: an export fails in an unforeseen way"),
        }
        Ok(())
    }
    async fn zero(
        &self,
        offset: u64,
        length: u64,
        _: ExtentKind,
        _: Durability,
    ) -> Result<(), Fault> {
        self.data.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
    async fn flush(&self) -> Result<(), Fault> {
        loop {
            let listener = self.go_on.listen();
            if !self.stall.load(Ordering::Acquire) {
                return Ok(());
            }
            listener.await;
        }
    }
    async fn cache(&self, _offset: u64, _length: u64) -> Result<(), Fault> {
        Ok(())
    }
    /// Reports the first 1,000 requested bytes as stored, the rest as a hole.
    async fn allocation(
        &self,
        _offset: u64,
        length: u32,
        extents_max: usize,
    ) -> Result<Vec<Extent>, Fault> {
        let stored = Extent { bytes: length.min(1000), kind: ExtentKind::Stored };
        let hole = Extent { bytes: length - stored.bytes, kind: ExtentKind::Hole };
        Ok([stored, hole].into_iter().filter(|e| e.bytes > 0).take(extents_max).collect())
    }
}

impl Exports for Memory {
    type Export = Memory;
    fn names(&self) -> Result<Vec<String>, Fault> {
        Ok(vec!["disk".into(), "other".into()])
    }
    fn find(&self, name: &str) -> Result<Option<(String, Memory)>, Fault> {
        let name = if name.is_empty() { "disk" } else { name };
        Ok(["other", "disk"].contains(&name).then(|| (name.into(), self.clone())))
    }
}

/// A connection without a socket: bytes in, bytes out.
struct Canned(Cursor<Vec<u8>>, Vec<u8>);

impl Read for Canned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Canned {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.1.write(buffer)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The limit on the bytes of a handshake in these tests.
const TALK_BYTES_MAX: usize = 200_000;

fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let head = [
        &proto::OPTION_MAGIC.to_be_bytes()[..],
        &number.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
    ];
    [&head.concat()[..], data].concat()
}

/// Runs a handshake over what a client sends after the greeting. Returns the outcome, and the
/// answer without the greeting.
fn talk(said: &[Vec<u8>]) -> (io::Result<Outcome<Memory>>, Vec<u8>) {
    let mut stream = Canned(Cursor::new(said.concat()), Vec::new());
    let outcome = handshake(&mut stream, &Memory::default(), TALK_BYTES_MAX);
    assert_eq!(stream.1[..18], proto::greeting());
    (outcome, stream.1.split_off(18))
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    flagged(0, command, cookie, offset, length)
}

fn flagged(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let magic = proto::REQUEST_MAGIC.to_be_bytes();
    let head = [&magic[..], &flags.to_be_bytes(), &command.to_be_bytes(), &cookie.to_be_bytes()];
    [&head.concat()[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// Makes a connection in transmission. Returns the client's side, and the thread of the server's
/// side.
fn connect(
    export: &Memory,
    stopping: Arc<AtomicBool>,
) -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
    connect_as(export, Agreed::default(), stopping)
}

fn connect_as(
    export: &Memory,
    agreed: Agreed,
    stopping: Arc<AtomicBool>,
) -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
    connect_with(export, agreed, stopping, Limits::default(), &usual())
}

/// The memory of a server with 64 MiB.
fn usual() -> Arc<Budget> {
    Arc::new(Budget::new(Division::of(64 << 20)))
}

/// So little memory that almost nothing can be done as a whole.
fn little() -> Arc<Budget> {
    let (replies_bytes, writes_bytes) = (10 << 10, 40 << 10);
    let division =
        Division { own_bytes: 8 << 10, replies_bytes, writes_bytes, ..Division::of(16 << 20) };
    Arc::new(Budget::new(division))
}

fn connect_with(
    export: &Memory,
    agreed: Agreed,
    stopping: Arc<AtomicBool>,
    limits: Limits,
    budget: &Arc<Budget>,
) -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
    let budget = budget.clone();
    let (client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let export = export.clone();
    let thread = std::thread::spawn(move || {
        let socket = Socket::Unix(server);
        let outcome = transmission::serve(&socket, &export, agreed, &limits, &budget, &stopping);
        socket.shut(Shutdown::Both);
        outcome
    });
    (client, thread)
}

/// Reads the next reply without data. Returns its cookie and error.
fn next_reply(client: &mut UnixStream) -> (u64, u32) {
    let mut bytes = [0; 16];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
    (
        u64::from_be_bytes(bytes[8..].try_into().unwrap()),
        u32::from_be_bytes(bytes[4..8].try_into().unwrap()),
    )
}

fn never() -> Arc<AtomicBool> {
    Arc::default()
}

/// Reads the next chunk, with its layout spelled out: flags, type, cookie, payload.
fn next_chunk(client: &mut UnixStream) -> (u16, u16, u64, Vec<u8>) {
    let mut head = [0; 20];
    client.read_exact(&mut head).unwrap();
    assert_eq!(head[..4], [0x66, 0x8e, 0x33, 0xef]);
    let number = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    client.read_exact(&mut data).unwrap();
    (number(4), number(6), u64::from_be_bytes(head[8..16].try_into().unwrap()), data)
}

const BOTH: Agreed = Agreed { structured: true, allocation: true };

/// Starts a server with these limits on a socket file. Returns also the path of that.
fn listening(limits: Limits) -> (tempfile::TempDir, std::path::PathBuf, Server<Memory>) {
    listening_with(limits, usual())
}

fn listening_with(
    limits: Limits,
    budget: Arc<Budget>,
) -> (tempfile::TempDir, std::path::PathBuf, Server<Memory>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Address::Unix(path.clone()).plan(dir.path()).unwrap().bind().unwrap();
    let server = Server::start(vec![listener], Memory::new(), limits, budget).unwrap();
    (dir, path, server)
}

/// Connects a client that chooses an export. Fails with what the server said instead.
fn chosen(path: &std::path::Path) -> io::Result<UnixStream> {
    let mut client = UnixStream::connect(path)?;
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    client.write_all(&[&FLAGS[..], &option_bytes(option::EXPORT_NAME, b"disk")].concat())?;
    client.read_exact(&mut [0; 18 + 10])?;
    Ok(client)
}
