//! The byte layout of requests, and the checks before any work is done for one.
//!
//! 1. `offset + length` is computed once, here, and can't wrap ([`Request::end`]).

use super::{Agreed, Errno, Fault, Fields, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, broken, flag};
use corepage::Durability;
use std::io;

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;

/// The commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reads bytes.
    Read,
    /// Writes bytes.
    Write,
    /// Says goodbye, without a reply.
    Disconnect,
    /// Makes all acknowledged writes durable.
    Flush,
    /// Says that the bytes are no longer needed.
    Trim,
    /// Says that the bytes are going to be read.
    Cache,
    /// Writes zeros.
    WriteZeroes,
    /// Asks which bytes are stored.
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

impl Command {
    /// Whether it changes the export, or makes changes durable.
    pub fn is_change(self) -> bool {
        matches!(self, Command::Write | Command::Flush | Command::Trim | Command::WriteZeroes)
    }
}

impl Request {
    /// Parses a header; after a wrong magic the stream is out of step and can't be resynchronised.
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
        Some(Request {
            flags,
            command,
            cookie: from.u64()?,
            offset: from.u64()?,
            length: from.u32()?,
        })
    }

    /// The byte after the last one, unless that overflows.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(u64::from(self.length))
    }

    /// Whether the command must be durable before its reply.
    pub fn durability(&self) -> Durability {
        match self.flags & flag::FUA {
            0 => Durability::Buffered,
            _ => Durability::Durable,
        }
    }

    /// Bytes of payload that follow the header.
    pub fn payload_bytes(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Checks the request for an export of `bytes` bytes, before any work is done for it.
    pub fn check(&self, bytes: u64, agreed: Agreed) -> Result<(), Fault> {
        self.check_command(agreed)?;
        let (offset, length) = (self.offset, self.length);
        let Some(end) = self.end() else {
            // This is an invalid request rather than a full disk.
            return Err(Fault::new(
                Errno::Invalid,
                format!("{length} bytes at {offset} wrap around"),
            ));
        };
        let errno = match self.command {
            Command::Write | Command::WriteZeroes => Errno::NoSpace,
            _ => Errno::Invalid,
        };
        if end > bytes {
            return Err(Fault::new(
                errno,
                format!("{length} bytes at {offset} end behind the last of {bytes}"),
            ));
        }
        Ok(())
    }

    fn check_command(&self, agreed: Agreed) -> Result<(), Fault> {
        let invalid = |what: &'static str| Err(Fault::new(Errno::Invalid, what));
        let known = match self.command {
            Command::WriteZeroes => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            Command::Read if agreed.structured => flag::FUA | flag::DF,
            Command::BlockStatus => flag::FUA | flag::REQ_ONE,
            _ => flag::FUA,
        };
        match self.command {
            Command::Unknown => invalid("unknown command"),
            Command::BlockStatus if !agreed.allocation => {
                invalid("no metadata context was negotiated")
            }
            _ if self.flags & !known != 0 => invalid("unknown flags for this command"),
            Command::Read if self.length > PAYLOAD_BYTES_MAX && self.flags & flag::DF != 0 => {
                Err(Fault::new(Errno::Overflow, "more than 32 MiB can't be answered by one chunk"))
            }
            _ => Ok(()),
        }
    }
}
