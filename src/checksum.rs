//! x
/// x
pub fn crc32c(bytes: &[u8]) -> u32 { crc32c::crc32c(bytes) }
/// x
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 { crc32c::crc32c_append(crc, bytes) }
