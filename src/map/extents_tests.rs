//! The bookkeeping of extents against a simple model: places are handed out, named and left, with checkpoints in between
//! whose steps are mixed with all of that.
//!
//! If this fails, a place is overwritten that a durable root names, the table counts what is not there, or space leaks.

use super::{Extents, Stream};
use crate::format::extent::{ItemKind, decode_summary};
use crate::types::{BLOCK, ExtentNo, Lsn, PageId, PageKey, Place, VShard, VolumeId};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const STORE: [u8; 16] = [4; 16];
const EXTENTS: u32 = 12;
const EXTENT_BLOCKS: u32 = 16;
const VSHARDS: u16 = 2;

type Places = BTreeSet<Place>;

/// A checkpoint under way.
#[derive(Default)]
struct Checkpoint {
    /// What the new root of each captured virtual shard names.
    captured: BTreeMap<u16, Places>,
}

struct Model {
    extents: Extents,
    /// What the map in memory names.
    now: [Places; VSHARDS as usize],
    /// What the durable roots name.
    durable: [Places; VSHARDS as usize],
    checkpoint: Option<Checkpoint>,
    /// What each place holds, for the summaries.
    items: BTreeMap<Place, ItemKind>,
    lsn: u64,
}

impl Model {
    fn new() -> Model {
        Model {
            extents: Extents::new(STORE, EXTENT_BLOCKS, VSHARDS.into(), &[], EXTENTS, |_| true),
            now: Default::default(),
            durable: Default::default(),
            checkpoint: None,
            items: BTreeMap::new(),
            lsn: 0,
        }
    }

    /// Places whose bytes somebody may still read.
    fn protected(&self) -> impl Iterator<Item = &Place> {
        let captured = self.checkpoint.iter().flat_map(|c| c.captured.values());
        self.now.iter().chain(&self.durable).chain(captured).flatten()
    }

    fn write(&mut self, stream: Stream, vshard: u16) {
        self.lsn += 1;
        let what = ItemKind::Page(PageKey::new(VolumeId::new(1), PageId::new(self.lsn)), Lsn::new(self.lsn));
        let Some((place, filled)) = self.extents.alloc(stream, what) else { return };
        assert!(place.block < self.extents.data_blocks());
        assert!(self.protected().all(|other| *other != place), "{place:?} was handed out while it is needed");
        self.items.insert(place, what);
        self.extents.name_page(VShard::new(vshard), place);
        self.now[usize::from(vshard)].insert(place);
        if filled.is_some_and(|no| self.extents.is_unsummarized(no)) {
            self.summarize(filled.expect("it is"));
        }
    }

    fn leave(&mut self, vshard: u16, pick: usize) {
        let mine = &mut self.now[usize::from(vshard)];
        let Some(place) = mine.iter().nth(pick % mine.len().max(1)).copied() else { return };
        mine.remove(&place);
        self.extents.leave_page(VShard::new(vshard), place);
    }

    /// A summary lists everything in the extent that a root may name.
    fn summarize(&mut self, no: ExtentNo) {
        let mut bytes = vec![0; self.extents.summary_bytes()];
        let place = self.extents.encode_summary(no, &mut bytes);
        assert!(place.extent == no && place.block >= self.extents.data_blocks() && place.block < EXTENT_BLOCKS);
        let items = decode_summary(STORE, no, self.extents.summary_crc(no), &bytes).expect("a summary");
        for place in self.protected().filter(|place| place.extent == no) {
            let listed = items.iter().any(|item| item.block == place.block && item.what == self.items[place]);
            assert!(listed, "the summary does not list {place:?}");
        }
        assert_eq!(bytes.len() % BLOCK, 0);
        self.extents.summary_written(no);
    }

    /// The next step of a checkpoint, or its begin.
    fn advance(&mut self, pick: u16) {
        let Some(checkpoint) = &mut self.checkpoint else {
            self.extents.begin_checkpoint();
            self.checkpoint = Some(Checkpoint::default());
            return;
        };
        let open: Vec<u16> = (0..VSHARDS).filter(|v| !checkpoint.captured.contains_key(v)).collect();
        if let Some(vshard) = open.get(usize::from(pick) % open.len().max(1)).copied() {
            self.extents.captured(VShard::new(vshard), std::iter::empty(), Vec::new());
            checkpoint.captured.insert(vshard, self.now[usize::from(vshard)].clone());
            return;
        }
        for no in self.extents.unsummarized() {
            self.summarize(no);
        }
        let checkpoint = self.checkpoint.take().expect("it is under way");
        let mut live: BTreeMap<ExtentNo, u16> = BTreeMap::new();
        checkpoint.captured.values().flatten().for_each(|place| *live.entry(place.extent).or_default() += 1);
        let rows = self.extents.rows().into_iter().map(|(no, row)| (no, row.live.get()));
        assert_eq!(rows.collect::<BTreeMap<_, _>>(), live, "the table is not what the new roots name");
        self.extents.end_checkpoint();
        for (vshard, places) in checkpoint.captured {
            self.durable[usize::from(vshard)] = places;
        }
    }

    fn finish_checkpoint(&mut self) {
        while self.checkpoint.is_some() {
            self.advance(0);
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
        steps in proptest::collection::vec((0u8..12, any::<u16>()), 0..if cfg!(miri) { 40 } else { 500 }),
    ) {
        let mut model = Model::new();
        for (step, pick) in steps {
            match step {
                0..3 => model.write(Stream::Data, pick % VSHARDS),
                3 => model.write(Stream::Moved, pick % VSHARDS),
                4 => model.write(Stream::Map, pick % VSHARDS),
                5..9 => model.leave(pick % VSHARDS, usize::from(pick / 2)),
                _ => model.advance(pick),
            }
            let space = model.extents.space();
            let named: usize = model.now.iter().map(BTreeSet::len).sum();
            prop_assert!(space.live_blocks >= named as u64 && space.free <= space.total);
        }
        model.finish_checkpoint();
        // With nothing named any more, two checkpoints give everything back but the extents that are open.
        for vshard in 0..VSHARDS {
            while !model.now[usize::from(vshard)].is_empty() {
                model.leave(vshard, 0);
            }
        }
        for _ in 0..2 {
            model.advance(0);
            model.finish_checkpoint();
        }
        let space = model.extents.space();
        prop_assert_eq!(space.live_blocks, 0);
        prop_assert!(space.free + 3 >= EXTENTS, "{} of {} extents are free", space.free, EXTENTS);
    }
}
