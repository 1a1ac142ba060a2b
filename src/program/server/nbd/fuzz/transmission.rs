//! Fuzz target: a client's half of a transmission, compared with a model of the export.
//!
//! 1. Cookies are renumbered before the server sees them, so that each reply can be matched with
//!    its request.
//! 2. The reply thread runs one request at a time, and the model follows the order of the replies.

use super::super::memory::{Division, Memory as Budget};
use super::super::proto::Agreed;
use super::super::socket::{Canned, Socket};
use super::super::{Limits, transmission as server};
use super::{Memory, Parts, SIZE};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const READ: u64 = 0;
const WRITE: u64 = 1;
const DISC: u64 = 2;
const FLUSH: u64 = 3;
const TRIM: u64 = 4;
const CACHE: u64 = 5;
const ZEROES: u64 = 6;
const STATUS: u64 = 7;
const PAYLOAD_MAX: u64 = 32 << 20;
const EINVAL: u64 = 22;
const ENOSPC: u64 = 28;
const EOVERFLOW: u64 = 75;
const ENOTSUP: u64 = 95;
const ESHUTDOWN: u64 = 108;

/// A request as it reaches the server.
struct Asked {
    flags: u64,
    command: u64,
    offset: u64,
    length: u64,
    payload: Vec<u8>,
}

/// How the client's bytes end.
#[derive(PartialEq)]
enum End {
    /// They end with a goodbye, or between two requests.
    Clean,
    /// They end within a payload, or with something that is not a request.
    Broken,
}

/// Runs the target.
pub fn transmission(data: &[u8]) {
    let Some((head, said)) = data.split_first_chunk::<2>() else { return };
    let [mode, cut] = *head;
    let agreed = Agreed { structured: mode & 1 != 0, allocation: mode & 1 != 0 && mode & 2 != 0 };
    let is_stopping = mode & 0x1c == 0x1c;
    let mut said = said.to_vec();
    let (mut asked, end) = requests(&mut said);
    if is_stopping {
        asked.truncate(1);
    }
    // The client may stop reading: then the server must end, and everything that it sent until then
    // must be well-formed.
    let room = if mode & 0x60 == 0x60 { usize::from(cut) * 64 } else { usize::MAX };
    let socket = Socket::Canned(Canned::new(said, usize::from(mode >> 5) * 13 + 1, room));
    let export = Memory::new();
    let mut model = export.0.lock().unwrap().clone();
    // With little memory, replies come in pieces and payloads are taken in parts, with others in
    // between: then one request runs at a time, so that the model knows the order. Else each runs
    // as a whole, three at a time.
    let is_little = cut & 1 == 1;
    let (own_bytes, writes_bytes, requests_max) =
        if is_little { (6 << 10, 8 << 10, 1) } else { (SIZE + 2048, 64 << 10, 3) };
    let replies_bytes = if is_little { 0 } else { 16 << 10 };
    let division = Division {
        engine_bytes: 0,
        connections_max: 1,
        input_bytes: 64,
        own_bytes,
        replies_bytes,
        writes_bytes,
    };
    let (limits, budget) =
        (Limits { requests_max, ..Limits::default() }, Arc::new(Budget::new(division)));
    let outcome = server::serve(
        &socket,
        &export,
        agreed,
        &limits,
        &budget,
        &Arc::new(AtomicBool::new(is_stopping)),
    );
    assert_eq!(budget.taken(), 0, "memory was not given back");
    let Socket::Canned(canned) = &socket else { unreachable!("it was made so") };
    let answered = canned.answered();
    let is_cut = answered.len() >= room;
    // A server that stops ends cleanly after one answer, whatever would have followed.
    let goes_on = !is_stopping || asked.is_empty();
    if !is_cut && goes_on {
        assert_eq!(outcome.is_ok(), end == End::Clean, "{outcome:?}");
    }
    let mut waiting: BTreeMap<u64, Asked> = (0..).zip(asked).collect();
    let mut parts = Parts(&answered);
    while !parts.0.is_empty() {
        if reply(&mut parts, agreed, is_stopping, &mut waiting, &mut model).is_none() {
            assert!(is_cut, "half a reply");
            break;
        }
    }
    if !is_cut {
        assert!(waiting.is_empty(), "{} requests without a reply", waiting.len());
        assert!(*export.0.lock().unwrap() == model, "the export is not as the model");
    }
}

/// Returns the requests that reach the server completely; their cookies are set to their numbers.
fn requests(said: &mut [u8]) -> (Vec<Asked>, End) {
    let (mut asked, mut at) = (Vec::new(), 0);
    loop {
        let Some(header) = said.get_mut(at..at + 28) else { return (asked, End::Clean) };
        header[8..16].copy_from_slice(&(asked.len() as u64).to_be_bytes());
        let mut parts = Parts(header);
        let mut number = |bytes| parts.number(bytes).expect("a header has 28 bytes");
        let (magic, flags, command) = (number(4), number(2), number(2));
        let (_, offset, length) = (number(8), number(8), number(4));
        at += 28;
        if magic != 0x2560_9513 {
            return (asked, End::Broken);
        }
        if command == DISC {
            return (asked, End::Clean);
        }
        let payload_len = if command == WRITE { length } else { 0 };
        let Some(payload) = said.get(at..at + payload_len as usize) else {
            return (asked, End::Broken);
        };
        at += payload.len();
        asked.push(Asked { flags, command, offset, length, payload: payload.to_vec() });
    }
}

/// The error that the specification requires; 0 for none.
fn error_of(asked: &Asked, agreed: Agreed) -> u64 {
    let (fua, no_hole, df, one, fast) = (1, 2, 4, 8, 16);
    let known = match asked.command {
        ZEROES => fua | no_hole | fast,
        READ if agreed.structured => fua | df,
        STATUS => fua | one,
        _ => fua,
    };
    let is_known = matches!(asked.command, READ | WRITE | FLUSH | TRIM | CACHE | ZEROES | STATUS);
    let is_status = asked.command == STATUS;
    let is_invalid = !is_known || (is_status && !agreed.allocation) || asked.flags & !known != 0;
    if !is_invalid && asked.command == READ && asked.flags & df != 0 && asked.length > PAYLOAD_MAX {
        return EOVERFLOW;
    }
    let Some(end) = asked.offset.checked_add(asked.length).filter(|_| !is_invalid) else {
        return EINVAL;
    };
    if end > SIZE as u64 {
        return if matches!(asked.command, WRITE | ZEROES) { ENOSPC } else { EINVAL };
    }
    let is_slow = asked.command == ZEROES
        && asked.length > 0
        && asked.flags & (no_hole | fast) == no_hole | fast;
    if is_slow { ENOTSUP } else { 0 }
}

/// Takes one whole reply, and applies the answered request to the model; `None` if the reply is not
/// complete.
fn reply(
    parts: &mut Parts,
    agreed: Agreed,
    is_stopping: bool,
    waiting: &mut BTreeMap<u64, Asked>,
    model: &mut [u8],
) -> Option<()> {
    let magic = parts.number(4)?;
    if magic == 0x6744_6698 {
        let (error, cookie) = (parts.number(4)?, parts.number(8)?);
        let asked = waiting.remove(&cookie).expect("a reply to a request that waits for one");
        let expected = if is_stopping { ESHUTDOWN } else { error_of(&asked, agreed) };
        assert_eq!(error, expected, "command {} flags {}", asked.command, asked.flags);
        assert!(
            !agreed.structured || (error == 0 && asked.command != READ && asked.command != STATUS)
        );
        if error == 0 && asked.command == READ {
            let data = parts.take(asked.length as usize)?;
            assert!(*data == model[asked.offset as usize..][..data.len()], "wrong bytes");
        }
        if error == 0 {
            perform(&asked, model);
        }
        return Some(());
    }
    assert!(
        magic == 0x668e_33ef && agreed.structured,
        "neither a reply nor a chunk that was agreed on"
    );
    chunks(parts, agreed, is_stopping, waiting, model)
}

fn perform(asked: &Asked, model: &mut [u8]) {
    let at = asked.offset as usize..(asked.offset + asked.length) as usize;
    match asked.command {
        WRITE => model[at].copy_from_slice(&asked.payload),
        TRIM | ZEROES => model[at].fill(0),
        _ => {}
    }
}

/// Takes the chunks of one reply, after the magic of the first.
fn chunks(
    parts: &mut Parts,
    agreed: Agreed,
    is_stopping: bool,
    waiting: &mut BTreeMap<u64, Asked>,
    model: &[u8],
) -> Option<()> {
    let (mut told, mut count, mut of) = (0, 0, None);
    loop {
        let (flags, kind, cookie, length) =
            (parts.number(2)?, parts.number(2)?, parts.number(8)?, parts.number(4)?);
        let mut data = Parts(parts.take(length as usize)?);
        assert!(
            flags <= 1 && *of.get_or_insert(cookie) == cookie,
            "chunks of two replies are mixed"
        );
        let asked = waiting.get(&cookie).expect("a reply to a request that waits for one");
        let expected = if is_stopping { ESHUTDOWN } else { error_of(asked, agreed) };
        count += 1;
        match kind {
            0 => {
                let is_for_none = matches!(asked.command, READ | STATUS) && asked.length == 0;
                assert!(is_for_none && expected == 0 && length == 0);
            }
            1 | 2 => {
                assert!(asked.command == READ && expected == 0);
                assert_eq!(
                    data.number(8)?,
                    asked.offset + told,
                    "a gap, or bytes that are told twice"
                );
                let range = (asked.offset + told) as usize..;
                let bytes = if kind == 1 {
                    data.take(data.0.len())?.to_vec()
                } else {
                    vec![0; data.number(4)? as usize]
                };
                assert!(!bytes.is_empty() && model[range][..bytes.len()] == bytes, "wrong bytes");
                told += bytes.len() as u64;
            }
            5 => {
                assert!(asked.command == STATUS && expected == 0 && data.number(4)? == 1);
                let mut bytes = 0;
                while !data.0.is_empty() {
                    let (extent, _) = (data.number(4)?, data.number(4)?);
                    assert!(
                        extent > 0 && (asked.flags & 8 == 0 || bytes == 0),
                        "more extents than asked for"
                    );
                    bytes += extent;
                }
                assert!((1..=asked.length).contains(&bytes), "extents beyond the range");
            }
            0x8001 => {
                assert_eq!(
                    data.number(4)?,
                    expected,
                    "command {} flags {}",
                    asked.command,
                    asked.flags
                );
                let text = data.number(2)? as usize;
                assert!(expected != 0 && std::str::from_utf8(data.take(text)?).is_ok());
            }
            other => panic!("a chunk of type {other}"),
        }
        assert!(data.0.is_empty(), "a chunk longer than what is in it");
        if flags == 1 {
            let asked = waiting.remove(&cookie).expect("it waited above");
            let is_read = asked.command == READ && expected == 0;
            assert!(!is_read || told == asked.length, "not all bytes were told");
            assert!((is_read && asked.flags & 4 == 0) || count == 1, "one chunk was asked for");
            return Some(());
        }
        assert_eq!(parts.number(4)?, 0x668e_33ef, "a reply within the chunks of another");
    }
}
