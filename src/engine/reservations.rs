//! Counts what is promised before it is used: frames, blocks of log and data space, and the heap
//! that requests take. Admission looks here, and nowhere else, for what is no longer free.
//!
//! Invariants
//! 1. Each promise raises its count once, and its use or release lowers it once; the audit recounts
//!    all of them.
//! 2. Nothing else takes what parts of commits over shards and checkpoints have reserved.
//!
//! It decides nothing: see `txn::admission`, `space` and `budget`.

use super::{Change, Commit};
use crate::base::VolumeId;
use crate::base::options::Limits;
use crate::engine::map::Map;
use crate::format::group::{RawChange, RawParts, RawRecord};
use crate::format::node::LEAF_ENTRIES;
use crate::memory::Arena;

/// The part of the memory in which requests in progress may keep pages; another request begins only
/// below it.
pub(super) const HELD_PAGES_SHARE: usize = 4;

/// The fewest frames left to checkpoints: some roots, or blocks of the extent table.
const CHECKPOINT_FRAMES_MIN: u32 = 8;

/// How many of 32 parts of the frames dirty map nodes may take (a third of the memory, including
/// tables), and at how many a checkpoint is requested. Under random overwrites every leaf is soon
/// dirty: a 64th of what is overwritten. Where all leaves fit here, a checkpoint comes only for
/// space or for the log, and serves many pages; where they don't, nearly every page written costs a
/// leaf.
const DIRTY_NODES_MAX: u64 = 12;
const DIRTY_NODES_MANY: u64 = 10;

/// Whether no more map nodes may become dirty.
pub(super) fn dirty_nodes_fill_memory(map: &Map, limits: &Limits) -> bool {
    map.dirty_count() as u64 > u64::from(limits.memory_blocks) * DIRTY_NODES_MAX / 32
}

/// Whether so many map nodes are dirty that a checkpoint should come before there are more.
pub(super) fn dirty_nodes_are_many(map: &Map, limits: &Limits) -> bool {
    map.dirty_count() as u64 > u64::from(limits.memory_blocks) * DIRTY_NODES_MANY / 32
}

/// Everything that a shard has promised.
pub(super) struct Reservations {
    /// Frames of the arena.
    frames: u32,
    /// Frames that are taken for good: log buffers, and those of the superblock.
    pub fixed_frames: u32,
    /// Frames that are left to checkpoints. A checkpoint can always write in parts of this size and
    /// gets the frames back: so it ends even while readers have pinned all the rest.
    pub checkpoint_frames: u32,
    /// Pages whose bytes requests in progress need in memory, counted once for each need.
    pub held_pages: usize,
    /// Pages that compaction is about to move, and nodes that must be read before it moves them.
    pub moves: usize,
    /// The heap that requests of callers take, in bytes (see `budget`).
    pub request_bytes: u64,
    /// Blocks of data space that dirty pages and page images of the open group will take.
    pub dirty_blocks: u64,
    /// Versions of pages that have left the dirty pages and are not in the map yet.
    pub unpublished: u64,
    /// Those versions that free a page: each keeps an entry in the page table until then.
    pub frees_unpublished: u64,
    /// Reservations for parts of commits over shards.
    pub parts: Reserved,
}

impl Reservations {
    /// The reservations at the start: what is already taken from `arena`, and what a checkpoint
    /// needs if its summaries have `summary_blocks` blocks.
    pub fn new(arena: &mut Arena, summary_blocks: u32) -> Self {
        Reservations {
            frames: arena.blocks(),
            fixed_frames: arena.blocks() - arena.free_blocks(),
            checkpoint_frames: summary_blocks.max(CHECKPOINT_FRAMES_MIN),
            held_pages: 0,
            moves: 0,
            request_bytes: 0,
            dirty_blocks: 0,
            unpublished: 0,
            frees_unpublished: 0,
            parts: Reserved::default(),
        }
    }

    /// Frames that are not taken for good.
    pub fn usable_frames(&self) -> u32 {
        self.frames - self.fixed_frames
    }

    /// Whether requests in progress leave most of the memory to those in front of them, which may
    /// need it to end.
    pub fn holds_little(&self) -> bool {
        self.held_pages <= self.usable_frames() as usize / HELD_PAGES_SHARE
    }

    /// The same for parts of commits over shards: they can't wait, so they get a little more.
    pub fn holds_little_for_parts(&self) -> bool {
        self.held_pages <= self.usable_frames() as usize / HELD_PAGES_SHARE * 3 / 2
    }
}

/// What parts with a `Yes` vote may still need.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Reserved {
    /// Parts.
    pub count: usize,
    /// Blocks of log, if each part is in a group of its own.
    pub log_blocks: u32,
    /// Frames for new versions.
    pub frames: u32,
    /// Pages that become dirty.
    pub changes: u64,
    /// Blocks of data space, map nodes included.
    pub space_blocks: u64,
}

impl Reserved {
    pub fn plus(self, other: Reserved) -> Reserved {
        Reserved {
            count: self.count + other.count,
            log_blocks: self.log_blocks + other.log_blocks,
            frames: self.frames + other.frames,
            changes: self.changes + other.changes,
            space_blocks: self.space_blocks + other.space_blocks,
        }
    }

    pub fn minus(self, other: Reserved) -> Reserved {
        Reserved {
            count: self.count - other.count,
            log_blocks: self.log_blocks - other.log_blocks,
            frames: self.frames - other.frames,
            changes: self.changes - other.changes,
            space_blocks: self.space_blocks - other.space_blocks,
        }
    }
}

/// The needs of a commit.
#[derive(Clone, Copy, Default)]
pub(super) struct Need {
    /// Bytes of records.
    pub record_bytes: usize,
    /// Whole pages, each an image.
    pub images: usize,
    /// Frames for new versions.
    pub frames: u32,
    /// Changes: each may dirty a page.
    pub changes: u64,
    /// Map nodes that the changes may dirty.
    pub nodes: u64,
    /// Whether it makes room: it only frees pages, or changes the catalog, as a deletion does. Then
    /// it may use a reserve.
    pub makes_room: bool,
}

impl Need {
    pub fn of(commit: &Commit, map: &Map) -> Need {
        let record_bytes = size_of::<RawRecord>() + size_of::<RawParts>();
        let mut need = Need { record_bytes, makes_room: true, ..Need::default() };
        let mut last = None;
        for (key, change) in &commit.changes {
            // Pages of one leaf share its path.
            let leaf = (key.volume, key.page.get() / LEAF_ENTRIES as u64);
            if last.replace(leaf) != Some(leaf) {
                need.nodes += map.path_len(*key);
            }
            need.record_bytes += size_of::<RawChange>();
            match change {
                Change::Put(_) => need.images += 1,
                Change::Patch { bytes, .. } => need.record_bytes += bytes.len(),
                Change::Free => continue,
            }
            need.frames += 1;
            // The catalog has 255 pages, so these can't use the reserve up.
            need.makes_room &= key.volume == VolumeId::CATALOG;
        }
        need.changes = commit.changes.len() as u64;
        need
    }

    /// Blocks of data space that the commit may take: for each page written, one as an image and
    /// another later, and its map nodes on top. A freed page takes none.
    pub fn blocks(&self) -> u64 {
        2 * u64::from(self.frames) + self.nodes
    }

    pub fn plus(self, other: Need) -> Need {
        Need {
            record_bytes: self.record_bytes + other.record_bytes,
            images: self.images + other.images,
            frames: self.frames + other.frames,
            changes: self.changes + other.changes,
            nodes: self.nodes + other.nodes,
            makes_room: other.makes_room,
        }
    }
}
