//! Every NBD number and every byte layout, and nothing else: bytes in, checked types out.
//!
//! Source: `doc/proto.md` of the repository NetworkBlockDevice/nbd. All numbers on the wire are big
//! endian.
//!
//! 1. Parsing takes bytes of known length and never panics: what does not fit is an error of the
//!    caller's choice.
//!
//! Numbers are here, layouts below: of the handshake in `options`, of the transmission in
//! `requests` and `replies`. Does no I/O and decides nothing about exports.

mod options;
mod replies;
mod requests;

pub use options::{
    InfoRequest, MetaRequest, export_name_reply, greeting, info_block_size, info_export, info_name,
    list_entry, meta_context, option_reply, parse_name, parse_option,
};
pub use replies::{
    DATA_CHUNK_HEAD_BYTES, SIMPLE_REPLY_BYTES, data_chunk_head, empty_chunk, error_chunk,
    hole_chunk, simple_reply, status_chunk,
};
pub use requests::{Command, REQUEST_BYTES, Request};

use std::borrow::Cow;
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
/// Start of every chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags of the server: fixed newstyle, and the 124 zeros after EXPORT_NAME may be left
/// out.
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
    /// Replies in chunks from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which metadata contexts BLOCK_STATUS is to tell about.
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

/// Types of chunks; errors have the highest bit set.
pub mod chunk {
    /// Nothing but the end of a reply.
    pub const NONE: u16 = 0;
    /// Bytes that were read.
    pub const DATA: u16 = 1;
    /// Zeros that were read, as a number.
    pub const HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// What went wrong, as a number and as text.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// Flag: the last chunk of its reply.
    pub const DONE: u16 = 1;
}

/// The one metadata context here: which bytes are stored, and which are holes.
pub const ALLOCATION: &str = "base:allocation";
/// Its number, once chosen.
pub const ALLOCATION_ID: u32 = 1;
/// Status of an extent in it: not stored, and reads as zeros.
pub const STATUS_HOLE: u32 = 1 | 1 << 1;

/// Transmission flags of every export: flags are valid, FLUSH, FUA, TRIM, WRITE_ZEROES, several
/// connections (a flush of the store covers the acknowledged writes of all of them), CACHE, and
/// fast zeroing. With structured replies also reads in one piece.
pub fn export_flags(structured: bool) -> u16 {
    let always = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11;
    if structured { always | 1 << 7 } else { always }
}

/// What client and server agreed on in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Replies are in chunks.
    pub structured: bool,
    /// BLOCK_STATUS may be asked.
    pub allocation: bool,
}

/// Command flags.
pub mod flag {
    /// Durable before the reply; valid on every command.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES must leave allocated space behind.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must be answered with one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS must be answered with one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must fail at once if it is not faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Smallest unit of a request: anything goes.
pub const BLOCK_MIN_BYTES: u32 = 1;
/// What clients should use: a page.
pub const BLOCK_PREFERRED_BYTES: u32 = 4096;
/// Largest READ or WRITE that is announced: what clients may assume without asking, so less would
/// break them. Larger ones are served like any other, in parts, but for a READ that must be
/// answered by one chunk.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest string of the protocol.
pub const STRING_BYTES_MAX: usize = 4096;
/// Longest option that is read at all: room for the longest name, and any list of facts (2 bytes
/// each) or of metadata contexts that makes sense. In a handshake it is all that a connection
/// holds; `serve --help` counts it.
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
    /// A READ too large for the one chunk that it asks for.
    Overflow = 75,
    /// Can't be done as fast as asked.
    NotSupported = 95,
    /// The server is going away, or what it exported here was deleted.
    Shutdown = 108,
}

/// Why a request fails: the number for the client's program, the text for its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The number.
    pub errno: Errno,
    /// The text; only structured replies carry it.
    pub message: Cow<'static, str>,
}

impl Fault {
    /// A failure, and what it is about.
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        Fault { errno, message: message.into() }
    }
}

/// A part of an export, stored or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length.
    pub bytes: u32,
    /// Whether it is not stored, and reads as zeros.
    pub is_hole: bool,
}

/// Takes big-endian numbers off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
    fn u32(&mut self) -> Option<u32> {
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
