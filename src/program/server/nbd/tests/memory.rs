//! Tests requests of any size in little memory.

use super::super::memory::{REQUEST_BYTES, payload_charge};
use super::*;
use corepage::testing::random::Rng;

/// Reads as a client without structured replies.
fn read_simple(client: &mut UnixStream, cookie: u64, length: usize) -> Vec<u8> {
    assert_eq!(next_reply(client), (cookie, 0));
    let mut data = vec![0; length];
    client.read_exact(&mut data).unwrap();
    data
}

/// Reads a reply in chunks. Returns the data, and the number of chunks.
fn read_chunks(
    client: &mut UnixStream,
    cookie: u64,
    offset: u64,
    length: usize,
) -> (Vec<u8>, usize) {
    let (mut data, mut count) = (Vec::new(), 0);
    loop {
        let (flags, kind, answered, chunk) = next_chunk(client);
        assert_eq!(
            (answered, &chunk[..8]),
            (cookie, &(offset + data.len() as u64).to_be_bytes()[..])
        );
        match kind {
            1 => data.extend_from_slice(&chunk[8..]),
            2 => data.resize(
                data.len() + u32::from_be_bytes(chunk[8..12].try_into().unwrap()) as usize,
                0,
            ),
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
    let mut data = export.data.lock().unwrap();
    Rng::new(1).fill(&mut data[..8 << 20]);
    // Make sure that no page of it is a hole.
    data[..8 << 20].iter_mut().for_each(|byte| *byte |= 1);
    drop(data);
    export
}

/// A client may read 32 MiB at a time however little memory there is; each byte that it gets must
/// be right, and none of its other requests may be lost in between.
#[test]
fn reads_larger_than_the_memory_are_answered_in_pieces() {
    let (export, budget) = (filled(), little());
    let (offset, length) = (1000u64, 4 << 20);
    let whole = export.data.lock().unwrap()[offset as usize..][..length].to_vec();
    let ask =
        [request(0, 1, offset, length as u32), request(3, 2, 0, 0), request(0, 3, offset, 5000)]
            .concat();
    let (mut client, server) =
        connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
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
    // It comes in one chunk if the client insists.
    client.write_all(&flagged(1 << 2, 0, 5, offset, length as u32)).unwrap();
    let (data, count) = read_chunks(&mut client, 5, offset, length);
    assert!(data == whole && count == 1, "{count} chunks");
    // Beyond the filled part there is a hole, at the end of the same read.
    client.write_all(&request(0, 6, (8 << 20) - 8192, 65_536)).unwrap();
    let (data, _) = read_chunks(&mut client, 6, (8 << 20) - 8192, 65_536);
    assert!(
        data[..8192] == export.data.lock().unwrap()[(8 << 20) - 8192..8 << 20]
            && data[8192..] == [0; 65_536 - 8192]
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
    let (mut client, server) =
        connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
    client.write_all(&request(0, 1, 1 << 20, 2 << 20)).unwrap();
    assert_eq!(next_reply(&mut client), (1, Errno::Io as u32), "nothing was sent yet");
    client.write_all(&request(0, 2, 0, 2 << 20)).unwrap();
    assert_eq!(next_reply(&mut client), (2, 0));
    let mut data = Vec::new();
    let _ = client.read_to_end(&mut data);
    assert!(
        data.len() <= 1 << 20 && data == export.data.lock().unwrap()[..data.len()],
        "{} bytes",
        data.len()
    );
    let _ = server.join().unwrap();
    assert_eq!(budget.taken(), 0);
}

/// A write of 32 MiB must be possible with any memory, and one that fails on its way must not be
/// called good.
#[test]
fn writes_larger_than_the_memory_are_taken_in_parts() {
    let (export, budget) = (Memory::new(), little());
    let (mut client, server) =
        connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
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
    client
        .write_all(&[&request(1, 4, 0, data.len() as u32)[..], &data[..100_000]].concat())
        .unwrap();
    let _ = client.read_to_end(&mut Vec::new());
    assert!(server.join().unwrap().is_err(), "a part has panicked");
    assert_eq!(budget.taken(), 0);
}

/// Clients that send requests and don't read take all the memory they can get; a well-behaved one
/// must not notice, and the server must not grow.
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

/// One client that stops in the middle of a payload must not keep all others from writing; and
/// while no other needs its memory it is left alone, since it may be a paused virtual machine.
#[test]
fn a_client_that_stops_within_a_payload_is_cut_off_once_others_wait_for_its_memory() {
    let (export, budget) = (Memory::new(), little());
    let limits = Limits { payload_stall: Duration::from_millis(50), ..Limits::default() };
    let (mut stalled, first) = connect_with(&export, Agreed::default(), never(), limits, &budget);
    let payload = vec![1; 24 << 10];
    stalled
        .write_all(&[&request(1, 1, 0, payload.len() as u32)[..], &payload[..100]].concat())
        .unwrap();
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

/// Writes of a client that reads no replies are stuck behind these: they must not keep the memory
/// that others' writes need.
#[test]
fn a_client_that_reads_nothing_is_cut_off_once_others_wait_for_the_memory_of_its_writes() {
    let (export, budget) = (Memory::new(), little());
    let limits = Limits { payload_stall: Duration::from_millis(50), ..Limits::default() };
    let (mut stalled, first) = connect_with(&export, Agreed::default(), never(), limits, &budget);
    let payload = vec![1; 24 << 10];
    stalled.write_all(&request(0, 1, 0, 32 << 20)).unwrap();
    // Wait until no more of the answer arrives: then the socket is full, and the client's next
    // requests are stuck.
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

/// A crowd of clients that request much and leave must not keep the device busy for those that
/// stay. And a late write of a client that is gone could overwrite what it has written through its
/// next connection.
#[test]
fn what_a_client_asked_for_is_not_begun_once_it_is_gone() {
    let export = Memory::new();
    let budget = Arc::new(Budget::new(Division::of(2 << 30)));
    let (mut client, server) =
        connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
    let mut asked: Vec<u8> = (0..32).flat_map(|n| request(0, n, 0, 1 << 20)).collect();
    (0..4).for_each(|n| asked.extend([&request(1, 32 + n, 0, 3)[..], b"xyz"].concat()));
    client.write_all(&asked).unwrap();
    // All requests have their memory, and wait until the client takes the first reply, which does
    // not fit into the socket.
    let expected = 32 * ((1 << 20) + REQUEST_BYTES) + 4 * payload_charge(3);
    while budget.taken() < expected {
        std::thread::yield_now();
    }
    drop(client);
    let _ = server.join().unwrap();
    let reads = export.reads.load(Ordering::Relaxed);
    assert!(reads <= 2, "{reads} of 32 reads were done for a client that is gone");
    assert_eq!(
        export.data.lock().unwrap()[..3],
        [0; 3],
        "a write of a client that is gone was done"
    );
    assert_eq!(budget.taken(), 0);
}

/// Clients that stopped within a payload, by malice or because their machine was gone, used to keep
/// the memory of all writes: no client could write for half a minute, and with each further such
/// client for half a minute more.
#[test]
fn a_crowd_that_stops_within_its_payloads_keeps_nobody_from_writing() {
    let (export, budget) = (Memory::new(), little());
    let stalled: Vec<_> = (0..4)
        .map(|_| {
            let connection =
                connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
            let payload = [1; 100];
            (&connection.0)
                .write_all(&[&request(1, 1, 1 << 20, 24 << 10)[..], &payload].concat())
                .unwrap();
            connection
        })
        .collect();
    while budget.taken() < 24 << 10 {
        std::thread::yield_now();
    }
    let (mut good, server) =
        connect_with(&export, Agreed::default(), never(), Limits::default(), &budget);
    let data: Vec<u8> = (0..100_000u32).map(|n| (n >> 8) as u8 ^ n as u8).collect();
    for round in 1..=20 {
        good.write_all(&[&request(1, round, 4095 + round, data.len() as u32)[..], &data].concat())
            .unwrap();
        assert_eq!(next_reply(&mut good), (round, 0));
        assert!(
            export.data.lock().unwrap()[4095 + round as usize..][..data.len()] == data[..],
            "round {round}"
        );
    }
    assert!(stalled.iter().all(|(_, thread)| !thread.is_finished()), "they may only be slow");
    drop(good);
    server.join().unwrap().unwrap();
    for (client, thread) in stalled {
        drop(client);
        assert!(thread.join().unwrap().is_err(), "half a payload");
    }
    assert_eq!(budget.taken(), 0);
}

// --- a busy store ---

/// A file system on a block device that returns EIO becomes read-only: a store that is busy, for
/// however long, must not cause an error.
#[test]
fn a_busy_store_is_waited_for_and_other_requests_are_served_meanwhile() {
    let export = Memory::new();
    export.busy.store(true, Ordering::Relaxed);
    let (mut client, server) = connect(&export, never());
    client
        .write_all(&[&request(1, 1, 0, 3)[..], b"abc", &request(0, 2, 0, 4096)].concat())
        .unwrap();
    assert_eq!(read_simple(&mut client, 2, 4096), [0; 4096], "a read need not wait");
    // A request once had a limit of five seconds.
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

/// A write that waits for a busy store is not written yet: after its client is gone it must not
/// overwrite what the client has written through its next connection.
#[test]
fn a_write_that_waits_does_not_land_once_its_client_is_gone() {
    let export = Memory::new();
    export.busy.store(true, Ordering::Relaxed);
    let (mut client, server) = connect(&export, never());
    client.write_all(&[&request(1, 1, 0, 3)[..], b"abc"].concat()).unwrap();
    while export.tries.load(Ordering::Relaxed) == 0 {
        std::thread::yield_now();
    }
    drop(client);
    // Wait until the server has noticed, but not as long as it retries for a client that has only
    // stopped sending.
    let end = Instant::now() + Duration::from_millis(900);
    while !server.is_finished() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    export.busy.store(false, Ordering::Relaxed);
    let _ = server.join().unwrap();
    assert_eq!(export.data.lock().unwrap()[..3], [0; 3], "it has landed");
}

/// This must also hold if the connection has so many requests in flight that no more is read from
/// it.
#[test]
fn writes_that_fill_a_connection_do_not_land_once_their_client_is_gone() {
    let export = Memory::new();
    export.busy.store(true, Ordering::Relaxed);
    let (mut client, server) = connect(&export, never());
    let count = 2 + crate::program::server::nbd::Limits::default().requests_max as u64;
    for cookie in 0..count {
        client.write_all(&[&request(1, cookie, 0, 3)[..], b"abc"].concat()).unwrap();
    }
    while export.tries.load(Ordering::Relaxed) < 200 {
        std::thread::yield_now();
    }
    drop(client);
    let end = Instant::now() + Duration::from_secs(10);
    while !server.is_finished() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    export.busy.store(false, Ordering::Relaxed);
    let _ = server.join().unwrap();
    assert_eq!(export.data.lock().unwrap()[..3], [0; 3], "they have landed");
}

/// If this fails, a server whose client is gone, or that has to stop, waits for ever for a busy
/// store.
#[test]
fn a_connection_ends_though_the_store_stays_busy() {
    let export = Memory::new();
    export.busy.store(true, Ordering::Relaxed);
    // One write is taken as a whole, the other in parts, from a client that never stops sending.
    for length in [3, 5 << 20] {
        let (mut client, server) = connect(&export, never());
        client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let _ =
            client.write_all(&[&request(1, 1, 0, length)[..], &vec![1; length as usize]].concat());
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
