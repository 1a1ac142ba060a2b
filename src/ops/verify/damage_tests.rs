//! Damage to every kind of structure of a closed store, on the simulated disk: each block of each
//! file in turn is flipped, zeroed, set back to what it was before, or swapped with another.
//!
//! If these fail, someone is served wrong bytes, or is told that a damaged store is whole. The same
//! through the public face, on real files: `store_damage_tests`.

use super::read::{ARENA_BLOCKS, Meter};
use super::{Verifier, VerifyProgress, VerifyReport, verify_disk};
use crate::base::checksum::crc32c;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::options::{Geometry, Options};
use crate::base::{BLOCK, Lsn, PageId, PageKey, ShardId, VolumeId};
use crate::engine::recovery;
use crate::engine::{Change, Commit, Request, Response, Token};
use crate::format::catalog;
use crate::format::extent::{Item, ItemKind};
use crate::format::node::{self, Child, Entry};
use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock};
use crate::format::{put, root};
use crate::io::{DiskOp, FileId, IoSlice, execute};
use crate::memory::Arena;
use crate::testing::local_cluster::LocalCluster;
use crate::testing::random::Rng;
use crate::testing::sim::disk::{Damage, Latency, Loss, SECTORS, SimDisk};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};

type Model = BTreeMap<PageKey, Vec<u8>>;

struct Driver {
    disk: SimDisk,
    all: LocalCluster,
    now: u64,
}

fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 64 << 10,
        segment_bytes: 128 << 10,
        segments_count: 4,
        vshards_count: 4,
    };
    Options { geometry, memory_bytes: 4 << 20, ..Options::default() }
}

impl Driver {
    fn open(mut disk: SimDisk) -> Result<Driver> {
        let opening = recovery::begin(&mut disk, &options(), 1, 7, 0)?;
        let mut all = LocalCluster::new(opening.shards);
        all.run_until_open(&mut disk, 0)?;
        Ok(Driver { now: disk.now() + 1_000_000, disk, all })
    }

    fn ask(&mut self, request: Request) -> Result<Response> {
        self.all.request(ShardId::LEADER, Token(1), request);
        for _ in 0..100_000 {
            self.now += 50;
            self.all.poll_once(&mut self.disk, self.now);
            if let Some((_, answer)) = self.all.replies.pop() {
                return answer;
            }
            self.disk.advance_to(self.now);
        }
        panic!("no answer to a request");
    }

    fn commit(&mut self, changes: Vec<(PageKey, Change)>) {
        let commit = Commit { reads: vec![], changes, durable: true };
        assert!(matches!(self.ask(Request::Commit(commit)), Ok(Response::Committed(_))));
    }

    fn read(&mut self, key: PageKey) -> Result<Vec<u8>> {
        match self.ask(Request::Read([key].into_iter().collect()))? {
            Response::Pages(pages) => Ok(pages[0].to_vec()),
            other => panic!("{other:?}"),
        }
    }
}

fn key(volume: u8, page: u64) -> PageKey {
    PageKey::new(VolumeId::new(volume), PageId::new(page))
}

/// A store with all that can be on disk: several volumes, dense and lone ids, patches, frees,
/// compaction, a log that went round; closed cleanly. And what must be read from it.
fn reference_store() -> (SimDisk, Model) {
    let mut driver = Driver::open(SimDisk::new(1)).expect("a fresh disk");
    let mut rng = Rng::new(2);
    let mut model = Model::new();
    for round in 0..500u64 {
        let mut changes = Vec::new();
        for _ in 0..rng.within(1, 6) {
            let page = if rng.one_in(20) { rng.below(4) << 40 } else { rng.below(100) };
            let key = if rng.one_in(20) {
                key(0, rng.within(3, 9))
            } else {
                key(rng.within(1, 3) as u8, page)
            };
            let now = model.entry(key).or_insert_with(|| vec![0; BLOCK]);
            let change = match rng.below(8) {
                _ if key.volume == VolumeId::CATALOG => {
                    let (name, bytes) = (format!("volume-{round}"), round * BLOCK as u64);
                    Change::Put(
                        catalog::encode(&catalog::Volume { name, bytes, is_cut: round % 5 == 0 })
                            .into(),
                    )
                }
                0 => Change::Free,
                1 | 2 => Change::Patch {
                    offset: rng.below(4000) as u32,
                    bytes: Bytes::from(vec![round as u8; 90]),
                },
                _ => {
                    let word = rng.draw().to_le_bytes();
                    Change::Put(word.iter().copied().cycle().take(BLOCK).collect())
                }
            };
            match &change {
                Change::Free => *now = vec![0; BLOCK],
                Change::Patch { offset, bytes } => {
                    now[*offset as usize..][..bytes.len()].copy_from_slice(bytes)
                }
                Change::Put(bytes) => now.copy_from_slice(bytes),
            }
            changes.push((key, change));
        }
        driver.commit(changes);
    }
    assert!(matches!(driver.ask(Request::Close), Ok(Response::Closed)));
    (driver.disk, model)
}

fn copy_of(disk: &SimDisk) -> SimDisk {
    disk.crash(Loss::Nothing, &mut Rng::new(3))
}

/// The kind of structure, from its name in a report.
fn kind(structure: &str) -> &'static str {
    let kinds = [
        ("superblock copy", "superblock copy"),
        ("the superblock", "superblock copy"),
        ("the root of", "root"),
        ("block ", "table block"),
        ("interior node", "interior node"),
        ("leaf node", "leaf node"),
        ("page v0/", "catalog page"),
        ("page ", "page"),
        ("the summary of", "summary"),
        ("extent ", "extent"),
        ("the log ", "log group"),
    ];
    let found = kinds.iter().find(|(start, _)| structure.starts_with(start));
    found.unwrap_or_else(|| panic!("no known kind of structure: {structure}")).1
}

/// Opens and reads everything: only right bytes, or an error that names the place.
fn never_wrong(disk: SimDisk, model: &Model, what: &str) -> bool {
    let mut driver = match Driver::open(disk) {
        Ok(driver) => driver,
        Err(error) => {
            assert_names_the_place(&error, what);
            return false;
        }
    };
    let mut all_right = true;
    for (key, bytes) in model {
        match driver.read(*key) {
            Ok(found) => assert!(found == *bytes, "{what}: wrong bytes of {key:?} were served"),
            Err(error) => {
                assert_names_the_place(&error, what);
                all_right = false;
            }
        }
    }
    all_right
}

fn assert_names_the_place(error: &Error, what: &str) {
    let text = error.to_string();
    assert!(
        [ErrorKind::Corrupt, ErrorKind::Unsupported].contains(&error.kind()),
        "{what}: {error:?}"
    );
    assert!(
        ["byte", "block", "copy", "version"].iter().any(|word| text.contains(word)),
        "{what}: no place in: {text}"
    );
}

fn names_block(report: &VerifyReport, file: FileId, blocks: &[u64]) -> bool {
    let size = |structure: &str| match kind(structure) {
        "superblock copy" => 4,
        "log group" => 32,
        _ => 1,
    };
    report.damaged.iter().any(|damage| {
        let first = damage.offset / BLOCK as u64;
        damage.file == file
            && blocks.iter().any(|block| (first..first + size(&damage.structure)).contains(block))
    })
}

/// Where each kind of structure lies, found by damaging every block once.
fn survey(disk: &SimDisk) -> BTreeMap<&'static str, Vec<(FileId, u64)>> {
    let mut places: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (file, len) in disk.files() {
        for block in 0..len / BLOCK as u64 {
            let damaged = copy_of(disk);
            assert!(damaged.damage(
                file,
                block * SECTORS as u64,
                SECTORS,
                Damage::Flip { bit: 4099 }
            ));
            let report = verify_disk(&mut damaged.clone()).expect("damage is in the report");
            match report.damaged.first() {
                Some(damage) => {
                    assert!(
                        names_block(&report, file, &[block]),
                        "{file} block {block}: {:?}",
                        report.damaged
                    );
                    places.entry(kind(&damage.structure)).or_default().push((file, block));
                }
                None => places.entry("nothing").or_default().push((file, block)),
            }
        }
    }
    places
}

const KINDS: [&str; 9] = [
    "superblock copy",
    "root",
    "table block",
    "interior node",
    "leaf node",
    "catalog page",
    "page",
    "summary",
    "log group",
];

/// The fourth promise of the whole: damage is detected, named, and never served.
#[test]
fn damage_of_every_structure_is_named_and_never_served() {
    let (disk, model) = reference_store();
    let report = verify_disk(&mut disk.clone()).expect("a closed store");
    assert!(report.is_whole() && report.clean, "{report}\n{:?}", report.damaged);
    let live = model.values().filter(|bytes| bytes.iter().any(|b| *b != 0)).count() as u64;
    assert!(
        report.pages >= live && report.nodes > 10 && report.extents > 5 && report.groups > 0,
        "{report}"
    );
    assert!(never_wrong(copy_of(&disk), &model, "an undamaged store"));

    let places = survey(&disk);
    let mut seen = BTreeSet::new();
    let mut rng = Rng::new(4);
    for kind in KINDS {
        let all = places.get(kind).unwrap_or_else(|| panic!("the reference store has no {kind}"));
        for (i, (file, block)) in
            all.iter().copied().enumerate().filter(|(i, _)| i % all.len().div_ceil(30) == 0)
        {
            let others: Vec<u64> =
                all.iter().filter(|(f, b)| *f == file && *b != block).map(|(_, b)| *b).collect();
            let with = if others.is_empty() { block ^ 1 } else { *rng.pick(&others) };
            let bit = rng.below(BLOCK as u64 * 8) as usize;
            let kinds = [
                Damage::Flip { bit },
                Damage::Zero,
                Damage::Stale,
                Damage::Swap { with: with * SECTORS as u64 },
            ];
            for (n, damage) in kinds.into_iter().enumerate() {
                let what = format!("{kind} {i}, block {block} of {file}, {damage:?}");
                let damaged = copy_of(&disk);
                if !damaged.damage(file, block * SECTORS as u64, SECTORS, damage) {
                    continue;
                }
                let report = verify_disk(&mut damaged.clone()).expect("damage is in the report");
                let both = if n == 3 { vec![block, with] } else { vec![block] };
                assert!(
                    names_block(&report, file, &both),
                    "{what}: not named: {report}\n{:?}",
                    report.damaged
                );
                never_wrong(damaged, &model, &what);
                seen.insert((kind, n));
            }
        }
    }
    let missing: Vec<_> = KINDS
        .iter()
        .flat_map(|k| (0..4).map(move |n| (*k, n)))
        .filter(|x| !seen.contains(x))
        .collect();
    assert_eq!(missing, [], "these were never tried");
    // What nothing refers to may hold anything.
    let dead = &places["nothing"];
    for (file, block) in dead.iter().copied().step_by(dead.len().div_ceil(40)) {
        let damaged = copy_of(&disk);
        damaged.damage(file, block * SECTORS as u64, SECTORS, Damage::Flip { bit: 77 });
        assert!(never_wrong(damaged, &model, "a block that nothing refers to"));
    }
}

/// After a crash `verify` must neither call the store whole without a word nor call a legal tail
/// damage.
#[test]
fn an_unclean_store_is_called_unclean_and_not_damaged() {
    let mut driver = Driver::open(SimDisk::new(5)).expect("a fresh disk");
    for i in 0..50 {
        driver.commit(vec![(key(1, i), Change::Put(Bytes::from(vec![i as u8; BLOCK])))]);
    }
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let crashed = driver.disk.crash(Loss::random(&mut rng), &mut rng);
        let mut end = VerifyProgress::default();
        let report = super::verify_telling(&mut crashed.clone(), &mut |progress| end = progress)
            .expect("a store");
        let logs_bytes =
            crashed.files().into_iter().filter(|(file, _)| matches!(file, FileId::Log(..)));
        let logs_bytes = logs_bytes.map(|(_, len)| len).sum::<u64>();
        assert!(
            end.bytes_done == end.bytes_total && end.bytes_done > logs_bytes,
            "all that is read is told: {end:?}"
        );
        assert!(
            report.is_whole() && !report.clean && report.notes.len() == 2,
            "{report}\n{:?}",
            report.damaged
        );
    }
}

/// Reading one thing after another, a terabyte took ten hours on a device that could read it in
/// minutes: nobody verifies then. The clock is the simulated disk's, in which each read takes a
/// millisecond and any number goes on at a time.
#[test]
fn a_store_is_verified_with_many_reads_at_a_time() {
    let mut driver = Driver::open(SimDisk::new(6)).expect("a fresh disk");
    let mut rng = Rng::new(7);
    for _ in 0..400 {
        let page = |rng: &mut Rng| {
            (key(1, rng.below(3_000)), Change::Put(Bytes::from(vec![rng.below(255) as u8; BLOCK])))
        };
        driver.commit((0..8).map(|_| page(&mut rng)).collect());
    }
    assert!(matches!(driver.ask(Request::Close), Ok(Response::Closed)));
    let mut disk = copy_of(&driver.disk);
    disk.set_latency(Latency { read: (1_000, 1_000), ..Latency::default() });
    let (begun, mut told) = (disk.now(), Vec::new());
    let report = super::verify_telling(&mut disk, &mut |progress| told.push(progress))
        .expect("a closed store");
    assert!(report.is_whole(), "{:?}", report.damaged);
    let (things, took) =
        (report.pages + report.nodes + report.extents, (disk.now() - begun) / 1_000);
    assert!(things > 2_000, "{report}");
    assert!(took * 8 < things, "{things} pages, nodes and summaries took the time of {took} reads");
    // How far it is can be told: it only grows, and ends where it was said to.
    let end = told.last().expect("something was read");
    assert!(told.windows(2).all(|pair| pair[0].bytes_done <= pair[1].bytes_done));
    assert_eq!(end.bytes_done, end.bytes_total, "what was read is what was to be read");
}

/// A store that was killed while it was made, or opened for the first time, was called damaged.
/// Whoever believed that looked for a broken device.
#[test]
fn a_store_whose_creation_or_first_opening_is_cut_short_is_not_called_damaged() {
    let first = SimDisk::new(8);
    let mut driver = Driver::open(first).expect("a fresh disk");
    driver.commit(vec![(key(1, 1), Change::Put(Bytes::from(vec![1; BLOCK])))]);
    let events = driver.disk.events();
    let (mut unmade, mut whole) = (0, 0);
    for cut in (0..events).step_by((events / 300).max(1) as usize) {
        let disk = SimDisk::new(8);
        disk.cut_power_after(cut);
        // It ends with the power.
        let _ = Driver::open(disk.clone());
        let mut rng = Rng::new(cut);
        let crashed = disk.crash(Loss::random(&mut rng), &mut rng);
        let listed = super::inspect::inspect_disk(&mut crashed.clone())
            .map(drop)
            .map_err(|error| error.kind());
        let outcome = verify_disk(&mut crashed.clone());
        let kind = outcome.as_ref().map(drop).map_err(|error| error.kind());
        assert_eq!(listed, kind, "cut at {cut} of {events}: a list of the volumes");
        match outcome {
            Ok(report) => {
                assert!(
                    report.is_whole(),
                    "cut at {cut} of {events}: {report}\n{:?}",
                    report.damaged
                );
                whole += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotFound, "cut at {cut} of {events}: {error}");
                unmade += 1;
            }
        }
    }
    assert!(
        unmade > 5 && whole > 5,
        "{unmade} cut short before there was a store, {whole} behind it"
    );
}

/// One page that rots must not hide that counts don't agree: pages that may be gone were told only
/// once that page was written anew.
#[test]
fn a_damaged_page_hides_no_wrong_count() {
    let mut driver = Driver::open(SimDisk::new(9)).expect("a fresh disk");
    driver.commit(vec![(key(1, 1), Change::Put(Bytes::from(vec![7; BLOCK])))]);
    assert!(matches!(driver.ask(Request::Close), Ok(Response::Closed)));
    let mut disk = copy_of(&driver.disk);
    let len =
        disk.files().into_iter().find(|(file, _)| *file == FileId::Data).expect("a data file").1;
    let at = (0..len / BLOCK as u64)
        .find(|n| disk.block(FileId::Data, *n) == [7; BLOCK])
        .expect("it lies somewhere");
    assert!(disk.damage(FileId::Data, at * SECTORS as u64, SECTORS, Damage::Flip { bit: 77 }));
    let meter = Meter { progress: VerifyProgress::default(), tell: &mut |_| () };
    let mut this = Verifier::new(&mut disk, Arena::new(ARENA_BLOCKS).expect("memory"), meter);
    let superblock = this.superblock().expect("it is read").expect("there is one");
    let (roots, mut extents) = (this.roots(&superblock), this.table(&superblock));
    this.map(&superblock, &roots, &mut extents);
    assert_eq!(this.report.damaged.len(), 1, "{:?}", this.report.damaged);
    // As if the table counted too few.
    let extent = (at / u64::from(superblock.geometry.extent_blocks())) as usize;
    let free = (0..).find(|block| !extents[extent].has(*block)).expect("one of them is free");
    let item = Item { block: free, what: ItemKind::Page(key(1, 2), Lsn::new(1)) };
    extents[extent].name(item, free + 1).expect("nothing is there");
    this.summaries(&superblock, &roots, &extents);
    let told =
        this.report.damaged.iter().any(|damage| damage.structure == format!("extent {extent}"));
    assert!(told, "{:?}", this.report.damaged);
}

/// Writes one block into a store that nobody has open.
fn write_block(disk: &mut SimDisk, file: FileId, offset: u64, bytes: &[u8]) {
    let mut frame = Arena::new(1).and_then(|mut arena| {
        arena.alloc(0).ok_or_else(|| Error::invalid("an arena of one block has none"))
    });
    let frame = frame.as_mut().expect("a block of memory");
    frame.try_mut().expect("it is new").copy_from_slice(bytes);
    let from = smallvec::smallvec![IoSlice::whole(frame.pin())];
    execute(disk, DiskOp::Write { file, offset, from }).expect("written");
}

/// Changes what the map says of a page, with all checksums above it made right: what a later
/// version of this program would leave. The tree of its volume must be a single leaf.
fn describe_anew(disk: &mut SimDisk, key: PageKey, change: impl Fn(Entry) -> Entry) {
    let mut arena = Arena::new(ARENA_BLOCKS).expect("memory");
    let mut superblock = recovery::find_superblock(disk, &mut arena).expect("one").superblock;
    let roots = recovery::load(disk, &mut arena, &superblock).expect("a whole store").roots;
    let (vshard, page_index) = key.place_in(superblock.geometry.vshards_count);
    let mut children = roots[vshard.index()].0.clone();
    let top = &mut children[usize::from(key.volume.get())];
    assert!(top.is_present() && top.level == 0 && page_index < 64);
    let at = top.place().offset(superblock.geometry.extent_bytes);
    let mut leaf = disk.block(FileId::Data, at / BLOCK as u64);
    let entry = change(node::entry(&leaf, page_index as usize));
    put(&mut leaf, page_index as usize * size_of::<Entry>(), &entry);
    write_block(disk, FileId::Data, at, &leaf);
    *top = Child::at(top.place(), crc32c(&leaf), 0);
    let named = &mut superblock.vshards[vshard.index()].root;
    let at = root::offset(vshard, named.generation, superblock.geometry.vshards_count);
    let mut block = disk.block(FileId::Meta, at / BLOCK as u64);
    let (head, ..) = root::decode(&block).expect("a whole root");
    named.crc = root::encode(&head, &children, &mut block);
    write_block(disk, FileId::Meta, at, &block);
    let mut bytes = vec![0; SUPERBLOCK_BYTES];
    for copy in Superblock::copies_of(superblock.generation) {
        superblock.encode(copy, &mut bytes);
        for (n, block) in (0..).zip(bytes.chunks(BLOCK)) {
            let offset = Superblock::offset(copy) + n * BLOCK as u64;
            write_block(disk, FileId::Meta, offset, block);
        }
    }
}

/// A page of a form that this version does not write is not damaged: whoever reads "wrong checksum"
/// looks for a broken device, and restores a backup over pages that a newer program can read.
#[test]
fn a_page_of_an_unknown_form_is_not_said_to_have_a_wrong_checksum() {
    let mut driver = Driver::open(SimDisk::new(9)).expect("a fresh disk");
    let record = catalog::Volume { name: "a".into(), bytes: BLOCK as u64, is_cut: false };
    driver.commit(vec![(key(0, 1), Change::Put(catalog::encode(&record).into()))]);
    assert!(matches!(driver.ask(Request::Close), Ok(Response::Closed)));
    let mut disk = copy_of(&driver.disk);
    assert_eq!(super::inspect::inspect_disk(&mut disk).expect("a store").volumes.len(), 1);
    describe_anew(&mut disk, key(0, 1), |entry| Entry { codec: 1, ..entry });

    let listed = super::inspect::inspect_disk(&mut disk).expect_err("it can't be read");
    let report = verify_disk(&mut disk).expect("damage is in the report");
    let named = report.damaged.iter().find(|damage| kind(&damage.structure) == "catalog page");
    let verified = named.expect("it is named").what.clone();
    let read = Driver::open(disk).and_then(|mut driver| driver.read(key(0, 1)));
    let read = read.expect_err("it can't be read").to_string();
    for text in [listed.to_string(), verified, read] {
        assert!(text.contains("version") && !text.contains("checksum"), "{text}");
    }
}
