//! The handshake, from the greeting to the chosen export: fixed newstyle.
//!
//! ```text
//! greeting ──> client flags ──> option ──GO, EXPORT_NAME of a known export──> transmission
//!                                 │ ^
//!                                 v │ INFO, LIST, unknown or malformed options: answered, and on
//!                                 └─┘ ABORT, wrong magic, too much: the connection ends
//! ```
//!
//! 1. An option's data is always read whole before its answer, so the stream stays in step.
//! 2. A metadata context is chosen for one export: a client that then takes another export has
//!    none.
//! 3. The total of what is sent and answered is limited (`bytes_max`), and one option by
//!    [`proto::OPTION_BYTES_MAX`]; the number of options is not, since a client that asks about
//!    every export needs some for each. The given stream limits the time.
//!
//! It does *not* touch the data of any export.

use super::proto::{self, Agreed, InfoRequest, MetaRequest, Padding, option, reply};
use super::{Export, Exports};
use std::io::{self, Read, Write};

/// How a successful handshake ended.
pub enum Outcome<E> {
    /// The client wants to use this export, in this way.
    Chosen(String, E, Agreed),
    /// The client said goodbye.
    Aborted,
}

/// Runs the handshake until the client has chosen, or the connection can't continue.
pub fn handshake<S: Read + Write, X: Exports>(
    stream: &mut S,
    exports: &X,
    bytes_max: usize,
) -> io::Result<Outcome<X::Export>> {
    stream.write_all(&proto::greeting())?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !(proto::CLIENT_FIXED_NEWSTYLE | proto::CLIENT_NO_ZEROES) != 0 {
        return Err(proto::broken("unknown client flags"));
    }
    let padding = match flags & proto::CLIENT_NO_ZEROES {
        0 => Padding::Zeroes,
        _ => Padding::None,
    };
    let mut talk = Talk {
        stream,
        exports,
        bytes_left: bytes_max,
        padding,
        structured: false,
        allocation_of: None,
    };
    loop {
        if let Some(outcome) = talk.option()? {
            return Ok(outcome);
        }
    }
}

struct Talk<'a, S, X> {
    stream: &'a mut S,
    exports: &'a X,
    /// Bytes that may still be sent and answered.
    bytes_left: usize,
    padding: Padding,
    structured: bool,
    /// The export for which the metadata context was chosen.
    allocation_of: Option<String>,
}

impl<S: Read + Write, X: Exports> Talk<'_, S, X> {
    /// Reads and answers one option; an outcome ends the handshake.
    fn option(&mut self) -> io::Result<Option<Outcome<X::Export>>> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let (option, length) = proto::parse_option(&header)?;
        if length > proto::OPTION_BYTES_MAX {
            // To stay in step we would have to read up to 4 GiB that are not needed.
            self.answer(option, reply::ERR_TOO_BIG, &[])?;
            return Err(proto::broken("option data too long"));
        }
        self.spend(header.len() + length as usize)?;
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        match option {
            option::EXPORT_NAME => return self.export_name(&data).map(Some),
            option::GO | option::INFO => return self.info(option, &data),
            option::LIST => self.list(&data)?,
            option::STRUCTURED_REPLY => self.structured_reply(&data)?,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, &data)?
            }
            option::ABORT => {
                // The client may leave without waiting for this, which is its right.
                let _ = self.answer(option, reply::ACK, &[]);
                return Ok(Some(Outcome::Aborted));
            }
            _ => self.answer(option, reply::ERR_UNSUP, &[])?,
        }
        Ok(None)
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let reply = proto::option_reply(option, kind, data);
        self.spend(reply.len())?;
        self.stream.write_all(&reply)
    }

    /// Counts bytes that are received or sent.
    fn spend(&mut self, bytes: usize) -> io::Result<()> {
        let left = self.bytes_left.checked_sub(bytes);
        self.bytes_left = left.ok_or_else(|| proto::broken("a handshake without end"))?;
        Ok(())
    }

    fn agreed(&self, name: &str) -> Agreed {
        Agreed {
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
        }
    }

    fn export_name(&mut self, data: &[u8]) -> io::Result<Outcome<X::Export>> {
        let name = proto::parse_name(data).ok_or_else(|| proto::broken("bad export name"))?;
        // This option has no negative answer.
        let Ok(Some((name, export))) = self.exports.find(name) else {
            return Err(proto::broken("EXPORT_NAME of an unknown export"));
        };
        let agreed = self.agreed(&name);
        let reply = proto::export_name_reply(export.bytes(), agreed, self.padding);
        self.stream.write_all(&reply)?;
        Ok(Outcome::Chosen(name, export, agreed))
    }

    /// Returns the export of this name; if there is none, answers the client.
    fn find(&mut self, option: u32, name: &str) -> io::Result<Option<(String, X::Export)>> {
        let (kind, why) = match self.exports.find(name) {
            Ok(Some(found)) => return Ok(Some(found)),
            Ok(None) => (reply::ERR_UNKNOWN, "no volume of this name"),
            Err(_) => (reply::ERR_SHUTDOWN, "the store is not available"),
        };
        self.answer(option, kind, why.as_bytes())?;
        Ok(None)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Option<Outcome<X::Export>>> {
        let Some(request) = InfoRequest::parse(data) else {
            self.answer(option, reply::ERR_INVALID, b"malformed request")?;
            return Ok(None);
        };
        let Some((name, export)) = self.find(option, &request.name)? else { return Ok(None) };
        let agreed = self.agreed(&name);
        self.answer(option, reply::INFO, &proto::info_export(export.bytes(), agreed))?;
        if request.wants_name {
            self.answer(option, reply::INFO, &proto::info_name(&name))?;
        }
        if request.wants_block_size {
            self.answer(option, reply::INFO, &proto::info_block_size())?;
        }
        self.answer(option, reply::ACK, &[])?;
        Ok((option == option::GO).then_some(Outcome::Chosen(name, export, agreed)))
    }

    fn structured_reply(&mut self, data: &[u8]) -> io::Result<()> {
        let (kind, text): (_, &[u8]) = match (data.is_empty(), self.structured) {
            (false, _) => (reply::ERR_INVALID, b"STRUCTURED_REPLY takes no data"),
            (true, true) => (reply::ERR_INVALID, b"structured replies are agreed on already"),
            (true, false) => (reply::ACK, b""),
        };
        self.structured |= kind == reply::ACK;
        self.answer(option::STRUCTURED_REPLY, kind, text)
    }

    /// Lists contexts, or sets those for BLOCK_STATUS; earlier ones are dropped even if that fails.
    fn meta_context(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.allocation_of = None;
        }
        if !self.structured {
            return self.answer(option, reply::ERR_INVALID, b"STRUCTURED_REPLY comes first");
        }
        let Some(request) = MetaRequest::parse(data) else {
            return self.answer(option, reply::ERR_INVALID, b"malformed request");
        };
        let Some((name, _)) = self.find(option, &request.name)? else { return Ok(()) };
        // Only a list may be requested by namespace, or without a name.
        if request.allocation || (!set && (request.base || request.is_open)) {
            let id = if set { proto::ALLOCATION_ID } else { 0 };
            self.answer(option, reply::META_CONTEXT, &proto::meta_context(id, proto::ALLOCATION))?;
            self.allocation_of = if set { Some(name) } else { self.allocation_of.take() };
        }
        self.answer(option, reply::ACK, &[])
    }

    fn list(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.answer(option::LIST, reply::ERR_INVALID, b"LIST takes no data");
        }
        let Ok(names) = self.exports.names() else {
            return self.answer(option::LIST, reply::ERR_SHUTDOWN, b"the store is not available");
        };
        for name in names {
            self.answer(option::LIST, reply::SERVER, &proto::list_entry(&name))?;
        }
        self.answer(option::LIST, reply::ACK, &[])
    }
}
