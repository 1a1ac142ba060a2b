//! The catalog: page `n` of volume 0 describes volume `n`. An ordinary page, written by ordinary transactions; its
//! own sum tells a page of the catalog from anything else that could stand there.

use super::{crc_around, get, put};
use crate::types::BLOCK;
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most bytes of a volume's name.
pub const NAME_BYTES_MAX: usize = 255;
const MAGIC: [u8; 8] = *b"CPVOLUME";

/// A volume's record, at the start of its page; zeros follow.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct VolumeRecord {
    /// `CPVOLUME`.
    pub magic: [u8; 8],
    /// CRC32C of the page, this field as zeros.
    pub crc: U32,
    /// Bytes of the name.
    pub name_len: U16,
    /// Zero.
    pub reserved: U16,
    /// Bytes of the volume.
    pub bytes: U64,
    /// UTF-8, zeros behind.
    pub name: [u8; 256],
}

const _: () = assert!(size_of::<VolumeRecord>() == 280);

/// The page for a volume.
pub fn encode(name: &str, bytes: u64) -> Vec<u8> {
    let mut page = vec![0; BLOCK];
    let len = name.len().min(NAME_BYTES_MAX);
    let mut record = VolumeRecord {
        magic: MAGIC,
        crc: 0.into(),
        name_len: (len as u16).into(),
        reserved: 0.into(),
        bytes: bytes.into(),
        name: [0; 256],
    };
    record.name[..len].copy_from_slice(&name.as_bytes()[..len]);
    put(&mut page, 0, &record);
    let crc = U32::from(crc_around(0, &page, offset_of!(VolumeRecord, crc)));
    put(&mut page, offset_of!(VolumeRecord, crc), &crc);
    page
}

/// Name and bytes; the message says what is wrong.
pub fn decode(page: &[u8]) -> Result<(String, u64), &'static str> {
    let record: &VolumeRecord = get(page, 0).ok_or("is too short")?;
    if record.magic != MAGIC {
        return Err("is not a volume's record");
    }
    if crc_around(0, page, offset_of!(VolumeRecord, crc)) != record.crc.get() {
        return Err("has a wrong checksum");
    }
    let name = record.name.get(..usize::from(record.name_len.get())).ok_or("has a name that is too long")?;
    let name = std::str::from_utf8(name).map_err(|_| "has a name that is not UTF-8")?;
    Ok((name.to_string(), record.bytes.get()))
}
