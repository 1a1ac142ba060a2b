//! Fuzz target: a client's half of a handshake, compared with an independent reader.

use super::super::handshake::{Outcome, handshake as serve};
use super::{Memory, Parts, SIZE};
use std::io::{self, Read, Write};

const ACK: u64 = 1;
const UNSUPPORTED: u64 = 0x8000_0001;
const INVALID: u64 = 0x8000_0003;
const UNKNOWN: u64 = 0x8000_0006;
const TOO_BIG: u64 = 0x8000_0009;

/// What a client sends, in pieces of one to sixteen bytes, and what the server answers.
struct Canned<'a> {
    said: &'a [u8],
    piece: usize,
    answered: Vec<u8>,
}

impl Read for Canned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.piece).min(self.said.len());
        let (now, rest) = self.said.split_at(count);
        buffer[..count].copy_from_slice(now);
        self.said = rest;
        Ok(count)
    }
}

impl Write for Canned<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.answered.extend_from_slice(buffer);
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How the model expects it to end.
#[derive(Debug, PartialEq)]
enum End {
    Chosen { name: String, structured: bool, allocation: bool },
    Aborted,
    Broken,
}

/// Runs the target.
pub fn handshake(data: &[u8]) {
    let Some((&piece, said)) = data.split_first() else { return };
    let mut stream = Canned { said, piece: usize::from(piece % 16) + 1, answered: Vec::new() };
    let outcome = serve(&mut stream, &Memory::new(), usize::MAX);
    let ended = match outcome {
        Ok(Outcome::Chosen(name, _, agreed)) => {
            End::Chosen { name, structured: agreed.structured, allocation: agreed.allocation }
        }
        Ok(Outcome::Aborted) => End::Aborted,
        Err(_) => End::Broken,
    };
    let mut model = Model {
        said: Parts(said),
        answered: Parts(&stream.answered),
        structured: false,
        allocation: None,
    };
    assert_eq!(model.answered.take(18), Some(&b"NBDMAGICIHAVEOPT\0\x03"[..]));
    let expected = model.run();
    assert_eq!(ended, expected);
    assert_eq!(model.answered.0, b"", "more was sent than was asked for");
    if ended != End::Broken {
        assert_eq!(
            stream.said, model.said.0,
            "bytes of the next phase were read, or some of this one left"
        );
    }
    // The longest answer to an option, which has at least 16 bytes, is a text, three facts about an
    // export, or a list of two.
    assert!(
        stream.answered.len() <= 200 + said.len() / 16 * 400,
        "{} bytes of answers",
        stream.answered.len()
    );
}

/// Reads both sides by the specification.
struct Model<'a> {
    said: Parts<'a>,
    answered: Parts<'a>,
    structured: bool,
    allocation: Option<String>,
}

impl Model<'_> {
    fn run(&mut self) -> End {
        let flags = self.said.number(4);
        let Some(flags) = flags.filter(|flags| flags & !3 == 0) else { return End::Broken };
        loop {
            match self.option(flags & 2 != 0) {
                None => return End::Broken,
                Some(Some(end)) => return end,
                Some(None) => {}
            }
        }
    }

    /// Reads an option and its answer. `None`: the connection must end; else how the handshake
    /// ended, if it did.
    fn option(&mut self, no_zeroes: bool) -> Option<Option<End>> {
        if self.said.take(8)? != b"IHAVEOPT" {
            return None;
        }
        let (option, length) = (self.said.number(4)?, self.said.number(4)? as usize);
        if length > 65_536 {
            self.reply(option, TOO_BIG);
            return None;
        }
        let data = self.said.take(length)?;
        match option {
            1 => return self.export_name(data, no_zeroes).map(Some),
            2 => {
                self.reply(2, ACK);
                return Some(Some(End::Aborted));
            }
            3 if data.is_empty() => {
                for name in ["disk", "other"] {
                    let text = self.reply(3, 2);
                    assert_eq!(
                        text,
                        [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat()
                    );
                }
                self.reply(3, ACK);
            }
            6 | 7 => return Some(self.info(option, data)),
            8 if data.is_empty() && !self.structured => {
                self.reply(8, ACK);
                self.structured = true;
            }
            9 | 10 => self.context(option, data),
            3 | 8 => drop(self.reply(option, INVALID)),
            _ => drop(self.reply(option, UNSUPPORTED)),
        }
        Some(None)
    }

    /// Takes one reply, which must be of this kind. Returns its data.
    fn reply(&mut self, option: u64, kind: u64) -> Vec<u8> {
        let found = [8, 4, 4].map(|bytes| self.answered.number(bytes));
        assert_eq!(
            found,
            [Some(0x0003_e889_0455_65a9), Some(option), Some(kind)],
            "the reply to option {option}"
        );
        let length = self.answered.number(4).expect("a length") as usize;
        let data = self.answered.take(length).expect("as many bytes as the length says").to_vec();
        assert!(data.len() <= 4096, "a string longer than the specification allows");
        if kind == ACK || kind == UNSUPPORTED {
            assert_eq!(data, b"");
        }
        data
    }

    fn ending(&self, name: &str) -> End {
        let allocation = self.allocation.as_deref() == Some(name);
        End::Chosen { name: name.into(), structured: self.structured, allocation }
    }

    fn flags(&self) -> u64 {
        // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN, CACHE, FAST_ZERO; DF with
        // structured replies.
        0b1101_0110_1101 | u64::from(self.structured) << 7
    }

    fn export_name(&mut self, data: &[u8], no_zeroes: bool) -> Option<End> {
        let name = std::str::from_utf8(data).ok().filter(|_| data.len() <= 4096)?;
        let name = known(name)?;
        assert_eq!(self.answered.number(8), Some(SIZE as u64));
        assert_eq!(self.answered.number(2), Some(self.flags()));
        let zeroes = if no_zeroes { 0 } else { 124 };
        assert_eq!(self.answered.take(zeroes), Some(&[0; 124][..zeroes]));
        Some(self.ending(name))
    }

    fn info(&mut self, option: u64, data: &[u8]) -> Option<End> {
        let mut parts = Parts(data);
        let parsed = (|| {
            let name = parts.string()?;
            let count = parts.number(2)?;
            let facts: Vec<u64> = (0..count).map(|_| parts.number(2)).collect::<Option<_>>()?;
            parts.0.is_empty().then_some((name, facts))
        })();
        let Some((name, facts)) = parsed else {
            self.reply(option, INVALID);
            return None;
        };
        let Some(name) = known(name) else {
            self.reply(option, UNKNOWN);
            return None;
        };
        let size = (SIZE as u64).to_be_bytes();
        let flags = (self.flags() as u16).to_be_bytes();
        assert_eq!(self.reply(option, 3), [&[0, 0][..], &size, &flags].concat());
        if facts.contains(&1) {
            assert_eq!(self.reply(option, 3), [&[0, 1][..], name.as_bytes()].concat());
        }
        if facts.contains(&3) {
            assert_eq!(self.reply(option, 3), [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
        }
        self.reply(option, ACK);
        (option == 7).then(|| self.ending(name))
    }

    fn context(&mut self, option: u64, data: &[u8]) {
        if option == 10 {
            self.allocation = None;
        }
        let mut parts = Parts(data);
        let parsed = (|| {
            let name = parts.string()?;
            let count = parts.number(4)?;
            let mut queries = Vec::new();
            for _ in 0..count {
                queries.push(parts.string()?);
            }
            parts.0.is_empty().then_some((name, queries))
        })();
        let (true, Some((name, queries))) = (self.structured, parsed) else {
            self.reply(option, INVALID);
            return;
        };
        let Some(name) = known(name) else {
            self.reply(option, UNKNOWN);
            return;
        };
        let lists_it = option == 9 && (queries.is_empty() || queries.contains(&"base:"));
        if lists_it || queries.contains(&"base:allocation") {
            let id = if option == 10 { 1 } else { 0 };
            assert_eq!(self.reply(option, 4), [&[0, 0, 0, id][..], b"base:allocation"].concat());
            if option == 10 {
                self.allocation = Some(name.into());
            }
        }
        self.reply(option, ACK);
    }
}

/// The own name of the export with this name.
fn known(name: &str) -> Option<&str> {
    match name {
        "" | "disk" => Some("disk"),
        "other" => Some("other"),
        _ => None,
    }
}
