//! Damage to the logs, as an opening sees it: everything that is left of them is examined before a
//! gap is taken for their end.

use super::*;
use crate::base::error::ErrorKind;
use crate::format::group::GroupHead;
use crate::format::superblock::Superblock;
use crate::testing::sim::disk::{Damage, SECTOR, SECTORS};

/// Segments of a few groups, so that logs go round in them.
fn short_segments() -> Options {
    let geometry =
        crate::Geometry { segment_bytes: 64 << 10, segments_count: 6, ..options().geometry };
    Options { geometry, ..options() }
}

/// A disk as a crash has left it: the store has logged for a while, with checkpoints in between,
/// and some commits were in progress.
fn crashed(seed: u64) -> SimDisk {
    let mut rng = Rng::new(seed);
    let shards_count = 1 + (seed % 2) as u16;
    let (mut d, _) = Driver::open_shards(SimDisk::new(seed), &short_segments(), shards_count);
    let commit = |rng: &mut Rng| {
        let pages = rng.within(1, 6);
        let changes = (0..pages).map(|_| (key(rng.below(60) << 7), put(rng.draw() as u8)));
        Commit { reads: vec![], changes: changes.collect(), durable: true }
    };
    for _ in 0..rng.below(60) {
        let count = rng.within(1, 4) as usize;
        (0..count).for_each(|_| _ = d.begin(Request::Commit(commit(&mut rng))));
        while d.all.replies.len() < count {
            d.step();
        }
        d.all.replies.clear();
        if rng.one_in(30) {
            d.ask(Request::Checkpoint).expect("a checkpoint");
        }
    }
    (0..rng.below(8)).for_each(|_| _ = d.begin(Request::Commit(commit(&mut rng))));
    (0..rng.below(12)).for_each(|_| d.step());
    let loss = *rng.pick(&[Loss::Nothing, Loss::Everything, Loss::Sectors(50), Loss::Prefixes]);
    d.disk.crash(loss, &mut rng)
}

/// Damages blocks of one log file, all in one way.
fn damage_blocks(
    disk: &SimDisk,
    file: FileId,
    blocks: std::ops::Range<u64>,
    sectors: usize,
    rng: &mut Rng,
) {
    let kind = rng.below(4);
    for block in blocks.clone() {
        let how = match kind {
            0 => Damage::Flip { bit: rng.below((sectors * SECTOR * 8) as u64) as usize },
            1 => Damage::Zero,
            2 => Damage::Stale,
            _ => Damage::Swap { with: rng.below(blocks.end) * SECTORS as u64 },
        };
        disk.damage(file, block * SECTORS as u64, sectors, how);
    }
}

/// Damages the logs somehow: a sector, a block or many blocks of one file, its beginning more often
/// than the rest; or whole files and the beginnings of all others, which leaves groups that nothing
/// leads to.
fn damage(disk: &SimDisk, rng: &mut Rng) -> String {
    let logs: Vec<(FileId, u64)> =
        disk.files().into_iter().filter(|(file, _)| matches!(file, FileId::Log(..))).collect();
    if rng.one_in(3) {
        let wiped: Vec<FileId> =
            logs.iter().map(|(file, _)| *file).filter(|_| rng.one_in(3)).collect();
        for (file, len) in &logs {
            let blocks = len / BLOCK as u64;
            let end = if wiped.contains(file) { blocks } else { rng.within(1, 4).min(blocks) };
            damage_blocks(disk, *file, 0..end, SECTORS, rng);
        }
        return format!("{wiped:?} whole, and the beginnings of all others");
    }
    let (file, len) = *rng.pick(&logs);
    let blocks = len / BLOCK as u64;
    let first = if rng.one_in(2) { 0 } else { rng.below(blocks) };
    let count = *rng.pick(&[1, 1, 2, 3, blocks]).min(&(blocks - first));
    let sectors = if count == 1 && rng.one_in(2) { 1 } else { SECTORS };
    damage_blocks(disk, file, first..first + count, sectors, rng);
    format!("{count} blocks of {file} from {first} on, {sectors} sectors of each")
}

/// The highest watermark that is still recorded anywhere in the store: each block of each log is
/// examined by itself.
fn recorded_watermark(disk: &SimDisk, superblock: &Superblock) -> Lsn {
    let segment_blocks = (superblock.geometry.segment_bytes / BLOCK as u64) as u32;
    let mut watermark = superblock.watermark;
    for (file, len) in disk.files() {
        let FileId::Log(shard, segment) = file else { continue };
        for block in 0..len / BLOCK as u64 {
            let (here, position) = (disk.block(file, block), (shard, segment, block as u32));
            let head =
                GroupHead::open(&here, superblock.salt, superblock.epoch, position, segment_blocks);
            watermark = head.map_or(watermark, |head| watermark.max(head.watermark));
        }
    }
    watermark
}

#[derive(Default, Debug)]
struct ScanCounts {
    stores: u64,
    /// Damages that left a watermark above what the superblock records.
    telling: u64,
    damaged: u64,
    refused: u64,
}

fn examine(seed: u64, damages: u64, counts: &mut ScanCounts) -> std::result::Result<(), String> {
    let (disk, mut rng) = (crashed(seed), Rng::new(seed));
    let mut arena = Arena::new(READ_BLOCKS).expect("memory");
    let superblock =
        find_superblock(&mut disk.clone(), &mut arena).expect("a superblock").superblock;
    let shard_map = ShardMap::new(superblock.geometry.vshards_count, superblock.logs.len() as u16);
    counts.stores += 1;
    for round in 0..=damages {
        let mut image = disk.crash(Loss::Everything, &mut Rng::new(seed));
        let what = if round == 0 { "nothing".into() } else { damage(&image, &mut rng) };
        let recorded = recorded_watermark(&image, &superblock);
        let scanned = scan(&mut image, &mut arena, &superblock, shard_map);
        counts.damaged += u64::from(round > 0);
        counts.telling += u64::from(round > 0 && recorded > superblock.watermark);
        counts.refused += u64::from(scanned.is_err());
        match scanned {
            Ok(scan) if scan.recovered_lsn >= recorded && scan.highest >= scan.recovered_lsn => {}
            Err(error) if round > 0 && error.kind() == ErrorKind::Corrupt => {}
            other => {
                let got = other.map(|scan| (scan.recovered_lsn, scan.highest));
                return Err(format!(
                    "seed {seed}, damaged: {what}: {recorded} is recorded as durable, and it is \
                     {got:?}"
                ));
            }
        }
    }
    Ok(())
}

fn examine_all(
    seeds: std::ops::RangeInclusive<u64>,
    damages: u64,
) -> std::result::Result<ScanCounts, String> {
    let mut counts = ScanCounts::default();
    seeds.into_iter().try_for_each(|seed| examine(seed, damages, &mut counts))?;
    Ok(counts)
}

/// One of the runs in which planted bugs are looked for.
pub(crate) fn examined() -> std::result::Result<(), String> {
    examine_all(1..=20, 40).map(drop)
}

/// If this fails, a store that is opened after a crash and damage to its log silently loses durable
/// commits, although a remaining block records that they were durable (contract 5).
#[test]
fn a_gap_is_the_end_of_a_log_only_after_every_block_was_examined() {
    let seeds =
        std::env::var("COREPAGE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let counts = examine_all(1..=seeds, 40).unwrap_or_else(|why| panic!("{why}"));
    println!("{counts:?}");
    assert!(
        counts.telling * 4 > counts.damaged && counts.refused * 10 > counts.damaged,
        "{counts:?}"
    );
}
