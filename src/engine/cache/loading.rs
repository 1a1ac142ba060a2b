//! Reads map nodes and pages: which requests wait for what, which goes first, and what arrives.
//!
//! ```text
//! wanted (oldest request first) --a frame is free--> under way, its parent pinned
//!                               --> arrived, checked --> the requests that wait go on
//! ```
//! Invariants
//! 1. The oldest request gets the first frame, and proceeds from node to node before younger ones:
//!    so each reaches its page, however many requests there are and however little memory. Nodes
//!    and pages take turns.
//! 2. Nothing is pinned for a read that waits. When its turn comes, the path to it may have left
//!    memory: then the request looks it up again.
//! 3. Bytes from the device become a page's content only if their checksum is the entry's, and the
//!    entry is still the page's: a page changed meanwhile ignores a late read.
//! 4. An unreadable block fails no other page: what was read together is then read separately.

use crate::base::error::Error;
use crate::base::{BlockAddr, NodeMoveIdx, PageIdx, RequestIdx};
use crate::engine::Work;
use crate::engine::codec;
use crate::engine::op_kind::{NodeWanted, PageRead};
use crate::engine::writeback::plan;
use crate::engine::{OpKind, Shard, Step};
use crate::format::extent::NodeKey;
use crate::format::node::{Child, Entry};
use crate::io::{Completion, DiskOp, FileId};
use crate::memory::Frame;
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// The most blocks between two reads that are also read to merge the two. With more, the bytes cost
/// what the operations save (see decision 14).
const READ_GAP_MAX: u32 = 1;

/// Reads that wait for memory.
#[derive(Default)]
pub(in crate::engine) struct Wanted {
    /// Nodes, by the age of the request: the oldest goes first, so that it reaches its leaf
    /// whatever others need.
    pub nodes: BTreeMap<u64, NodeWanted>,
    /// The age that was assigned last.
    asked_last: u64,
    pub pages: Vec<PageIdx>,
    /// Whether page reads were left without a frame: then they come before nodes the next time.
    pages_first: bool,
}

impl Wanted {
    /// The age for a request that needs a node for the first time.
    pub fn next_age(&mut self) -> u64 {
        self.asked_last += 1;
        self.asked_last
    }
}

/// Who waits for a node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum NodeWaiter {
    Page(PageIdx),
    Request(RequestIdx),
    /// A node that compaction moves, by its number in `Moves`.
    Move(NodeMoveIdx, u64),
}

/// Everything that waits for a node.
#[derive(Default)]
pub(in crate::engine) struct NodeWaiters {
    /// The age of the oldest, by which the node is wanted.
    asked: u64,
    pub list: Vec<NodeWaiter>,
}

impl Shard {
    /// Requests the read of a node, or joins those that wait for it. A request that proceeds from
    /// the node above keeps its turn.
    pub(in crate::engine) fn want_node(&mut self, key: NodeKey, child: Child, waiter: NodeWaiter) {
        let asked = match waiter {
            NodeWaiter::Page(idx) => &mut self.cache.table.pages[idx].asked,
            NodeWaiter::Request(waiter) => &mut self.requests.pending[waiter].asked,
            NodeWaiter::Move(_, asked) => &mut { asked },
        };
        if *asked == 0 {
            *asked = self.cache.wanted.next_age();
        }
        let asked = *asked;
        let waiters = self.cache.node_waiters.entry(key).or_default();
        waiters.list.push(waiter);
        let wanted = match waiters.list.len() {
            1 => Some(NodeWanted { key, child, parent: None }),
            // A read is as old as the oldest request that waits for it: otherwise a request between
            // them in age would go first, and take its path.
            _ if asked < waiters.asked => self.cache.wanted.nodes.remove(&waiters.asked),
            _ => None,
        };
        if let Some(wanted) = wanted {
            assert!(
                wanted.key == key,
                "{key:?} is wanted at {}, and not {:?}",
                waiters.asked,
                wanted.key
            );
            waiters.asked = asked;
            let before = self.cache.wanted.nodes.insert(asked, wanted);
            assert!(before.is_none(), "whoever asks asks for one node at a time");
            self.ctx.need(Work::Reads);
        }
    }

    /// Submits the waiting reads, nodes and pages in turns if there is no memory for all.
    pub(in crate::engine) fn submit_reads(&mut self) {
        if self.cache.wanted.nodes.is_empty() && self.cache.wanted.pages.is_empty() {
            return;
        }
        if self.cache.wanted.pages_first {
            self.submit_page_reads();
            self.submit_node_reads();
        } else {
            self.submit_node_reads();
            self.submit_page_reads();
        }
        self.cache.wanted.pages_first =
            !self.cache.wanted.pages_first && !self.cache.wanted.pages.is_empty();
    }

    fn submit_node_reads(&mut self) {
        while let Some((asked, wanted)) = self.cache.wanted.nodes.pop_first() {
            let NodeWanted { key, child, .. } = wanted;
            // While it waited for memory, the node above may have left it: then the request looks
            // it up again.
            if !self.map.names(key, child) || self.map.is_resident(key) {
                self.node_arrived(wanted, Ok(()));
                continue;
            }
            let parent = self.map.pin_parent(key);
            if !self.ensure_frames(1, Step::NodeRead) {
                parent.into_iter().for_each(|parent| self.map.unpin(parent));
                self.cache.wanted.nodes.insert(asked, wanted);
                return;
            }
            let frame = self.ctx.arena.alloc(0).expect("a frame was ensured");
            let offset = child.place().offset(self.ctx.limits.geometry.extent_bytes);
            let into = std::iter::once(frame).collect();
            let wanted = NodeWanted { parent, ..wanted };
            self.ctx.stats.node_reads += 1;
            self.ctx.submit(
                OpKind::NodeRead(wanted),
                DiskOp::Read { file: FileId::Data, offset, into },
            );
        }
    }

    /// Page reads, sorted and merged.
    fn submit_page_reads(&mut self) {
        let mut blocks = Vec::new();
        let mut wanted = std::mem::take(&mut self.cache.wanted.pages).into_iter();
        for idx in wanted.by_ref() {
            let page = &mut self.cache.table.pages[idx];
            assert!(page.loading, "{:?} is to be read, and does not say so", page.key);
            match page.entry {
                Some(entry) if page.frame.is_none() && !page.absent && entry.lsn() == page.lsn => {
                    if !self.ensure_frames(1, Step::PageRead) {
                        self.cache.wanted.pages.push(idx);
                        break;
                    }
                    let frame = self.ctx.arena.alloc(0).expect("a frame was ensured");
                    blocks.push((entry.place(), (PageRead { page: idx, entry }, frame)));
                }
                _ => {
                    page.loading = false;
                    self.reference_ended(idx);
                }
            }
        }
        self.cache.wanted.pages.extend(wanted);
        for run in plan::reads(blocks, READ_GAP_MAX, self.ctx.limits.vectored_pages_max) {
            self.submit_read(run);
        }
    }

    /// Submits one operation for a run of pages or, without memory for the blocks between them, one
    /// for each.
    fn submit_read(&mut self, run: plan::Run<Option<(PageRead, Frame)>>) {
        let wanted = run.items.iter().filter(|item| item.is_some()).count();
        assert!(wanted > 0, "a read of {} blocks that nobody wants", run.items.len());
        let gaps = run.items.iter().filter(|item| item.is_none()).count() as u32;
        let bridges = gaps == 0
            || self.find_frames(
                gaps + self.reservations.parts.frames + self.reservations.checkpoint_frames,
            );
        let (mut reads, mut into, mut first) = (Vec::new(), SmallVec::new(), run.place);
        for (block, item) in (run.place.block..).zip(run.items) {
            match item {
                Some((read, frame)) => {
                    reads.push(Some(read));
                    into.push(frame);
                }
                None if bridges => {
                    reads.push(None);
                    into.push(self.ctx.arena.alloc(0).expect("frames were ensured"));
                }
                None => {
                    self.submit_page_read(
                        first,
                        std::mem::take(&mut reads),
                        std::mem::take(&mut into),
                    );
                    first.block = block + 1;
                }
            }
        }
        self.submit_page_read(first, reads, into);
    }

    fn submit_page_read(
        &mut self,
        first: BlockAddr,
        reads: Vec<Option<PageRead>>,
        into: SmallVec<[Frame; 4]>,
    ) {
        assert!(
            reads.len() == into.len(),
            "{} pages are read into {} frames",
            reads.len(),
            into.len()
        );
        if !reads.is_empty() {
            let offset = first.offset(self.ctx.limits.geometry.extent_bytes);
            self.count_page_read(&reads);
            self.ctx
                .submit(OpKind::PageRead(reads), DiskOp::Read { file: FileId::Data, offset, into });
        }
    }

    /// Ends the first of the page reads that wait for memory, and what else its readers wait for.
    pub(in crate::engine) fn refuse_page_read(&mut self, error: &Error) {
        if !self.cache.wanted.pages.is_empty() {
            let idx = self.cache.wanted.pages.remove(0);
            self.give_page_up(idx, error);
        }
        self.give_up_what_nobody_needs(error);
    }

    /// Ends the first of the node reads that wait for memory, and what else those who wait for it
    /// wait for.
    pub(in crate::engine) fn refuse_node_read(&mut self, error: &Error) {
        if let Some((_, wanted)) = self.cache.wanted.nodes.pop_first() {
            self.node_arrived(wanted, Err(error.clone()));
        }
        self.give_up_what_nobody_needs(error);
    }

    fn give_page_up(&mut self, idx: PageIdx, error: &Error) {
        let page = &mut self.cache.table.pages[idx];
        assert!(page.loading, "{:?} is given up, and was not wanted", page.key);
        page.loading = false;
        self.fail_waiters(idx, error);
        self.reference_ended(idx);
    }

    /// Ends the reads for which only failed requests wait. Otherwise a read of many pages would be
    /// refused for each of them in turn, and would keep the pages that it has from others until the
    /// last one.
    fn give_up_what_nobody_needs(&mut self, error: &Error) {
        let wanted = self.cache.wanted.nodes.iter();
        let nodes: Vec<u64> =
            wanted.filter(|(_, node)| !self.is_node_needed(node.key)).map(|(at, _)| *at).collect();
        for at in nodes {
            let wanted = self.cache.wanted.nodes.remove(&at).expect("just seen");
            self.node_arrived(wanted, Err(error.clone()));
        }
        let pages = std::mem::take(&mut self.cache.wanted.pages);
        let (needed, unneeded) = pages.into_iter().partition(|idx| self.is_page_needed(*idx));
        self.cache.wanted.pages = needed;
        let unneeded: Vec<PageIdx> = unneeded;
        unneeded.into_iter().for_each(|idx| self.give_page_up(idx, error));
    }

    fn is_node_needed(&self, key: NodeKey) -> bool {
        let waiters = self.cache.node_waiters.get(&key).map_or(&[][..], |waiters| &waiters.list);
        waiters.iter().any(|waiter| match *waiter {
            NodeWaiter::Page(idx) => self.is_page_needed(idx),
            NodeWaiter::Request(waiter) => self.requests.pending[waiter].error.is_none(),
            NodeWaiter::Move(..) => true,
        })
    }

    fn is_page_needed(&self, idx: PageIdx) -> bool {
        self.cache.table.pages[idx]
            .waiters()
            .any(|waiter| self.requests.pending[waiter].error.is_none())
    }

    /// Pages arrive from the device.
    pub(in crate::engine) fn pages_read(
        &mut self,
        reads: Vec<Option<PageRead>>,
        completion: Completion,
    ) {
        let DiskOp::Read { into, .. } = completion.op else {
            unreachable!("a read completes as a read")
        };
        assert!(reads.len() == into.len(), "{} pages come in {} frames", reads.len(), into.len());
        if completion.result.is_err() && reads.len() > 1 {
            return self.read_apart(reads, into);
        }
        for (read, frame) in reads.into_iter().zip(into) {
            let Some(read) = read else { continue };
            let page = &mut self.cache.table.pages[read.page];
            assert!(page.loading, "{:?} arrives, and was not being read", page.key);
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
                    self.cache.table.set_frame(read.page, Some(frame));
                    self.cache.table.pages[read.page].assert_state();
                    self.wake_waiters(read.page);
                }
                Err(error) => self.fail_waiters(read.page, &error),
            }
            self.reference_ended(read.page);
        }
    }

    /// Reads each page of a failed operation separately: the unreadable block may be one of them,
    /// or lie between them.
    fn read_apart(&mut self, reads: Vec<Option<PageRead>>, into: SmallVec<[Frame; 4]>) {
        for (read, frame) in reads.into_iter().zip(into) {
            if let Some(read) = read {
                self.submit_page_read(
                    read.entry.place(),
                    vec![Some(read)],
                    std::iter::once(frame).collect(),
                );
            }
        }
    }

    fn check_page(&mut self, idx: PageIdx, entry: &Entry, bytes: &[u8]) -> Result<(), Error> {
        self.ctx.stats.checksums += 1;
        let key = self.cache.table.pages[idx].key;
        match codec::open(entry, bytes) {
            Ok(_) => Ok(()),
            Err(codec::Refusal::Damaged) if planted!(PageSumIgnored) => Ok(()),
            Err(codec::Refusal::Damaged) => {
                Err(damaged(&format!("page {key:?} ({:?})", entry.lsn()), entry.place()))
            }
            Err(codec::Refusal::Unknown) => Err(Error::corrupt(format_args!(
                "page {key:?}: the page map describes it in a way that this version does not \
                 write; run `corepage verify`"
            ))),
        }
    }

    /// A node arrives from the device.
    pub(in crate::engine) fn node_read(&mut self, wanted: NodeWanted, completion: Completion) {
        let NodeWanted { key, child, .. } = wanted;
        let DiskOp::Read { mut into, .. } = completion.op else {
            unreachable!("a read completes as a read")
        };
        let frame = into.pop().expect("a node is one frame");
        self.ctx.stats.checksums += 1;
        let result = match completion.result {
            Ok(())
                if crate::base::checksum::crc32c(&frame) == child.crc.get()
                    || planted!(NodeSumIgnored) =>
            {
                Ok(())
            }
            Ok(()) => Err(damaged(&format!("map node {key:?}"), child.place())),
            Err(error) => Err(error),
        };
        let is_current = match &result {
            Ok(()) => self.map.insert_loaded(key, child, frame),
            Err(_) => self.map.names(key, child),
        };
        if !is_current {
            self.ctx.stats.nodes_overtaken += 1;
        }
        // If a node is no longer part of the tree, not even damage to it matters.
        self.node_arrived(wanted, if is_current { result } else { Ok(()) });
    }

    /// Called when the node is in memory, or was overtaken by a change of the tree, or will not
    /// arrive: everything that waits for it looks it up again.
    fn node_arrived(&mut self, wanted: NodeWanted, result: Result<(), Error>) {
        let key = wanted.key;
        wanted.parent.into_iter().for_each(|parent| self.map.unpin(parent));
        let waiters = self.cache.node_waiters.remove(&key).unwrap_or_default().list;
        assert!(!waiters.is_empty(), "{key:?} comes from {:?} for nobody", wanted.child.place());
        for waiter in waiters {
            match waiter {
                NodeWaiter::Page(idx) => {
                    let page = &mut self.cache.table.pages[idx];
                    assert!(page.resolving, "{:?} gets {key:?}, and did not wait for it", page.key);
                    page.resolving = false;
                    match &result {
                        Ok(()) => self.advance_page(idx),
                        Err(error) => self.fail_waiters(idx, error),
                    }
                    self.reference_ended(idx);
                }
                NodeWaiter::Request(waiter) => {
                    self.requests.need_met(waiter, result.clone().err(), &mut self.ctx)
                }
                NodeWaiter::Move(no, _) => {
                    self.cache.moves_ended.push((no, result.clone().err()));
                    self.ctx.need(Work::Moves);
                }
            }
        }
    }
}

/// The error for bytes that are not what was written.
pub(in crate::engine) fn damaged(what: &str, place: BlockAddr) -> Error {
    Error::corrupt(format_args!(
        "{what} at extent {}, block {} of the data file is damaged: its checksum is wrong; run \
         `corepage verify`",
        place.extent.get(),
        place.block
    ))
}
