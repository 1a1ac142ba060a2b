//! Tests the handshake: options, metadata contexts, limits.

use super::*;

/// If this fails, clients that follow the specification can't connect.
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
        let said =
            [FLAGS.to_vec(), option_bytes(option::GO, data), option_bytes(option::GO, &whole)];
        let (outcome, answer) = talk(&said);
        assert!(matches!(outcome, Ok(Outcome::Chosen(name, ..)) if name == "disk"));
        assert_eq!(answer[12..16], reply::ERR_INVALID.to_be_bytes());
    }
    let (outcome, answer) = talk(&[
        FLAGS.to_vec(),
        option_bytes(5, b""),
        option_bytes(11, b"xyz"),
        option_bytes(2, b""),
    ]);
    assert!(matches!(outcome, Ok(Outcome::Aborted)));
    let unsupported = |n| proto::option_reply(n, reply::ERR_UNSUP, b"");
    assert_eq!(
        answer,
        [unsupported(5), unsupported(11), proto::option_reply(2, reply::ACK, b"")].concat()
    );
}

/// Without limits a client could make the server read or answer for ever.
#[test]
fn a_handshake_out_of_bounds_ends_the_connection() {
    let endless = vec![option_bytes(77, b""); TALK_BYTES_MAX / (16 + 20) + 1];
    let too_long =
        [&proto::OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 7], &u32::MAX.to_be_bytes()].concat();
    for said in [
        endless,
        vec![too_long],
        vec![b"NOTMAGIC\0\0\0\x07\0\0\0\0".to_vec()],
        vec![option_bytes(1, b"none")],
    ] {
        assert!(talk(&[&[FLAGS.to_vec()][..], &said].concat()).0.is_err());
    }
    assert!(talk(&[vec![0, 0, 0, 0x83]]).0.is_err(), "unknown client flags");
}

/// A client that lists a store asks about every export, with some options for each: 128 options
/// were too few for 64 volumes.
#[test]
fn a_handshake_may_have_as_many_options_as_there_are_things_to_ask() {
    let info = option_bytes(option::INFO, b"\0\0\0\x04disk\0\0");
    let set = option_bytes(option::SET_META_CONTEXT, &meta("disk", &[b"base:allocation"]));
    let each = [info, set].concat();
    let mut said = vec![FLAGS.to_vec(), option_bytes(8, b""), option_bytes(option::LIST, b"")];
    said.extend(vec![each; 500]);
    said.push(option_bytes(option::GO, b"\0\0\0\x04disk\0\0"));
    let (outcome, _) = talk(&said);
    assert!(matches!(
        outcome,
        Ok(Outcome::Chosen(_, _, Agreed { structured: true, allocation: true }))
    ));
}

/// Lists of metadata contexts are the largest messages that a client can send before it has chosen
/// an export. Each is limited, and all are counted, so that they don't take unlimited memory or
/// answers; and however often a client asks for a context, it is reported once.
#[test]
fn lists_of_metadata_contexts_are_bounded_and_answered_once() {
    let structured = option_bytes(8, b"");
    let ours: &[u8] = b"base:allocation";
    let go = option_bytes(option::GO, b"\0\0\0\x04disk\0\0");
    let told =
        |option, id: u32| proto::option_reply(option, 4, &[&id.to_be_bytes()[..], ours].concat());
    let ack = |option| proto::option_reply(option, reply::ACK, b"");
    // Send as many queries as an option has room for: the shortest ones, and the known one.
    let room = proto::OPTION_BYTES_MAX as usize - 4 - 4 - 4;
    let shortest = [&vec![&b""[..]; (room - 4 - ours.len()) / 4][..], &[ours]].concat();
    let repeated = vec![ours; room / (4 + ours.len())];
    for queries in [shortest, repeated] {
        let data = meta("disk", &queries);
        assert!(data.len() <= proto::OPTION_BYTES_MAX as usize && queries.len() > 800);
        for (option, id) in [(9, 0), (10, 1)] {
            let said = [FLAGS.into(), structured.clone(), option_bytes(option, &data), go.clone()];
            let (outcome, answer) = talk(&said);
            let Ok(Outcome::Chosen(_, _, agreed)) = outcome else { panic!("no export was chosen") };
            assert_eq!(agreed.allocation, option == 10);
            let answers = [ack(8), told(option, id), ack(option)].concat();
            assert!(answer.starts_with(&answers), "one answer to {} queries", queries.len());
            // One byte more than this is not read.
            let longer = meta("disk", &[&queries[..], &[&[b'x'; 20]]].concat());
            let (outcome, answer) = talk(&[
                FLAGS.into(),
                structured.clone(),
                option_bytes(option, &longer),
                go.clone(),
            ]);
            assert!(
                outcome.is_err() && answer[20 + 12..20 + 16] == reply::ERR_TOO_BIG.to_be_bytes()
            );
            // An endless sequence of lists must be refused, too.
            let lists = vec![option_bytes(option, &data); TALK_BYTES_MAX / data.len() + 1];
            let said =
                [&[FLAGS.to_vec(), structured.clone()][..], &lists, std::slice::from_ref(&go)]
                    .concat();
            assert!(talk(&said).0.is_err(), "{} lists of {} bytes", lists.len(), data.len());
        }
    }
}

/// Makes the data of a meta context option.
fn meta(name: &str, queries: &[&[u8]]) -> Vec<u8> {
    let string = |text: &[u8]| [&(text.len() as u32).to_be_bytes()[..], text].concat();
    let mut data =
        [string(name.as_bytes()), (queries.len() as u32).to_be_bytes().to_vec()].concat();
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

/// A client must get exactly what the server has agreed to.
#[test]
fn metadata_contexts_are_negotiated_as_specified() {
    const GO: &[u8] = b"\0\0\0\x04disk\0\0";
    let structured = option_bytes(8, b"");
    let ack = |option| proto::option_reply(option, reply::ACK, b"");
    let told = |option, id: u32| {
        proto::option_reply(option, 4, &[&id.to_be_bytes()[..], b"base:allocation"].concat())
    };
    let agreed = |options: &[Vec<u8>], answers: &[Vec<u8>]| {
        let (outcome, answer) =
            talk(&[&[FLAGS.to_vec()], options, &[option_bytes(option::GO, GO)]].concat());
        assert!(answer.starts_with(&answers.concat()), "{answer:?}");
        let Ok(Outcome::Chosen(_, _, agreed)) = outcome else { panic!("no export was chosen") };
        (agreed.structured, agreed.allocation)
    };
    let set = |name: &str, queries: &[&[u8]]| option_bytes(10, &meta(name, queries));
    let list = |queries: &[&[u8]]| option_bytes(9, &meta("disk", queries));
    assert_eq!(agreed(&[], &[]), (false, false));
    let ours: &[u8] = b"base:allocation";
    assert_eq!(
        agreed(&[structured.clone(), set("disk", &[ours])], &[ack(8), told(10, 1), ack(10)]),
        (true, true)
    );
    // The default export under its own name is the same export; another one is not.
    assert!(
        agreed(
            &[structured.clone(), set("", &[b"x:y", ours, ours])],
            &[ack(8), told(10, 1), ack(10)]
        )
        .1
    );
    assert!(
        !agreed(&[structured.clone(), set("other", &[ours])], &[ack(8), told(10, 1), ack(10)]).1
    );
    // The last selection counts, even if it selects nothing or fails.
    for last in [
        set("disk", &[]),
        set("disk", &[b"base:"]),
        set("disk", &[b"qemu:dirty"]),
        set("none", &[ours]),
    ] {
        assert!(!agreed(&[structured.clone(), set("disk", &[ours]), last], &[]).1);
    }
    for queries in [&[][..], &[&b"base:"[..]], &[ours], &[b"x:", ours]] {
        assert_eq!(
            agreed(&[structured.clone(), list(queries)], &[ack(8), told(9, 0), ack(9)]),
            (true, false)
        );
    }
    assert!(!agreed(&[structured.clone(), list(&[b"x:"])], &[ack(8), ack(9)]).1);
}

/// A length that is trusted takes memory, or gets the stream out of step.
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
            let (outcome, answer) =
                talk(&[FLAGS.into(), structured.clone(), option_bytes(option, data), go.clone()]);
            assert!(matches!(
                outcome,
                Ok(Outcome::Chosen(_, _, Agreed { structured: true, allocation: false }))
            ));
            assert_eq!(answer[20 + 12..20 + 16], reply::ERR_INVALID.to_be_bytes(), "{data:?}");
        }
        let (outcome, answer) = talk(&[FLAGS.into(), option_bytes(option, &whole), go.clone()]);
        assert!(matches!(
            outcome,
            Ok(Outcome::Chosen(_, _, Agreed { structured: false, allocation: false }))
        ));
        assert_eq!(answer[12..16], reply::ERR_INVALID.to_be_bytes(), "before STRUCTURED_REPLY");
    }
    for said in [vec![option_bytes(8, b"x")], vec![structured.clone(), structured]] {
        let (_, answer) = talk(&[&[FLAGS.to_vec()][..], &said, std::slice::from_ref(&go)].concat());
        let last = &answer[20 * (said.len() - 1)..];
        assert_eq!(last[12..16], reply::ERR_INVALID.to_be_bytes());
    }
}
