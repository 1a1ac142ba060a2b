//! The protocol against an export in memory, with the faults that a real store does not show on demand: a client that
//! sends rubbish, one that never reads, an export that stalls, fails or panics.
//!
//! If these fail, one client can hang or end what others are doing. Requests against a real store: `tests/nbd_protocol.rs`.

use super::handshake::{Outcome, handshake};
use super::holes::Holes;
use super::memory::{Division, Memory as Budget};
use super::pause;
use super::proto::{self, Agreed, Errno, Extent, Fault, option, reply};
use super::socket::Socket;
use super::{Address, Export, Exports, Limits, Server, transmission};
use bytes::Bytes;
use event_listener::Event;
use std::io::{self, Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const SIZE: u64 = 64 << 20;

/// An export in memory; `stall` holds its flushes back, `fault` makes its next writes fail, `shrunk` takes bytes off
/// its end. While it is `busy` its writes are tried again, as those of a store are; reads from `unreadable` on fail.
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
    fn write_bytes_max(&self) -> usize {
        1 << 20
    }
    async fn read(&self, offset: u64, into: &mut [u8], holes: &mut Holes) -> Result<(), Fault> {
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
    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), Fault> {
        let attempt = || async {
            self.tries.fetch_add(1, Ordering::Relaxed);
            match self.busy.load(Ordering::Relaxed) {
                true => Err(corepage::Error::new(corepage::ErrorKind::Busy, "planted: busy")),
                false => Ok(()),
            }
        };
        pause::patiently(attempt, |error| Fault::new(Errno::Io, error.to_string())).await?;
        match self.fault.load(Ordering::Relaxed) {
            0 => self.data.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(&data),
            28 => return Err(Fault::new(Errno::NoSpace, "planted: full")),
            _ => panic!("planted: an export fails in an unforeseen way"),
        }
        Ok(())
    }
    async fn zero(&self, offset: u64, length: u64, _hole: bool, _fua: bool) -> Result<(), Fault> {
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
    /// The first 1,000 bytes asked for are stored, the rest is a hole.
    async fn allocation(&self, _offset: u64, length: u32, extents_max: usize) -> Result<Vec<Extent>, Fault> {
        let stored = Extent { bytes: length.min(1000), is_hole: false };
        let hole = Extent { bytes: length - stored.bytes, is_hole: true };
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
    flagged(0, command, cookie, offset, length)
}

fn flagged(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let magic = proto::REQUEST_MAGIC.to_be_bytes();
    let head = [&magic[..], &flags.to_be_bytes(), &command.to_be_bytes(), &cookie.to_be_bytes()];
    [&head.concat()[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// A connection in transmission, and what became of its server side.
fn connect(export: &Memory, stopping: Arc<AtomicBool>) -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
    connect_as(export, Agreed::default(), stopping)
}

fn connect_as(
    export: &Memory,
    agreed: Agreed,
    stopping: Arc<AtomicBool>,
) -> (UnixStream, std::thread::JoinHandle<io::Result<()>>) {
    connect_with(export, agreed, stopping, Limits::default(), &usual())
}

/// Memory as of a server with 64 MiB.
fn usual() -> Arc<Budget> {
    Arc::new(Budget::new(Division::of(64 << 20)))
}

/// So little memory that nearly nothing can be done as a whole.
fn little() -> Arc<Budget> {
    let (replies_bytes, writes_bytes) = (10 << 10, 40 << 10);
    let division = Division { own_bytes: 8 << 10, replies_bytes, writes_bytes, ..Division::of(16 << 20) };
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

/// A chunk's layout, spelled out: flags, type, cookie, payload.
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

/// A client takes each byte from where its chunk says; a wrong offset is wrong data, and a missing end a hang.
#[test]
fn a_structured_read_is_data_and_holes_and_one_end() {
    let export = Memory::new();
    export.data.lock().unwrap()[4096..6000].fill(7);
    let (mut client, server) = connect_as(&export, BOTH, never());
    client.write_all(&request(0, 9, 0, 16384)).unwrap();
    let hole = |at: u64, bytes: u32| [&at.to_be_bytes()[..], &bytes.to_be_bytes()].concat();
    let data = [&4096u64.to_be_bytes()[..], &[7; 6000 - 4096], &[0; 8192 - 6000]].concat();
    assert_eq!(next_chunk(&mut client), (0, 2, 9, hole(0, 4096)));
    assert_eq!(next_chunk(&mut client), (0, 1, 9, data));
    assert_eq!(next_chunk(&mut client), (1, 2, 9, hole(8192, 8192)));
    client.write_all(&request(0, 8, 2048, 8192)).unwrap();
    let (flags, kind, cookie, some) = next_chunk(&mut client);
    assert_eq!((flags, kind, cookie, some.len()), (0, 1, 8, 8 + 4096));
    assert_eq!((&some[..8], &some[8 + 2048..][..2]), (&2048u64.to_be_bytes()[..], &[7, 7][..]));
    assert_eq!(next_chunk(&mut client), (1, 2, 8, hole(6144, 4096)));
    // In one piece, if the client insists, and where there is no hole anyway.
    client.write_all(&flagged(1 << 2, 0, 10, 0, 8192)).unwrap();
    let (flags, kind, cookie, whole) = next_chunk(&mut client);
    assert_eq!((flags, kind, cookie, whole.len()), (1, 1, 10, 8 + 8192));
    assert_eq!((&whole[..8], &whole[8..12], &whole[8 + 4096..][..4]), (&[0; 8][..], &[0; 4][..], &[7; 4][..]));
    client.write_all(&request(0, 11, 5998, 4)).unwrap();
    assert_eq!(next_chunk(&mut client), (1, 1, 11, [&5998u64.to_be_bytes()[..], &[7, 7, 0, 0]].concat()));
    client.write_all(&request(0, 12, 77, 0)).unwrap();
    assert_eq!(next_chunk(&mut client), (1, 0, 12, vec![]));
    // What is no read keeps its short reply.
    client.write_all(&request(3, 13, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut client), (13, 0));
    drop(client);
    server.join().unwrap().unwrap();
}

/// A client that can't see the reason can't tell a full disk from its own mistake.
#[test]
fn failures_come_with_number_and_text() {
    let export = Memory::new();
    export.fault.store(28, Ordering::Relaxed);
    let (mut client, server) = connect_as(&export, BOTH, never());
    let mut fails = |said: &[u8], cookie: u64, errno: u32, text: &str| {
        client.write_all(said).unwrap();
        let (flags, kind, answered, data) = next_chunk(&mut client);
        assert_eq!((flags, kind, answered, &data[..4]), (1, 0x8001, cookie, &errno.to_be_bytes()[..]));
        assert_eq!(u16::from_be_bytes([data[4], data[5]]) as usize, data.len() - 6);
        assert!(String::from_utf8_lossy(&data[6..]).contains(text), "{:?}", String::from_utf8_lossy(&data[6..]));
    };
    fails(&[request(1, 1, 0, 3), b"xyz".to_vec()].concat(), 1, 28, "planted: full");
    fails(&request(0, 2, SIZE - 1, 2), 2, 22, "67108864");
    fails(&request(0, 3, u64::MAX, 2), 3, 22, "wrap");
    fails(&request(7, 4, 0, 0), 4, 22, "status of no bytes");
    fails(&request(7, 5, SIZE, 1), 5, 22, "67108864");
    fails(&flagged(1 << 3, 0, 6, 0, 1), 6, 22, "flags");
    fails(&request(4711, 7, 0, 1), 7, 22, "unknown command");
    drop(client);
    server.join().unwrap().unwrap();
}

/// A client that was promised one extent takes the second for the next reply.
#[test]
fn block_status_tells_extents_to_those_who_agreed_on_it_only() {
    let export = Memory::new();
    let (mut client, server) = connect_as(&export, BOTH, never());
    client.write_all(&[request(7, 1, 5, 3000), flagged(1 << 3, 7, 2, 5, 3000)].concat()).unwrap();
    let extents = |list: &[(u32, u32)]| {
        let extents = list.iter().flat_map(|(bytes, status)| [bytes.to_be_bytes(), status.to_be_bytes()].concat());
        [0, 0, 0, 1].into_iter().chain(extents).collect::<Vec<u8>>()
    };
    assert_eq!(next_chunk(&mut client), (1, 5, 1, extents(&[(1000, 0), (2000, 3)])));
    assert_eq!(next_chunk(&mut client), (1, 5, 2, extents(&[(1000, 0)])));
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) = connect_as(&export, Agreed { structured: true, allocation: false }, never());
    client.write_all(&request(7, 3, 0, 4096)).unwrap();
    let (flags, kind, cookie, data) = next_chunk(&mut client);
    assert_eq!((flags, kind, cookie, &data[..4]), (1, 0x8001, 3, &[0, 0, 0, 22][..]));
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) = connect(&export, never());
    client.write_all(&[request(7, 4, 0, 4096), flagged(1 << 2, 0, 5, 0, 1)].concat()).unwrap();
    let mut refused = [next_reply(&mut client), next_reply(&mut client)];
    refused.sort_unstable();
    assert_eq!(refused, [(4, 22), (5, 22)], "without structured replies: BLOCK_STATUS, and the flag DF");
    drop(client);
    server.join().unwrap().unwrap();
}

/// Pages beyond the end of a volume that was made smaller must not come back.
#[test]
fn a_client_of_an_export_that_shrank_can_not_go_beyond_its_end() {
    let export = Memory::new();
    let (mut client, server) = connect(&export, never());
    export.shrunk.store(4096, Ordering::Relaxed);
    let refused = [(1, 28), (6, 28), (0, 22), (4, 22), (5, 22)];
    for (command, errno) in refused {
        let payload: &[u8] = if command == 1 { &[1; 4096] } else { &[] };
        client.write_all(&[&request(command, 1, SIZE - 4096, 4096)[..], payload].concat()).unwrap();
        assert_eq!(next_reply(&mut client), (1, errno), "command {command}");
    }
    client.write_all(&request(5, 2, SIZE - 8192, 4096)).unwrap();
    assert_eq!(next_reply(&mut client), (2, 0));
    drop(client);
    server.join().unwrap().unwrap();
}

/// The data of a meta context option.
fn meta(name: &str, queries: &[&[u8]]) -> Vec<u8> {
    let string = |text: &[u8]| [&(text.len() as u32).to_be_bytes()[..], text].concat();
    let mut data = [string(name.as_bytes()), (queries.len() as u32).to_be_bytes().to_vec()].concat();
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

/// What a server did not agree to, a client must not get; what it did, it must.
#[test]
fn metadata_contexts_are_negotiated_as_specified() {
    const GO: &[u8] = b"\0\0\0\x04disk\0\0";
    let structured = option_bytes(8, b"");
    let ack = |option| proto::option_reply(option, reply::ACK, b"");
    let told = |option, id: u32| proto::option_reply(option, 4, &[&id.to_be_bytes()[..], b"base:allocation"].concat());
    let agreed = |options: &[Vec<u8>], answers: &[Vec<u8>]| {
        let (outcome, answer) = talk(&[&[FLAGS.to_vec()], options, &[option_bytes(option::GO, GO)]].concat());
        assert!(answer.starts_with(&answers.concat()), "{answer:?}");
        let Ok(Outcome::Chosen(_, _, agreed)) = outcome else { panic!("no export was chosen") };
        (agreed.structured, agreed.allocation)
    };
    let set = |name: &str, queries: &[&[u8]]| option_bytes(10, &meta(name, queries));
    let list = |queries: &[&[u8]]| option_bytes(9, &meta("disk", queries));
    assert_eq!(agreed(&[], &[]), (false, false));
    let ours: &[u8] = b"base:allocation";
    assert_eq!(agreed(&[structured.clone(), set("disk", &[ours])], &[ack(8), told(10, 1), ack(10)]), (true, true));
    // The default export under its own name is the same one; another is not.
    assert!(agreed(&[structured.clone(), set("", &[b"x:y", ours, ours])], &[ack(8), told(10, 1), ack(10)]).1);
    assert!(!agreed(&[structured.clone(), set("other", &[ours])], &[ack(8), told(10, 1), ack(10)]).1);
    // The last word counts, also if it selects nothing or fails.
    for last in [set("disk", &[]), set("disk", &[b"base:"]), set("disk", &[b"qemu:dirty"]), set("none", &[ours])] {
        assert!(!agreed(&[structured.clone(), set("disk", &[ours]), last], &[]).1);
    }
    for queries in [&[][..], &[&b"base:"[..]], &[ours], &[b"x:", ours]] {
        assert_eq!(agreed(&[structured.clone(), list(queries)], &[ack(8), told(9, 0), ack(9)]), (true, false));
    }
    assert!(!agreed(&[structured.clone(), list(&[b"x:"])], &[ack(8), ack(9)]).1);
}

/// A length that is believed is memory that is taken, or a stream that is out of step.
#[test]
fn malformed_metadata_options_are_refused_and_the_handshake_goes_on() {
    let go = option_bytes(option::GO, b"\0\0\0\x04disk\0\0");
    let structured = option_bytes(8, b"");
    let whole = meta("disk", &[b"base:allocation"]);
    let many = [&4u32.to_be_bytes()[..], b"disk", &u32::MAX.to_be_bytes()].concat();
    let malformed: [&[u8]; 8] = [
        b"",
        &whole[..10],
        &whole[..whole.len() - 1],
        &[&whole[..], b"x"].concat(),
        &many,
        &[&many[..], &u32::MAX.to_be_bytes(), b"base:allocation"].concat(),
        &meta("disk", &[&[b'q'; 5000]]),
        &meta("disk", &[b"\xc3\x28"]),
    ];
    for option in [9, 10] {
        for data in malformed {
            let (outcome, answer) = talk(&[FLAGS.into(), structured.clone(), option_bytes(option, data), go.clone()]);
            assert!(matches!(outcome, Ok(Outcome::Chosen(_, _, Agreed { structured: true, allocation: false }))));
            assert_eq!(answer[20 + 12..20 + 16], reply::ERR_INVALID.to_be_bytes(), "{data:?}");
        }
        let (outcome, answer) = talk(&[FLAGS.into(), option_bytes(option, &whole), go.clone()]);
        assert!(matches!(outcome, Ok(Outcome::Chosen(_, _, Agreed { structured: false, allocation: false }))));
        assert_eq!(answer[12..16], reply::ERR_INVALID.to_be_bytes(), "before STRUCTURED_REPLY");
    }
    for said in [vec![option_bytes(8, b"x")], vec![structured.clone(), structured]] {
        let (_, answer) = talk(&[&[FLAGS.to_vec()][..], &said, std::slice::from_ref(&go)].concat());
        let last = &answer[20 * (said.len() - 1)..];
        assert_eq!(last[12..16], reply::ERR_INVALID.to_be_bytes());
    }
}

/// A server with these limits on a socket file, and where it is.
fn listening(limits: Limits) -> (tempfile::TempDir, std::path::PathBuf, Server<Memory>) {
    listening_with(limits, usual())
}

fn listening_with(limits: Limits, budget: Arc<Budget>) -> (tempfile::TempDir, std::path::PathBuf, Server<Memory>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = Address::Unix(path.clone()).plan(dir.path()).unwrap().bind().unwrap();
    let server = Server::start(vec![listener], Memory::new(), limits, budget).unwrap();
    (dir, path, server)
}

/// A client of it that has chosen an export, or what the server said instead.
fn chosen(path: &std::path::Path) -> io::Result<UnixStream> {
    let mut client = UnixStream::connect(path)?;
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    client.write_all(&[&FLAGS[..], &option_bytes(option::EXPORT_NAME, b"disk")].concat())?;
    client.read_exact(&mut [0; 18 + 10])?;
    Ok(client)
}

/// A client that sends a byte now and then would stay for ever, and a hundred of them lock everybody else out.
#[test]
fn a_handshake_ends_in_time_however_it_is_drawn_out() {
    let (_dir, path, server) = listening(Limits { handshake: Duration::from_millis(300), ..Limits::default() });
    let mut good = chosen(&path).unwrap();
    let mut slow = UnixStream::connect(&path).unwrap();
    slow.write_all(&FLAGS).unwrap();
    // One option, so long that the server has nothing to say in between.
    let endless = option_bytes(77, &[0; 1000]);
    let cut_off = endless.iter().any(|byte| {
        std::thread::sleep(Duration::from_millis(20));
        slow.write_all(&[*byte]).is_err()
    });
    assert!(cut_off, "20 s later it is still there");
    // One that is silent, and one that never reads what it asked for.
    let mut silent = UnixStream::connect(&path).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    silent.read_to_end(&mut Vec::new()).unwrap();
    let mut deaf = UnixStream::connect(&path).unwrap();
    deaf.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    deaf.write_all(&FLAGS).unwrap();
    let list = option_bytes(option::LIST, b"");
    let refused = (0..1_000_000).find_map(|_| deaf.write_all(&list).err()).expect("it ends");
    assert_ne!(refused.kind(), io::ErrorKind::WouldBlock, "it was waited for");
    good.write_all(&request(3, 1, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut good), (1, 0), "the limit is for the handshake only");
    drop(good);
    assert!(server.stop());
}

/// Each connection takes two threads and memory: without a bound, connecting is all that an attack needs.
#[test]
fn connections_beyond_the_limit_are_closed_and_the_others_served() {
    let (_dir, path, server) = listening_with(
        Limits::default(),
        Arc::new(Budget::new(Division { connections_max: 2, ..Division::of(64 << 20) })),
    );
    let (mut first, second) = (chosen(&path).unwrap(), chosen(&path).unwrap());
    for _ in 0..5 {
        assert!(chosen(&path).is_err(), "a third connection");
    }
    first.write_all(&request(3, 1, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut first), (1, 0));
    drop(second);
    // Its place is free as soon as its threads have ended.
    let third = (0..1000).find_map(|_| {
        std::thread::sleep(Duration::from_millis(10));
        chosen(&path).ok()
    });
    assert!(third.is_some(), "a place that was given back is taken for ever");
    drop((first, third));
    assert!(server.stop());
}

// --- memory ---

/// A read by a client without structured replies.
fn read_simple(client: &mut UnixStream, cookie: u64, length: usize) -> Vec<u8> {
    assert_eq!(next_reply(client), (cookie, 0));
    let mut data = vec![0; length];
    client.read_exact(&mut data).unwrap();
    data
}

/// The data of a reply in chunks, and how many they were.
fn read_chunks(client: &mut UnixStream, cookie: u64, offset: u64, length: usize) -> (Vec<u8>, usize) {
    let (mut data, mut count) = (Vec::new(), 0);
    loop {
        let (flags, kind, answered, chunk) = next_chunk(client);
        assert_eq!((answered, &chunk[..8]), (cookie, &(offset + data.len() as u64).to_be_bytes()[..]));
        match kind {
            1 => data.extend_from_slice(&chunk[8..]),
            2 => data.resize(data.len() + u32::from_be_bytes(chunk[8..12].try_into().unwrap()) as usize, 0),
            other => panic!("chunk of type {other}"),
        }
        count += 1;
        if flags == 1 {
            assert_eq!(data.len(), length);
            return (data, count);
        }
    }
}

fn filled() -> Memory {
    let export = Memory::new();
    let mut number = 1u64;
    for byte in export.data.lock().unwrap()[..8 << 20].iter_mut() {
        number = number.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *byte = (number >> 56) as u8 | 1;
    }
    export
}

/// A client may ask for 32 MiB at a time however little memory there is; what it gets must be right to the byte, and others of
/// its requests must not be lost in between.
#[test]
fn reads_larger_than_the_memory_are_answered_in_pieces() {
    let (export, budget) = (filled(), little());
    let (offset, length) = (1000u64, 4 << 20);
    let whole = export.data.lock().unwrap()[offset as usize..][..length].to_vec();
    let ask = [request(0, 1, offset, length as u32), request(3, 2, 0, 0), request(0, 3, offset, 5000)].concat();
    let (mut client, server) = connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
    client.write_all(&ask).unwrap();
    let (mut flushed, mut read, mut small) = (0, 0, 0);
    for _ in 0..3 {
        match next_reply(&mut client) {
            (1, 0) => {
                let mut data = vec![0; length];
                client.read_exact(&mut data).unwrap();
                assert!(data == whole);
                read += 1;
            }
            (2, 0) => flushed += 1,
            (3, 0) => {
                let mut data = vec![0; 5000];
                client.read_exact(&mut data).unwrap();
                assert!(data == whole[..5000]);
                small += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((flushed, read, small), (1, 1, 1));
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) = connect_with(&export, BOTH, never(), Limits::default(), &budget);
    client.write_all(&request(0, 4, offset, length as u32)).unwrap();
    let (data, count) = read_chunks(&mut client, 4, offset, length);
    assert!(data == whole && count > 100, "{count} chunks");
    // In one chunk all the same, if the client insists.
    client.write_all(&flagged(1 << 2, 0, 5, offset, length as u32)).unwrap();
    let (data, count) = read_chunks(&mut client, 5, offset, length);
    assert!(data == whole && count == 1, "{count} chunks");
    // Beyond what is filled it is a hole, at the end of the same read.
    client.write_all(&request(0, 6, (8 << 20) - 8192, 65_536)).unwrap();
    let (data, _) = read_chunks(&mut client, 6, (8 << 20) - 8192, 65_536);
    assert!(
        data[..8192] == export.data.lock().unwrap()[(8 << 20) - 8192..8 << 20] && data[8192..] == [0; 65_536 - 8192]
    );
    drop(client);
    server.join().unwrap().unwrap();
    assert_eq!(budget.taken(), 0);
}

/// Bytes that could not be read must never be taken for data.
#[test]
fn a_failure_in_the_middle_of_a_large_read_is_told_or_ends_the_connection() {
    let (export, budget) = (filled(), little());
    export.unreadable.store(1 << 20, Ordering::Relaxed);
    let (mut client, server) = connect_with(&export, BOTH, never(), Limits::default(), &budget);
    client.write_all(&request(0, 1, 0, 2 << 20)).unwrap();
    let mut told = 0;
    loop {
        let (flags, kind, cookie, chunk) = next_chunk(&mut client);
        assert_eq!(cookie, 1);
        if kind == 0x8001 {
            assert!(flags == 1 && chunk[..4] == 5u32.to_be_bytes(), "{chunk:?}");
            break;
        }
        told += chunk.len() - 8;
    }
    assert!(told > 0 && told <= 1 << 20, "{told} bytes before the failure");
    client.write_all(&request(3, 2, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut client), (2, 0), "the connection goes on");
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) = connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
    client.write_all(&request(0, 1, 1 << 20, 2 << 20)).unwrap();
    assert_eq!(next_reply(&mut client), (1, Errno::Io as u32), "nothing was sent yet");
    client.write_all(&request(0, 2, 0, 2 << 20)).unwrap();
    assert_eq!(next_reply(&mut client), (2, 0));
    let mut data = Vec::new();
    let _ = client.read_to_end(&mut data);
    assert!(data.len() <= 1 << 20 && data == export.data.lock().unwrap()[..data.len()], "{} bytes", data.len());
    let _ = server.join().unwrap();
    assert_eq!(budget.taken(), 0);
}

/// A write of 32 MiB must be possible with any memory, and one that fails on its way must not be called good.
#[test]
fn writes_larger_than_the_memory_are_taken_in_parts() {
    let (export, budget) = (Memory::new(), little());
    let (mut client, server) = connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n >> 8) as u8 ^ n as u8).collect();
    client.write_all(&[&request(1, 1, 4095, data.len() as u32)[..], &data].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (1, 0));
    assert!(export.data.lock().unwrap()[4095..][..data.len()] == data[..]);
    export.fault.store(28, Ordering::Relaxed);
    client.write_all(&[&request(1, 2, 0, data.len() as u32)[..], &data].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (2, Errno::NoSpace as u32));
    client.write_all(&request(3, 3, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut client), (3, 0), "the stream is in step");
    export.fault.store(1, Ordering::Relaxed);
    client.write_all(&[&request(1, 4, 0, data.len() as u32)[..], &data[..100_000]].concat()).unwrap();
    let _ = client.read_to_end(&mut Vec::new());
    assert!(server.join().unwrap().is_err(), "a part has panicked");
    assert_eq!(budget.taken(), 0);
}

/// Clients that ask and don't read take what they can get; one that behaves must not feel it, and the server must not grow.
#[test]
fn a_crowd_of_stalled_readers_holds_no_more_than_its_share_and_others_are_served() {
    let budget = Arc::new(Budget::new(Division::of(16 << 20)));
    let (_dir, path, server) = listening_with(Limits::default(), budget.clone());
    let stalled: Vec<UnixStream> = (0..budget.division().connections_max - 1)
        .map(|_| {
            let mut client = chosen(&path).unwrap();
            client.set_nonblocking(true).unwrap();
            let asked: Vec<u8> = (0..64).flat_map(|n| request(0, n, 0, 32 << 20)).collect();
            let _ = client.write(&asked);
            client
        })
        .collect();
    let mut good = chosen(&path).unwrap();
    let data = vec![7; 8 << 20];
    for round in 0..3 {
        good.write_all(&[&request(1, 1, 0, 8 << 20)[..], &data].concat()).unwrap();
        assert_eq!(next_reply(&mut good), (1, 0));
        good.write_all(&request(0, 2, 0, 8 << 20)).unwrap();
        assert!(read_simple(&mut good, 2, 8 << 20) == data, "round {round}");
    }
    let shared = budget.division().replies_bytes + budget.division().writes_bytes;
    assert!(budget.taken() <= shared, "{} bytes are taken", budget.taken());
    drop((stalled, good));
    assert!(server.stop());
    assert_eq!(budget.taken(), 0, "memory is lost with each client that goes");
}

/// One client that stops in the middle of a payload must not keep all others from writing; and while nobody needs its memory
/// it is left alone, since it may be a virtual machine that is paused.
#[test]
fn a_client_that_stops_within_a_payload_is_cut_off_once_others_wait_for_its_memory() {
    let (export, budget) = (Memory::new(), little());
    let limits = Limits { payload_stall: Duration::from_millis(50), ..Limits::default() };
    let (mut stalled, first) = connect_with(&export, Agreed::default(), never(), limits, &budget);
    let payload = vec![1; 32 << 10];
    stalled.write_all(&[&request(1, 1, 0, payload.len() as u32)[..], &payload[..100]].concat()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!first.is_finished(), "it was cut off though nobody waits");
    let (mut other, second) = connect_with(&export, Agreed::default(), never(), limits, &budget);
    other.write_all(&[&request(1, 1, 0, payload.len() as u32)[..], &payload].concat()).unwrap();
    assert_eq!(next_reply(&mut other), (1, 0));
    let cut = first.join().unwrap().unwrap_err();
    assert!(cut.to_string().contains("others wait for its memory"), "{cut}");
    drop((stalled, other));
    second.join().unwrap().unwrap();
    assert_eq!(budget.taken(), 0);
}

/// Writes of a client that reads no replies are stuck behind them: they must not keep the memory that others' writes need.
#[test]
fn a_client_that_reads_nothing_is_cut_off_once_others_wait_for_the_memory_of_its_writes() {
    let (export, budget) = (Memory::new(), little());
    let limits = Limits { payload_stall: Duration::from_millis(50), ..Limits::default() };
    let (mut stalled, first) = connect_with(&export, Agreed::default(), never(), limits, &budget);
    let payload = vec![1; 32 << 10];
    stalled.write_all(&request(0, 1, 0, 32 << 20)).unwrap();
    // Until no more of the answer comes: then the socket is full, and whatever it asks for next is stuck.
    let (mut before, mut same) = (0, 0);
    while same < 30 {
        std::thread::sleep(Duration::from_millis(10));
        let there = rustix::io::ioctl_fionread(&stalled).unwrap();
        same = if there == before && there > 0 { same + 1 } else { 0 };
        before = there;
    }
    stalled.write_all(&[&request(1, 2, 0, payload.len() as u32)[..], &payload].concat()).unwrap();
    while budget.taken() < payload.len() {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(300));
    assert!(!first.is_finished(), "it was cut off though nobody waits");
    let (mut other, second) = connect_with(&export, Agreed::default(), never(), limits, &budget);
    other.write_all(&[&request(1, 1, 0, payload.len() as u32)[..], &payload].concat()).unwrap();
    assert_eq!(next_reply(&mut other), (1, 0));
    let _ = first.join().unwrap();
    drop((stalled, other));
    second.join().unwrap().unwrap();
    assert_eq!(budget.taken(), 0);
}

// --- a busy store ---

/// A file system on a block device that says EIO is read-only from then on: being busy for longer than some limit is no error.
#[test]
fn a_busy_store_is_waited_for_and_other_requests_are_served_meanwhile() {
    let export = Memory::new();
    export.busy.store(true, Ordering::Relaxed);
    let (mut client, server) = connect(&export, never());
    client.write_all(&[&request(1, 1, 0, 3)[..], b"abc", &request(0, 2, 0, 4096)].concat()).unwrap();
    assert_eq!(read_simple(&mut client, 2, 4096), [0; 4096], "a read need not wait");
    // It was five seconds that a request was given.
    std::thread::sleep(Duration::from_millis(5500));
    client.write_all(&request(3, 3, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut client), (3, 0), "the write was not given up");
    export.busy.store(false, Ordering::Relaxed);
    assert_eq!(next_reply(&mut client), (1, 0));
    assert!(export.tries.load(Ordering::Relaxed) < 1000, "it does not spin");
    assert_eq!(export.data.lock().unwrap()[..3], *b"abc");
    drop(client);
    server.join().unwrap().unwrap();
}

/// Else a server whose client has gone, or that is asked to stop, waits for a store that is busy for ever.
#[test]
fn a_connection_ends_though_the_store_stays_busy() {
    let export = Memory::new();
    export.busy.store(true, Ordering::Relaxed);
    // One that is taken whole, and one in parts, whose client finds no end of its sending.
    for length in [3, 5 << 20] {
        let (mut client, server) = connect(&export, never());
        client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let _ = client.write_all(&[&request(1, 1, 0, length)[..], &vec![1; length as usize]].concat());
        drop(client);
        let _ = server.join().unwrap();
    }
    let (_dir, path, server) = listening(Limits::default());
    let busy = server.exports_for_tests().busy.clone();
    busy.store(true, Ordering::Relaxed);
    let mut client = chosen(&path).unwrap();
    client.write_all(&[&request(1, 1, 0, 3)[..], b"abc"].concat()).unwrap();
    while server.exports_for_tests().tries.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    assert!(server.stop(), "a request keeps it from stopping");
    assert_eq!(next_reply(&mut client), (1, Errno::Shutdown as u32));
    assert!(export.data.lock().unwrap()[..3] == [0; 3], "it was written while it was busy");
}
