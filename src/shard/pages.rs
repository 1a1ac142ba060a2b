//! The pages that a shard knows: what is cached, what is being read, who waits for it.
//!
//! ```text
//! Unresolved --map lookup (may read nodes)--> Resolved: version known --read--> Cached
//!                                                 \--no entry--> Absent
//! ```
//! Invariants
//! 1. `lsn` is the version of the content that the next reader gets; `mapped_lsn` is the version that the map
//!    names. They differ only while a change is on its way to its place.
//! 2. A page leaves the table only when nothing refers to it: no request, no capture, no slot, not dirty, no pin.
//! 3. A page with a change on its way has its map leaf pinned, so that the map can be changed without a read.
//! 4. Bytes from the device become a page's content only if their sum is the entry's, and the entry is still the
//!    page's: a page changed meanwhile ignores a late read.

use super::holds::Hold;
use super::{OpKind, Shard};
use crate::coalesce;
use crate::disk::{Completion, DiskOp, FileId};
use crate::error::Error;
use crate::format::extent::NodeKey;
use crate::format::node::{Child, Entry};
use crate::map::{Lookup, NodeIdx};
use crate::pool::{Frame, Residency, Standing};
use crate::types::{Lsn, PageKey, Place};
use hashbrown::HashMap;
use slab::Slab;
use smallvec::SmallVec;
use std::hash::BuildHasher;

/// Blocks between two reads that are read too, to make one of them. With more, the bytes cost what the operations save (see
/// decision 14).
const READ_GAP_MAX: u32 = 1;

/// A page in the table.
pub(super) struct Page {
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
    resolving: bool,
    loading: bool,
    /// Requests that need it to stay.
    pub holds: u32,
    /// Versions on their way to their places.
    pub captures: u32,
    /// Its slot in the open group.
    pub slot: Option<usize>,
    /// First change that no capture holds yet.
    pub dirty_from: Option<Lsn>,
    /// It stands in the queue of the coalescer.
    pub queued: bool,
    /// Its map leaf, pinned.
    pub leaf: Option<NodeIdx>,
    /// The checkpoint under way waits for this version to be in the map.
    pub checkpoint_target: Lsn,
    /// By commits over shards.
    pub hold: Hold,
    pub residency: Residency,
    waiters: SmallVec<[(usize, bool); 2]>,
}

impl Page {
    /// The version as transactions see it: zero while absent.
    pub fn version(&self) -> Lsn {
        if self.absent { Lsn::ZERO } else { self.lsn }
    }

    /// The LSN that a reader is told: of an absent page that of its `Free`, as long as it is not durable. The table knows it until
    /// then, since such a page has a change on its way to the map.
    pub fn told(&self, watermark: Lsn) -> Lsn {
        let hides = self.absent && (self.lsn <= watermark || planted!(FreeUntold));
        if hides { Lsn::ZERO } else { self.lsn }
    }

    /// Whether it is there for somebody who needs it, with its bytes if `data`.
    pub fn has(&self, data: bool) -> bool {
        self.resolved && (!data || self.absent || self.frame.is_some())
    }

    /// Whether nothing in the shard refers to it; readers may still hold its bytes.
    pub fn is_unreferenced(&self) -> bool {
        self.holds == 0
            && self.captures == 0
            && self.slot.is_none()
            && self.dirty_from.is_none()
            && !self.queued
            && !self.resolving
            && !self.loading
            && self.leaf.is_none()
            && self.waiters.is_empty()
    }

    /// It has other bytes now, or none.
    pub fn set_frame(&mut self, frame: Option<Frame>) {
        self.frame = frame;
        self.residency.frame_changed();
    }
}

/// The table.
pub(super) struct Table {
    pub pages: Slab<Page>,
    index: HashMap<PageKey, usize, foldhash::fast::FixedState>,
}

impl Table {
    pub fn new(seed: u64) -> Self {
        let index = HashMap::with_hasher(foldhash::fast::FixedState::with_seed(seed));
        Table { pages: Slab::new(), index }
    }

    /// The page's index, if the table has it.
    pub fn find(&self, key: PageKey) -> Option<usize> {
        self.index.get(&key).copied()
    }

    /// The page's index, for somebody who reads or changes it; a new one is unresolved.
    pub fn get(&mut self, key: PageKey) -> usize {
        if let Some(idx) = self.find(key) {
            self.pages[idx].residency.used();
            return idx;
        }
        self.entry(key)
    }

    /// The same for what is no use of its own: a look at its version, a move, a redo.
    pub fn entry(&mut self, key: PageKey) -> usize {
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
            captures: 0,
            slot: None,
            dirty_from: None,
            queued: false,
            leaf: None,
            checkpoint_target: Lsn::ZERO,
            hold: Hold::default(),
            residency: Residency::default(),
            waiters: SmallVec::new(),
        });
        self.index.insert(key, idx);
        idx
    }

    pub fn remove(&mut self, idx: usize) {
        let page = self.pages.remove(idx);
        self.index.remove(&page.key);
    }

    /// A hash of the key, for the eviction policy.
    pub fn hash(&self, key: PageKey) -> u64 {
        self.index.hasher().hash_one(key)
    }

    /// How page `idx` stands, if `block` holds its bytes.
    pub fn standing(&self, idx: usize, block: u32) -> Standing {
        let Some(page) = self.pages.get(idx) else { return Standing::Gone };
        match &page.frame {
            Some(frame) if frame.block() == block => match page.is_unreferenced() {
                false => Standing::Referenced,
                true if frame.pins() > 0 => Standing::Pinned,
                true => Standing::Idle,
            },
            _ => Standing::Gone,
        }
    }

    /// Drops a page with its memory; returns the hash of its key.
    pub fn evict(&mut self, idx: usize) -> u64 {
        let key = self.pages[idx].key;
        self.remove(idx);
        self.hash(key)
    }
}

/// Who waits for a node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeWaiter {
    Page(usize),
    Request(usize),
    /// A node that compaction moves.
    Move,
}

/// A node that is to be read.
pub(super) struct NodeWanted {
    pub key: NodeKey,
    pub child: Child,
    /// Pinned meanwhile: a node is in memory only while its parent is.
    parent: Option<NodeIdx>,
}

/// One page of a read under way.
pub(super) struct PageRead {
    pub page: usize,
    pub entry: Entry,
}

impl Shard {
    /// Registers that pending request `waiter` needs page `idx` (resolved; with its data if `data`). Returns true
    /// if it has it already; else the waiter is told later.
    pub(super) fn want(&mut self, idx: usize, data: bool, waiter: usize) -> bool {
        if self.table.pages[idx].has(data) {
            return true;
        }
        self.table.pages[idx].waiters.push((waiter, data));
        self.advance_page(idx);
        false
    }

    /// Takes the next step for a page that somebody waits for.
    pub(super) fn advance_page(&mut self, idx: usize) {
        let page = &self.table.pages[idx];
        if !page.resolved && !page.resolving {
            match self.map.lookup(page.key) {
                Lookup::Found(entry) => self.resolve(idx, entry),
                Lookup::Load(key, child) => {
                    self.table.pages[idx].resolving = true;
                    self.want_node(key, child, NodeWaiter::Page(idx));
                }
            }
        }
        let page = &mut self.table.pages[idx];
        let wants_data = page.waiters.iter().any(|(_, data)| *data);
        if page.resolved && !page.absent && page.frame.is_none() && !page.loading && wants_data {
            page.loading = true;
            self.reads_wanted.push(idx);
        }
        self.wake_waiters(idx);
    }

    fn resolve(&mut self, idx: usize, entry: Option<Entry>) {
        let page = &mut self.table.pages[idx];
        page.resolved = true;
        page.absent = entry.is_none();
        page.lsn = entry.map_or(Lsn::ZERO, |e| e.lsn());
        page.mapped_lsn = page.lsn;
        page.entry = entry;
    }

    /// Tells those whose need is met.
    pub(super) fn wake_waiters(&mut self, idx: usize) {
        let page = &mut self.table.pages[idx];
        if page.waiters.is_empty() {
            return;
        }
        let mut met: SmallVec<[usize; 4]> = SmallVec::new();
        let (resolved, all) = (page.has(false), page.has(true));
        page.waiters.retain(|(waiter, data)| {
            let has = if *data { all } else { resolved };
            if has {
                met.push(*waiter);
            }
            !has
        });
        for waiter in met {
            self.need_met(waiter, None);
        }
    }

    fn fail_waiters(&mut self, idx: usize, error: &Error) {
        for (waiter, _) in std::mem::take(&mut self.table.pages[idx].waiters) {
            self.need_met(waiter, Some(error.clone()));
        }
    }

    /// Asks for a node to be read, or joins those who wait for it.
    pub(super) fn want_node(&mut self, key: NodeKey, child: Child, waiter: NodeWaiter) {
        let waiters = self.node_waiters.entry(key).or_default();
        waiters.push(waiter);
        if waiters.len() == 1 {
            let parent = self.map.pin_parent(key);
            self.nodes_wanted.push(NodeWanted { key, child, parent });
        }
    }

    /// Submits the reads that were asked for in this turn, sorted and merged.
    pub(super) fn submit_reads(&mut self) {
        while let Some(wanted) = self.nodes_wanted.pop() {
            if !self.ensure_frames(1) {
                self.nodes_wanted.push(wanted);
                self.memory_short = true;
                break;
            }
            let frame = self.arena.alloc(0).expect("a frame was ensured");
            let offset = wanted.child.place().offset(self.limits.geometry.extent_bytes);
            let into = std::iter::once(frame).collect();
            self.submit(OpKind::NodeRead(wanted), DiskOp::Read { file: FileId::Data, offset, into });
        }
        let mut blocks = Vec::new();
        let mut later = Vec::new();
        for idx in std::mem::take(&mut self.reads_wanted) {
            let page = &mut self.table.pages[idx];
            match page.entry {
                Some(entry) if page.frame.is_none() && !page.absent && entry.lsn() == page.lsn => {
                    if self.ensure_frames(1) {
                        let frame = self.arena.alloc(0).expect("a frame was ensured");
                        blocks.push((entry.place(), (PageRead { page: idx, entry }, frame)));
                    } else {
                        later.push(idx);
                    }
                }
                _ => {
                    page.loading = false;
                    self.reference_ended(idx);
                }
            }
        }
        self.memory_short |= !later.is_empty();
        self.reads_wanted = later;
        let runs = coalesce::plan(blocks, self.limits.vectored_pages_max);
        let runs = coalesce::bridge(runs, READ_GAP_MAX, self.limits.vectored_pages_max);
        for run in runs {
            self.submit_read(run);
        }
    }

    /// One operation for a run of pages, or, without memory for what lies between them, one for each.
    fn submit_read(&mut self, run: coalesce::Run<Option<(PageRead, Frame)>>) {
        let gaps = run.items.iter().filter(|item| item.is_none()).count() as u32;
        let bridges = gaps == 0 || self.ensure_frames(gaps);
        let (mut reads, mut into, mut first) = (Vec::new(), SmallVec::new(), run.place);
        for (block, item) in (run.place.block..).zip(run.items) {
            match item {
                Some((read, frame)) => {
                    reads.push(Some(read));
                    into.push(frame);
                }
                None if bridges => {
                    reads.push(None);
                    into.push(self.arena.alloc(0).expect("frames were ensured"));
                }
                None => {
                    self.submit_page_read(first, std::mem::take(&mut reads), std::mem::take(&mut into));
                    first.block = block + 1;
                }
            }
        }
        self.submit_page_read(first, reads, into);
    }

    fn submit_page_read(&mut self, first: Place, reads: Vec<Option<PageRead>>, into: SmallVec<[Frame; 4]>) {
        if !reads.is_empty() {
            let offset = first.offset(self.limits.geometry.extent_bytes);
            self.submit(OpKind::PageRead(reads), DiskOp::Read { file: FileId::Data, offset, into });
        }
    }

    /// Ends the reads that wait for memory.
    pub(super) fn refuse_reads(&mut self, error: &Error) {
        for idx in std::mem::take(&mut self.reads_wanted) {
            self.table.pages[idx].loading = false;
            self.fail_waiters(idx, error);
            self.reference_ended(idx);
        }
        for wanted in std::mem::take(&mut self.nodes_wanted) {
            self.node_arrived(wanted, Err(error.clone()));
        }
    }

    /// Pages arrive from the device.
    pub(super) fn pages_read(&mut self, reads: Vec<Option<PageRead>>, completion: Completion) {
        let DiskOp::Read { into, .. } = completion.op else { unreachable!("a read completes as a read") };
        for (read, frame) in reads.into_iter().zip(into) {
            let Some(read) = read else { continue };
            let page = &mut self.table.pages[read.page];
            page.loading = false;
            if page.frame.is_some() || page.absent || page.entry != Some(read.entry) {
                // Changed or moved since: these bytes are not its content any more.
                self.advance_page(read.page);
                self.reference_ended(read.page);
                continue;
            }
            let result = match &completion.result {
                Ok(()) => self.check_page(read.page, &read.entry, &frame),
                Err(_) if planted!(ReadErrorForgotten) => Ok(()),
                Err(error) => Err(error.clone()),
            };
            match result {
                Ok(()) => {
                    self.table.pages[read.page].set_frame(Some(frame));
                    self.wake_waiters(read.page);
                }
                Err(error) => self.fail_waiters(read.page, &error),
            }
            self.reference_ended(read.page);
        }
    }

    fn check_page(&mut self, idx: usize, entry: &Entry, bytes: &[u8]) -> Result<(), Error> {
        self.stats.checksums += 1;
        let key = self.table.pages[idx].key;
        if entry.len.get() as usize != bytes.len() || entry.class != 0 || entry.codec != 0 || entry.key_id.get() != 0 {
            return Err(Error::corrupt(format_args!(
                "page {key:?}: the page map describes it in a way that this version does not write; run `corepage verify`"
            )));
        }
        if crate::checksum::crc32c(bytes) != entry.crc.get() && !planted!(PageSumIgnored) {
            return Err(damaged(&format!("page {key:?} ({:?})", entry.lsn()), entry.place()));
        }
        Ok(())
    }

    /// A node arrives from the device.
    pub(super) fn node_read(&mut self, wanted: NodeWanted, completion: Completion) {
        let NodeWanted { key, child, .. } = wanted;
        let DiskOp::Read { mut into, .. } = completion.op else { unreachable!("a read completes as a read") };
        let frame = into.pop().expect("a node is one frame");
        self.stats.checksums += 1;
        let result = match completion.result {
            Ok(()) if crate::checksum::crc32c(&frame) == child.crc.get() => Ok(()),
            Ok(()) if planted!(NodeSumIgnored) => Ok(()),
            Ok(()) => Err(damaged(&format!("map node {key:?}"), child.place())),
            Err(error) => Err(error),
        };
        let is_current = match &result {
            Ok(()) => self.map.insert_loaded(key, child, frame),
            Err(_) => self.map.names(key, child),
        };
        if !is_current {
            self.stats.nodes_overtaken += 1;
        }
        // Of a node that is not part of the tree any more, not even damage matters.
        self.node_arrived(wanted, if is_current { result } else { Ok(()) });
    }

    /// The node is in memory, or was overtaken by a change of the tree, or will not come: those who wait for it look up again.
    fn node_arrived(&mut self, wanted: NodeWanted, result: Result<(), Error>) {
        let key = wanted.key;
        wanted.parent.into_iter().for_each(|parent| self.map.unpin(parent));
        for waiter in self.node_waiters.remove(&key).unwrap_or_default() {
            match waiter {
                NodeWaiter::Page(idx) => {
                    self.table.pages[idx].resolving = false;
                    match &result {
                        Ok(()) => self.advance_page(idx),
                        Err(error) => self.fail_waiters(idx, error),
                    }
                    self.reference_ended(idx);
                }
                NodeWaiter::Request(waiter) => self.need_met(waiter, result.clone().err()),
                NodeWaiter::Move => self.node_move_read(result.clone().err()),
            }
        }
    }
}

/// The error for bytes that are not what was written.
pub(super) fn damaged(what: &str, place: Place) -> Error {
    Error::corrupt(format_args!(
        "{what} at extent {}, block {} of the data file is damaged: its checksum is wrong; run `corepage verify`",
        place.extent.get(),
        place.block
    ))
}
