//! Compares the bookkeeping of extents with a simple model: places are handed out, named and given
//! up, mixed with the steps of checkpoints.
//!
//! If this fails, a place is overwritten that a durable root names, the table counts what is not
//! there, or space leaks.

use super::{Extents, Stream};
use crate::base::{BLOCK, BlockAddr, ExtentNo, Lsn, PageId, PageKey, VShard, VolumeId};
use crate::format::extent::{Item, ItemKind, TableRow, decode_summary, summary_at};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const STORE: [u8; 16] = [4; 16];
const EXTENTS: u32 = 12;
const EXTENT_BLOCKS: u32 = 16;
const VSHARDS: u16 = 2;

type Places = BTreeSet<BlockAddr>;

/// A checkpoint in progress.
#[derive(Default)]
struct Checkpoint {
    /// The places that the new root of each captured virtual shard names.
    captured: BTreeMap<u16, Places>,
    /// Places that are free again when it ends.
    retiring: Vec<BlockAddr>,
}

struct Model {
    extents: Extents,
    /// The places that the map in memory names, of pages and nodes.
    now: [Places; VSHARDS as usize],
    /// The nodes among them, which only a capture names or gives up.
    nodes: [Places; VSHARDS as usize],
    /// Places handed out for nodes that the next capture names.
    unpublished: [Places; VSHARDS as usize],
    /// The places that the durable roots name.
    durable: [Places; VSHARDS as usize],
    /// Places given up since, which the next checkpoint retires.
    pending_free: Vec<BlockAddr>,
    died: u64,
    checkpoint: Option<Checkpoint>,
    /// The content of each place, for the summaries.
    items: BTreeMap<BlockAddr, ItemKind>,
    /// Places handed out of the extents in use, and which of these have their last summary.
    handed: BTreeMap<ExtentNo, u32>,
    /// The number of them when the last summary was encoded.
    summarized: BTreeMap<ExtentNo, u32>,
    closed: BTreeSet<ExtentNo>,
    /// Extents given to other shards.
    given: Vec<ExtentNo>,
    lsn: u64,
}

impl Model {
    fn new() -> Model {
        Model {
            extents: Extents::new(STORE, EXTENT_BLOCKS, VSHARDS.into(), &[], EXTENTS, |_| true),
            now: Default::default(),
            nodes: Default::default(),
            unpublished: Default::default(),
            durable: Default::default(),
            pending_free: Vec::new(),
            died: 0,
            checkpoint: None,
            items: BTreeMap::new(),
            handed: BTreeMap::new(),
            summarized: BTreeMap::new(),
            closed: BTreeSet::new(),
            given: Vec::new(),
            lsn: 0,
        }
    }

    /// Places whose bytes may still be read.
    fn protected(&self) -> impl Iterator<Item = &BlockAddr> {
        let captured = self.checkpoint.iter().flat_map(|c| c.captured.values());
        self.now.iter().chain(&self.durable).chain(&self.unpublished).chain(captured).flatten()
    }

    fn write(&mut self, stream: Stream, vshard: u16) {
        self.lsn += 1;
        let what = ItemKind::Page(
            PageKey::new(VolumeId::new(1), PageId::new(self.lsn)),
            Lsn::new(self.lsn),
        );
        let Some((place, filled)) = self.extents.alloc(stream, what) else {
            assert_eq!(self.extents.space().free, 0);
            return;
        };
        assert!(
            self.protected().all(|other| *other != place),
            "{place:?} was handed out while it is needed"
        );
        assert!(self.extents.is_mine(place.extent) && !self.given.contains(&place.extent));
        if self.handed.get(&place.extent).is_none_or(|handed| *handed == self.extents.data_blocks())
        {
            self.handed.insert(place.extent, 0);
            self.summarized.insert(place.extent, 0);
            self.closed.remove(&place.extent);
        }
        let handed = self.handed.get_mut(&place.extent).expect("just begun");
        assert_eq!(place.block, *handed, "front to back");
        *handed += 1;
        assert_eq!(filled, (*handed == self.extents.data_blocks()).then_some(place.extent));
        self.items.insert(place, what);
        match stream {
            Stream::Map => _ = self.unpublished[usize::from(vshard)].insert(place),
            Stream::Data | Stream::Moved => {
                self.extents.name_page(VShard::new(vshard), place);
                self.now[usize::from(vshard)].insert(place);
            }
        }
        if let Some(no) = filled {
            assert_eq!(self.extents.filled().contains(&no), self.extents.is_unsummarized(no));
            if self.extents.is_unsummarized(no) {
                self.summarize(no);
            }
        }
    }

    fn leave(&mut self, vshard: u16, pick: usize) {
        let mine = &mut self.now[usize::from(vshard)];
        let pages: Vec<_> = mine.difference(&self.nodes[usize::from(vshard)]).copied().collect();
        let Some(place) = pages.get(pick % pages.len().max(1)).copied() else { return };
        mine.remove(&place);
        self.extents.free_later(VShard::new(vshard), place);
        self.pending_free.push(place);
        self.died += 1;
    }

    /// A summary lists everything in the extent that a root may name.
    fn summarize(&mut self, no: ExtentNo) {
        let mut bytes = vec![0; self.extents.summary_bytes()];
        let place = self.extents.encode_summary(no, &mut bytes);
        assert!(
            place.extent == no
                && place.block >= self.extents.data_blocks()
                && place.block < EXTENT_BLOCKS
        );
        assert!(!self.extents.is_unsummarized(no), "once between two checkpoints");
        let before = self.summarized.insert(no, self.handed[&no]);
        assert!(before < Some(self.handed[&no]), "a summary with nothing new in it");
        let items =
            decode_summary(STORE, no, self.extents.summary_crc(no), &bytes).expect("a summary");
        for place in self.protected().filter(|place| place.extent == no) {
            let listed = items
                .iter()
                .any(|item| item.block == place.block && item.what == self.items[place]);
            assert!(listed, "the summary does not list {place:?}");
        }
        assert_eq!(bytes.len() % BLOCK, 0);
        if self.handed[&no] == self.extents.data_blocks() {
            self.closed.insert(no);
        }
        self.extents.summary_written(no);
    }

    /// Captures a virtual shard: its new root names the new nodes, and no longer names some of the
    /// older ones.
    fn capture(&mut self, vshard: u16) {
        let i = usize::from(vshard);
        let named = std::mem::take(&mut self.unpublished[i]);
        let retired: Vec<_> = self.nodes[i].iter().copied().take(named.len()).collect();
        for place in &retired {
            self.now[i].remove(place);
            self.nodes[i].remove(place);
        }
        self.now[i].extend(&named);
        self.nodes[i].extend(&named);
        self.died += retired.len() as u64;
        self.extents.captured(VShard::new(vshard), named.into_iter(), retired.clone());
        let checkpoint = self.checkpoint.as_mut().expect("it is under way");
        checkpoint.retiring.extend(retired);
        checkpoint.captured.insert(vshard, self.now[i].clone());
    }

    /// Takes the next step of a checkpoint, or begins one.
    fn advance(&mut self, pick: u16) {
        let Some(checkpoint) = &self.checkpoint else {
            self.extents.begin_checkpoint();
            let retiring = std::mem::take(&mut self.pending_free);
            self.checkpoint = Some(Checkpoint { retiring, ..Checkpoint::default() });
            return;
        };
        let open: Vec<u16> =
            (0..VSHARDS).filter(|v| !checkpoint.captured.contains_key(v)).collect();
        if let Some(vshard) = open.get(usize::from(pick) % open.len().max(1)).copied() {
            self.capture(vshard);
            return;
        }
        for no in self.extents.unsummarized() {
            self.summarize(no);
        }
        let checkpoint = self.checkpoint.take().expect("it is under way");
        let mut live: BTreeMap<ExtentNo, u16> = BTreeMap::new();
        checkpoint
            .captured
            .values()
            .flatten()
            .for_each(|place| *live.entry(place.extent).or_default() += 1);
        let rows = self.extents.rows();
        for (no, row) in &rows {
            assert!(row.state == 1 && row.summary_crc.get() == self.extents.summary_crc(*no));
            let at = summary_at(EXTENT_BLOCKS, row.summary_slot);
            assert_eq!(self.extents.summary_place(*no), BlockAddr { extent: *no, block: at });
        }
        let rows = rows.into_iter().map(|(no, row)| (no, row.live.get()));
        assert_eq!(
            rows.collect::<BTreeMap<_, _>>(),
            live,
            "the table is not what the new roots name"
        );
        assert_eq!(self.extents.end_checkpoint(), checkpoint.retiring.len() as u64);
        for (vshard, places) in checkpoint.captured {
            self.durable[usize::from(vshard)] = places;
        }
    }

    fn finish_checkpoint(&mut self) {
        while self.checkpoint.is_some() {
            self.advance(0);
        }
    }

    /// Gives free extents to another shard, or takes them back.
    fn change_homes(&mut self, count: usize) {
        if self.given.is_empty() {
            let free = self.extents.space().free as usize;
            self.given = self.extents.give_away(count);
            assert_eq!(self.given.len(), count.min(free));
        } else {
            self.extents.grant(std::mem::take(&mut self.given));
        }
        assert_eq!(self.extents.space().total, EXTENTS - self.given.len() as u32);
        assert_eq!(self.extents.count(), EXTENTS);
        self.given.iter().for_each(|no| assert!(!self.extents.is_mine(*no)));
    }

    /// Checks the sums, and the counts by which compaction chooses.
    fn check(&self) {
        let of = |places: &mut dyn Iterator<Item = &BlockAddr>| {
            let mut by_extent: BTreeMap<ExtentNo, u32> = BTreeMap::new();
            places.for_each(|place| *by_extent.entry(place.extent).or_default() += 1);
            by_extent
        };
        let retiring = self.checkpoint.iter().flat_map(|checkpoint| &checkpoint.retiring);
        let garbage = of(&mut self.pending_free.iter().chain(retiring));
        let named = of(&mut self.now.iter().flatten());
        let unpublished = of(&mut self.unpublished.iter().flatten());
        let garbage_count: u32 = garbage.values().sum();
        let space = self.extents.space();
        assert_eq!(space.live_blocks, u64::from(named.values().sum::<u32>() + garbage_count));
        let in_use: BTreeSet<_> =
            garbage.keys().chain(named.keys()).chain(unpublished.keys()).collect();
        assert!(space.free as usize + in_use.len() <= space.total as usize);
        assert!(
            space.free as usize + in_use.len() + 3 >= space.total as usize,
            "an extent is lost"
        );
        assert_eq!(
            (self.extents.pending_free_count(), self.extents.died()),
            (garbage_count as usize, self.died)
        );
        let settled = self.closed.iter().filter(|no| !unpublished.contains_key(no));
        let reclaimable = settled
            .clone()
            .filter(|no| garbage.contains_key(no) && !named.contains_key(no))
            .count();
        assert_eq!(
            self.extents.coming(),
            reclaimable as u64 * u64::from(self.extents.data_blocks())
        );
        for (share_max, except) in [(1000, None), (500, None), (1000, self.closed.first())] {
            let limit = self.extents.data_blocks() * share_max / 1000;
            let candidates = settled.clone().filter(|no| Some(*no) != except);
            let fewest = candidates.filter_map(|no| Some((*named.get(no)?, *no)));
            let mut fewest: Vec<_> = fewest.filter(|(count, _)| *count <= limit).collect();
            fewest.sort_unstable();
            fewest.truncate(3);
            fewest.reverse();
            let emptiest = self.extents.emptiest(share_max, 3, |no| Some(&no) == except);
            assert_eq!(emptiest, fewest.iter().map(|(_, no)| *no).collect::<Vec<_>>());
            let to_move = |no: &ExtentNo| self.extents.to_move(*no, share_max);
            assert!(fewest.iter().all(|(count, no)| to_move(no) == Some(*count)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_place_is_reused_while_a_root_names_it_and_none_is_lost(
        steps in proptest::collection::vec(
            (0u8..12, any::<u16>()), 0..if cfg!(miri) { 40 } else { 500 },
        ),
    ) {
        let mut model = Model::new();
        for (step, pick) in steps {
            match step {
                0..3 => model.write(Stream::Data, pick % VSHARDS),
                3 => model.write(Stream::Moved, pick % VSHARDS),
                4 => model.write(Stream::Map, pick % VSHARDS),
                5..9 => model.leave(pick % VSHARDS, usize::from(pick / 2)),
                9 if pick % 8 == 0 => model.change_homes(usize::from(pick / 8 % 4)),
                _ => model.advance(pick),
            }
            model.check();
        }
        model.finish_checkpoint();
        // Once no page is named any more, two checkpoints give back everything but the open extents
        // and those of the nodes.
        for vshard in 0..VSHARDS {
            let pages = &model.now[usize::from(vshard)] - &model.nodes[usize::from(vshard)];
            pages.iter().for_each(|_| model.leave(vshard, 0));
        }
        for _ in 0..2 {
            model.advance(0);
            model.finish_checkpoint();
        }
        model.check();
        let nodes = model.nodes.iter().flatten().map(|place| place.extent);
        let nodes: BTreeSet<ExtentNo> = nodes.collect();
        let space = model.extents.space();
        let live = model.nodes.iter().map(BTreeSet::len).sum::<usize>();
        prop_assert_eq!(space.live_blocks, live as u64);
        prop_assert!(space.free as usize + 3 + nodes.len() >= space.total as usize, "{:?}", space);
    }
}

/// If this fails, a summary that no correct writer makes causes a panic while the store is opened,
/// where its extent should be left to `verify`.
#[test]
fn a_summary_that_lists_a_block_twice_is_not_gone_on_with() {
    let row = TableRow { state: 1, live: 1.into(), ..TableRow::default() };
    let mut extents = Extents::new(STORE, EXTENT_BLOCKS, VSHARDS.into(), &[row], 1, |_| true);
    let what = ItemKind::Page(PageKey::new(VolumeId::new(1), PageId::new(1)), Lsn::new(1));
    extents.refill(ExtentNo::new(0), vec![Item { block: 0, what }, Item { block: 0, what }]);
    assert!(extents.alloc(Stream::Data, what).is_none(), "the only extent stays closed");
}
