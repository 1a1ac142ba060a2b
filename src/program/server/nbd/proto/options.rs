//! Byte layouts of the handshake: greeting, options, their replies.
//!
//! 1. Counts and lengths in an option are checked against its data before they are used.

use super::{
    ALLOCATION, Agreed, BLOCK_MIN_BYTES, BLOCK_PREFERRED_BYTES, Fields, GREETING_MAGIC,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX, SERVER_FLAGS, STRING_BYTES_MAX, broken,
    export_flags, info,
};
use std::io;

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
    /// Parses the data; `None` if lengths don't add up, or the name is too long or not UTF-8.
    pub fn parse(data: &[u8]) -> Option<InfoRequest> {
        let mut from = Fields(data);
        let name = parse_string(&mut from)?.to_owned();
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

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export's name; empty stands for the default one.
    pub name: String,
    /// No context was requested by name.
    pub is_open: bool,
    /// The context of stored bytes was requested by its full name.
    pub allocation: bool,
    /// All contexts of the namespace `base` were requested.
    pub base: bool,
}

impl MetaRequest {
    /// Parses the data; `None` if lengths don't add up, or a string is too long or not UTF-8. It
    /// makes no list of the queries: of the shortest ones it would be eight times as long as the
    /// data, for each client.
    pub fn parse(data: &[u8]) -> Option<MetaRequest> {
        let mut from = Fields(data);
        let name = parse_string(&mut from)?.to_owned();
        let count = from.u32()?;
        let (mut allocation, mut base) = (false, false);
        // Each takes at least four bytes, so the data also limits an arbitrary count.
        for _ in 0..count {
            let query = parse_string(&mut from)?;
            allocation |= query == ALLOCATION;
            base |= query == "base:";
        }
        from.0.is_empty().then_some(MetaRequest { name, is_open: count == 0, allocation, base })
    }
}

/// Takes a string that follows its length.
fn parse_string<'a>(from: &mut Fields<'a>) -> Option<&'a str> {
    let bytes = from.u32()? as usize;
    if bytes > STRING_BYTES_MAX {
        return None;
    }
    parse_name(from.take(bytes)?)
}

/// Parses a string of the protocol.
pub fn parse_name(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// The server's greeting.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    out[16..].copy_from_slice(&SERVER_FLAGS.to_be_bytes());
    out
}

/// A reply to `option`; by construction `data` is short enough for its length field.
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

/// Data of a META_CONTEXT reply.
pub fn meta_context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), name.as_bytes()].concat()
}

/// The fact that is always sent: the size and the flags.
pub fn info_export(bytes: u64, agreed: Agreed) -> Vec<u8> {
    let mut out = info::EXPORT.to_be_bytes().to_vec();
    out.extend_from_slice(&bytes.to_be_bytes());
    out.extend_from_slice(&export_flags(agreed).to_be_bytes());
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

/// What follows the answer to EXPORT_NAME.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// 124 zeroes.
    Zeroes,
    /// Nothing, as the client has asked for.
    None,
}

/// The answer to EXPORT_NAME, which has no header.
pub fn export_name_reply(bytes: u64, agreed: Agreed, padding: Padding) -> Vec<u8> {
    let mut out = bytes.to_be_bytes().to_vec();
    out.extend_from_slice(&export_flags(agreed).to_be_bytes());
    if padding == Padding::Zeroes {
        out.resize(out.len() + 124, 0);
    }
    out
}
