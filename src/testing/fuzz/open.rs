//! Fuzz target: opens a damaged store.
//!
//! 1. Bytes are changed, zeroed, cut off, lost or misdirected, and checksums are not corrected:
//!    what is read of the store is what was written, or an error says where the damage is. A store
//!    that opens serves, page by page, exactly the state at the LSN that it reports, or refuses the
//!    page.
//! 2. The same damage with corrected checksums, so that nonsense gets past them: superblocks,
//!    roots, tables and logs are read without a panic. Nothing more is promised against an attacker
//!    that can compute a checksum.
//!
//! A lost or a misdirected write is the only damage: two of them can form an older, complete state.

use super::input::Input;
use super::log::seal;
use super::memory::{Image, MemoryDisk};
use crate::base::checksum::crc32c;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::mix::mix;
use crate::base::options::{Geometry, Options};
use crate::base::{BLOCK, Lsn, PageId, PageKey, ShardId, ShardMap, VolumeId};
use crate::engine::recovery;
use crate::engine::{Change, Commit, Request, Response, Token};
use crate::format::group::{HEAD_BYTES, Head};
use crate::format::superblock::{SUPERBLOCK_BYTES, SUPERBLOCK_COPIES, Superblock};
use crate::format::{crc_around, extent, root};
use crate::io::{Disk, FileId};
use crate::memory::Arena;
use crate::testing::local_cluster::LocalCluster;
use crate::testing::pattern;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem::offset_of;
use std::sync::{Arc, LazyLock};

const SHARDS: u16 = 2;
/// Pages of the model, in two volumes.
const PAGES: u64 = 12;
const COMMITS: u64 = 40;
/// The offset of the checksum in all structures that have one: not changed where checksums must
/// catch the damage.
const SUMS: std::ops::Range<usize> = 8..16;

type State = BTreeMap<PageKey, Vec<u8>>;

/// A store to damage.
struct Base {
    image: Arc<Image>,
    /// The image some commits earlier.
    earlier: Image,
    /// Blocks that are not all zeros.
    spots: Vec<(FileId, u64)>,
    superblock: Superblock,
    commits: Vec<(Lsn, Vec<(PageKey, Change)>)>,
}

static BASES: LazyLock<[Base; 2]> = LazyLock::new(|| [base(true), base(false)]);

thread_local! {
    static ARENA: RefCell<Arena> = RefCell::new(Arena::new(512).expect("memory for reading"));
}

/// Runs the target. It opens one in 32 stores fully, which takes fifty times as long as reading
/// everything that an open reads.
pub fn open(data: &[u8]) {
    run(data, crc32c(data).is_multiple_of(32));
}

/// Opens every store fully.
#[cfg(test)]
pub(super) fn open_each(data: &[u8]) {
    run(data, true);
}

fn run(data: &[u8], is_full: bool) {
    let mut input = Input(data);
    let mode = input.u8();
    let (base, is_sealed) = (&BASES[usize::from(mode & 1)], mode & 2 != 0);
    let mut disk = MemoryDisk::new(base.image.clone());
    damage(&mut disk, base, is_sealed, &mut input);
    match is_full && !is_sealed {
        true => serve(disk, base),
        false => load(&mut disk, base, is_sealed),
    }
}

fn options() -> Options {
    let geometry = Geometry {
        extent_bytes: 64 << 10,
        segment_bytes: 64 << 10,
        segments_count: 4,
        vshards_count: 4,
    };
    Options { geometry, memory_bytes: 4 << 20, ..Options::default() }
}

// --- the stores ---

/// The shards of a store, driven together.
struct Driver {
    disk: MemoryDisk,
    all: LocalCluster,
    now: u64,
}

impl Driver {
    fn open(mut disk: MemoryDisk) -> Result<(Driver, recovery::RecoveryReport)> {
        let opening = recovery::begin(&mut disk, &options(), SHARDS, 7, 0)?;
        let mut all = LocalCluster::new(opening.shards);
        all.run_until_open(&mut disk, 0)?;
        Ok((Driver { disk, all, now: 1_000_000 }, opening.report))
    }

    fn ask(&mut self, shard: ShardId, request: Request) -> Result<Response> {
        self.all.request(shard, Token(1), request);
        for _ in 0..10_000 {
            self.now += 50;
            self.all.poll_once(&mut self.disk, self.now);
            if let Some((_, answer)) = self.all.replies.pop() {
                return answer;
            }
        }
        panic!("no answer to a request");
    }

    fn read(&mut self, key: PageKey) -> Result<Vec<u8>> {
        let home = ShardMap::new(options().geometry.vshards_count, SHARDS).shard_of(key);
        match self.ask(home, Request::Read([key].into_iter().collect()))? {
            Response::Pages(pages) => Ok(pages[0].to_vec()),
            other => panic!("{other:?}"),
        }
    }
}

fn keys() -> Vec<PageKey> {
    let key = |i| {
        PageKey::new(
            VolumeId::new(1 + (i % 2) as u8),
            PageId::new(if i == 7 { 1 << 40 } else { i << 9 | i }),
        )
    };
    (0..PAGES).map(key).collect()
}

/// Makes whole pages, patches and frees, some over both shards.
fn changes(round: u64) -> Vec<(PageKey, Change)> {
    let keys = keys();
    let one = |n: u64| {
        let word = mix(round * 8 + n);
        let change = match word % 6 {
            0 => Change::Free,
            1 | 2 => Change::Patch {
                offset: (word >> 8 & 0xfff) as u32 % 4000,
                bytes: Bytes::from(vec![round as u8; 60]),
            },
            _ => Change::Put(pattern::words(word, BLOCK).into()),
        };
        (keys[(word >> 32) as usize % keys.len()], change)
    };
    (0..1 + round % 3).map(one).collect()
}

fn base(clean: bool) -> Base {
    let (mut driver, _) = Driver::open(MemoryDisk::new(Arc::default())).expect("a store is made");
    let (mut commits, mut earlier) = (Vec::new(), Image::new());
    for round in 0..COMMITS {
        if round == COMMITS / 2 {
            assert!(matches!(driver.ask(ShardId::LEADER, Request::Close), Ok(Response::Closed)));
            earlier = driver.disk.image();
            driver = Driver::open(driver.disk).expect("it opens again").0;
        }
        let changes = changes(round);
        let commit = Commit { reads: vec![], changes: changes.clone(), durable: round % 4 != 0 };
        match driver.ask(ShardId::LEADER, Request::Commit(commit)) {
            Ok(Response::Committed(lsn)) => commits.push((lsn, changes)),
            other => panic!("{other:?}"),
        }
    }
    if clean {
        assert!(matches!(driver.ask(ShardId::LEADER, Request::Close), Ok(Response::Closed)));
    }
    let image = driver.disk.image();
    let mut spots = Vec::new();
    for (file, bytes) in &image {
        let blocks =
            bytes.chunks(BLOCK).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0));
        spots.extend(blocks.map(|(number, _)| (*file, number as u64)));
    }
    let found = ARENA
        .with_borrow_mut(|arena| recovery::find_superblock(&mut driver.disk, arena))
        .expect("a superblock");
    assert_eq!(found.superblock.clean, clean);
    Base { image: Arc::new(image), earlier, spots, superblock: found.superblock, commits }
}

/// The store after all commits up to `recovered_lsn`; an absent page reads as zeros.
fn state(base: &Base, recovered_lsn: Lsn) -> State {
    let mut state: State = keys().into_iter().map(|key| (key, vec![0; BLOCK])).collect();
    for (key, change) in base
        .commits
        .iter()
        .filter(|(lsn, _)| *lsn <= recovered_lsn)
        .flat_map(|(_, changes)| changes)
    {
        let now = state.get_mut(key).expect("a page of the model");
        match change {
            Change::Free => now.fill(0),
            Change::Patch { offset, bytes } => {
                now[*offset as usize..][..bytes.len()].copy_from_slice(bytes)
            }
            Change::Put(bytes) => now.copy_from_slice(bytes),
        }
    }
    state
}

// --- damage ---

fn damage(disk: &mut MemoryDisk, base: &Base, is_sealed: bool, input: &mut Input) {
    let mut touched = Vec::new();
    while !input.is_empty() {
        let kind = input.u8() % 7;
        let (file, number) = base.spots[input.below(base.spots.len())];
        if kind == 6 {
            disk.truncate(file, number);
            continue;
        }
        let (other_file, other) =
            base.spots[if kind == 4 { input.below(base.spots.len()) } else { 0 }];
        let other: [u8; BLOCK] = *disk.block(other_file, other);
        let (offset, width) = match kind {
            0 | 1 => (input.below(BLOCK), 1),
            2 => (input.below(BLOCK / 8) * 8, 8),
            _ => (0, 0),
        };
        let value = input.take(width);
        let is_alone = kind == 4 || kind == 5;
        if !is_sealed && is_alone && !touched.is_empty() {
            continue;
        }
        if !is_sealed && width > 0 && offset + width > SUMS.start && offset < SUMS.end {
            continue;
        }
        let Some(block) = disk.block_mut(file, number) else { continue };
        touched.push((file, number));
        let at = offset..offset + value.len();
        match kind {
            0 | 2 => block[at].copy_from_slice(value),
            1 => block[at].iter_mut().zip(value).for_each(|(byte, flip)| *byte ^= flip),
            3 => block.fill(0),
            4 => *block = other,
            _ => {
                let from = number as usize * BLOCK;
                let before =
                    base.earlier.get(&file).and_then(|bytes| bytes.get(from..from + BLOCK));
                before.into_iter().for_each(|before| block.copy_from_slice(before));
            }
        }
        if !is_sealed && is_alone {
            return;
        }
    }
    if is_sealed {
        touched
            .iter()
            .for_each(|(file, number)| reseal(disk, *file, *number, base.superblock.salt));
        (0..SUPERBLOCK_COPIES).for_each(|copy| name_anew(disk, copy));
    }
}

/// Corrects the checksums by which a superblock names roots and table.
fn name_anew(disk: &mut MemoryDisk, copy: u64) {
    let blocks =
        (0..SUPERBLOCK_BYTES / BLOCK).map(|i| Superblock::offset(copy) / BLOCK as u64 + i as u64);
    let mut bytes: Vec<u8> =
        blocks.clone().flat_map(|number| *disk.block(FileId::Meta, number)).collect();
    let Ok(mut superblock) = Superblock::decode(copy, &bytes) else { return };
    let sum =
        |file, offset: u64| crc_around(0, disk.block(file, offset / BLOCK as u64), SUMS.start);
    let vshards_count = superblock.geometry.vshards_count;
    for (i, state) in superblock.vshards.iter_mut().enumerate() {
        let vshard = crate::base::VShard::new(i as u16);
        state.root.crc =
            sum(FileId::Meta, root::offset(vshard, state.root.generation, vshards_count));
    }
    // With more blocks than the file has, it is refused anyway.
    let table_blocks = superblock.extents_count.div_ceil(extent::TABLE_ROWS).min(64);
    let table = (0..table_blocks)
        .map(|i| sum(FileId::Table, extent::table_offset(i, superblock.checkpoint)));
    superblock.table_crc = extent::table_crc(table);
    superblock.encode(copy, &mut bytes);
    for (number, bytes) in blocks.zip(bytes.chunks(BLOCK)) {
        if let Some(block) = disk.block_mut(FileId::Meta, number) {
            block.copy_from_slice(bytes);
        }
    }
}

/// Corrects the checksum of the structure that the block belongs to, if it has one of its own.
fn reseal(disk: &mut MemoryDisk, file: FileId, number: u64, salt: u64) {
    let copy_blocks = (SUPERBLOCK_BYTES / BLOCK) as u64;
    let (first, count, at) = match file {
        FileId::Meta if number < SUPERBLOCK_COPIES * copy_blocks => {
            (number / copy_blocks * copy_blocks, copy_blocks, 12)
        }
        FileId::Meta | FileId::Table => (number, 1, 8),
        FileId::Log(..) => return reseal_groups(disk, file, number, salt),
        FileId::Data => return,
    };
    let mut bytes: Vec<u8> =
        (first..first + count).flat_map(|number| *disk.block(file, number)).collect();
    let sum = crc_around(0, &bytes, at);
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    if let Some(block) = disk.block_mut(file, first) {
        block.copy_from_slice(&bytes[..BLOCK]);
    }
}

/// Does the same for the group, or for all possible groups, that the block belongs to.
fn reseal_groups(disk: &mut MemoryDisk, file: FileId, number: u64, salt: u64) {
    for first in 0..=number {
        let head = disk.block(file, first);
        let at = offset_of!(Head, body_blocks);
        let blocks =
            u64::from(u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes")));
        if !head.starts_with(b"CPGROUP\0")
            || !(1..=16).contains(&blocks)
            || first + blocks <= number
        {
            continue;
        }
        let body: Vec<u8> =
            (first..first + blocks).flat_map(|number| *disk.block(file, number)).collect();
        let body_crc = crc32c(&body[HEAD_BYTES..]);
        let Some(head) = disk.block_mut(file, first) else { return };
        head[offset_of!(Head, body_crc)..][..4].copy_from_slice(&body_crc.to_le_bytes());
        seal(head, salt);
    }
}

// --- what must hold ---

fn assert_names_the_place(error: &Error) {
    let text = error.to_string();
    assert!(
        [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Io].contains(&error.kind()),
        "{error:?}"
    );
    let places = ["byte", "block", "copy", "copies", "version", "log"];
    assert!(places.iter().any(|word| text.contains(word)), "no place in: {text}");
}

/// Reads everything that an open reads before there are shards.
fn load(disk: &mut MemoryDisk, base: &Base, is_sealed: bool) {
    let outcome = ARENA.with_borrow_mut(|arena| -> Result<()> {
        let superblock = recovery::find_superblock(disk, arena)?.superblock;
        let loaded = recovery::load(disk, arena, &superblock)?;
        if !is_sealed {
            assert_eq!(superblock, base.superblock, "another superblock than the newest counts");
            check_loaded(base, &loaded);
        }
        if !superblock.clean {
            let shard_map = ShardMap::new(superblock.geometry.vshards_count, 1);
            let scan = recovery::scan(disk, arena, &superblock, shard_map)?;
            let last = base.commits.last().expect("there are commits").0;
            assert!(
                is_sealed || (superblock.watermark..=last).contains(&scan.state(&superblock)),
                "{}",
                scan.recovered_lsn
            );
        }
        Ok(())
    });
    if let Err(error) = outcome {
        assert_names_the_place(&error);
    }
}

/// Checks that roots and table are, byte for byte, those of the image.
fn check_loaded(base: &Base, loaded: &recovery::Loaded) {
    let (meta, table) = (&base.image[&FileId::Meta], &base.image[&FileId::Table]);
    let superblock = &base.superblock;
    for (i, (children, version)) in loaded.roots.iter().enumerate() {
        let vshard = crate::base::VShard::new(i as u16);
        let at =
            root::offset(vshard, version.generation, superblock.geometry.vshards_count) as usize;
        let (head, crc, written) =
            root::decode(&meta[at..at + BLOCK]).expect("a root of the image");
        assert!(
            head.generation == version.generation && crc == version.crc && written == *children,
            "another root is taken"
        );
    }
    let at = extent::table_offset(0, superblock.checkpoint) as usize;
    let rows =
        extent::decode_table(superblock.store_id, 0, superblock.checkpoint, &table[at..at + BLOCK]);
    assert_eq!(rows.expect("the table of the image").0, loaded.table, "another table is taken");
}

/// Opens the store fully and reads every page.
fn serve(disk: MemoryDisk, base: &Base) {
    let (mut driver, report) = match Driver::open(disk) {
        Ok(opened) => opened,
        Err(error) => return assert_names_the_place(&error),
    };
    // Without a superblock and without the first log block it is an empty directory.
    if report.created {
        return;
    }
    let last = base.commits.last().expect("there are commits").0;
    assert!(
        (base.superblock.watermark..=last).contains(&report.recovered_lsn),
        "the state at {} is none",
        report.recovered_lsn
    );
    for (key, bytes) in state(base, report.recovered_lsn) {
        match driver.read(key) {
            Ok(found) => {
                assert!(found == bytes, "wrong bytes of {key:?} at {}", report.recovered_lsn)
            }
            Err(error) => assert_names_the_place(&error),
        }
    }
    assert!(driver.disk.len(FileId::Meta).is_ok_and(|len| len.is_some()));
}

/// Nonsense with corrected checksums must get past them: changed roots and tables are accepted.
#[cfg(test)]
#[test]
fn sealed_nonsense_is_read() {
    let base = &BASES[0];
    let superblock = &base.superblock;
    let root = root::offset(crate::base::VShard::new(1), superblock.vshards[1].root.generation, 4);
    let table = extent::table_offset(0, superblock.checkpoint);
    for (file, offset) in [(FileId::Meta, root), (FileId::Table, table)] {
        let mut disk = MemoryDisk::new(base.image.clone());
        let number = offset / BLOCK as u64;
        disk.block_mut(file, number).expect("a block of the image")[1000] ^= 1;
        reseal(&mut disk, file, number, superblock.salt);
        let load = |disk: &mut MemoryDisk| {
            ARENA.with_borrow_mut(|arena| {
                let superblock = recovery::find_superblock(disk, arena)?.superblock;
                recovery::load(disk, arena, &superblock)
            })
        };
        let error = load(&mut disk).err().expect("the superblock names another sum");
        assert!(error.to_string().contains("another one than the superblock names"), "{error}");
        (0..SUPERBLOCK_COPIES).for_each(|copy| name_anew(&mut disk, copy));
        let loaded = load(&mut disk).expect("all sums are right");
        assert!(
            std::panic::catch_unwind(|| check_loaded(base, &loaded)).is_err(),
            "the change is not seen"
        );
    }
}
