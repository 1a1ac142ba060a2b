//! Damage to every kind of structure on disk, through the public face and on real files: each is
//! flipped, zeroed, set back to what an earlier close left there, or swapped with another of its
//! kind. `Store` must serve right bytes or a clear error, and `verify` must name the place.
//!
//! If these fail, bit rot, a lost or a misdirected write reaches a user as wrong data. The same for
//! *every* block, on the simulated disk: `src/ops/verify/damage_tests.rs`.
//!
//! The structures are found by a reader of its own (below), which knows the format document only.

#![allow(clippy::disallowed_methods)]

use crate::base::{BlockAddr, VShard};
use crate::format::{extent, node, root, superblock::Superblock};
use crate::io::FileId;
use crate::testing::pattern;
use crate::testing::random::Rng;
use crate::{
    Change, Driver, Durability, Error, ErrorKind, Geometry, Mend, Options, PageId, Store,
    VerifyReport,
};
use futures_lite::future::block_on;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

const BLOCK: usize = 4096;
const VOLUMES: [&str; 3] = ["alpha", "beta", "gamma"];
/// Enough that the extent table has two blocks.
const PAGES: u64 = 800;
/// So that there are two logs, and commits that are in both.
const SHARDS: u16 = 2;
/// The most lives of the reference store after the first close; two or three suffice.
const LIVES_MAX: u32 = 20;
/// Structures of a kind that are damaged in each way.
const SAMPLES: usize = 3;

type Model = BTreeMap<(usize, u64), Vec<u8>>;
/// The files of a store: names and contents.
type Files = BTreeMap<String, Vec<u8>>;
/// A place in a file: name, offset, bytes.
type Spot = (String, u64, usize);

fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 64 << 10,
        segment_bytes: 1 << 20,
        segments_count: 4,
        vshards_count: 4,
    };
    Options {
        geometry,
        memory_bytes: 16 << 20,
        shards: Some(SHARDS),
        driver: Driver::Portable,
        ..Options::default()
    }
}

// --- the reference store ---

/// A store that was filled, closed, changed and closed again; what it was at the first close; and
/// what it holds. In memory: what a static keeps is never dropped, and a directory would be left
/// behind.
struct Reference {
    now: Files,
    earlier: Files,
    model: Model,
    spots: BTreeMap<&'static str, Vec<Spot>>,
}

fn reference() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory for the store");
        let mut model = Model::new();
        let mut rng = Rng::new(1);
        let (now, earlier, spots) = block_on(async {
            let store = Store::open(dir.path(), options()).await?;
            for name in VOLUMES {
                store.create_volume(name, 1 << 50).await?;
            }
            work(&store, &mut model, &mut rng, 40).await?;
            store.close().await?;
            let earlier = contents(dir.path());
            // Which places are used again depends on how the work falls into checkpoints, so there
            // is more of it until each kind of structure lies somewhere where something else was.
            let mut lives = 0;
            loop {
                let store = Store::open(dir.path(), options()).await?;
                store.create_volume(&format!("not in the model {lives}"), 1 << 20).await?;
                work(&store, &mut model, &mut rng, 90).await?;
                store.close().await?;
                lives += 1;
                let (now, spots) = (contents(dir.path()), spots(dir.path()));
                let lacks =
                    |all: &[Spot]| !all.iter().any(|spot| was_different(&now, &earlier, spot));
                let lacking: Vec<_> =
                    spots.iter().filter(|(_, all)| lacks(all)).map(|(kind, _)| kind).collect();
                if lacking.is_empty() {
                    return Ok::<_, Error>((now, earlier, spots));
                }
                assert!(
                    lives < LIVES_MAX,
                    "after {lives} lives nothing else was where these are: {lacking:?}"
                );
            }
        })
        .expect("the reference store is made");
        Reference { now, earlier, model, spots }
    })
}

/// Commits of whole pages, patches and frees: all pages once, then some of them again and again, so
/// that extents are left, compacted and filled once more.
async fn work(store: &Store, model: &mut Model, rng: &mut Rng, rounds: u64) -> crate::Result<()> {
    let volumes = store.volumes().await?;
    for round in 0..rounds {
        for (v, volume) in volumes.iter().take(VOLUMES.len()).enumerate() {
            let mut changes = Vec::new();
            for i in 0..PAGES / 20 {
                let page = if round < 20 { round * (PAGES / 20) + i } else { rng.below(PAGES / 4) };
                let page = if page % 97 == 5 { page << 30 } else { page };
                let now = model.entry((v, page)).or_insert_with(|| vec![0; BLOCK]);
                let change = match rng.below(10) {
                    0 => Change::Free,
                    1 | 2 => {
                        let offset = rng.below(4000) as u32;
                        Change::Patch { offset, bytes: vec![round as u8 + 1; 90].into() }
                    }
                    _ => Change::Put(pattern::words(rng.draw(), BLOCK).into()),
                };
                match &change {
                    Change::Free => now.fill(0),
                    Change::Patch { offset, bytes } => {
                        now[*offset as usize..][..bytes.len()].copy_from_slice(bytes)
                    }
                    Change::Put(bytes) => now.copy_from_slice(bytes),
                }
                changes.push((PageId::new(page), change));
            }
            volume.apply(changes, Durability::Durable).await?;
        }
    }
    Ok(())
}

/// The reference store in a directory of its own.
fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory for a copy");
    for (name, bytes) in &reference().now {
        fs::write(dir.path().join(name), bytes).expect("a copy of a file");
    }
    dir
}

/// Makes the store in `dir` the same as the reference store again, writing only what differs: fresh
/// copies of whole files would all have to reach the device before the store can read past the page
/// cache.
fn restore(dir: &Path) {
    const CHUNK: usize = 64 << 10;
    for (name, right) in &reference().now {
        let file =
            fs::OpenOptions::new().read(true).write(true).open(dir.join(name)).expect("a copy");
        file.set_len(right.len() as u64).expect("a length");
        let mut found = vec![0; CHUNK];
        for (i, right) in right.chunks(CHUNK).enumerate() {
            let offset = (i * CHUNK) as u64;
            file.read_exact_at(&mut found[..right.len()], offset).expect("a read");
            if found[..right.len()] != *right {
                file.write_all_at(right, offset).expect("a write");
            }
        }
    }
}

fn contents(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).expect("the directory").map(|entry| entry.expect("an entry"));
    entries
        .map(|e| {
            (e.file_name().into_string().expect("a name"), fs::read(e.path()).expect("a file"))
        })
        .collect()
}

// --- where the structures are ---

fn read_at(dir: &Path, file: &str, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fs::File::open(dir.join(file))
        .and_then(|f| f.read_exact_at(&mut bytes, offset))
        .expect("a read in a store's file");
    bytes
}

fn newest(dir: &Path) -> Superblock {
    let copies = (0..4).filter_map(|copy| {
        let offset = Superblock::offset(copy);
        Superblock::decode(
            copy,
            &read_at(dir, "meta", offset, crate::format::superblock::SUPERBLOCK_BYTES),
        )
        .ok()
    });
    copies.max_by_key(|s| s.generation).expect("a superblock")
}

/// All structures of a cleanly closed store, by kind.
fn spots(dir: &Path) -> BTreeMap<&'static str, Vec<Spot>> {
    let superblock = newest(dir);
    assert!(superblock.clean);
    let geometry = &superblock.geometry;
    let mut spots: BTreeMap<&'static str, Vec<Spot>> = BTreeMap::new();
    let mut add = |kind, file: &str, offset, len| {
        spots.entry(kind).or_default().push((file.to_string(), offset, len))
    };
    (0..4).for_each(|copy| add("superblock copy", "meta", Superblock::offset(copy), 16384));
    let mut nodes = Vec::new();
    for (i, state) in superblock.vshards.iter().enumerate() {
        let offset =
            root::offset(VShard::new(i as u16), state.root.generation, geometry.vshards_count);
        add("root", "meta", offset, BLOCK);
        let (_, _, trees) = root::decode(&read_at(dir, "meta", offset, BLOCK)).expect("a root");
        nodes.extend(trees.iter().copied().enumerate().filter(|(_, child)| child.is_present()));
    }
    while let Some((volume, child)) = nodes.pop() {
        let offset = child.place().offset(geometry.extent_bytes);
        let bytes = read_at(dir, "data", offset, BLOCK);
        add(if child.level == 0 { "leaf node" } else { "interior node" }, "data", offset, BLOCK);
        for slot in 0..if child.level == 0 { node::LEAF_ENTRIES } else { node::NODE_CHILDREN } {
            let (entry, below) = (node::entry(&bytes, slot), node::child(&bytes, slot));
            if child.level == 0 && entry.is_present() {
                let kind = if volume == 0 { "catalog page" } else { "page" };
                add(kind, "data", entry.place().offset(geometry.extent_bytes), BLOCK);
            } else if child.level > 0 && below.is_present() {
                nodes.push((volume, below));
            }
        }
    }
    for index in 0..superblock.extents_count.div_ceil(extent::TABLE_ROWS) {
        let offset = extent::table_offset(index, superblock.checkpoint);
        add("table block", "extents", offset, BLOCK);
        let bytes = read_at(dir, "extents", offset, BLOCK);
        let (rows, _) =
            extent::decode_table(superblock.store_id, index, superblock.checkpoint, &bytes)
                .expect("a table block");
        for (i, row) in rows.iter().enumerate().filter(|(_, row)| row.state == 1) {
            let blocks = (geometry.extent_bytes / BLOCK as u64) as u32;
            let extent = crate::base::ExtentNo::new(index * extent::TABLE_ROWS + i as u32);
            let place = BlockAddr { extent, block: extent::summary_at(blocks, row.summary_slot) };
            let len = extent::summary_blocks(blocks) as usize * BLOCK;
            add("summary", "data", place.offset(geometry.extent_bytes), len);
        }
    }
    assert_eq!(superblock.logs.len(), usize::from(SHARDS));
    for (shard, log) in (0..).zip(&superblock.logs) {
        let end = log.end;
        let file = FileId::Log(crate::base::ShardId::new(shard), end.segment).to_string();
        (0..u64::from(end.block))
            .for_each(|block| add("log block", &file, block * BLOCK as u64, BLOCK));
    }
    spots
}

// --- damage ---

#[derive(Clone, Copy, Debug, PartialEq)]
enum Damage {
    Flipped,
    Zeroed,
    Stale,
    Swapped,
}

/// What the store can still do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Left {
    /// It opens, and everything is read right.
    Everything,
    /// It opens, and some pages are refused.
    SomePages,
    /// It is refused.
    Nothing,
}

/// What `files` have at `spot`, if they are so long.
fn bytes_at<'a>(files: &'a Files, (file, offset, len): &Spot) -> Option<&'a [u8]> {
    files.get(file)?.get(*offset as usize..*offset as usize + len)
}

/// Whether something else is at `spot` now than at the first close.
fn was_different(now: &Files, earlier: &Files, spot: &Spot) -> bool {
    bytes_at(earlier, spot).is_some_and(|bytes| Some(bytes) != bytes_at(now, spot))
}

/// Damages the structure at `spot` of the copy in `dir`; `false` if that changed nothing.
fn damage(dir: &Path, spot: &Spot, other: &Spot, how: Damage) -> bool {
    let (file, offset, len) = spot;
    let before = read_at(dir, file, *offset, *len);
    let mut after = before.clone();
    match how {
        Damage::Flipped => after[len / 3] ^= 4,
        Damage::Zeroed => after.fill(0),
        Damage::Stale => {
            after = bytes_at(&reference().earlier, spot).expect("places were chosen so").to_vec()
        }
        Damage::Swapped => {
            after = read_at(dir, &other.0, other.1, *len);
            write_at(dir, other, &before);
        }
    }
    write_at(dir, spot, &after);
    after != before
}

fn write_at(dir: &Path, (file, offset, _): &Spot, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(dir.join(file)).expect("a store's file");
    file.write_all_at(bytes, *offset).expect("a write to a store's file");
}

/// Opens, reads everything and compares.
fn read_all(dir: &Path, what: &str) -> Left {
    let names_place = |error: &Error| {
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        let text = error.to_string();
        assert!(
            ["byte ", "block ", "copy ", "copies"].iter().any(|word| text.contains(word)),
            "{what}: no place: {text}"
        );
    };
    let store = match block_on(Store::open(dir, options())) {
        Ok(store) => store,
        Err(error) => {
            names_place(&error);
            return Left::Nothing;
        }
    };
    let volumes = match block_on(store.volumes()) {
        Ok(volumes) => volumes,
        Err(error) => {
            names_place(&error);
            return Left::SomePages;
        }
    };
    let mut left = Left::Everything;
    for ((volume, page), bytes) in &reference().model {
        match block_on(volumes[*volume].read(PageId::new(*page))) {
            Ok(found) => assert!(
                found[..] == bytes[..],
                "{what}: wrong bytes of page {page} of {}",
                VOLUMES[*volume]
            ),
            Err(error) => {
                names_place(&error);
                left = Left::SomePages;
            }
        }
    }
    left
}

fn is_named(report: &VerifyReport, (file, offset, len): &Spot) -> bool {
    let inside = |at: u64| (*offset..offset + *len as u64).contains(&at);
    // A group is named at its beginning, which may lie before the block.
    let in_group = |at: u64| file.starts_with("log") && at <= *offset;
    report
        .damaged
        .iter()
        .any(|d| d.file.to_string() == *file && (inside(d.offset) || in_group(d.offset)))
}

/// Does what `report` says mends the damage, where that is done with the store itself; then it must
/// be whole.
fn mends(dir: &Path, report: &VerifyReport, what: &str) {
    let all = |mends: &[Mend]| report.damaged.iter().all(|damage| mends.contains(&damage.mend));
    if !all(&[Mend::Reopen, Mend::Overwrite, Mend::Rewrite]) {
        return;
    }
    let rewrite = !all(&[Mend::Reopen, Mend::Overwrite]);
    block_on(async {
        let store = Store::open(dir, options()).await?;
        let volumes = store.volumes().await?;
        for bytes in report.damaged.iter().filter_map(|damage| damage.bytes.as_ref()) {
            let volume = volumes
                .iter()
                .find(|v| v.name() == bytes.volume)
                .expect("it is called by its name");
            let page = PageId::new(bytes.offset / BLOCK as u64);
            assert_eq!(
                (bytes.offset % BLOCK as u64, bytes.length, bytes.all),
                (0, BLOCK as u64, true),
                "{what}"
            );
            assert_eq!(
                volume.read(page).await.expect_err("it is damaged").kind(),
                ErrorKind::Corrupt,
                "{what}"
            );
            volume.write(page, vec![7; BLOCK]).await?;
        }
        for (volume, page) in reference().model.keys().filter(|_| rewrite) {
            volumes[*volume].write_back(PageId::new(*page), vec![7; BLOCK]).await?;
        }
        for name in volumes
            .iter()
            .map(crate::Volume::name)
            .filter(|name| rewrite && name.starts_with("not in"))
        {
            store.delete_volume(name).await?;
        }
        store.wait_freed().await?;
        // What the last map names is in use until the second one after it.
        store.checkpoint().await?;
        store.checkpoint().await?;
        store.close().await
    })
    .unwrap_or_else(|error| panic!("{what}: {error}"));
    let after = crate::verify(dir).expect("a closed store");
    assert!(after.is_whole(), "{what}: still damaged: {:?}", after.damaged);
}

/// Damages structures of one kind in all four ways. `tolerated`: what may be left of the store.
fn damage_each(kind: &str, tolerated: &[Left]) {
    let all =
        reference().spots.get(kind).unwrap_or_else(|| panic!("the reference store has no {kind}"));
    assert!(all.len() >= 2, "the reference store has only {} of {kind}", all.len());
    let dir = copy();
    for how in [Damage::Flipped, Damage::Zeroed, Damage::Stale, Damage::Swapped] {
        // Not every place had something else in it at the first close.
        let mut places: Vec<usize> = (0..all.len())
            .filter(|i| {
                how != Damage::Stale
                    || was_different(&reference().now, &reference().earlier, &all[*i])
            })
            .collect();
        places = places.iter().copied().step_by(places.len().div_ceil(SAMPLES).max(1)).collect();
        let mut done = 0;
        for i in places {
            restore(dir.path());
            let (spot, other) = (&all[i], &all[(i + all.len() / 2) % all.len()]);
            if !damage(dir.path(), spot, other, how) {
                continue;
            }
            let what = format!("{kind} at byte {} of {}, {how:?}", spot.1, spot.0);
            let report = crate::verify(dir.path()).expect("damage is in the report");
            let named =
                is_named(&report, spot) || (how == Damage::Swapped && is_named(&report, other));
            assert!(named, "{what}: not named: {report}\n{:?}", report.damaged);
            let left = read_all(dir.path(), &what);
            assert!(tolerated.contains(&left), "{what}: left was {left:?}");
            if done == 0 && how != Damage::Swapped {
                restore(dir.path());
                damage(dir.path(), spot, other, how);
                mends(dir.path(), &report, &what);
            }
            done += 1;
        }
        assert!(done > 0, "{kind} was never {how:?}");
    }
}

#[test]
fn an_undamaged_store_is_whole() {
    let dir = copy();
    let before = contents(dir.path());
    let report = crate::verify(dir.path()).expect("a closed store");
    assert!(report.is_whole() && report.clean, "{report}\n{:?}", report.damaged);
    assert!(contents(dir.path()) == before, "verify changed something");
    assert_eq!(read_all(dir.path(), "undamaged"), Left::Everything);
    assert!(reference().spots["table block"].len() >= 2);
}

/// One copy of four is redundant: the store opens, and only `verify` speaks of it. Two that take
/// each other's place are damage that can't come from a crash.
#[test]
fn damaged_superblock_copies_are_named() {
    damage_each("superblock copy", &[Left::Everything, Left::Nothing]);
}

#[test]
fn a_store_with_a_damaged_root_is_refused() {
    damage_each("root", &[Left::Nothing]);
}

#[test]
fn a_store_with_a_damaged_table_block_is_refused() {
    damage_each("table block", &[Left::Nothing]);
}

#[test]
fn pages_below_a_damaged_interior_node_are_refused() {
    damage_each("interior node", &[Left::SomePages]);
}

#[test]
fn pages_below_a_damaged_leaf_are_refused() {
    damage_each("leaf node", &[Left::SomePages]);
}

#[test]
fn damaged_pages_are_refused() {
    damage_each("page", &[Left::SomePages]);
}

#[test]
fn damaged_catalog_pages_are_refused() {
    damage_each("catalog page", &[Left::SomePages]);
}

/// The summary is for compaction: nothing else needs it.
#[test]
fn damaged_summaries_are_named() {
    damage_each("summary", &[Left::Everything]);
}

/// After a clean close the log is not needed, but a device that lost some of it is not to be
/// trusted.
#[test]
fn damaged_log_groups_are_named() {
    damage_each("log block", &[Left::Everything]);
}

// --- refusals ---

/// A newer program's store must not be touched by an older one.
#[test]
fn a_store_of_another_version_is_refused_and_not_changed() {
    let dir = copy();
    for copy in 0..4 {
        write_at(
            dir.path(),
            &("meta".into(), Superblock::offset(copy) + 8, 4),
            &4711u32.to_le_bytes(),
        );
    }
    let before = contents(dir.path());
    let error = block_on(Store::open(dir.path(), options())).expect_err("another version");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("version 4711"), "{error}");
    assert_eq!(
        crate::verify(dir.path()).expect_err("another version").kind(),
        ErrorKind::Unsupported
    );
    assert!(contents(dir.path()) == before, "a refused store was changed");
}

/// What can't be opened must be left as it is, for whoever mends it.
#[test]
fn a_store_without_a_superblock_is_refused_and_not_changed() {
    let dir = copy();
    for copy in 0..4 {
        write_at(dir.path(), &("meta".into(), Superblock::offset(copy), 1), &[0; 16384]);
    }
    let before = contents(dir.path());
    let error = block_on(Store::open(dir.path(), options())).expect_err("no superblock");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(contents(dir.path()) == before, "a refused store was changed");
    assert!(!crate::verify(dir.path()).expect("damage is in the report").is_whole());
}

/// A copy that ended early, or a file system that lost the end of a file.
#[test]
fn a_store_with_a_shortened_data_file_is_refused_and_not_changed() {
    let dir = copy();
    let in_use = {
        let superblock = newest(dir.path());
        u64::from(superblock.extents_count) * superblock.geometry.extent_bytes
    };
    for bytes in [in_use - 1, in_use / 2, 0] {
        restore(dir.path());
        fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join("data"))
            .and_then(|f| f.set_len(bytes))
            .expect("it is cut");
        let before = contents(dir.path());
        let error = block_on(Store::open(dir.path(), options())).expect_err("a part is missing");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(&format!("has {bytes} bytes")), "{error}");
        assert!(contents(dir.path()) == before, "a refused store was changed");
    }
    restore(dir.path());
    assert_eq!(read_all(dir.path(), "made whole again"), Left::Everything);
}

#[test]
fn verify_says_why_it_can_not_read() {
    let dir = tempfile::tempdir().expect("a directory");
    assert_eq!(
        crate::verify(&dir.path().join("none")).expect_err("no store").kind(),
        ErrorKind::NotFound
    );
    let store = block_on(Store::open(dir.path(), options())).expect("a fresh store");
    assert_eq!(crate::verify(dir.path()).expect_err("it is open").kind(), ErrorKind::InUse);
    block_on(store.close()).expect("a clean close");
    drop(store);
    assert!(crate::verify(dir.path()).expect("a closed store").is_whole());
}
