//! The protocol against an export in memory, with the faults that a real store does not show on demand: a client that
//! sends rubbish, one that never reads, an export that stalls, fails or panics.
//!
//! If these fail, one client can hang or end what others are doing. Requests against a real store: `tests/nbd_protocol.rs`.

use super::handshake::{Outcome, handshake};
use super::proto::{self, Agreed, Errno, option, reply};
use super::socket::Socket;
use super::{Export, Exports, Holes, Limits, StoreExports, Stretch, span, transmission};
use bytes::Bytes;
use corepage::{Allocated, PageId, Store};
use event_listener::Event;
use futures_lite::future::block_on;
use std::io::{self, Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SIZE: u64 = 64 << 20;

/// An export in memory; `stall` holds its flushes back, `fault` makes its next writes fail.
#[derive(Clone, Default)]
struct Memory {
    data: Arc<Mutex<Vec<u8>>>,
    stall: Arc<AtomicBool>,
    go_on: Arc<Event>,
    fault: Arc<AtomicU32>,
}

impl Memory {
    fn new() -> Self {
        Memory { data: Arc::new(Mutex::new(vec![0; SIZE as usize])), ..Memory::default() }
    }

    fn stretches(&self, offset: u64, length: u64) -> Vec<Stretch> {
        let data = self.data.lock().unwrap();
        let pages = offset / 4096..=(offset + length - 1) / 4096;
        let stored = pages.filter(|page| data[*page as usize * 4096..][..4096].iter().any(|byte| *byte != 0));
        let ranges = stored.map(|page| (PageId::new(page), PageId::new(page))).collect();
        span::stretches(offset, offset + length, &Allocated { ranges, next: None })
    }
}

impl Export for Memory {
    fn bytes(&self) -> u64 {
        SIZE
    }
    /// Pages of zeros count as not stored.
    async fn read(&self, offset: u64, into: &mut [u8]) -> Result<Holes, Errno> {
        into.copy_from_slice(&self.data.lock().unwrap()[offset as usize..][..into.len()]);
        let mut at = 0;
        let mut holes = Holes::new();
        for stretch in self.stretches(offset, into.len() as u64) {
            let part = at..at + stretch.length as usize;
            at = part.end;
            holes.extend(stretch.is_hole.then_some(part));
        }
        Ok(holes)
    }
    async fn cache(&self, _offset: u64, _length: u64) -> Result<(), Errno> {
        Ok(())
    }
    async fn allocation(&self, offset: u64, length: u32) -> Result<Vec<Stretch>, Errno> {
        Ok(self.stretches(offset, u64::from(length)))
    }
    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), Errno> {
        match self.fault.load(Ordering::Relaxed) {
            0 => self.data.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data),
            28 => return Err(Errno::NoSpace),
            _ => panic!("planted: an export fails in an unforeseen way"),
        }
        Ok(())
    }
    async fn zero(&self, offset: u64, length: u64, _hole: bool, _fua: bool) -> Result<(), Errno> {
        self.data.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
    async fn flush(&self) -> Result<(), Errno> {
        loop {
            let listener = self.go_on.listen();
            if !self.stall.load(Ordering::Acquire) {
                return Ok(());
            }
            listener.await;
        }
    }
}

impl Exports for Memory {
    type Export = Memory;
    fn names(&self) -> Result<Vec<String>, Errno> {
        Ok(vec!["disk".into()])
    }
    fn find(&self, name: &str) -> Result<Option<(String, Memory)>, Errno> {
        Ok(["", "disk"].contains(&name).then(|| ("disk".into(), self.clone())))
    }
}

/// Bytes in, bytes out: a connection without a socket.
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

fn option_bytes(number: u32, data: &[u8]) -> Vec<u8> {
    let head = [&proto::OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()];
    [&head.concat()[..], data].concat()
}

/// Runs a handshake over what a client says after the greeting; the outcome, and the answer without the greeting.
fn talk(said: &[Vec<u8>]) -> (io::Result<Outcome<Memory>>, Vec<u8>) {
    let mut stream = Canned(Cursor::new(said.concat()), Vec::new());
    let outcome = handshake(&mut stream, &Memory::default(), 16);
    assert_eq!(stream.1[..18], proto::greeting());
    (outcome, stream.1.split_off(18))
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];

/// Clients written against the specification would not connect otherwise.
#[test]
fn malformed_options_are_answered_and_the_next_one_is_understood() {
    let whole = [&4u32.to_be_bytes()[..], b"disk", &0u16.to_be_bytes()].concat();
    let malformed: [&[u8]; 6] = [
        b"",
        &whole[..7],
        &whole[..9],
        &[&whole[..], b"x"].concat(),
        &[&u32::MAX.to_be_bytes()[..], b"disk\0\0"].concat(),
        &[&5000u32.to_be_bytes()[..], &[b'a'; 5000], &[0, 0]].concat(),
    ];
    for data in malformed {
        let said = [FLAGS.to_vec(), option_bytes(option::GO, data), option_bytes(option::GO, &whole)];
        let (outcome, answer) = talk(&said);
        assert!(matches!(outcome, Ok(Outcome::Chosen(name, ..)) if name == "disk"));
        assert_eq!(answer[12..16], reply::ERR_INVALID.to_be_bytes());
    }
    let (outcome, answer) =
        talk(&[FLAGS.to_vec(), option_bytes(5, b""), option_bytes(11, b"xyz"), option_bytes(2, b"")]);
    assert!(matches!(outcome, Ok(Outcome::Aborted)));
    let unsupported = |n| proto::option_reply(n, reply::ERR_UNSUP, b"");
    assert_eq!(answer, [unsupported(5), unsupported(11), proto::option_reply(2, reply::ACK, b"")].concat());
}

/// Without bounds a client could make the server read or answer for ever.
#[test]
fn a_handshake_out_of_bounds_ends_the_connection() {
    let endless = vec![option_bytes(77, b""); 17];
    let too_long = [&proto::OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 7], &u32::MAX.to_be_bytes()].concat();
    for said in [endless, vec![too_long], vec![b"NOTMAGIC\0\0\0\x07\0\0\0\0".to_vec()], vec![option_bytes(1, b"none")]]
    {
        assert!(talk(&[&[FLAGS.to_vec()][..], &said].concat()).0.is_err());
    }
    assert!(talk(&[vec![0, 0, 0, 0x83]]).0.is_err(), "unknown client flags");
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let head = [&proto::REQUEST_MAGIC.to_be_bytes()[..], &[0, 0], &command.to_be_bytes(), &cookie.to_be_bytes()];
    [&head.concat()[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// A connection in transmission, and what became of its server side.
fn connect(export: &Memory, stopping: Arc<AtomicBool>) -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
    let (client, server) = UnixStream::pair().unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let export = export.clone();
    let thread = std::thread::spawn(move || {
        let socket = Socket::Unix(server);
        let outcome = transmission::serve(&socket, &export, Agreed::default(), &Limits::default(), &stopping);
        socket.shut(Shutdown::Both);
        outcome
    });
    (client, thread)
}

/// Cookie and error of the next reply without data.
fn next_reply(client: &mut UnixStream) -> (u64, u32) {
    let mut bytes = [0; 16];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
    (u64::from_be_bytes(bytes[8..].try_into().unwrap()), u32::from_be_bytes(bytes[4..8].try_into().unwrap()))
}

fn never() -> Arc<AtomicBool> {
    Arc::default()
}

/// One slow flush must not hold up the reads behind it.
#[test]
fn requests_overtake_one_that_stalls() {
    let export = Memory::new();
    export.stall.store(true, Ordering::Release);
    let (mut client, server) = connect(&export, never());
    client.write_all(&[request(3, 1, 0, 0), request(4, 2, 0, 512)].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (2, 0));
    export.stall.store(false, Ordering::Release);
    export.go_on.notify(usize::MAX);
    assert_eq!(next_reply(&mut client), (1, 0));
    client.write_all(&request(2, 3, 0, 0)).unwrap();
    server.join().unwrap().unwrap();
}

/// A refused write whose payload were taken for requests would make a mess of all that follows.
#[test]
fn the_stream_stays_in_step_after_a_refused_write() {
    let export = Memory::new();
    let (mut client, server) = connect(&export, never());
    let rubbish = [0x25; 4096];
    client.write_all(&[&request(1, 1, SIZE - 1, 4096)[..], &rubbish].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (1, Errno::NoSpace as u32));
    export.fault.store(28, Ordering::Relaxed);
    client.write_all(&[&request(1, 2, 0, 4096)[..], &rubbish].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (2, Errno::NoSpace as u32));
    client.write_all(&request(99, 3, 0, 4096)).unwrap();
    assert_eq!(next_reply(&mut client), (3, Errno::Invalid as u32));
    drop(client);
    server.join().unwrap().unwrap();
}

/// A client that is waited for for ever keeps a stopping server from closing its store.
#[test]
fn an_export_that_panics_ends_its_connection_and_nothing_hangs() {
    let export = Memory::new();
    export.fault.store(1, Ordering::Relaxed);
    let (mut client, server) = connect(&export, never());
    client.write_all(&[&request(1, 1, 0, 1)[..], b"x"].concat()).unwrap();
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0, "the connection must end without a reply");
    assert!(server.join().unwrap().is_err());
}

/// Requests that come while the server stops must be refused, not half done.
#[test]
fn a_stopping_server_says_so() {
    let (mut client, server) = connect(&Memory::new(), Arc::new(AtomicBool::new(true)));
    client.write_all(&[&request(1, 7, 0, 3)[..], b"xyz"].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (7, Errno::Shutdown as u32));
    server.join().unwrap().unwrap();
}

/// A client that asks for much and reads nothing must not fill the memory; the gate holds it.
#[test]
fn a_client_that_never_reads_is_held_back() {
    let export = Memory::new();
    let (mut client, server) = connect(&export, never());
    client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let read = request(0, 1, 0, 32 << 20);
    let sent = (0..1_000_000).take_while(|_| client.write_all(&read).is_ok()).count();
    assert!(sent < 100_000, "{sent} requests were taken without a reply being read");
    client.shutdown(Shutdown::Both).unwrap();
    assert!(server.join().unwrap().is_ok() || !export.data.lock().unwrap().is_empty());
}

/// A disk that was made larger is larger to whoever connects from then on; one that was made smaller gives nothing beyond its end
/// to anybody, and takes nothing there.
#[test]
fn new_connections_see_a_new_size_and_old_ones_are_held_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let options = corepage::Options { memory_bytes: 16 << 20, ..corepage::Options::default() };
    let store = block_on(Store::open(dir.path(), options)).unwrap();
    block_on(store.create_volume("disk", 1 << 20)).unwrap();
    let exports = StoreExports::new(store.clone());
    let find = || exports.find("disk").unwrap().unwrap().1;
    let old = find();
    block_on(old.write(900 << 10, Bytes::from(vec![7; 4096]), false)).unwrap();
    block_on(store.resize_volume("disk", 4 << 20)).unwrap();
    assert_eq!((find().bytes(), old.bytes()), (4 << 20, 4 << 20));
    block_on(store.resize_volume("disk", 64 << 10)).unwrap();
    assert_eq!((find().bytes(), old.bytes()), (64 << 10, 64 << 10));
    for command in [0, 1, 4, 6] {
        let header = request(command, 1, 900 << 10, 4096);
        let parsed = proto::Request::parse(header[..28].try_into().unwrap()).unwrap();
        assert!(parsed.check(old.bytes(), Agreed::default()).is_err(), "command {command} beyond the end");
    }
    block_on(store.resize_volume("disk", 1 << 20)).unwrap();
    let mut bytes = [0; 4096];
    let holes = block_on(old.read(900 << 10, &mut bytes)).unwrap();
    assert_eq!((holes.len(), holes[0].len()), (1, 4096), "what was cut off is back");
    block_on(store.delete_volume("disk")).unwrap();
    assert!(exports.find("disk").unwrap().is_none());
    assert_eq!((old.bytes(), block_on(old.read(0, &mut bytes))), (0, Err(Errno::Invalid)));
    block_on(store.close()).unwrap();
}
