//! A client that speaks NBD byte by byte, so that it can also speak it wrong.
//!
//! Written from the specification, not from the server: the numbers are repeated here on purpose.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const FAST_ZERO: u16 = 16;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ENOTSUP: u32 = 95;
pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED: u32 = 8;
pub const OPT_LIST_META: u32 = 9;
pub const OPT_SET_META: u32 = 10;
pub const CACHE: u16 = 5;
pub const BLOCK_STATUS: u16 = 7;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const CHUNK_DATA: u16 = 1;
pub const CHUNK_HOLE: u16 = 2;
pub const CHUNK_STATUS: u16 = 5;
pub const CHUNK_ERROR: u16 = 0x8001;

/// No reply for so long is a hang.
const REPLY_LIMIT: Duration = Duration::from_secs(60);

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection in any phase.
pub struct Client {
    stream: Box<dyn Stream>,
    /// Size of the export.
    pub bytes: u64,
    /// Its transmission flags.
    pub flags: u16,
    cookie: u64,
}

/// A part of a structured reply.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub kind: u16,
    pub data: Vec<u8>,
}

/// One reply to an option.
#[derive(Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub kind: u32,
    pub data: Vec<u8>,
}

impl Client {
    /// Connected, nothing said yet. `address` is HOST:PORT or a path.
    pub fn connect(address: &str) -> Client {
        let stream: Box<dyn Stream> = if address.starts_with('/') {
            let stream = UnixStream::connect(address).expect("the server listens");
            stream.set_read_timeout(Some(REPLY_LIMIT)).unwrap();
            Box::new(stream)
        } else {
            let stream = TcpStream::connect(address).expect("the server listens");
            stream.set_read_timeout(Some(REPLY_LIMIT)).unwrap();
            stream.set_nodelay(true).unwrap();
            Box::new(stream)
        };
        Client { stream, bytes: 0, flags: 0, cookie: 0 }
    }

    /// Greeted, flags sent, no option yet.
    pub fn greeted(address: &str) -> Client {
        let mut client = Client::connect(address);
        assert_eq!(client.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&[0, 0, 0, 3]);
        client
    }

    /// In transmission.
    pub fn go(address: &str, name: &str) -> Client {
        Client::greeted(address).gone(name)
    }

    /// In transmission, with structured replies and block status.
    pub fn structured(address: &str, name: &str) -> Client {
        let mut client = Client::greeted(address);
        client.option(OPT_STRUCTURED, b"");
        assert_eq!(
            client.option_reply(),
            OptionReply { option: OPT_STRUCTURED, kind: 1, data: vec![] }
        );
        client.option(OPT_SET_META, &meta_data(name, &[b"base:allocation"]));
        let context = [&1u32.to_be_bytes()[..], b"base:allocation"].concat();
        assert_eq!(
            client.option_reply(),
            OptionReply { option: OPT_SET_META, kind: 4, data: context }
        );
        assert_eq!(
            client.option_reply(),
            OptionReply { option: OPT_SET_META, kind: 1, data: vec![] }
        );
        client.gone(name)
    }

    /// Chooses an export.
    pub fn gone(mut self, name: &str) -> Client {
        let client = &mut self;
        client.option(OPT_GO, &info_data(name, &[]));
        let info = client.option_reply();
        assert_eq!((info.option, info.kind, info.data.len()), (OPT_GO, 3, 12), "{info:?}");
        client.bytes = u64::from_be_bytes(info.data[2..10].try_into().unwrap());
        client.flags = u16::from_be_bytes(info.data[10..].try_into().unwrap());
        assert_eq!(client.option_reply(), OptionReply { option: OPT_GO, kind: 1, data: vec![] });
        self
    }

    /// The chunks of the reply to a request, with nothing else in flight.
    pub fn chunks(&mut self, cookie: u64) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let head = self.take(20);
            assert_eq!(head[..4], 0x668e_33ef_u32.to_be_bytes(), "no chunk");
            assert_eq!(head[8..16], cookie.to_be_bytes());
            let length = u32::from_be_bytes(head[16..].try_into().unwrap());
            let kind = u16::from_be_bytes(head[6..8].try_into().unwrap());
            chunks.push(Chunk { kind, data: self.take(length as usize) });
            match u16::from_be_bytes(head[4..6].try_into().unwrap()) {
                0 => {}
                1 => return chunks,
                flags => panic!("chunk flags {flags:#x}"),
            }
        }
    }

    /// A read by chunks: what was read, and which parts of it were told as holes.
    pub fn read_chunks(
        &mut self,
        flags: u16,
        offset: u64,
        length: u32,
    ) -> (Vec<u8>, Vec<(u64, u32)>) {
        let cookie = self.request(flags, READ, offset, length, &[]);
        let (mut data, mut holes, mut told) = (vec![0xee; length as usize], Vec::new(), 0);
        for chunk in self.chunks(cookie) {
            let at = u64::from_be_bytes(chunk.data[..8].try_into().unwrap());
            let into = &mut data[(at - offset) as usize..];
            match chunk.kind {
                CHUNK_DATA => {
                    told += chunk.data.len() - 8;
                    into[..chunk.data.len() - 8].copy_from_slice(&chunk.data[8..]);
                }
                CHUNK_HOLE => {
                    let length = u32::from_be_bytes(chunk.data[8..12].try_into().unwrap());
                    told += length as usize;
                    into[..length as usize].fill(0);
                    holes.push((at, length));
                }
                other => panic!("chunk of type {other}"),
            }
        }
        assert_eq!(told, length as usize, "each byte is told once");
        (data, holes)
    }

    /// Block status: lengths and flags.
    pub fn status(&mut self, flags: u16, offset: u64, length: u32) -> Vec<(u32, u32)> {
        let cookie = self.request(flags, BLOCK_STATUS, offset, length, &[]);
        let chunks = self.chunks(cookie);
        let [Chunk { kind: CHUNK_STATUS, data }] = &chunks[..] else { panic!("{chunks:?}") };
        assert_eq!(data[..4], 1u32.to_be_bytes(), "the context");
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        data[4..].chunks(8).map(|pair| (number(&pair[..4]), number(&pair[4..]))).collect()
    }

    /// The error that a request gets in a chunk.
    pub fn error(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> u32 {
        let cookie = self.request(flags, command, offset, length, &[]);
        let chunks = self.chunks(cookie);
        let [Chunk { kind: CHUNK_ERROR, data }] = &chunks[..] else { panic!("{chunks:?}") };
        assert_eq!(
            data.len(),
            6 + usize::from(u16::from_be_bytes([data[4], data[5]])),
            "the message"
        );
        u32::from_be_bytes(data[..4].try_into().unwrap())
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server takes what is sent");
    }

    /// Sends to a server that may have hung up.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Whether the server has hung up, after what it may still have sent.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    pub fn option(&mut self, number: u32, data: &[u8]) {
        let head =
            [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
        self.send(&[&head, data].concat());
    }

    pub fn option_reply(&mut self) -> OptionReply {
        let head = self.take(20);
        assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        OptionReply { option: number(8), kind: number(12), data: self.take(number(16) as usize) }
    }

    /// Sends a request; the cookie that its reply will carry.
    pub fn request(
        &mut self,
        flags: u16,
        command: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> u64 {
        self.cookie += 1;
        let head = request_bytes(flags, command, self.cookie, offset, length);
        self.send(&[&head, payload].concat());
        self.cookie
    }

    /// The next reply: cookie and error.
    pub fn reply(&mut self) -> (u64, u32) {
        self.try_reply().expect("the server answers")
    }

    /// The same from a server that may be gone.
    pub fn try_reply(&mut self) -> io::Result<(u64, u32)> {
        let mut bytes = [0; 16];
        self.stream.read_exact(&mut bytes)?;
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
        let cookie = u64::from_be_bytes(bytes[8..].try_into().unwrap());
        Ok((cookie, u32::from_be_bytes(bytes[4..8].try_into().unwrap())))
    }

    /// A request and its reply, with nothing else in flight: the error, 0 for none.
    pub fn call(
        &mut self,
        flags: u16,
        command: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> u32 {
        let cookie = self.request(flags, command, offset, length, payload);
        let (answered, error) = self.reply();
        assert_eq!(answered, cookie);
        error
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        assert_eq!(
            self.call(0, READ, offset, length, &[]),
            0,
            "read of {length} bytes at {offset}"
        );
        self.take(length as usize)
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) {
        let error = self.call(flags, WRITE, offset, data.len() as u32, data);
        assert_eq!(error, 0, "write of {} bytes at {offset}", data.len());
    }

    /// A write to a server that may die under it: whether it was acknowledged.
    pub fn try_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> bool {
        self.cookie += 1;
        let head = request_bytes(flags, WRITE, self.cookie, offset, data.len() as u32);
        self.try_send(&[&head, data].concat()).is_ok()
            && self.try_reply().is_ok_and(|r| r == (self.cookie, 0))
    }

    pub fn flush(&mut self) {
        assert_eq!(self.call(0, FLUSH, 0, 0, &[]), 0);
    }
}

/// A request's header.
pub fn request_bytes(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The data of INFO and GO.
pub fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|w| data.extend(w.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_data(name: &str, queries: &[&[u8]]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(*query);
    }
    data
}
