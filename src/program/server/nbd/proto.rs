//! All numbers and byte layouts of NBD, and nothing else: it turns bytes into checked types.
//!
//! Source: `doc/proto.md` of the repository NetworkBlockDevice/nbd. All numbers on the wire are big
//! endian.
//!
//! 1. Parsing takes bytes of known length and never panics: the caller chooses the error for what
//!    does not fit.
//!
//! Numbers are here, layouts in the files below: those of the handshake in `options`, those of the
//! transmission in `requests` and `replies`. It does no I/O and decides nothing about exports.

mod options;
mod replies;
mod requests;

pub use options::{
    InfoRequest, MetaRequest, Padding, export_name_reply, greeting, info_block_size, info_export,
    info_name, list_entry, meta_context, option_reply, parse_name, parse_option,
};
pub use replies::{
    DATA_CHUNK_HEAD_BYTES, Position, SIMPLE_REPLY_BYTES, data_chunk_head, empty_chunk, error_chunk,
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
/// Client flag: leave out the 124 zeros.
pub const CLIENT_NO_ZEROES: u32 = 1 << 1;

/// Options that this server knows.
pub mod option {
    /// Ends the handshake; it has no error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// The client leaves.
    pub const ABORT: u32 = 2;
    /// Asks for the names of the exports.
    pub const LIST: u32 = 3;
    /// Asks for facts about an export.
    pub const INFO: u32 = 6;
    /// Asks for facts about an export, then begins the transmission.
    pub const GO: u32 = 7;
    /// Asks for replies in chunks from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Selects the metadata contexts that BLOCK_STATUS reports.
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
    /// The option's data is longer than this server accepts.
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
    /// The error, as a number and as text.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// Flag: the last chunk of its reply.
    pub const DONE: u16 = 1;
}

/// The only metadata context of this server: which bytes are stored, and which are holes.
pub const ALLOCATION: &str = "base:allocation";
/// Its number, once chosen.
pub const ALLOCATION_ID: u32 = 1;
/// Status of an extent in it: not stored, and reads as zeros.
pub const STATUS_HOLE: u32 = 1 | 1 << 1;

/// Transmission flags of every export: flags are valid, FLUSH, FUA, TRIM, WRITE_ZEROES, several
/// connections (a flush of the store covers the acknowledged writes of all of them), CACHE, and
/// fast zeroing. With structured replies also reads in one piece.
pub fn export_flags(agreed: Agreed) -> u16 {
    let always = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 11;
    if agreed.structured { always | 1 << 7 } else { always }
}

/// What client and server agreed on in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Replies are in chunks.
    pub structured: bool,
    /// BLOCK_STATUS may be used.
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

/// The smallest unit of a request: any length is allowed.
pub const BLOCK_MIN_BYTES: u32 = 1;
/// The unit that clients should use: a page.
pub const BLOCK_PREFERRED_BYTES: u32 = 4096;
/// The largest READ or WRITE that is announced. Clients may assume this size without asking, so
/// less would break them. Larger ones are served in parts like any other, except for a READ that
/// must be answered by one chunk.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest string of the protocol.
pub const STRING_BYTES_MAX: usize = 4096;
/// The longest option that is read: room for the longest name, and any reasonable list of facts (2
/// bytes each) or of metadata contexts. In a handshake a connection holds nothing else; `serve
/// --help` counts it.
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
    /// A READ that is too large for the single chunk that it requires.
    Overflow = 75,
    /// It can't be done as fast as required.
    NotSupported = 95,
    /// The server is going away, or what it exported here was deleted.
    Shutdown = 108,
}

/// Why a request fails: a number for the client's program, and a text for its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The number.
    pub errno: Errno,
    /// The text; only structured replies carry it.
    pub message: Cow<'static, str>,
}

impl Fault {
    /// Makes a failure; `message` says what it is about.
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        Fault { errno, message: message.into() }
    }
}

/// A part of an export, stored or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length.
    pub bytes: u32,
    /// What it holds.
    pub kind: ExtentKind,
}

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that are stored.
    Stored,
    /// Nothing that is stored: it reads as zeros.
    Hole,
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
