//! The pages that a shard knows: which are cached, and which requests wait for them; `loading`
//! reads them.
//!
//! ```text
//! Unresolved --map lookup (may read nodes)--> Resolved: version known --read--> Cached
//!                                                 \--no entry--> Absent
//! ```
//! Invariants
//! 1. `lsn` is the version of the content that the next reader gets; `mapped_lsn` is the version
//!    that the map names. They differ only while a change is on its way to its place.
//! 2. A page leaves the table only when nothing refers to it: no request, no version on its way, no
//!    image, not dirty, no pin.
//! 3. A page with a change on its way has its map leaf pinned, so that the map can be changed
//!    without a read.
//! 4. A request keeps the entries of its pages, and the bytes only of those that it reads or
//!    patches.

use crate::base::error::Error;
use crate::base::{ImageIdx, IndexedSlab, Lsn, NodeIdx, PageIdx, PageKey, RequestIdx, VolumeId};
use crate::engine::Work;
use crate::engine::cache::page_lock::PageLock;
use crate::engine::map::Lookup;
use crate::engine::{NodeWaiter, PageRef, Shard};
use crate::format::node::Entry;
use crate::memory::{Frame, Residency, Standing};
use hashbrown::HashTable;
use smallvec::SmallVec;
use std::hash::BuildHasher;

/// What a request needs of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Needs {
    /// Its version.
    Version,
    /// Its version, and its bytes in memory.
    Bytes,
}

/// A page in the table.
pub(in crate::engine) struct Page {
    pub key: PageKey,
    /// Version of the content; the LSN of the `Free` for a page freed since it was loaded.
    pub lsn: Lsn,
    /// Version that the map names.
    pub mapped_lsn: Lsn,
    /// The content, if in memory.
    pub frame: Option<Frame>,
    /// What the map says.
    pub entry: Option<Entry>,
    pub resolved: bool,
    pub absent: bool,
    pub resolving: bool,
    pub loading: bool,
    /// Requests that need its entry to stay.
    pub holds: u32,
    /// Those requests that need its bytes too.
    pub data_holds: u32,
    /// Versions on their way to their places.
    pub versions: u32,
    /// Its image in the open group.
    pub image: Option<ImageIdx>,
    /// The first change that no [`PageVersion`](crate::engine::writeback::PageVersion) holds yet.
    pub dirty_from: Option<Lsn>,
    /// Whether it is in the queue of the write-back.
    pub queued: bool,
    /// Its map leaf, pinned.
    pub leaf: Option<NodeIdx>,
    /// The checkpoint in progress waits for this version to be in the map.
    pub checkpoint_target: Lsn,
    /// The lock for commits over shards.
    pub hold: PageLock,
    pub residency: Residency,
    /// When a node was first requested to resolve it, as a growing number; zero if none was.
    pub asked: u64,
    waiters: SmallVec<[(RequestIdx, Needs); 1]>,
}

impl Page {
    /// Panics if the state of the page contradicts itself: that is a bug, and to continue would
    /// write it to the device.
    pub fn assert_state(&self) {
        let key = self.key;
        assert!(self.frame.is_none() || !self.absent, "{key:?} is absent, and has bytes");
        assert!(
            self.mapped_lsn <= self.lsn,
            "{key:?}: the map names {:?}, newer than {:?}",
            self.mapped_lsn,
            self.lsn
        );
        assert!(
            self.data_holds <= self.holds,
            "{key:?}: {} requests need bytes of {}",
            self.data_holds,
            self.holds
        );
        if let Some(since) = self.dirty_from {
            assert!(
                since <= self.lsn && self.queued,
                "{key:?} is dirty since {since:?} of {:?}, queued {}",
                self.lsn,
                self.queued
            );
            assert!(
                self.absent || self.frame.is_some(),
                "{key:?} is dirty, and its bytes are gone"
            );
        }
        let is_on_its_way = self.dirty_from.is_some() || self.image.is_some() || self.versions > 0;
        assert!(
            !is_on_its_way || self.leaf.is_some(),
            "{key:?} has a change on its way, and no leaf pinned"
        );
    }

    /// The version as transactions see it: zero while absent.
    pub fn version(&self) -> Lsn {
        if self.absent { Lsn::ZERO } else { self.lsn }
    }

    /// The LSN that a reader gets: for an absent page that of its `Free`, as long as that is not
    /// durable. The table knows it until then, since such a page has a change on its way to the
    /// map.
    pub fn told(&self, watermark: Lsn) -> Lsn {
        let hides = self.absent && (self.lsn <= watermark || planted!(FreeUntold));
        if hides { Lsn::ZERO } else { self.lsn }
    }

    /// What a reader gets: its bytes, pinned, and its version.
    pub fn as_read(&self, watermark: Lsn) -> PageRef {
        PageRef::new(self.frame.as_ref().map(|frame| frame.pin()), self.told(watermark))
    }

    /// Whether it is a record of a volume, whose reads are the engine's own.
    pub fn is_catalog(&self) -> bool {
        self.key.volume == VolumeId::CATALOG
    }

    /// The requests that wait for it.
    pub fn waiters(&self) -> impl Iterator<Item = RequestIdx> {
        self.waiters.iter().map(|(waiter, _)| *waiter)
    }

    /// Whether it has what a request needs of it.
    pub fn has(&self, needs: Needs) -> bool {
        self.resolved && (needs == Needs::Version || self.absent || self.frame.is_some())
    }

    /// Whether nothing in the shard refers to it; readers may still hold its bytes.
    pub fn is_unreferenced(&self) -> bool {
        self.holds == 0
            && self.versions == 0
            && self.image.is_none()
            && self.dirty_from.is_none()
            && !self.queued
            && !self.resolving
            && !self.loading
            && self.leaf.is_none()
            && self.waiters.is_empty()
    }

    /// Whether its bytes may leave memory although requests hold it: none of them needs the bytes,
    /// and the map names them.
    fn has_spare_bytes(&self) -> bool {
        let is_clean = self.versions == 0 && self.image.is_none() && self.dirty_from.is_none();
        self.holds > 0 && self.data_holds == 0 && is_clean
    }
}

/// What a page in the table takes: its entry, and up to 16/7 places in the index, of five bytes
/// each.
pub(in crate::engine) const ENTRY_BYTES: usize = size_of::<Page>() + 5 * 16 / 7 + 1;

/// How many pages have their bytes in memory.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(in crate::engine) struct Resident {
    /// All of them.
    pub pages: u32,
    /// Those whose bytes a request in progress needs.
    pub held: u32,
}

/// The table.
pub(in crate::engine) struct Table {
    pub pages: IndexedSlab<PageIdx, Page>,
    resident: Resident,
    /// The indices of the pages by key; the keys themselves are in the pages.
    index: HashTable<PageIdx>,
    hasher: foldhash::fast::FixedState,
}

impl Table {
    /// Makes the table of a shard with `frames` frames. It has room for that many pages from the
    /// start, so that it does not grow as the cache fills, which would take memory for two tables;
    /// the unused part takes no memory.
    pub fn new(frames: u32, seed: u64) -> Self {
        Table {
            pages: IndexedSlab::with_capacity(frames as usize),
            resident: Resident::default(),
            index: HashTable::with_capacity(frames as usize),
            hasher: foldhash::fast::FixedState::with_seed(seed),
        }
    }

    /// The page's index, if the table has it.
    #[inline]
    pub fn find(&self, key: PageKey) -> Option<PageIdx> {
        let is_it = |idx: &PageIdx| self.pages[*idx].key == key;
        self.index.find(self.hasher.hash_one(key), is_it).copied()
    }

    /// The page's index, for a read or a change, which counts as a use; a new page is unresolved.
    pub fn get(&mut self, key: PageKey) -> PageIdx {
        if let Some(idx) = self.find(key) {
            let page = &mut self.pages[idx];
            // The use that brings it into memory does not count.
            if page.frame.is_some() || page.holds > 0 {
                page.residency.used();
            }
            return idx;
        }
        self.entry(key)
    }

    /// The page's index, for an access that does not count as a use: a look at its version, a move,
    /// a redo.
    pub fn entry(&mut self, key: PageKey) -> PageIdx {
        if let Some(idx) = self.find(key) {
            return idx;
        }
        let idx = self.pages.insert(Page {
            key,
            lsn: Lsn::ZERO,
            mapped_lsn: Lsn::ZERO,
            frame: None,
            entry: None,
            resolved: false,
            absent: false,
            resolving: false,
            loading: false,
            holds: 0,
            data_holds: 0,
            versions: 0,
            image: None,
            dirty_from: None,
            queued: false,
            leaf: None,
            checkpoint_target: Lsn::ZERO,
            hold: PageLock::default(),
            residency: Residency::default(),
            asked: 0,
            waiters: SmallVec::new(),
        });
        let (pages, hasher) = (&self.pages, &self.hasher);
        let hash_of = |idx: &PageIdx| hasher.hash_one(pages[*idx].key);
        self.index.insert_unique(hasher.hash_one(key), idx, hash_of);
        idx
    }

    pub fn remove(&mut self, idx: PageIdx) {
        let page = self.pages.remove(idx);
        assert!(
            page.is_unreferenced(),
            "{:?} is removed, and {} requests and {} captures refer to it",
            page.key,
            page.holds,
            page.versions
        );
        assert_eq!(page.data_holds, 0, "{:?} is removed while a request needs its bytes", page.key);
        self.resident.pages -= u32::from(page.frame.is_some());
        let entry = self.index.find_entry(self.hasher.hash_one(page.key), |at| *at == idx);
        entry.expect("a page in the table is in its index").remove();
    }

    /// Sets the bytes of the page, or removes them.
    pub fn set_frame(&mut self, idx: PageIdx, frame: Option<Frame>) {
        let page = &mut self.pages[idx];
        let (before, after) = (u32::from(page.frame.is_some()), u32::from(frame.is_some()));
        self.resident.pages = self.resident.pages - before + after;
        if page.data_holds > 0 {
            self.resident.held = self.resident.held - before + after;
        }
        page.frame = frame;
        page.residency.frame_changed();
        let Resident { pages, held } = self.resident;
        assert!(held <= pages, "{held} pages are needed by requests, and {pages} are in memory");
    }

    /// Records that another request needs the page's bytes.
    pub fn hold_bytes(&mut self, idx: PageIdx) {
        let page = &mut self.pages[idx];
        page.data_holds += 1;
        assert!(
            page.data_holds <= page.holds,
            "{:?}: {} requests need its bytes, and {} the page",
            page.key,
            page.data_holds,
            page.holds
        );
        self.resident.held += u32::from(page.data_holds == 1 && page.frame.is_some());
    }

    /// Records that a request no longer needs them.
    pub fn let_bytes_go(&mut self, idx: PageIdx) {
        let page = &mut self.pages[idx];
        assert!(page.data_holds > 0, "{:?}: no request needs its bytes", page.key);
        page.data_holds -= 1;
        self.resident.held -= u32::from(page.data_holds == 0 && page.frame.is_some());
    }

    pub fn resident(&self) -> Resident {
        self.resident
    }

    /// Recounts the same.
    #[cfg(any(test, feature = "sim"))]
    pub fn count_resident(&self) -> Resident {
        let resident = || self.pages.iter().filter(|(_, page)| page.frame.is_some());
        let held = resident().filter(|(_, page)| page.data_holds > 0).count();
        Resident { pages: resident().count() as u32, held: held as u32 }
    }

    /// A hash of the key, for the eviction policy.
    pub fn hash(&self, key: PageKey) -> u64 {
        self.hasher.hash_one(key)
    }

    /// The standing of page `idx`, provided that `block` holds its bytes.
    pub fn standing(&self, idx: PageIdx, block: u32) -> Standing {
        let Some(page) = self.pages.get(idx) else { return Standing::Gone };
        match &page.frame {
            Some(frame) if frame.block() == block => {
                match page.is_unreferenced() || page.has_spare_bytes() {
                    false => Standing::Referenced,
                    true if frame.pins() > 0 => Standing::Pinned,
                    true => Standing::Idle,
                }
            }
            _ => Standing::Gone,
        }
    }

    /// Drops a page with its memory or, if requests hold the page, only its memory. Returns the
    /// hash of its key.
    pub fn evict(&mut self, idx: PageIdx) -> u64 {
        let page = &self.pages[idx];
        let key = page.key;
        assert!(page.frame.is_some(), "{key:?} is evicted, and has no memory");
        assert!(
            page.lsn == page.mapped_lsn && page.entry.is_some(),
            "{key:?} is evicted at {:?}, but the map has {:?}, present: {}",
            page.lsn,
            page.mapped_lsn,
            page.entry.is_some()
        );
        if page.is_unreferenced() {
            self.remove(idx);
        } else {
            self.set_frame(idx, None);
        }
        self.hash(key)
    }
}

impl Shard {
    /// Registers that pending request `waiter` needs page `idx`. Returns true if that is already
    /// there; otherwise the waiter is notified later.
    pub(in crate::engine) fn want(
        &mut self,
        idx: PageIdx,
        needs: Needs,
        waiter: RequestIdx,
    ) -> bool {
        if self.cache.table.pages[idx].has(needs) {
            return true;
        }
        self.cache.table.pages[idx].waiters.push((waiter, needs));
        self.advance_page(idx);
        false
    }

    /// Takes the next step for a page that requests wait for.
    pub(in crate::engine) fn advance_page(&mut self, idx: PageIdx) {
        let page = &self.cache.table.pages[idx];
        if !page.resolved && !page.resolving {
            match self.map.lookup(page.key) {
                Lookup::Found(entry) => self.resolve(idx, entry),
                Lookup::Load(key, child) => {
                    self.cache.table.pages[idx].resolving = true;
                    self.want_node(key, child, NodeWaiter::Page(idx));
                }
            }
        }
        let page = &mut self.cache.table.pages[idx];
        let wants_data = page.waiters.iter().any(|(_, needs)| *needs == Needs::Bytes);
        if page.resolved && !page.absent && page.frame.is_none() && !page.loading && wants_data {
            page.loading = true;
            self.cache.wanted.pages.push(idx);
            self.ctx.need(Work::Reads);
        }
        self.wake_waiters(idx);
    }

    /// Records what the map says about the page: `entry`, or none.
    pub(in crate::engine) fn resolve(&mut self, idx: PageIdx, entry: Option<Entry>) {
        let page = &mut self.cache.table.pages[idx];
        assert!(
            !page.resolved,
            "{:?} is resolved twice, at {:?} before",
            page.key, page.mapped_lsn
        );
        page.resolved = true;
        page.absent = entry.is_none();
        page.lsn = entry.map_or(Lsn::ZERO, |e| e.lsn());
        page.mapped_lsn = page.lsn;
        page.entry = entry;
        page.asked = 0;
    }

    /// Notifies the requests whose needs are met.
    pub(in crate::engine) fn wake_waiters(&mut self, idx: PageIdx) {
        let page = &mut self.cache.table.pages[idx];
        if page.waiters.is_empty() {
            return;
        }
        let mut met: SmallVec<[RequestIdx; 4]> = SmallVec::new();
        let (version, bytes) = (page.has(Needs::Version), page.has(Needs::Bytes));
        page.waiters.retain(|(waiter, needs)| {
            let has = if *needs == Needs::Bytes { bytes } else { version };
            if has {
                met.push(*waiter);
            }
            !has
        });
        for waiter in met {
            self.requests.need_met(waiter, None, &mut self.ctx);
        }
    }

    pub(in crate::engine) fn fail_waiters(&mut self, idx: PageIdx, error: &Error) {
        for (waiter, _) in std::mem::take(&mut self.cache.table.pages[idx].waiters) {
            self.requests.need_met(waiter, Some(error.clone()), &mut self.ctx);
        }
    }
}
