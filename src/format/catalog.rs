//! The catalog: page `n` of volume 0 describes volume `n`. These are ordinary pages, written by
//! ordinary transactions. A checksum of its own tells a page of the catalog from anything else that
//! could stand there.

use super::{crc_around, get, put};
use crate::base::BLOCK;
use std::mem::offset_of;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most bytes of a volume's name.
pub const NAME_BYTES_MAX: usize = 255;
pub(super) const MAGIC: [u8; 8] = *b"CPVOLUME";
/// The magic of a volume with pages that must still be freed. It is another one, so that a program
/// that does not free them refuses the record.
pub(super) const MAGIC_CUT: [u8; 8] = *b"CPVOLCUT";

/// A volume's record, at the start of its page; zeros follow.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct VolumeRecord {
    /// `CPVOLUME`; `CPVOLCUT`: pages from `bytes` on must still be freed, since the volume was
    /// deleted or made smaller.
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

/// A volume, as its page describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Empty: the volume was deleted, and its pages must still be freed.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Pages from `bytes` on must still be freed: it was deleted, or made smaller.
    pub is_cut: bool,
}

/// Encodes the page of a volume.
pub fn encode(volume: &Volume) -> Vec<u8> {
    let mut page = vec![0; BLOCK];
    let len = volume.name.len().min(NAME_BYTES_MAX);
    let mut record = VolumeRecord {
        magic: if volume.is_cut { MAGIC_CUT } else { MAGIC },
        crc: 0.into(),
        name_len: (len as u16).into(),
        reserved: 0.into(),
        bytes: volume.bytes.into(),
        name: [0; 256],
    };
    record.name[..len].copy_from_slice(&volume.name.as_bytes()[..len]);
    put(&mut page, 0, &record);
    let crc = U32::from(crc_around(0, &page, offset_of!(VolumeRecord, crc)));
    put(&mut page, offset_of!(VolumeRecord, crc), &crc);
    page
}

/// Checks and decodes the page of a volume; the message says what is wrong.
pub fn decode(page: &[u8]) -> Result<Volume, &'static str> {
    let record: &VolumeRecord = get(page, 0).ok_or("is too short")?;
    if record.magic != MAGIC && record.magic != MAGIC_CUT {
        return Err("is not a volume's record");
    }
    if crc_around(0, page, offset_of!(VolumeRecord, crc)) != record.crc.get() {
        return Err("has a wrong checksum");
    }
    let name = record
        .name
        .get(..usize::from(record.name_len.get()))
        .ok_or("has a name that is too long")?;
    let name = std::str::from_utf8(name).map_err(|_| "has a name that is not UTF-8")?;
    Ok(Volume {
        name: name.to_string(),
        bytes: record.bytes.get(),
        is_cut: record.magic == MAGIC_CUT,
    })
}
