//! Compares the page map with a simple one: any order of changes, checkpoints, evictions and
//! reopenings, even between the request for a node and its arrival.
//!
//! If this fails, a page is lost, an old version comes back, or a scan misses a page; or places
//! leak.

use super::{LEAF_PAGES, Lookup, Map, NextLeaf};
use crate::base::checksum::crc32c;
use crate::base::{BLOCK, BlockAddr, ExtentNo, Lsn, NodeIdx, PageId, PageKey, VShard, VolumeId};
use crate::format::extent::NodeKey;
use crate::format::node::{Child, Entry};
use crate::format::root::VOLUMES_MAX;
use crate::format::superblock::RootVersion;
use crate::memory::Arena;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

mod growth;

const VSHARDS: u16 = 4;
const CHILDREN: usize = BLOCK / size_of::<Child>();

/// The map under test, the nodes that it has written and that are not retired, and the expected
/// entries.
struct Store {
    map: Map,
    arena: Arena,
    nodes: BTreeMap<BlockAddr, Vec<u8>>,
    next_place: u64,
    model: BTreeMap<PageKey, Entry>,
    lsn: u64,
    /// Nodes that are being read; each once, as in the shard.
    reads: Vec<Reading>,
    /// Nodes that were dropped when they arrived.
    overtaken: u64,
}

/// A node on its way from the device.
struct Reading {
    at: NodeKey,
    child: Child,
    bytes: Vec<u8>,
    parent: Option<NodeIdx>,
}

/// Few pages that are close, and some so far apart that trees must grow.
fn key(pick: u16) -> PageKey {
    let id = match pick % 16 {
        0 => u64::MAX,
        1 => 1 << 60,
        2 => u64::from(pick) << 40,
        3 | 4 => u64::from(pick / 16) << 14,
        _ => u64::from(pick / 16) % 700,
    };
    PageKey::new(VolumeId::new([0, 1, 200][usize::from(pick / 7 % 3)]), PageId::new(id))
}

fn fresh(arena: &mut Arena, bytes: &[u8]) -> crate::memory::Frame {
    let mut frame = arena.alloc(0).expect("the arena is large enough");
    frame.try_mut().expect("a new frame has no pins").copy_from_slice(bytes);
    frame
}

impl Store {
    fn new() -> Store {
        let roots = (0..VSHARDS)
            .map(|_| (Box::new([Child::default(); VOLUMES_MAX]), RootVersion::default()))
            .collect();
        let arena = Arena::new(if cfg!(miri) { 256 } else { 8192 }).expect("memory");
        let (nodes, model, reads) = Default::default();
        Store {
            map: Map::new(roots, 3),
            arena,
            nodes,
            next_place: 1,
            model,
            lsn: 0,
            reads,
            overtaken: 0,
        }
    }

    /// Requests a node, or joins those that have.
    fn begin_read(&mut self, at: NodeKey, child: Child) {
        if self.reads.iter().any(|read| read.at == at) {
            return;
        }
        let bytes = self
            .nodes
            .get(&child.place())
            .expect("a node is read from where it was written, and not retired");
        assert_eq!(crc32c(bytes), child.crc.get(), "the sum of {at:?}");
        let (bytes, parent) = (bytes.clone(), self.map.pin_parent(at));
        self.reads.push(Reading { at, child, bytes, parent });
    }

    /// Lets one of the nodes that are being read arrive.
    fn arrive(&mut self, which: usize) {
        let Reading { at, child, bytes, parent } = self.reads.swap_remove(which);
        let frame = fresh(&mut self.arena, &bytes);
        let taken = self.map.insert_loaded(at, child, frame);
        self.overtaken += u64::from(!taken);
        assert!(
            taken || parent.is_none(),
            "{at:?}: what has a parent that is pinned is not overtaken"
        );
        assert_eq!(taken, self.map.is_resident(at), "{at:?}");
        parent.into_iter().for_each(|parent| self.map.unpin(parent));
        self.audit();
    }

    /// Requests a node and waits for it, but not for the others.
    fn load(&mut self, at: NodeKey, child: Child) {
        self.begin_read(at, child);
        let which = self.reads.iter().position(|read| read.at == at).expect("it is being read");
        self.arrive(which);
    }

    fn audit(&self) {
        self.map.audit().expect("the map's counts are right");
    }

    /// Nodes that reads in flight keep in memory.
    fn parents(&self) -> BTreeSet<NodeIdx> {
        self.reads.iter().filter_map(|read| read.parent).collect()
    }

    fn lookup(&mut self, key: PageKey) -> Option<Entry> {
        for _ in 0..20 {
            match self.map.lookup(key) {
                Lookup::Found(entry) => return entry,
                Lookup::Load(at, child) => self.load(at, child),
            }
        }
        panic!("a lookup without end");
    }

    fn check(&mut self, key: PageKey) {
        let expected = self.model.get(&key).copied();
        assert!(self.lookup(key) == expected, "{key:?}");
    }

    fn set(&mut self, key: PageKey, present: bool) {
        self.check(key);
        self.change(key, present);
        self.check(key);
    }

    /// Changes an entry; all existing nodes on its path have been looked up.
    fn change(&mut self, key: PageKey, present: bool) {
        let (missing, path_len) = (self.map.missing_nodes(key), self.map.path_len(key));
        let (free, dirty) = (self.arena.free_blocks(), self.map.dirty_count());
        let leaf = self.map.pin(key, &mut self.arena);
        assert!(free - self.arena.free_blocks() <= missing, "more nodes were made than was said");
        assert!(missing as u64 <= 2 * path_len, "{missing} nodes for a path of {path_len}");
        self.lsn += 1;
        let place = BlockAddr { extent: ExtentNo::new(self.lsn as u32), block: 5 };
        let entry = present.then(|| Entry::plain(place, Lsn::new(self.lsn), 77));
        let replaced = self.map.set(leaf, key, entry);
        let expected = match entry {
            Some(entry) => self.model.insert(key, entry),
            None => self.model.remove(&key),
        };
        assert!(replaced == expected, "{key:?}: another entry was replaced");
        assert!(
            self.map.dirty_count() - dirty <= missing as usize + path_len as usize,
            "more became dirty than was said"
        );
        let (vshard, page_index) = self.map.position(key);
        let top = self.map.root(vshard).children[usize::from(key.volume.get())];
        assert_eq!(path_len, u64::from(top.level) + 1);
        let mut pinned = self.parents();
        pinned.insert(leaf);
        assert_eq!(
            self.map.in_memory().1,
            pinned.len(),
            "the leaf is pinned, and parents of what is being read"
        );
        if self.lsn.is_multiple_of(8) {
            while self.map.evict_one() {}
            assert!(
                self.map.leaf_bits(vshard, key.volume, page_index).is_some(),
                "a pinned leaf was evicted"
            );
            let (in_memory, dirty) = (self.map.in_memory().0, self.map.dirty_count());
            assert!(in_memory >= dirty, "what is dirty stays");
            assert!(in_memory == dirty || pinned.len() > 1, "and nothing else");
        }
        self.map.unpin(leaf);
        self.audit();
    }

    fn capture(&mut self, vshard: VShard) {
        let dirty = self.map.dirty_in(vshard);
        let (next, mut retired) = (&mut self.next_place, Vec::new());
        let place = |_: NodeKey| {
            *next += 1;
            BlockAddr::unpack(*next)
        };
        let generation = self.map.root(vshard).version.generation;
        let writes = self.map.capture(vshard, place, &mut retired);
        assert!(
            writes.len() <= dirty && self.map.dirty_in(vshard) == 0 && !self.map.is_dirty(vshard)
        );
        assert_eq!(self.map.root(vshard).version.generation, generation + 1);
        for place in retired {
            assert!(self.nodes.remove(&place).is_some(), "{place:?} was retired and not in use");
        }
        let written: Vec<(BlockAddr, Vec<u8>, NodeIdx)> =
            writes.iter().map(|write| (write.place, write.frame.to_vec(), write.node)).collect();
        for (place, bytes, node) in written {
            assert!(self.nodes.insert(place, bytes).is_none(), "{place:?} was written twice");
            self.map.written(node);
        }
    }

    fn capture_all(&mut self) {
        (0..VSHARDS).for_each(|vshard| self.capture(VShard::new(vshard)));
        assert_eq!(self.map.dirty_count(), 0);
    }

    /// Opens the map from written nodes alone, as after a crash that follows a checkpoint.
    fn reopen(&mut self) {
        self.capture_all();
        let root = |vshard| {
            let root = self.map.root(VShard::new(vshard));
            (root.children.clone(), root.version)
        };
        self.map = Map::new((0..VSHARDS).map(root).collect(), self.lsn);
        self.reads.clear();
    }

    /// The pages of a volume in a virtual shard, as a scan finds them.
    fn scan(&mut self, vshard: VShard, volume: VolumeId) -> BTreeSet<u64> {
        let (mut found, mut from) = (BTreeSet::new(), 0);
        loop {
            match self.map.next_leaf(vshard, volume, from, u64::MAX) {
                NextLeaf::None => return found,
                NextLeaf::Load(at, child) => self.load(at, child),
                NextLeaf::Leaf(page_index) => {
                    assert!(page_index >= from);
                    let bits = self
                        .map
                        .leaf_bits(vshard, volume, page_index)
                        .expect("the leaf is in memory");
                    let first = page_index / LEAF_PAGES * LEAF_PAGES;
                    found.extend(
                        (0..LEAF_PAGES)
                            .filter(|slot| bits >> slot & 1 == 1)
                            .map(|slot| first + slot),
                    );
                    let Some(next) = first.checked_add(LEAF_PAGES) else { return found };
                    from = next;
                }
            }
        }
    }

    fn check_scans(&mut self) {
        for volume in [0, 1, 200].map(VolumeId::new) {
            for vshard in (0..VSHARDS).map(VShard::new) {
                let of = |key: &&PageKey| key.volume == volume;
                let places = self.model.keys().filter(of).map(|key| key.place_in(VSHARDS.into()));
                let expected: BTreeSet<u64> = places
                    .filter(|(v, _)| *v == vshard)
                    .map(|(_, page_index)| page_index)
                    .collect();
                assert_eq!(
                    self.scan(vshard, volume),
                    expected,
                    "a scan of {volume:?} in {vshard:?}"
                );
            }
        }
    }

    /// All nodes that a checkpoint would leave, by what its roots name.
    fn written(&mut self) -> BTreeMap<NodeKey, Child> {
        self.capture_all();
        let mut open = Vec::new();
        for vshard in (0..VSHARDS).map(VShard::new) {
            for (volume, child) in self.map.root(vshard).children.iter().enumerate() {
                let key = NodeKey {
                    vshard,
                    volume: VolumeId::new(volume as u8),
                    level: child.level,
                    prefix: 0,
                };
                open.push((key, *child));
            }
        }
        let mut reached = BTreeMap::new();
        while let Some((key, child)) = open.pop() {
            if !child.is_present() {
                continue;
            }
            let node = &self.nodes[&child.place()];
            assert_eq!(child.level, key.level);
            assert!(reached.insert(key, child).is_none(), "two parents");
            if key.level > 0 {
                let below = |slot| NodeKey {
                    level: key.level - 1,
                    prefix: key.prefix << 8 | slot as u64,
                    ..key
                };
                open.extend(
                    (0..CHILDREN).map(|slot| (below(slot), crate::format::node::child(node, slot))),
                );
            }
        }
        reached
    }

    /// Checks that each node that is written and not retired is in a tree: otherwise its place is
    /// never free again.
    fn check_leaks(&mut self) {
        let places: BTreeSet<BlockAddr> = self.written().values().map(Child::place).collect();
        assert_eq!(places, self.nodes.keys().copied().collect(), "nodes that nothing names");
    }

    /// Compaction finds each node by its key, and no other; touched, it leaves its place.
    fn check_moves(&mut self, pick: u16) {
        let written = self.written();
        let pick = usize::from(pick);
        for key in written.keys().skip(pick % 7).step_by(5) {
            let aside = NodeKey { prefix: key.prefix ^ 1 << (pick % 60), ..*key };
            let above = NodeKey { level: key.level + 1, prefix: key.prefix >> 8, ..*key };
            let apart = NodeKey { volume: VolumeId::new(7), ..*key };
            for key in [*key, aside, above, apart] {
                let found = self.find_node(key).map(|child| (child.place(), child.crc));
                assert_eq!(
                    found,
                    written.get(&key).map(|child| (child.place(), child.crc)),
                    "{key:?}"
                );
            }
        }
        let Some((key, child)) = written.iter().nth(pick % written.len().max(1)) else { return };
        self.find_node(*key);
        let in_memory = self.map.is_resident(*key);
        assert!(!in_memory || self.map.written_at(*key) == Some(child.place()));
        self.map.touch(*key);
        assert_eq!(self.map.is_dirty(key.vshard), in_memory);
        self.capture(key.vshard);
        assert_eq!(self.nodes.contains_key(&child.place()), !in_memory, "{key:?} was moved");
    }

    fn find_node(&mut self, key: NodeKey) -> Option<Child> {
        for _ in 0..20 {
            match self.map.find_node(key) {
                Ok(child) => return child,
                Err((at, child)) => {
                    self.begin_read(at, child);
                    while self.map.evict_one() {}
                    self.load(at, child);
                }
            }
        }
        panic!("a search without end");
    }
}

/// Pages of three trees, each tree in one virtual shard; each page but two is in a leaf of its own,
/// so that the tree must grow.
fn growing(pick: u16) -> PageKey {
    let volume = VolumeId::new((pick / 8 % 3) as u8);
    let at = |id| PageKey::new(volume, PageId::new(id));
    let (vshard, _) = at(0).place_in(VSHARDS.into());
    let from = [0, 1, 100, 200, 1 << 14, 1 << 22, 1 << 30, 1 << 40][usize::from(pick % 8)];
    let run = (from..).step_by(512).map(at).find(|key| key.place_in(VSHARDS.into()).0 == vshard);
    run.expect("one run in four is in the virtual shard")
}

impl Store {
    /// One step of a run in which nodes arrive late.
    fn late_step(&mut self, step: u8, pick: u16) {
        let key = growing(pick);
        let (vshard, page_index) = self.map.position(key);
        match step {
            0..4 => self.set(key, true),
            4 => self.set(key, false),
            5 => self.come_to_nothing(key),
            // A lookup, a walk or a move requests the first node that is missing, and others
            // continue meanwhile.
            6..10 => {
                if let Lookup::Load(at, child) = self.map.lookup(key) {
                    self.begin_read(at, child);
                }
            }
            10 => {
                if let NextLeaf::Load(at, child) =
                    self.map.next_leaf(vshard, key.volume, page_index, u64::MAX)
                {
                    self.begin_read(at, child);
                }
            }
            11 => {
                let level = (pick / 24 % 3) as u8;
                let at = NodeKey {
                    vshard,
                    volume: key.volume,
                    level,
                    prefix: page_index >> 6 >> (8 * level),
                };
                if let Err((at, child)) = self.map.find_node(at) {
                    self.begin_read(at, child);
                }
            }
            12 | 13 => {
                if !self.reads.is_empty() {
                    self.arrive(usize::from(pick) % self.reads.len());
                }
            }
            14..17 => {
                self.capture(vshard);
                while self.map.evict_one() {}
                self.audit();
            }
            17 => self.replant(pick),
            18 if pick.is_multiple_of(8) => self.reopen(),
            18 => self.check(key),
            _ => self.evict_all(),
        }
    }

    /// Evicts everything that can go: as much as was counted before.
    fn evict_all(&mut self) {
        let idle = self.map.idle();
        let counted = idle.len() as u32 + self.map.idle_above(&idle);
        let mut evicted = 0;
        while self.map.evict_one() {
            evicted += 1;
        }
        assert_eq!(evicted, counted, "{} could go at first", idle.len());
    }

    /// Admits a commit that changes nothing, like one that frees an absent page.
    fn come_to_nothing(&mut self, key: PageKey) {
        self.check(key);
        let leaf = self.map.pin(key, &mut self.arena);
        self.map.unpin(leaf);
        self.audit();
    }

    /// Makes a tree small again, and requests its top.
    fn replant(&mut self, pick: u16) {
        let low = growing(pick & !7);
        (0..8).for_each(|page| self.set(growing(pick & !7 | page), false));
        self.capture(self.map.position(low).0);
        self.set(low, true);
        self.capture(self.map.position(low).0);
        while self.map.evict_one() {}
        if let Lookup::Load(at, child) = self.map.lookup(low) {
            self.begin_read(at, child);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 128 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_map_says_what_a_simple_map_says(
        steps in proptest::collection::vec(
            (0u8..20, any::<u16>()), 0..if cfg!(miri) { 20 } else { 300 },
        ),
    ) {
        let mut store = Store::new();
        for (step, pick) in steps {
            match step {
                0..10 => store.set(key(pick), true),
                10..14 => store.set(key(pick), false),
                14 | 15 => store.check(key(pick)),
                16 => store.capture(VShard::new(pick % VSHARDS)),
                17 => {
                    for _ in 0..pick % 64 {
                        if !store.map.evict_one() {
                            break;
                        }
                    }
                }
                18 if pick % 2 == 0 => store.check_moves(pick / 2),
                18 => store.check_scans(),
                _ => store.reopen(),
            }
        }
        store.reopen();
        let keys: Vec<PageKey> = store.model.keys().copied().collect();
        keys.into_iter().for_each(|key| store.check(key));
        store.check_scans();
        store.check_leaks();
        // Everything that is freed leaves nothing behind.
        let keys: Vec<PageKey> = store.model.keys().copied().collect();
        keys.into_iter().for_each(|key| store.set(key, false));
        store.check_leaks();
        store.check_scans();
        prop_assert!(store.nodes.is_empty(), "nodes without an entry are kept");
    }
}
