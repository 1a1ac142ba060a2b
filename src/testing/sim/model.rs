//! The expected state of the store: every page's versions by LSN, and contents that identify
//! themselves.
//!
//! Invariants
//! 1. A page's versions are in the order of their LSNs; the first one stands for everything before.
//! 2. Contents are unique: no two changes write the same bytes, so equal bytes mean the same
//!    version.
//!
//! It does *not* know requests, acknowledgements or crashes; see `oracle`.

use crate::base::mix::mix;
use crate::base::{BLOCK, Lsn, PageKey};
use crate::engine::{Change, PageRef};
use crate::testing::pattern::{self, Label};
use bytes::Bytes;
use std::collections::BTreeMap;

/// The bytes of a page; every word differs from page to page and from tag to tag.
pub fn page_bytes(key: PageKey, tag: u64) -> Bytes {
    pattern::page(label(key, tag)).into()
}

fn label(key: PageKey, tag: u64) -> Label {
    Label { owner: key.volume.get().into(), number: key.page.get(), version: tag }
}

/// The bytes of a patch.
pub fn patch_bytes(tag: u64, len: usize) -> Bytes {
    pattern::words(mix(!tag), len).into()
}

/// Identifies the bytes of a page.
pub fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|&byte| byte == 0) {
        return "zeros".into();
    }
    let Some(label) = Label::of(bytes) else {
        return format!("bytes of no page: {:02x?}..", &bytes[..16]);
    };
    let same = pattern::page(label).iter().zip(bytes).filter(|(a, b)| a == b).count();
    format!("{label:?}, {same} of {BLOCK} bytes as written whole")
}

/// Bytes of a change as the limit on commits counts them: the memory that it may need.
pub fn change_bytes(change: &Change) -> u64 {
    match change {
        Change::Put(_) | Change::Patch { .. } => BLOCK as u64,
        Change::Free => 512,
    }
}

/// A change in a few words.
pub fn describe_change((key, change): &(PageKey, Change)) -> String {
    match change {
        Change::Put(_) => format!("put {key:?}"),
        Change::Patch { offset, bytes } => format!("patch {key:?} {offset}+{}", bytes.len()),
        Change::Free => format!("free {key:?}"),
    }
}

/// A page from some LSN on.
#[derive(Clone, Debug)]
pub struct Version {
    /// The LSN of the commit.
    pub lsn: Lsn,
    /// `None` if it is absent.
    pub page: Option<Bytes>,
}

impl Version {
    /// The LSN that a reader gets: zero for an absent page.
    pub fn told(&self) -> Lsn {
        if self.page.is_some() { self.lsn } else { Lsn::ZERO }
    }
}

impl Version {
    /// Whether a reader that found no page gets the LSN of the commit that freed it, so that it can
    /// wait for it; once that is durable there is nothing to wait for.
    pub fn tells(&self, page: &PageRef, watermark: Lsn) -> bool {
        page.lsn() == self.lsn || (page.lsn() == Lsn::ZERO && self.lsn <= watermark)
    }
}

static ABSENT: Version = Version { lsn: Lsn::ZERO, page: None };

/// All pages with their versions.
#[derive(Default)]
pub struct Model {
    pages: BTreeMap<PageKey, Vec<Version>>,
}

impl Model {
    /// All versions of a page that matter from `lsn` on: the one that was current then, and later
    /// ones.
    pub fn since(&self, key: PageKey, lsn: Lsn) -> &[Version] {
        let Some(versions) = self.pages.get(&key) else { return std::slice::from_ref(&ABSENT) };
        let current = versions.partition_point(|version| version.lsn <= lsn).saturating_sub(1);
        &versions[current..]
    }

    /// The version that was current at `lsn`.
    pub fn at(&self, key: PageKey, lsn: Lsn) -> &Version {
        &self.since(key, lsn)[0]
    }

    /// The number of pages in the newest state.
    pub fn pages_present(&self) -> usize {
        self.pages
            .values()
            .filter(|versions| versions.last().is_some_and(|version| version.page.is_some()))
            .count()
    }

    /// Applies the changes of a commit.
    pub fn apply(&mut self, lsn: Lsn, changes: &[(PageKey, Change)]) {
        for (key, change) in changes {
            let versions = self.pages.entry(*key).or_insert_with(|| vec![ABSENT.clone()]);
            let last = versions.last().expect("there is always a first version");
            let page = match change {
                Change::Put(bytes) => Some(bytes.clone()),
                // This changes nothing: the page is absent since it was first freed, and a
                // transaction that has read it as absent is right.
                Change::Free if last.page.is_none() => continue,
                Change::Free => None,
                Change::Patch { offset, bytes } => {
                    let mut page =
                        last.page.as_ref().map_or_else(|| vec![0; BLOCK], |page| page.to_vec());
                    page[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
                    Some(page.into())
                }
            };
            if last.lsn == lsn {
                versions.pop();
            }
            versions.push(Version { lsn, page });
        }
    }

    /// Forgets everything above `recovered_lsn`, and what was before the newest version at or below
    /// it.
    pub fn restart_at(&mut self, recovered_lsn: Lsn) {
        for versions in self.pages.values_mut() {
            versions.truncate(versions.partition_point(|version| version.lsn <= recovered_lsn));
            versions.drain(..versions.len() - 1);
            // An absent page has no history any more: a transaction that read it as absent is
            // right, whenever that was.
            if versions[0].page.is_none() {
                versions[0].lsn = Lsn::ZERO;
            }
        }
        self.pages.retain(|_, versions| versions[0].page.is_some());
    }

    /// Names the page and the version that these bytes are, for messages.
    pub fn whose(&self, bytes: &[u8]) -> String {
        for (key, versions) in &self.pages {
            if let Some(version) = versions.iter().find(|v| v.page.as_deref() == Some(bytes)) {
                return format!("exactly {key:?} at {:?}", version.lsn);
            }
        }
        describe(bytes)
    }
}
