//! Many lives of a store, each of which ends soon after it has begun.

use super::*;

/// How lives end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Kill,
    Close,
}

/// How the life with this number ends.
type EndOf = fn(usize) -> End;

/// The lengths of the data file at the end of each life, in extents. `pages`: of the one commit of
/// a life.
fn lives(count: usize, shards_count: u16, pages: u64, end: EndOf) -> Vec<u64> {
    let mut rng = Rng::new(u64::from(shards_count) * pages);
    let (mut disk, mut lens) = (SimDisk::new(1), Vec::new());
    let mut model = std::collections::BTreeMap::new();
    for life in 0..count {
        let (mut d, _) = Driver::open_shards(disk, &options(), shards_count);
        let first = rng.below(40);
        let changes =
            || (first..first + pages).map(|page| (key(page << 7), put(life as u8))).collect();
        model.extend((first..first + pages).map(|page| (page, life as u8)));
        // A commit over shards does not wait for space that is being made: its caller must try
        // again.
        let mut tries = (0..100).map(|_| {
            d.ask(Request::Commit(Commit { reads: vec![], changes: changes(), durable: true }))
        });
        let done = tries.find(
            |outcome| !matches!(outcome, Err(error) if error.kind() == crate::ErrorKind::Busy),
        );
        assert!(matches!(done, Some(Ok(Response::Committed(_)))), "life {life}: {done:?}");
        if end(life) == End::Close {
            assert!(matches!(d.ask(Request::Close), Ok(Response::Closed)));
        }
        disk = d.disk.crash(Loss::Process, &mut rng);
        lens.push(
            disk.len(FileId::Data).expect("it is there").unwrap_or(0)
                / options().geometry.extent_bytes,
        );
    }
    let (mut d, _) = Driver::open_shards(disk, &options(), shards_count);
    model.into_iter().for_each(|(page, byte)| {
        assert_eq!(d.read(key(page << 7)), vec![byte; BLOCK], "page {page}")
    });
    lens
}

/// If this fails, a store that is killed or closed again and again soon after it was opened grows
/// until the disk is full, although it holds the same few pages all the time.
#[test]
fn short_lives_give_back_what_they_took() {
    let closes: [(&str, EndOf); 3] = [
        ("killed", |_| End::Kill),
        ("closed", |_| End::Close),
        ("closed now and then", |life| if life % 3 == 0 { End::Close } else { End::Kill }),
    ];
    for (how, end) in closes {
        for (shards_count, pages) in [(1, 1), (2, 1), (1, 8), (2, 8)] {
            let lens = lives(200, shards_count, pages, end);
            println!("{how}, {shards_count} shards, {pages} pages a life: extents {lens:?}");
            // Each shard may have nine extents for dead blocks, as many as the log has, and its
            // share, with eight in reserve, may fill seven tenths of the rest; what is added at a
            // time comes on top.
            let most = 40 * u64::from(shards_count);
            assert!(
                lens[199] <= most,
                "{how}, {shards_count} shards, {pages} pages a life: {} extents",
                lens[199]
            );
        }
    }
}

/// If this fails, an opening that finds no memory says "closed, reopen it" and not what is short.
#[test]
fn an_opening_that_is_refused_for_memory_says_so() {
    let (mut d, _) = Driver::open(SimDisk::new(1));
    // So few pages that no checkpoint has come: no map node has to be read.
    d.commit((0..4).map(|i| (key(i), put(1))).collect());
    let mut disk = d.disk.crash(Loss::Everything, &mut Rng::new(1));
    let opening = begin(&mut disk, &options(), 1, 7, 0).expect("the store can be opened");
    let mut all = LocalCluster::new(opening.shards);
    let (mut taken, mut now) = (Vec::new(), disk.now());
    // Something else has all the memory from the moment at which the log is read.
    let failure = (0..10_000).find_map(|_| {
        now += 5_000;
        if taken.is_empty() || all.shards[0].ops_under_way() > 0 {
            all.poll_once(&mut disk, now);
            disk.advance_to(now);
        } else {
            // Like a shard's thread: one turn, and then it asks.
            all.shards[0].turn(now);
        }
        let shard = &mut all.shards[0];
        assert!(!shard.is_open(), "without memory it can't open");
        if shard.ops_under_way() > 0 || !taken.is_empty() {
            taken.extend(std::iter::from_fn(|| shard.take_frame()));
        }
        shard.failure()
    });
    let error = failure.expect("it does not wait for ever");
    assert_eq!(error.kind(), crate::ErrorKind::Busy, "{error}");
    assert!(!taken.is_empty());
}
