//! Parses sizes and names of volumes as people write them: `64M`, `1GiB`, `4096`.
//!
//! 1. K, M, G, T, P and E are powers of 1024, with or without `iB` or `B`: `10G`, `10GB` and
//!    `10GiB` are the same, as in the settings of PostgreSQL. Messages therefore give sizes in GiB,
//!    or to the byte.
//! 2. The size of a volume is a multiple of 4,096 bytes below 2^63: clients keep sizes and offsets
//!    as signed 64-bit numbers. A refusal names the nearest valid sizes.
//!
//! Except for volumes, it does *not* judge whether a size makes sense.

pub use corepage::probe::human_bytes as show;
use parse_size::{Config, Error};

/// The unit of a volume's size: a page.
const PAGE: u64 = 4096;
/// The largest volume: whole pages, below 2^63.
const VOLUME_BYTES_MAX: u64 = (1 << 63) - PAGE;
/// The longest name of a volume.
const NAME_BYTES_MAX: usize = 255;

/// Parses `text` as a number of bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let what = match Config::new().with_binary().parse_size(text) {
        Ok(bytes) => return Ok(bytes),
        Err(Error::PosOverflow) => "this is 16 EiB or more, which no size here can be",
        Err(Error::Empty) => "a size is missing",
        Err(_) => "this is not a size",
    };
    Err(format!(
        "{what}; write a number with a unit or without, like 64M, 1GiB or 4096 (1K = 1KB = 1KiB = \
         1024 bytes)"
    ))
}

/// Parses the size of a volume.
pub fn parse_volume(text: &str) -> Result<u64, String> {
    let bytes = parse(text)?;
    if bytes > VOLUME_BYTES_MAX {
        return Err(format!(
            "{bytes} bytes are more than the most that clients can use: {VOLUME_BYTES_MAX} bytes \
             (8 EiB - 4 KiB)"
        ));
    }
    if bytes == 0 {
        return Err("a volume has 4096 bytes at least".into());
    }
    if bytes % PAGE == 0 {
        return Ok(bytes);
    }
    let below = bytes / PAGE * PAGE;
    let next = if below == 0 { PAGE.to_string() } else { format!("{below} or {}", below + PAGE) };
    Err(format!("{bytes} bytes are no multiple of 4096: use {next}"))
}

/// Parses the name of a volume.
pub fn parse_name(text: &str) -> Result<String, String> {
    if text.chars().any(char::is_control) {
        return Err("a name of a volume has no control characters".into());
    }
    match text.len() {
        1..=NAME_BYTES_MAX => Ok(text.into()),
        0 => Err(format!("a volume needs a name, of {NAME_BYTES_MAX} bytes at most")),
        bytes => Err(format!(
            "a name of a volume has {NAME_BYTES_MAX} bytes at most, and this one has {bytes}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If a volume is 7 % smaller than the image that it should hold, that shows only at the end of
    /// the copy.
    #[test]
    fn a_gigabyte_is_what_other_block_device_tools_call_one() {
        for text in ["1G", "1GiB", "1 GiB", "1g", "1GB", "1024M", "1073741824"] {
            assert_eq!(parse(text), Ok(1 << 30), "{text}");
        }
        for bad in ["", "G", "-1", "1X", "99999999999999999999", "1e3e3"] {
            let why = parse(bad).unwrap_err();
            assert!(why.contains("64M, 1GiB or 4096") && !why.contains("type"), "{bad}: {why}");
        }
        assert!(parse("99999999999999999999").unwrap_err().contains("16 EiB or more"));
        assert_eq!(show(1 << 30), "1.0 GiB");
        assert_eq!(show(512), "512 bytes");
        assert_eq!(
            (show(3 << 50), show(VOLUME_BYTES_MAX)),
            ("3.0 PiB".into(), "8.0 EiB".into()),
            "not 8388608.0 TiB"
        );
    }

    /// Clients take a size of 2^63 or more for a negative one; and a refusal must say what would be
    /// valid.
    #[test]
    fn sizes_of_volumes_are_refused_with_those_that_are_right() {
        assert_eq!(parse_volume("10G"), Ok(10 << 30));
        assert_eq!(parse_volume(&VOLUME_BYTES_MAX.to_string()), Ok(VOLUME_BYTES_MAX));
        for (bad, says) in [
            ("1000001", "use 999424 or 1003520"),
            ("1", "use 4096"),
            ("0", "4096 bytes at least"),
            ("8E", "9223372036854771712 bytes (8 EiB - 4 KiB)"),
            ("16E", "16 EiB or more"),
        ] {
            let why = parse_volume(bad).unwrap_err();
            assert!(why.contains(says), "{bad}: {why}");
        }
    }

    /// An invalid name must not be sent to a server, whose answer would be about its length in the
    /// protocol.
    #[test]
    fn names_that_no_volume_can_have_are_refused_in_words_about_names() {
        assert_eq!(parse_name(&"ü".repeat(127)), Ok("ü".repeat(127)));
        assert!(
            parse_name(&"a".repeat(4096))
                .unwrap_err()
                .contains("255 bytes at most, and this one has 4096")
        );
        assert!(parse_name("a\nb").unwrap_err().contains("control characters"));
        assert!(parse_name("").is_err());
    }
}
