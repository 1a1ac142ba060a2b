//! Page contents that identify themselves: for the simulator, benchmarks and tests.
//!
//! ```text
//! 0      8       16      24       32     64            192             4096
//! magic  owner   number  version  words  patch area    words ...
//!                                        number  count  words ...
//! ```
//! 1. Owner, number and version of a page determine all its bytes except the patch area; number and
//!    count of a patch determine that. So another page, an old one and a torn one are recognised.
//! 2. Every word differs from its neighbours and from the words of other pages and versions.
//!
//! [`check`] runs next to what benchmarks measure, so it allocates no memory, and compares eight
//! bytes at a time.

use crate::base::mix::mix;

/// Bytes of a page.
pub const PAGE: usize = crate::base::BLOCK;
/// Bytes of a patch, and where it goes.
pub const PATCH: usize = 128;
pub const PATCH_AT: usize = 64;

const MAGIC: u64 = 0x6e65_6765_7061_6765;
/// The step from word to word: it is odd, so that a sequence never repeats a word.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Bytes of the numbers at the front of a page, and of a patch.
const PAGE_HEAD: usize = 32;
const PATCH_HEAD: usize = 16;

/// Identifies a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its volume, for instance; any number works.
    pub owner: u64,
    pub number: u64,
    pub version: u64,
}

impl Label {
    /// The label at the front of a page; `None` if [`page`] did not make it.
    pub fn of(page: &[u8]) -> Option<Label> {
        let (words, _) = page.as_chunks::<8>();
        let [magic, owner, number, version] = *words.first_chunk::<4>()?;
        let [owner, number, version] = [owner, number, version].map(u64::from_le_bytes);
        (u64::from_le_bytes(magic) == MAGIC).then_some(Label { owner, number, version })
    }

    fn seed(self) -> u64 {
        mix(mix(mix(self.owner) ^ self.number) ^ self.version)
    }
}

/// Makes the bytes of a page that was never patched.
pub fn page(label: Label) -> Vec<u8> {
    let mut page = words(label.seed(), PAGE);
    let head = [MAGIC, label.owner, label.number, label.version];
    for (bytes, word) in page.chunks_exact_mut(8).zip(head) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    page
}

/// Makes the `count`th patch of page `number`.
pub fn patch(number: u64, count: u64) -> Vec<u8> {
    let mut patch = words(patch_seed(number, count), PATCH);
    for (bytes, word) in patch.chunks_exact_mut(8).zip([number, count]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    patch
}

fn patch_seed(number: u64, count: u64) -> u64 {
    mix(!mix(number) ^ count)
}

/// Makes this many bytes that only this seed gives.
pub fn words(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
    let words = (0..len.div_ceil(8) as u64).map(|n| seed.wrapping_add(n.wrapping_mul(STEP)));
    words.for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes.truncate(len);
    bytes
}

/// Checks that these are the bytes of page `number` of this owner, in any version. Returns the
/// version and the number of the last patch.
pub fn check(owner: u64, number: u64, page: &[u8]) -> Option<(u64, u64)> {
    let label = Label::of(page).filter(|_| page.len() == PAGE)?;
    if (label.owner, label.number) != (owner, number) {
        return None;
    }
    let seed = label.seed();
    let area = &page[PATCH_AT..PATCH_AT + PATCH];
    let count = if holds(area, PATCH_AT, seed) {
        0
    } else {
        let (words, _) = area.as_chunks::<8>();
        let count = u64::from_le_bytes(words[1]);
        let is_own = u64::from_le_bytes(words[0]) == number;
        let rest = &area[PATCH_HEAD..];
        (is_own && holds(rest, PATCH_HEAD, patch_seed(number, count))).then_some(count)?
    };
    let (front, back) = (&page[PAGE_HEAD..PATCH_AT], &page[PATCH_AT + PATCH..]);
    (holds(front, PAGE_HEAD, seed) && holds(back, PATCH_AT + PATCH, seed))
        .then_some((label.version, count))
}

/// Whether these are the words that the seed gives from byte `at` on.
fn holds(bytes: &[u8], at: usize, seed: u64) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    let first = seed.wrapping_add((at as u64 / 8).wrapping_mul(STEP));
    let wanted = |n: usize| first.wrapping_add((n as u64).wrapping_mul(STEP));
    // There is no early exit: that is faster if the words match.
    let difference = |n: usize, word: &[u8; 8]| u64::from_le_bytes(*word) ^ wanted(n);
    words.iter().enumerate().fold(0, |other, (n, word)| other | difference(n, word)) == 0
        && rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(number: u64, version: u64) -> Label {
        Label { owner: 2, number, version }
    }

    /// If this fails, the simulator and the benchmarks accept wrong data.
    #[test]
    fn a_page_that_is_not_the_one_asked_for_is_noticed() {
        let mut page = page(label(7, 3));
        assert_eq!(Label::of(&page), Some(label(7, 3)));
        assert_eq!(check(2, 7, &page), Some((3, 0)));
        assert_eq!(check(2, 8, &page), None, "another number");
        assert_eq!(check(1, 7, &page), None, "another owner");
        page[PATCH_AT..][..PATCH].copy_from_slice(&patch(7, 9));
        assert_eq!(check(2, 7, &page), Some((3, 9)));
        assert_eq!(check(2, 7, &page[..PAGE - 8]), None, "a short one");
        for at in (0..PAGE).step_by(8).chain([PATCH_AT - 1, PATCH_AT + PATCH - 1, PAGE - 1]) {
            page[at] ^= 1;
            assert_eq!(check(2, 7, &page), None, "a flipped bit at {at}");
            page[at] ^= 1;
        }
        page[PATCH_AT..][..PATCH].copy_from_slice(&patch(8, 9));
        assert_eq!(check(2, 7, &page), None, "another page's patch");
    }

    /// A sector of another version, or one that landed elsewhere in the same page, is no longer the
    /// page.
    #[test]
    fn a_torn_or_shifted_page_is_noticed() {
        let (old, new) = (page(label(7, 3)), page(label(7, 4)));
        for sector in 1..PAGE / 512 {
            let mut torn = new.clone();
            torn[sector * 512..][..512].copy_from_slice(&old[sector * 512..][..512]);
            assert_eq!(check(2, 7, &torn), None, "torn at sector {sector}");
            let mut shifted = new.clone();
            shifted.copy_within(sector * 512..(sector + 1) * 512, sector % 7 * 512 + 512);
            assert_eq!(check(2, 7, &shifted).is_some(), sector % 7 + 1 == sector);
        }
    }
}
