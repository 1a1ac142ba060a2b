//! Tests how many connections there may be, and how long a handshake may take.

use super::*;

/// A client that sends a byte now and then would stay for ever, and a hundred of them would lock
/// all others out.
#[test]
fn a_handshake_ends_in_time_however_it_is_drawn_out() {
    let limit = Duration::from_millis(300);
    let (_dir, path, server) =
        listening(Limits { handshake: limit, handshake_pause: limit, ..Limits::default() });
    let mut good = chosen(&path).unwrap();
    let mut slow = UnixStream::connect(&path).unwrap();
    slow.write_all(&FLAGS).unwrap();
    // It sends one option, so long that the server does not answer in between.
    let endless = option_bytes(77, &[0; 1000]);
    let cut_off = endless.iter().any(|byte| {
        std::thread::sleep(Duration::from_millis(20));
        slow.write_all(&[*byte]).is_err()
    });
    assert!(cut_off, "20 s later it is still there");
    // One client is silent, and one never reads the answers.
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

/// Each connection takes two threads and memory: without a limit, an attacker would only have to
/// connect.
#[test]
fn connections_beyond_the_limit_are_closed_and_the_others_served() {
    let (_dir, path, server) = listening_with(
        Limits::default(),
        Arc::new(Budget::new(Division { connections_max: 2, ..Division::of(64 << 20) })),
    );
    let (mut first, second) = (chosen(&path).unwrap(), chosen(&path).unwrap());
    // One connection is kept for other peers.
    for _ in 0..5 {
        assert!(chosen(&path).is_err(), "a third connection");
    }
    first.write_all(&request(3, 1, 0, 0)).unwrap();
    assert_eq!(next_reply(&mut first), (1, 0));
    drop(second);
    // Its connection is free as soon as its threads have ended.
    let third = (0..1000).find_map(|_| {
        std::thread::sleep(Duration::from_millis(10));
        chosen(&path).ok()
    });
    assert!(third.is_some(), "a place that was given back is taken for ever");
    drop((first, third));
    assert!(server.stop());
}
