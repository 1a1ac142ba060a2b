//! Sizes as people write them: `64M`, `1GiB`, `4096`.
//!
//! 1. K, M, G and T are powers of 1024, with or without `iB`, as in qemu and coreutils; `KB` and `MB` count as well.
//!
//! Does not judge whether a size makes sense.

pub use corepage::probe::human_bytes as show;
use parse_size::Config;

/// Bytes of `text`.
pub fn parse(text: &str) -> Result<u64, String> {
    let config = Config::new().with_binary();
    config.parse_size(text).map_err(|e| format!("{e}; write a size like 64M, 1GiB or 4096"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume 7 % smaller than the image that is to go in is found out only at the end of the copy.
    #[test]
    fn a_gigabyte_is_what_other_block_device_tools_call_one() {
        for text in ["1G", "1GiB", "1 GiB", "1g", "1024M", "1073741824"] {
            assert_eq!(parse(text), Ok(1 << 30), "{text}");
        }
        for bad in ["", "G", "-1", "1X", "99999999999999999999", "1e3e3"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(show(1 << 30), "1.0 GiB");
        assert_eq!(show(512), "512 bytes");
    }
}
