//! Every NBD number and every byte layout, and nothing else: bytes in, checked types out.
//!
//! Source: `doc/proto.md` of the repository NetworkBlockDevice/nbd. All numbers on the wire are big endian.
//!
//! 1. Parsing takes bytes of known length and never panics: what does not fit is an error of the caller's choice.
//! 2. `offset + length` is computed once, here, and can't wrap ([`Request::end`]).
//!
//! Does no I/O and decides nothing about exports.

use std::io;

/// First eight bytes of a server's greeting: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: second half of the greeting, and the start of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags of the server: fixed newstyle, and the 124 zeros after EXPORT_NAME may be left out.
pub const SERVER_FLAGS: u16 = 1 | 1 << 1;
/// Client flag: the client knows fixed newstyle.
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1;
/// Client flag: leave the 124 zeros out.
pub const CLIENT_NO_ZEROES: u32 = 1 << 1;

/// Options that this server knows.
pub mod option {
    /// Ends the handshake; can't fail politely.
    pub const EXPORT_NAME: u32 = 1;
    /// The client goes away.
    pub const ABORT: u32 = 2;
    /// Names of the exports.
    pub const LIST: u32 = 3;
    /// Facts about an export.
    pub const INFO: u32 = 6;
    /// Facts about an export, then transmission.
    pub const GO: u32 = 7;
    /// From now on replies have a structure.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts an export has.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which of them are to be used.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of option replies; errors have the highest bit set.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One fact about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The server does not know this option.
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// The option's data makes no sense.
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    /// The option's data is longer than this server takes.
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Kinds of facts in INFO and GO.
pub mod info {
    /// Size and transmission flags; always sent.
    pub const EXPORT: u16 = 0;
    /// The export's own name.
    pub const NAME: u16 = 1;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of every export: flags are valid, FLUSH, FUA, TRIM, WRITE_ZEROES, several connections
/// (a flush of the store covers the acknowledged writes of all of them), CACHE, and fast zeroing.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11;
/// With structured replies: reads may ask to be answered in one piece.
const SEND_DF: u16 = 1 << 7;

/// What client and server have agreed on, beside the export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Reads and errors are answered in chunks.
    pub structured: bool,
    /// Block status requests are answered, by `base:allocation`.
    pub allocation: bool,
}

impl Agreed {
    fn export_flags(self) -> u16 {
        EXPORT_FLAGS | if self.structured { SEND_DF } else { 0 }
    }
}

/// Command flags.
pub mod flag {
    /// Durable before the reply; valid on every command.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES must leave allocated space behind.
    pub const NO_HOLE: u16 = 1 << 1;
    /// A READ must be answered in one piece.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS is to tell one stretch only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must fail at once if it is not faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Smallest unit of a request: anything goes.
pub const BLOCK_MIN_BYTES: u32 = 1;
/// What clients should use: a page.
pub const BLOCK_PREFERRED_BYTES: u32 = 4096;
/// Largest READ or WRITE: what clients may assume without asking, so less would break them.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest string of the protocol.
pub const STRING_BYTES_MAX: usize = 4096;
/// Longest option that is read at all: room for a name and any list of facts (2 bytes each) that makes sense.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;

/// Errors of the transmission phase, with their numbers on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// The device or the store failed.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// No space, or a write beyond the end.
    NoSpace = 28,
    /// Can't be done as fast as asked.
    NotSupported = 95,
    /// The server is going away.
    Shutdown = 108,
}

impl Errno {
    /// For people.
    pub fn message(self) -> &'static str {
        match self {
            Errno::Io => "the store failed; its log says more",
            Errno::Invalid => "the request makes no sense, or lies outside of the volume",
            Errno::NoSpace => "no space is left, or a write lies beyond the end of the volume",
            Errno::NotSupported => "can't be done as fast as asked",
            Errno::Shutdown => "the server is going away",
        }
    }
}

/// The commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes out.
    Read,
    /// Bytes in.
    Write,
    /// Goodbye, without a reply.
    Disconnect,
    /// Make all acknowledged writes durable.
    Flush,
    /// The bytes are not needed any more.
    Trim,
    /// Zeros in.
    WriteZeroes,
    /// The bytes will be read soon.
    Cache,
    /// Where something is stored.
    BlockStatus,
    /// Anything else: refused, and known to carry no payload.
    Unknown,
}

/// One request's header.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The client's name for the request, returned in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;

/// Takes big-endian numbers off the front of a slice.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// Some bytes.
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
    /// A number.
    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }
    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }
}

/// The error for a peer that does not speak the protocol: the connection can't go on.
pub fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Request {
    /// Parses a header; a wrong magic means the stream is out of step and can't be mended.
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> io::Result<Request> {
        Self::fields(&mut Fields(bytes)).ok_or_else(|| broken("wrong request magic"))
    }

    fn fields(from: &mut Fields<'_>) -> Option<Request> {
        if from.u32()? != REQUEST_MAGIC {
            return None;
        }
        let flags = from.u16()?;
        let command = match from.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => Command::Unknown,
        };
        Some(Request { flags, command, cookie: from.u64()?, offset: from.u64()?, length: from.u32()? })
    }

    /// The byte after the last one, unless that can't be a number.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(u64::from(self.length))
    }

    /// Whether the durability of the command is asked for before its reply.
    pub fn fua(&self) -> bool {
        self.flags & flag::FUA != 0
    }

    /// Bytes of payload that follow the header.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// What is wrong with the request for an export of `bytes`, before any work is done for it.
    pub fn check(&self, bytes: u64, agreed: Agreed) -> Result<(), Errno> {
        let known = match self.command {
            Command::WriteZeroes => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            Command::BlockStatus if agreed.allocation => flag::FUA | flag::REQ_ONE,
            Command::Unknown | Command::BlockStatus => return Err(Errno::Invalid),
            Command::Read if agreed.structured => flag::FUA | flag::DF,
            _ => flag::FUA,
        };
        if self.flags & !known != 0 {
            return Err(Errno::Invalid);
        }
        let inside = self.end().is_some_and(|end| end <= bytes);
        match self.command {
            Command::Read if self.length > PAYLOAD_BYTES_MAX => Err(Errno::Invalid),
            Command::BlockStatus if self.length == 0 => Err(Errno::Invalid),
            Command::Read | Command::Trim | Command::Cache | Command::BlockStatus if !inside => Err(Errno::Invalid),
            // A wrapping end is nonsense rather than a full disk.
            Command::Write | Command::WriteZeroes if self.end().is_none() => Err(Errno::Invalid),
            Command::Write | Command::WriteZeroes if !inside => Err(Errno::NoSpace),
            _ => Ok(()),
        }
    }
}

/// An option's header: its number and the length of its data.
pub fn parse_option(bytes: &[u8; 16]) -> io::Result<(u32, u32)> {
    let mut from = Fields(bytes);
    let magic = from.u64();
    match (magic, from.u32(), from.u32()) {
        (Some(OPTION_MAGIC), Some(option), Some(length)) => Ok((option, length)),
        _ => Err(broken("wrong option magic")),
    }
}

/// The data of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export's name; empty stands for the default one.
    pub name: String,
    /// Whether the export's own name is wanted.
    pub wants_name: bool,
    /// Whether the block sizes are wanted.
    pub wants_block_size: bool,
}

impl InfoRequest {
    /// Parses the data; `None` if lengths don't add up, or the name is too long or no UTF-8.
    pub fn parse(data: &[u8]) -> Option<InfoRequest> {
        let mut from = Fields(data);
        let name_bytes = from.u32()? as usize;
        if name_bytes > STRING_BYTES_MAX {
            return None;
        }
        let name = parse_name(from.take(name_bytes)?)?;
        let count = from.u16()?;
        let (mut wants_name, mut wants_block_size) = (false, false);
        for _ in 0..count {
            match from.u16()? {
                info::NAME => wants_name = true,
                info::BLOCK_SIZE => wants_block_size = true,
                _ => {}
            }
        }
        from.0.is_empty().then_some(InfoRequest { name, wants_name, wants_block_size })
    }
}

/// A string of the protocol.
pub fn parse_name(bytes: &[u8]) -> Option<String> {
    if bytes.len() > STRING_BYTES_MAX {
        return None;
    }
    String::from_utf8(bytes.to_vec()).ok()
}

/// The server's first words.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&SERVER_FLAGS.to_be_bytes());
    out
}

/// A reply to `option`, with `data` short enough for its length field by construction.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Data of a LIST entry.
pub fn list_entry(name: &str) -> Vec<u8> {
    let mut out = (name.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out
}

/// The fact that is always sent: size and flags.
pub fn info_export(bytes: u64, agreed: Agreed) -> Vec<u8> {
    let mut out = info::EXPORT.to_be_bytes().to_vec();
    out.extend_from_slice(&bytes.to_be_bytes());
    out.extend_from_slice(&agreed.export_flags().to_be_bytes());
    out
}

/// The export's own name, as a fact.
pub fn info_name(name: &str) -> Vec<u8> {
    let mut out = info::NAME.to_be_bytes().to_vec();
    out.extend_from_slice(name.as_bytes());
    out
}

/// The block sizes, as a fact.
pub fn info_block_size() -> Vec<u8> {
    let mut out = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [BLOCK_MIN_BYTES, BLOCK_PREFERRED_BYTES, PAYLOAD_BYTES_MAX] {
        out.extend_from_slice(&size.to_be_bytes());
    }
    out
}

/// The answer to EXPORT_NAME, which has no header.
pub fn export_name_reply(bytes: u64, agreed: Agreed, zeroes: bool) -> Vec<u8> {
    let mut out = bytes.to_be_bytes().to_vec();
    out.extend_from_slice(&agreed.export_flags().to_be_bytes());
    out.resize(out.len() + if zeroes { 124 } else { 0 }, 0);
    out
}

/// A simple reply's header; data follows only after a READ that went well.
pub fn simple_reply(cookie: u64, outcome: Result<(), Errno>) -> [u8; SIMPLE_REPLY_BYTES] {
    let error = outcome.err().map_or(0, |e| e as u32);
    let mut out = [0; SIMPLE_REPLY_BYTES];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}
