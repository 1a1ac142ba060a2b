//! What the pages of a benchmark hold.
//!
//! ```text
//! 0      8        64            192                 4096
//! number version  patch area    pattern of both ...
//! ```
//! 1. From a page's number and version follows all that it holds, the patch area aside; from number and count all of that.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a patch, and where it goes.
pub const PATCH: usize = 128;
pub const PATCH_AT: usize = 64;

fn word(number: u64, version: u64) -> u64 {
    // Multiplicative mixing: neighbours look nothing alike.
    (number ^ version.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Version `version` of page `number`, never patched.
pub fn whole(number: u64, version: u64) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE);
    page.extend_from_slice(&number.to_le_bytes());
    page.extend_from_slice(&version.to_le_bytes());
    let word = word(number, version).to_le_bytes();
    page.extend(word.iter().cycle().take(PAGE - 16));
    page
}

/// The `count`th patch of page `number`.
pub fn patch(number: u64, count: u64) -> Vec<u8> {
    let mut patch = number.to_le_bytes().to_vec();
    patch.extend_from_slice(&count.to_le_bytes());
    let word = word(count, number).to_le_bytes();
    patch.extend(word.iter().cycle().take(PATCH - 16));
    patch
}

/// Whether these are the bytes of page `number`, in any version; which version and, if it was patched, which patch.
pub fn check(number: u64, page: &[u8]) -> Option<(u64, u64)> {
    let version = u64::from_le_bytes(page.get(8..16)?.try_into().ok()?);
    let mut expected = whole(number, version);
    let area = PATCH_AT..PATCH_AT + PATCH;
    let count = if page.get(area.clone())? == &expected[area.clone()] {
        0
    } else {
        let count = u64::from_le_bytes(page[PATCH_AT + 8..PATCH_AT + 16].try_into().ok()?);
        expected[area].copy_from_slice(&patch(number, count));
        count
    };
    (page == expected).then_some((version, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_the_one_asked_for_is_noticed() {
        let mut page = whole(7, 3);
        assert_eq!(check(7, &page), Some((3, 0)));
        assert_eq!(check(8, &page), None);
        page[PATCH_AT..][..PATCH].copy_from_slice(&patch(7, 9));
        assert_eq!(check(7, &page), Some((3, 9)));
        for at in [0, 9, PATCH_AT, PATCH_AT + PATCH - 1, PATCH_AT + PATCH, PAGE - 1] {
            page[at] ^= 1;
            assert_eq!(check(7, &page), None, "a flipped bit at {at}");
            page[at] ^= 1;
        }
        page[PATCH_AT..][..PATCH].copy_from_slice(&patch(8, 9));
        assert_eq!(check(7, &page), None, "another page's patch");
    }
}
