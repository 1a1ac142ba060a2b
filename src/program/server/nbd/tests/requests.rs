//! Tests requests and replies, over a socket pair.

use super::*;

/// A slow flush must not delay the reads behind it.
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

/// If the payload of a refused write were taken for requests, everything that follows would be
/// garbled.
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

/// If a server waited for ever for a client, it could not stop and close its store.
#[test]
fn an_export_that_panics_ends_its_connection_and_nothing_hangs() {
    let export = Memory::new();
    export.fault.store(1, Ordering::Relaxed);
    let (mut client, server) = connect(&export, never());
    client.write_all(&[&request(1, 1, 0, 1)[..], b"x"].concat()).unwrap();
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0, "the connection must end without a reply");
    assert!(server.join().unwrap().is_err());
}

/// Requests that arrive while the server stops must be refused, not half done.
#[test]
fn a_stopping_server_says_so() {
    let (mut client, server) = connect(&Memory::new(), Arc::new(AtomicBool::new(true)));
    client.write_all(&[&request(1, 7, 0, 3)[..], b"xyz"].concat()).unwrap();
    assert_eq!(next_reply(&mut client), (7, Errno::Shutdown as u32));
    server.join().unwrap().unwrap();
}

/// A client that sends many requests and reads nothing must not fill the memory; the gate stops it.
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

/// A client puts each byte where its chunk says: a wrong offset means wrong data, and a missing end
/// a hang.
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
    // The reply is in one piece if the client insists, and if there is no hole anyway.
    client.write_all(&flagged(1 << 2, 0, 10, 0, 8192)).unwrap();
    let (flags, kind, cookie, whole) = next_chunk(&mut client);
    assert_eq!((flags, kind, cookie, whole.len()), (1, 1, 10, 8 + 8192));
    assert_eq!(
        (&whole[..8], &whole[8..12], &whole[8 + 4096..][..4]),
        (&[0; 8][..], &[0; 4][..], &[7; 4][..])
    );
    client.write_all(&request(0, 11, 5998, 4)).unwrap();
    assert_eq!(
        next_chunk(&mut client),
        (1, 1, 11, [&5998u64.to_be_bytes()[..], &[7, 7, 0, 0]].concat())
    );
    client.write_all(&request(0, 12, 77, 0)).unwrap();
    assert_eq!(next_chunk(&mut client), (1, 0, 12, vec![]));
    // Other requests keep their short replies.
    client.write_all(&request(3, 13, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut client), (13, 0));
    drop(client);
    server.join().unwrap().unwrap();
}

/// A client that is not told the reason can't tell a full disk from its own mistake.
#[test]
fn failures_come_with_number_and_text() {
    let export = Memory::new();
    export.fault.store(28, Ordering::Relaxed);
    let (mut client, server) = connect_as(&export, BOTH, never());
    let mut fails = |said: &[u8], cookie: u64, errno: u32, text: &str| {
        client.write_all(said).unwrap();
        let (flags, kind, answered, data) = next_chunk(&mut client);
        assert_eq!(
            (flags, kind, answered, &data[..4]),
            (1, 0x8001, cookie, &errno.to_be_bytes()[..])
        );
        assert_eq!(u16::from_be_bytes([data[4], data[5]]) as usize, data.len() - 6);
        assert!(
            String::from_utf8_lossy(&data[6..]).contains(text),
            "{:?}",
            String::from_utf8_lossy(&data[6..])
        );
    };
    fails(&[request(1, 1, 0, 3), b"xyz".to_vec()].concat(), 1, 28, "planted: full");
    fails(&request(0, 2, SIZE - 1, 2), 2, 22, "67108864");
    fails(&request(0, 3, u64::MAX, 2), 3, 22, "wrap");
    fails(&flagged(1 << 2, 0, 4, 0, (32 << 20) + 1), 4, 75, "one chunk");
    fails(&request(7, 5, SIZE, 1), 5, 22, "67108864");
    fails(&flagged(1 << 3, 0, 6, 0, 1), 6, 22, "flags");
    fails(&request(4711, 7, 0, 1), 7, 22, "unknown command");
    drop(client);
    server.join().unwrap().unwrap();
}

/// A client that was promised one extent would take a second one for the next reply.
#[test]
fn block_status_tells_extents_to_those_who_agreed_on_it_only() {
    let export = Memory::new();
    let (mut client, server) = connect_as(&export, BOTH, never());
    client.write_all(&[request(7, 1, 5, 3000), flagged(1 << 3, 7, 2, 5, 3000)].concat()).unwrap();
    let extents = |list: &[(u32, u32)]| {
        let extents = list
            .iter()
            .flat_map(|(bytes, status)| [bytes.to_be_bytes(), status.to_be_bytes()].concat());
        [0, 0, 0, 1].into_iter().chain(extents).collect::<Vec<u8>>()
    };
    assert_eq!(next_chunk(&mut client), (1, 5, 1, extents(&[(1000, 0), (2000, 3)])));
    assert_eq!(next_chunk(&mut client), (1, 5, 2, extents(&[(1000, 0)])));
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) =
        connect_as(&export, Agreed { structured: true, allocation: false }, never());
    client.write_all(&request(7, 3, 0, 4096)).unwrap();
    let (flags, kind, cookie, data) = next_chunk(&mut client);
    assert_eq!((flags, kind, cookie, &data[..4]), (1, 0x8001, 3, &[0, 0, 0, 22][..]));
    drop(client);
    server.join().unwrap().unwrap();
    let (mut client, server) = connect(&export, never());
    client.write_all(&[request(7, 4, 0, 4096), flagged(1 << 2, 0, 5, 0, 1)].concat()).unwrap();
    let mut refused = [next_reply(&mut client), next_reply(&mut client)];
    refused.sort_unstable();
    assert_eq!(
        refused,
        [(4, 22), (5, 22)],
        "without structured replies: BLOCK_STATUS, and the flag DF"
    );
    drop(client);
    server.join().unwrap().unwrap();
}

/// Pages beyond the end of a shortened volume must not come back.
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

/// A request for no bytes is not an error: all commands but BLOCK_STATUS must accept it.
#[test]
fn the_status_of_no_bytes_is_no_error() {
    let (mut client, server) = connect_as(&Memory::new(), BOTH, never());
    client.write_all(&[request(7, 1, 0, 0), flagged(1 << 3, 7, 2, SIZE, 0)].concat()).unwrap();
    assert_eq!(next_chunk(&mut client), (1, 0, 1, vec![]));
    assert_eq!(next_chunk(&mut client), (1, 0, 2, vec![]));
    drop(client);
    server.join().unwrap().unwrap();
}

/// Clients that don't ask for block sizes send any size: kernels have sent 33 MB. A read of that
/// size used to fail, and a write ended the connection.
#[test]
fn requests_larger_than_announced_are_served_in_both_directions() {
    let (export, length) = (Memory::new(), 40usize << 20);
    let data: Vec<u8> = (0..length).map(|n| (n >> 12) as u8 ^ n as u8).collect();
    for agreed in [Agreed::default(), BOTH] {
        let (mut client, server) = connect_as(&export, agreed, never());
        client.write_all(&[&request(1, 1, 7, length as u32)[..], &data].concat()).unwrap();
        assert_eq!(next_reply(&mut client), (1, 0));
        client.write_all(&request(0, 2, 7, length as u32)).unwrap();
        if agreed.structured {
            let mut told = 0;
            while told < length {
                let (_, kind, cookie, chunk) = next_chunk(&mut client);
                assert_eq!(
                    (kind, cookie, &chunk[..8]),
                    (1, 2, &(7 + told as u64).to_be_bytes()[..])
                );
                assert!(chunk[8..] == data[told..][..chunk.len() - 8]);
                told += chunk.len() - 8;
            }
        } else {
            assert_eq!(next_reply(&mut client), (2, 0));
            let mut read = vec![0; length];
            client.read_exact(&mut read).unwrap();
            assert!(read == data);
        }
        // What can't be served is refused, and the stream stays in sync.
        client
            .write_all(
                &[&request(1, 3, SIZE, length as u32)[..], &data, &request(3, 4, 0, 0)].concat(),
            )
            .unwrap();
        if agreed.structured {
            assert_eq!(next_chunk(&mut client).3[..4], 28u32.to_be_bytes());
        } else {
            assert_eq!(next_reply(&mut client), (3, 28));
        }
        assert_eq!(next_reply(&mut client), (4, 0));
        drop(client);
        server.join().unwrap().unwrap();
    }
}

/// "No space" and "invalid" would send an operator to look for a full disk, or for a faulty client.
#[test]
fn requests_to_a_deleted_export_say_that_it_is_gone() {
    let export = Memory::new();
    let (mut client, server) = connect_as(&export, BOTH, never());
    export.shrunk.store(SIZE, Ordering::Relaxed);
    for (cookie, said) in (1..).zip([
        request(0, 1, 0, 512),
        [request(1, 2, 0, 3), b"xyz".to_vec()].concat(),
        request(3, 3, 0, 0),
        request(4, 4, 0, 512),
        request(5, 5, 0, 512),
        request(6, 6, 0, 512),
        request(7, 7, 0, 512),
    ]) {
        client.write_all(&said).unwrap();
        let (_, kind, answered, data) = next_chunk(&mut client);
        assert_eq!((kind, answered, &data[..4]), (0x8001, cookie, &108u32.to_be_bytes()[..]));
        assert!(data.ends_with(b"the volume was deleted"));
    }
    drop(client);
    server.join().unwrap().unwrap();
}
