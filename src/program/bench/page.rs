//! What the pages of a benchmark hold.
//!
//! ```text
//! 0      8        64            192                 4096
//! number version  patch area    pattern of both ...
//! ```
//! 1. From a page's number and version follows all that it holds, the patch area aside; from number
//!    and count all of that.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a patch, and where it goes.
pub const PATCH: usize = 128;
pub const PATCH_AT: usize = 64;
/// Bytes of the two numbers at the front of a page and of a patch.
const HEAD: usize = 16;

fn word(number: u64, version: u64) -> u64 {
    // Multiplicative mixing: neighbours look nothing alike.
    (number ^ version.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Version `version` of page `number`, never patched.
pub fn whole(number: u64, version: u64) -> Vec<u8> {
    let mut page = word(number, version).to_le_bytes().repeat(PAGE / 8);
    head(&mut page, number, version);
    page
}

/// The `count`th patch of page `number`.
pub fn patch(number: u64, count: u64) -> Vec<u8> {
    let mut patch = word(count, number).to_le_bytes().repeat(PATCH / 8);
    head(&mut patch, number, count);
    patch
}

fn head(bytes: &mut [u8], first: u64, second: u64) {
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..HEAD].copy_from_slice(&second.to_le_bytes());
}

/// Whether these are the bytes of page `number`, in any version; which version and, if it was
/// patched, which patch. It stands beside what is measured, so it takes no memory, and looks at
/// eight bytes at a time.
pub fn check(number: u64, page: &[u8]) -> Option<(u64, u64)> {
    let version = second(number, page).filter(|_| page.len() == PAGE)?;
    let own = word(number, version);
    let area = &page[PATCH_AT..PATCH_AT + PATCH];
    let count = if holds(area, own) {
        0
    } else {
        let count = second(number, area)?;
        holds(&area[HEAD..], word(count, number)).then_some(count)?
    };
    (holds(&page[HEAD..PATCH_AT], own) && holds(&page[PATCH_AT + PATCH..], own))
        .then_some((version, count))
}

/// The second of the two numbers at the front, if the first is `first`.
fn second(first: u64, bytes: &[u8]) -> Option<u64> {
    let (head, _) = bytes.split_first_chunk::<HEAD>()?;
    let head = u128::from_le_bytes(*head);
    (head as u64 == first).then_some((head >> 64) as u64)
}

/// Whether there is nothing but `word`.
fn holds(bytes: &[u8], word: u64) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    // No early end: that is faster where it holds.
    words.iter().fold(0, |other, found| other | (u64::from_le_bytes(*found) ^ word)) == 0
        && rest.is_empty()
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
        assert_eq!(check(7, &page[..PAGE - 8]), None, "a short one");
        for at in
            [0, 9, 16, PATCH_AT - 1, PATCH_AT, PATCH_AT + PATCH - 1, PATCH_AT + PATCH, PAGE - 1]
        {
            page[at] ^= 1;
            assert_eq!(check(7, &page), None, "a flipped bit at {at}");
            page[at] ^= 1;
        }
        page[PATCH_AT..][..PATCH].copy_from_slice(&patch(8, 9));
        assert_eq!(check(7, &page), None, "another page's patch");
    }
}
