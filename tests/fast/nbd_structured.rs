//! Structured replies, block status, and what goes with them, byte by byte against a real server;
//! and clients that mean no good.
//!
//! If these fail, clients copy holes as data, take data for holes and lose it, or are disturbed by
//! somebody else.

// Real processes take real time; nothing here is replayed from a seed but the data.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::nbd::*;
use common::{Rng, Served, scratch};
use std::time::Duration;

const PAGE: u64 = 4096;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

fn serve(dir: &std::path::Path, size: &str) -> Served {
    Served::start_with(dir, &["--nbd", "tcp:127.0.0.1:0", "--volume", "vol", "--size", size])
}

/// All of a range's block status, asked for until it is told.
fn status_of(client: &mut Client, mut offset: u64, mut length: u64) -> Vec<(u64, bool)> {
    let mut all: Vec<(u64, bool)> = Vec::new();
    while length > 0 {
        let some = client.status(0, offset, length.min(u32::MAX.into()) as u32);
        assert!(
            !some.is_empty()
                && some.iter().all(|(length, flags)| *length > 0 && [0, 3].contains(flags)),
            "{some:?}"
        );
        for (part, flags) in some {
            (offset, length) = (offset + u64::from(part), length - u64::from(part));
            match all.last_mut() {
                Some((known, hole)) if *hole == (flags == 3) => *known += u64::from(part),
                _ => all.push((part.into(), flags == 3)),
            }
        }
    }
    all
}

#[test]
fn reads_tell_holes_and_data_and_in_one_piece_where_that_is_asked() {
    let dir = scratch("chunks");
    let served = serve(dir.path(), "1G");
    let mut client = Client::structured(&served.address(), "vol");
    assert_eq!(client.flags & (1 << 7 | 1 << 10), 1 << 7 | 1 << 10, "DF and CACHE are announced");
    client.write(0, 0, &[1; 4096]);
    client.write(0, 3 * PAGE + 100, &[2; 8192]);
    let mut expected = vec![0; 8 * 4096];
    expected[..4096].fill(1);
    expected[3 * 4096 + 100..][..8192].fill(2);
    let holes = vec![(PAGE, 2 * PAGE as u32), (6 * PAGE, 2 * PAGE as u32)];
    assert_eq!(client.read_chunks(0, 0, 8 * 4096), (expected.clone(), holes));
    assert_eq!(client.read_chunks(DF, 0, 8 * 4096), (expected.clone(), vec![]));
    // Unaligned, and within a hole.
    assert_eq!(
        client.read_chunks(0, 4000, 200),
        (expected[4000..4200].to_vec(), vec![(PAGE, 104)])
    );
    assert_eq!(client.read_chunks(0, PAGE + 7, 9), (vec![0; 9], vec![(PAGE + 7, 9)]));
    for (flags, command, offset, length, error) in [
        (0, READ, (1 << 30) - 1, 2, EINVAL),
        (0, READ, u64::MAX, 2, EINVAL),
        (REQ_ONE, READ, 0, 1, EINVAL),
        (DF, FLUSH, 0, 0, EINVAL),
        (0, BLOCK_STATUS, 1 << 30, 1, EINVAL),
        (DF, BLOCK_STATUS, 0, 1, EINVAL),
        (0, CACHE, 1 << 30, 1, EINVAL),
        (0, 99, 0, 0, EINVAL),
    ] {
        assert_eq!(
            client.error(flags, command, offset, length),
            error,
            "{command} with {flags} at {offset}, {length}"
        );
    }
    assert_eq!(client.call(0, CACHE, 0, 8 * 4096, &[]), 0);
    assert_eq!(client.call(0, CACHE, 0, 1 << 30, &[]), 0);
    assert_eq!(client.read_chunks(0, 5, 3), (vec![1; 3], vec![]), "in step");
    // Without structured replies: as before, and no block status.
    let mut plain = Client::go(&served.address(), "vol");
    assert_eq!(plain.flags & 1 << 7, 0, "DF means nothing there");
    assert_eq!(plain.call(0, BLOCK_STATUS, 0, 4096, &[]), EINVAL);
    assert_eq!(plain.call(DF, READ, 0, 1, &[]), EINVAL);
    assert_eq!(plain.read(0, 8 * 4096), expected);
}

#[test]
fn block_status_follows_writes_and_trims() {
    let dir = scratch("status");
    let served = serve(dir.path(), "64M");
    let mut client = Client::structured(&served.address(), "vol");
    let (pages, mut rng) = ((64 << 20) / PAGE, Rng::of(&[5]));
    let mut there = vec![false; pages as usize];
    assert_eq!(status_of(&mut client, 0, 64 << 20), [(64 << 20, true)]);
    for round in 0..60 {
        let first = rng.below(pages);
        let count = 1 + rng.below(if round % 3 == 0 { 2000 } else { 9 }).min(pages - first - 1);
        let (offset, bytes, part) =
            (first * PAGE, count * PAGE, &mut there[first as usize..(first + count) as usize]);
        match rng.below(4) {
            0 => assert_eq!(client.call(0, TRIM, offset, bytes as u32, &[]), 0),
            1 => assert_eq!(client.call(FUA, WRITE_ZEROES, offset, bytes as u32, &[]), 0),
            2 if count < 200 => {
                assert_eq!(client.call(NO_HOLE, WRITE_ZEROES, offset, bytes as u32, &[]), 0)
            }
            _ => {
                client.write(0, offset, &vec![round; bytes as usize]);
                part.fill(true);
                continue;
            }
        }
        let holds = status_of(&mut client, offset, bytes) == [(bytes, false)];
        part.fill(holds);
    }
    let mut expected: Vec<(u64, bool)> = Vec::new();
    for there in &there {
        match expected.last_mut() {
            Some((known, hole)) if *hole != *there => *known += PAGE,
            _ => expected.push((PAGE, !there)),
        }
    }
    assert!(expected.len() > 20, "too few stretches to show anything: {expected:?}");
    assert_eq!(status_of(&mut client, 0, 64 << 20), expected);
    // From the middle of a page, one stretch only, and never more than was asked for.
    let start = expected[0].0;
    assert_eq!(client.status(REQ_ONE, 5, 10), [(10, if expected[0].1 { 3 } else { 0 })]);
    assert_eq!(client.status(REQ_ONE, 7, u32::MAX >> 8).len(), 1);
    let two = client.status(0, start - 3, 6);
    assert_eq!(two.iter().map(|(length, _)| *length).collect::<Vec<_>>(), [3, 3]);
}

#[test]
fn trimming_a_huge_volume_costs_what_is_in_it_and_zeros_with_fua_survive_a_kill() {
    let dir = scratch("huge");
    let served = serve(dir.path(), "4T");
    let mut client = Client::structured(&served.address(), "vol");
    let far = |n: u64| n * ((4 << 40) / 50) / PAGE * PAGE;
    for n in 0..50 {
        client.write(0, far(n), &[n as u8 + 1; 6000]);
    }
    client.flush();
    // All but the first two, 4 GiB at a time and some bytes beside the pages.
    let (mut at, end) = (far(2) + 5, 4 << 40);
    while at < end {
        let length = (end - at).min(u64::from(u32::MAX)) as u32;
        let last = at + u64::from(length) == end;
        assert_eq!(client.call(if last { FUA } else { 0 }, WRITE_ZEROES, at, length, &[]), 0);
        at += u64::from(length);
    }
    let found = client.read_chunks(0, far(2), 8192).0;
    assert_eq!((&found[..5], &found[5..]), (&[3; 5][..], &[0; 8187][..]), "the edge");
    drop(client);
    served.kill();
    let served = serve(dir.path(), "4T");
    let mut client = Client::structured(&served.address(), "vol");
    assert_eq!(client.read_chunks(0, far(1), 6000).0, [2; 6000]);
    assert_eq!(client.read_chunks(0, far(2), 8192).0, found);
    for n in 3..50 {
        assert_eq!(
            client.read_chunks(0, far(n), 6000),
            (vec![0; 6000], vec![(far(n), 6000)]),
            "page {n} is back"
        );
    }
}

#[test]
fn contexts_are_of_the_export_that_they_were_set_for() {
    let dir = scratch("contexts");
    let first = serve(dir.path(), "1M");
    drop(first);
    let served = Served::start_with(
        dir.path(),
        &["--nbd", "tcp:127.0.0.1:0", "--volume", "other", "--size", "1M"],
    );
    let mut client = Client::greeted(&served.address());
    let mut ask = |option: u32, data: &[u8]| {
        client.option(option, data);
        let mut replies = vec![client.option_reply()];
        while replies.last().unwrap().kind == 4 {
            replies.push(client.option_reply());
        }
        replies.into_iter().map(|reply| (reply.kind, reply.data)).collect::<Vec<_>>()
    };
    let kinds = |replies: Vec<(u32, Vec<u8>)>| {
        replies.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>()
    };
    let context = |id: u32| (4, [&id.to_be_bytes()[..], b"base:allocation"].concat());
    let allocation: &[&[u8]] = &[b"base:allocation"];
    assert_eq!(
        kinds(ask(OPT_SET_META, &meta_data("vol", allocation))),
        [INVALID],
        "structured replies come first"
    );
    assert_eq!(kinds(ask(OPT_STRUCTURED, b"")), [1]);
    for all in [&[][..], &[&b"base:"[..]], allocation, &[b"x:y", b"base:allocation"]] {
        assert_eq!(
            ask(OPT_LIST_META, &meta_data("vol", all)),
            [context(0), (1, vec![])],
            "{all:?}"
        );
    }
    for nothing in
        [&[][..], &[&b"base:"[..]], &[&b"base:dirty"[..]], &[&b"qemu:dirty-bitmap:x"[..], b""]]
    {
        assert_eq!(kinds(ask(OPT_SET_META, &meta_data("vol", nothing))), [1], "{nothing:?}");
    }
    assert_eq!(kinds(ask(OPT_SET_META, &meta_data("nobody", allocation))), [UNKNOWN]);
    let whole = meta_data("vol", allocation);
    for malformed in
        [&whole[..whole.len() - 1], &whole[..9], b"", &[&whole[..], b"x"].concat(), &[0xff; 40]]
    {
        assert_eq!(kinds(ask(OPT_SET_META, malformed)), [INVALID], "{malformed:?}");
    }
    let long = [b'a'; 5000];
    assert_eq!(kinds(ask(OPT_SET_META, &meta_data("vol", &[&long]))), [INVALID]);
    let many: Vec<&[u8]> = vec![b"x:y"; 5000];
    assert_eq!(
        kinds(ask(OPT_SET_META, &meta_data("vol", &many))),
        [1],
        "many queries are only long"
    );
    assert_eq!(ask(OPT_SET_META, &whole), [context(1), (1, vec![])]);
    let mut client = client.gone("other");
    assert_eq!(client.error(0, BLOCK_STATUS, 0, 4096), EINVAL, "it was set for another export");
    let too_many: Vec<&[u8]> = vec![b"x:y"; 10_000];
    let mut client = Client::greeted(&served.address());
    client.option(OPT_SET_META, &meta_data("vol", &too_many));
    assert_eq!(client.option_reply().kind, TOO_BIG);
    assert!(client.is_closed());
}

/// Each of many connections sends something else that makes no sense, some of it slowly, some
/// without ever reading; one that behaves goes on beside them all the time.
#[test]
fn hostile_clients_hurt_only_themselves() {
    let dir = scratch("hostile");
    let served = serve(dir.path(), "64M");
    let address = served.address();
    let mut good = Client::structured(&address, "vol");
    let mut model = vec![0u8; 1 << 20];
    let mut rng = Rng::of(&[77]);
    let mut silent = Vec::new();
    for round in 0..150u64 {
        let mut bad =
            if round % 2 == 0 { Client::connect(&address) } else { Client::greeted(&address) };
        match round % 10 {
            // Rubbish, in place of flags or options.
            0 | 1 => {
                let length = 1 + rng.below(3000) as usize;
                let _ = bad.try_send(&rng.bytes(length));
            }
            // A known option with rubbish in it.
            3 | 5 => {
                let (number, length) = (rng.below(12) as u32, rng.below(500) as usize);
                bad.option(number, &rng.bytes(length));
            }
            // An option that is said to have much more data than comes.
            7 => {
                let _ = bad.try_send(
                    &[&b"IHAVEOPT"[..], &10u32.to_be_bytes(), &65_000u32.to_be_bytes(), b"half"]
                        .concat(),
                );
            }
            // In transmission: rubbish, lengths that wrap, half a header, half a payload.
            _ => {
                let mut bad = Client::structured(&address, "vol");
                let bytes = match rng.below(5) {
                    0 => rng.bytes(28),
                    1 => request_bytes(0, WRITE, 1, u64::MAX - 5, 100),
                    2 => request_bytes(0, WRITE, 1, 0, u32::MAX),
                    3 => [request_bytes(0, WRITE, 1, 0, 4096), vec![0; 50]].concat(),
                    _ => request_bytes(0, READ, 1, 0, 32 << 20)[..rng.below(28) as usize].to_vec(),
                };
                let _ = bad.try_send(&bytes);
                // And requests whose replies nobody takes.
                if round % 20 == 9 {
                    (0..64)
                        .for_each(|_| drop(bad.try_send(&request_bytes(0, READ, 2, 0, 1 << 20))));
                    silent.push(bad);
                }
            }
        }
        if silent.len() < 20 && round % 7 == 0 {
            silent.push(bad);
        }
        let (at, length) = (rng.below(1 << 20), 1 + rng.below(9000));
        let length = length.min((1 << 20) - at) as usize;
        let data = rng.bytes(length);
        good.write(0, at, &data);
        model[at as usize..][..length].copy_from_slice(&data);
        assert_eq!(good.read_chunks(0, at, length as u32).0, data, "round {round}");
    }
    assert_eq!(good.read_chunks(DF, 0, 1 << 20).0, model);
    // Byte by byte is slow, and right.
    let mut slow = Client::connect(&address);
    slow.take(18);
    for byte in [
        &[0, 0, 0, 3][..],
        b"IHAVEOPT",
        &7u32.to_be_bytes(),
        &9u32.to_be_bytes(),
        &info_data("vol", &[]),
    ]
    .concat()
    {
        slow.send(&[byte]);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((slow.option_reply().kind, slow.option_reply().kind), (3, 1));
    assert_eq!(slow.read(0, 100), model[..100]);
    drop(silent);
    assert_eq!(good.status(0, 0, 4096).len(), 1);
}
