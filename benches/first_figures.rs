//! First figures: the engine beside what the device gives, in one run, in alternating rounds.
//!
//! Goals: ratios that hold on a noisy machine (medians of rounds; reference and engine in turn on the same file system),
//! data verified after each workload, blocks that have been written before. Not goals: absolute records, other
//! engines (that is `compare/`), several machines.
//!
//! `cargo bench --bench first_figures [-- --small] [--dir DIR] [--rounds N] [WORKLOAD ...]`; `scripts/bench` says more.

// A bench measures time.
#![allow(clippy::disallowed_methods)]

use clap::Parser;
use corepage::{Change, Options, PageId, ShardHandle, Store, Volume};
use futures_lite::future::block_on;
use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

#[derive(Parser)]
struct Arguments {
    /// Tiny sizes: shows that it works, not how fast
    #[arg(long)]
    small: bool,
    /// Where the files go [default: a temporary directory in the current one]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Alternating rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// read, commit, latency, overwrite, idle [default: all]
    workloads: Vec<String>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sizes of a run.
struct Sizes {
    pages: u64,
    hot_pages: u64,
    time: Duration,
    commits: usize,
    rounds: usize,
}

struct Row {
    what: String,
    engine: f64,
    reference: Option<f64>,
    unit: &'static str,
    target: String,
    met: bool,
}

fn main() {
    let arguments = Arguments::parse();
    let sizes = match arguments.small {
        true => Sizes { pages: 16 << 10, hot_pages: 1 << 10, time: Duration::from_millis(200), commits: 50, rounds: 1 },
        false => Sizes {
            pages: 512 << 10,
            hot_pages: 16 << 10,
            time: Duration::from_millis(1500),
            commits: 2000,
            rounds: arguments.rounds.max(1),
        },
    };
    let parent = arguments.dir.clone().unwrap_or_else(|| PathBuf::from("."));
    let dir = tempfile::Builder::new().prefix("corepage-bench-").tempdir_in(parent).expect("a directory can be made");
    let wants = |name: &str| arguments.workloads.is_empty() || arguments.workloads.iter().any(|w| w == name);
    let mut rows = Vec::new();
    if wants("read") {
        rows.extend(cold_reads(dir.path(), &sizes));
    }
    if wants("commit") {
        rows.extend(commits(dir.path(), &sizes));
    }
    if wants("latency") {
        rows.extend(latency(dir.path(), &sizes));
    }
    if wants("overwrite") {
        rows.extend(overwrites(dir.path(), &sizes));
    }
    if wants("idle") {
        rows.extend(idle(dir.path(), &sizes));
    }
    report(&rows, arguments.small);
}

fn report(rows: &[Row], small: bool) {
    println!("\n{:<52} {:>12} {:>12} {:>7}  {:<22}", "", "engine", "reference", "ratio", "target");
    for row in rows {
        let ratio = row.reference.map(|reference| row.engine / reference);
        let met = if small {
            ""
        } else if row.met {
            "met"
        } else {
            "missed"
        };
        println!(
            "{:<52} {:>12} {:>12} {:>7}  {:<14} {met}",
            row.what,
            format!("{:.1} {}", row.engine, row.unit),
            row.reference.map_or_else(|| "-".into(), |r| format!("{r:.1} {}", row.unit)),
            ratio.map_or_else(|| "-".into(), |r| format!("{r:.2}")),
            row.target,
        );
        let json = serde_json::json!({
            "workload": row.what, "engine": row.engine, "reference": row.reference, "unit": row.unit, "ratio": ratio,
            "target": row.target, "met": row.met, "verified": true, "small": small,
        });
        eprintln!("{json}");
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn page(id: u64, tag: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    let mut chance = Chance(id ^ tag << 40);
    bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&chance.below(u64::MAX).to_le_bytes()));
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    bytes[8..16].copy_from_slice(&tag.to_le_bytes());
    bytes
}

fn options(shards: u16, memory_mib: u64) -> Options {
    Options { shards: Some(shards), memory_bytes: memory_mib << 20, requests_max: 1 << 14, ..Options::default() }
}

/// A store whose volume has every page written.
fn filled(dir: &Path, options: Options, pages: u64) -> (Store, Volume) {
    let store = block_on(Store::open(dir, options)).expect("the store opens");
    let volume = block_on(store.create_volume("bench", pages * PAGE as u64)).expect("a volume is made");
    let step = (store.txn_bytes_max() / PAGE as u64).min(256);
    for first in (0..pages).step_by(step as usize) {
        let batch = (first..(first + step).min(pages)).map(|id| (PageId::new(id), page(id, 0).into())).collect();
        block_on(volume.write_many(batch)).expect("pages are written");
    }
    block_on(store.checkpoint()).expect("a checkpoint is made");
    (store, volume)
}

/// Random reads with so many in flight from a task on the shard; pages a second.
fn read_for(store: &Store, volume: &Volume, pages: u64, depth: u64, time: Duration) -> f64 {
    let volume = volume.clone();
    let body = move |shard: ShardHandle| async move {
        let start = Instant::now();
        let tasks: Vec<_> = (0..depth)
            .map(|n| {
                let (volume, handle) = (volume.clone(), shard.clone());
                shard.spawn(async move {
                    let mut chance = Chance(n * 7919 + pages);
                    let mut count = 0u64;
                    while start.elapsed() < time {
                        for _ in 0..16 {
                            let id = chance.below(pages);
                            let page = handle.read(&volume, PageId::new(id)).await.expect("a page is read");
                            assert_eq!(page[..8], id.to_le_bytes(), "another page was served");
                            count += 1;
                        }
                    }
                    count
                })
            })
            .collect();
        let mut total = 0;
        for task in tasks {
            total += task.await.expect("the store is open");
        }
        total as f64 / start.elapsed().as_secs_f64()
    };
    block_on(store.on_shard(0, body).expect("there is a shard")).expect("the store is open")
}

fn cold_reads(dir: &Path, sizes: &Sizes) -> Vec<Row> {
    let (store, volume) = filled(&dir.join("read"), options(1, 64), sizes.pages);
    // The map is in memory: one page of each leaf is enough for that.
    for leaf in (0..sizes.pages).step_by(64) {
        block_on(volume.read(PageId::new(leaf))).expect("a page is read");
    }
    let file = fio_file(dir, sizes);
    let mut rows = Vec::new();
    for depth in [1, 16, 64, 256] {
        let (mut engine, mut reference) = (Vec::new(), Vec::new());
        for _ in 0..sizes.rounds {
            engine.push(read_for(&store, &volume, sizes.pages, depth, sizes.time));
            reference.extend(fio(&file, "randread", depth, sizes));
        }
        let (engine, reference) = (median(engine) / 1e3, fio_median(reference));
        let met = reference.is_some_and(|r| engine >= 0.85 * r);
        let what = format!("cold random reads, depth {depth}, from a shard");
        rows.push(Row { what, engine, reference, unit: "k/s", target: ">= 0.85 of fio".into(), met });
    }
    block_on(store.close()).expect("the store closes");
    rows
}

fn fio_median(values: Vec<f64>) -> Option<f64> {
    (!values.is_empty()).then(|| median(values) / 1e3)
}

/// A file of the same size of which every block has been written.
fn fio_file(dir: &Path, sizes: &Sizes) -> PathBuf {
    let path = dir.join("fio");
    if path.exists() {
        return path;
    }
    let mut file = File::create(&path).expect("a file is made");
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..(sizes.pages * PAGE as u64) >> 20 {
        file.write_all(&chunk).expect("a file is written");
    }
    file.sync_all().expect("a file is flushed");
    // Written once more past the cache: first writes are another world.
    let _ = fio(&path, "write", 16, sizes);
    path
}

/// Operations a second, by fio; nothing without it.
fn fio(file: &Path, kind: &str, depth: u64, sizes: &Sizes) -> Option<f64> {
    let block = if kind == "write" { "1M" } else { "4k" };
    let output = Command::new("fio")
        .args([
            "--name=x",
            "--ioengine=io_uring",
            "--direct=1",
            "--output-format=json",
            "--randrepeat=0",
            "--norandommap",
        ])
        .arg(format!("--filename={}", file.display()))
        .args([format!("--rw={kind}"), format!("--bs={block}"), format!("--iodepth={depth}")])
        .args(if kind == "write" {
            vec![]
        } else {
            vec!["--time_based".into(), format!("--runtime={}ms", sizes.time.as_millis())]
        })
        .output()
        .ok()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let side = if kind == "randread" { "read" } else { "write" };
    report["jobs"][0][side]["iops"].as_f64()
}

/// What each task has written last, to be compared afterwards: page and tag.
type Written = Vec<(u64, u64)>;

/// Commits of one change each by `tasks` tasks on each shard; commits a second, and what was written.
fn commit_for(
    store: &Store,
    volume: &Volume,
    pages: u64,
    tasks: u64,
    time: Duration,
    tag: u64,
    whole: bool,
) -> (f64, Written) {
    let start = Instant::now();
    let shards = store.shards_count();
    let ends: Vec<_> = (0..shards)
        .map(|shard| {
            let (volume, store_) = (volume.clone(), store.clone());
            let mine: Vec<u64> = (0..pages).filter(|id| store_.shard_of(&volume, PageId::new(*id)) == shard).collect();
            let body = move |handle: ShardHandle| async move {
                let written = Rc::new(RefCell::new(Vec::new()));
                let mine = Rc::new(mine);
                let all: Vec<_> = (0..tasks)
                    .map(|n| {
                        let (volume, own, mine) = (volume.clone(), handle.clone(), mine.clone());
                        handle.spawn(client(own, volume, mine, n, tasks, start, time, tag, whole))
                    })
                    .collect();
                let mut count = 0;
                for task in all {
                    let (n, last) = task.await.expect("the store is open");
                    count += n;
                    written.borrow_mut().extend(last);
                }
                let written = written.borrow().clone();
                (count, written)
            };
            store.on_shard(shard, body).expect("there is a shard")
        })
        .collect();
    let (mut total, mut written) = (0, Vec::new());
    for end in ends {
        let (count, last) = block_on(end).expect("the store is open");
        total += count;
        written.extend(last);
    }
    (total as f64 / start.elapsed().as_secs_f64(), written)
}

/// One client: its own pages, one commit after another.
#[expect(clippy::too_many_arguments, reason = "one caller")]
async fn client(
    shard: ShardHandle,
    volume: Volume,
    mine: Rc<Vec<u64>>,
    n: u64,
    tasks: u64,
    start: Instant,
    time: Duration,
    tag: u64,
    whole: bool,
) -> (u64, Written) {
    let own = mine.len() as u64 / tasks;
    let mut chance = Chance(n + 1);
    let mut last: std::collections::BTreeMap<u64, u64> = std::collections::BTreeMap::new();
    let mut count = 0;
    while start.elapsed() < time {
        let id = mine[(n * own + chance.below(own.max(1))) as usize % mine.len()];
        let tag = tag << 32 | count;
        let change = match whole {
            true => Change::Put(page(id, tag).into()),
            false => {
                let mut patch = vec![0x77; 128];
                patch[..8].copy_from_slice(&id.to_le_bytes());
                patch[8..16].copy_from_slice(&tag.to_le_bytes());
                Change::Patch { offset: 0, bytes: patch.into() }
            }
        };
        shard.commit(&volume, vec![(PageId::new(id), change)]).await.expect("a commit succeeds");
        last.insert(id, tag);
        count += 1;
    }
    (count, last.into_iter().collect())
}

fn verify(volume: &Volume, written: &Written) {
    for (id, tag) in written {
        let page = block_on(volume.read(PageId::new(*id))).expect("a page is read");
        assert_eq!(page[..8], id.to_le_bytes(), "page {id} is another");
        assert_eq!(page[8..16], tag.to_le_bytes(), "page {id} lost its last commit");
    }
}

fn commits(dir: &Path, sizes: &Sizes) -> Vec<Row> {
    let shards = std::thread::available_parallelism().map_or(1, usize::from).min(2) as u16;
    let (store, volume) = filled(&dir.join("commit"), options(shards, 256), sizes.hot_pages);
    let in_flight = 1024 / u64::from(shards);
    let mut engine = Vec::new();
    let mut written = Vec::new();
    for round in 0..=sizes.rounds {
        let rate;
        (rate, written) = commit_for(&store, &volume, sizes.hot_pages, in_flight, sizes.time, round as u64 + 1, false);
        // The first round warms the log's blocks.
        engine.extend((round > 0).then_some(rate));
    }
    verify(&volume, &written);
    let foreign = median((0..sizes.rounds).map(|_| foreign_commits(&volume, sizes)).collect()) / 1e3;
    let engine = median(engine) / 1e3;
    block_on(store.close()).expect("the store closes");
    let row = |what: &str, engine: f64| Row {
        what: what.into(),
        engine,
        reference: None,
        unit: "k/s",
        target: ">= 200 k/s".into(),
        met: engine >= 200.0,
    };
    vec![
        row("durable 128-byte patches, 1,024 in flight, on shards", engine),
        row("the same from two foreign threads", foreign),
    ]
}

fn foreign_commits(volume: &Volume, sizes: &Sizes) -> f64 {
    let start = Instant::now();
    let (pages, time) = (sizes.hot_pages, sizes.time);
    let threads: Vec<_> = (0..2u64)
        .map(|thread| {
            let volume = volume.clone();
            std::thread::spawn(move || {
                let executor = async_executor::LocalExecutor::new();
                let tasks: Vec<_> = (0..512u64)
                    .map(|n| {
                        let volume = &volume;
                        executor.spawn(async move {
                            let mut chance = Chance(thread << 32 | n);
                            let mut count = 0u64;
                            while start.elapsed() < time {
                                let id = PageId::new(chance.below(pages));
                                volume.patch(id, 128, vec![1; 128]).await.expect("a commit succeeds");
                                count += 1;
                            }
                            count
                        })
                    })
                    .collect();
                block_on(executor.run(async {
                    let mut total = 0;
                    for task in tasks {
                        total += task.await;
                    }
                    total
                }))
            })
        })
        .collect();
    let total: u64 = threads.into_iter().map(|thread| thread.join().expect("no panic")).sum();
    total as f64 / start.elapsed().as_secs_f64()
}

fn latency(dir: &Path, sizes: &Sizes) -> Vec<Row> {
    let (store, volume) = filled(&dir.join("latency"), options(1, 64), 1024);
    let file = bare_file(&dir.join("bare"));
    let (mut engine, mut reference) = (Vec::new(), Vec::new());
    for round in 0..=sizes.rounds {
        let (ours, theirs) = (commit_latency(&store, &volume, sizes.commits), bare_latency(&file, sizes.commits));
        if round > 0 {
            engine.push(ours);
            reference.push(theirs);
        }
    }
    block_on(store.close()).expect("the store closes");
    let (engine, reference) = (median(engine), median(reference));
    vec![Row {
        what: "commit of 128 bytes, one client on a shard, P50".into(),
        engine,
        reference: Some(reference),
        unit: "us",
        target: "<= 1.3 of bare".into(),
        met: engine <= 1.3 * reference,
    }]
}

fn commit_latency(store: &Store, volume: &Volume, commits: usize) -> f64 {
    let volume = volume.clone();
    let body = move |shard: ShardHandle| async move {
        let mut times = Vec::with_capacity(commits);
        for n in 0..commits as u64 {
            let change = Change::Patch { offset: 0, bytes: vec![n as u8; 128].into() };
            let start = Instant::now();
            shard.commit(&volume, vec![(PageId::new(n % 1024), change)]).await.expect("a commit succeeds");
            times.push(start.elapsed().as_nanos() as f64 / 1e3);
        }
        median(times)
    };
    block_on(store.on_shard(0, body).expect("there is a shard")).expect("the store is open")
}

fn bare_file(path: &Path) -> File {
    let mut file = File::create(path).expect("a file is made");
    for _ in 0..2 {
        file.write_all(&vec![0; 8 << 20]).expect("a file is written");
    }
    file.sync_all().expect("a file is flushed");
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new().write(true).custom_flags(direct).open(path).expect("the file system takes direct I/O")
}

/// A direct write of 4 KiB and fdatasync, one after another, through a warm file.
fn bare_latency(file: &File, commits: usize) -> f64 {
    let memory = vec![0u8; 2 * PAGE];
    let skip = memory.as_ptr().align_offset(PAGE);
    let block = &memory[skip..skip + PAGE];
    let mut times = Vec::with_capacity(commits);
    for n in 0..commits {
        let start = Instant::now();
        file.write_all_at(block, (n % 4096 * PAGE) as u64).expect("a block is written");
        file.sync_data().expect("the file is flushed");
        times.push(start.elapsed().as_nanos() as f64 / 1e3);
    }
    median(times)
}

fn overwrites(dir: &Path, sizes: &Sizes) -> Vec<Row> {
    let shards = std::thread::available_parallelism().map_or(1, usize::from).min(2) as u16;
    let pages = sizes.pages / 2;
    let (store, volume) = filled(&dir.join("overwrite"), options(shards, 256), pages);
    let file = fio_file(dir, sizes);
    let tasks = 512;
    // Until everything was written over about twice, compaction included: extents are then written again, not first.
    let warm = if sizes.time < Duration::from_secs(1) { sizes.time } else { Duration::from_secs(12) };
    commit_for(&store, &volume, pages, tasks, warm, 1, true);
    let before = block_on(store.stats()).expect("counters");
    let (mut engine, mut reference, mut written) = (Vec::new(), Vec::new(), Vec::new());
    let mut commits = 0.0;
    for round in 0..sizes.rounds {
        let rate;
        (rate, written) = commit_for(&store, &volume, pages, tasks, sizes.time * 2, round as u64 + 2, true);
        commits += rate * sizes.time.as_secs_f64() * 2.0;
        engine.push(rate);
        let best =
            [64, 128, 256].into_iter().filter_map(|depth| fio(&file, "randwrite", depth, sizes)).fold(0.0, f64::max);
        reference.extend((best > 0.0).then_some(best));
    }
    verify(&volume, &written);
    let after = block_on(store.stats()).expect("counters");
    let device = (after.log_bytes - before.log_bytes)
        + (after.pages_written - before.pages_written + after.nodes_written - before.nodes_written) * PAGE as u64;
    println!(
        "overwrites: {:.2} bytes written for each byte of the user, {} extents compacted",
        device as f64 / (commits * PAGE as f64),
        after.extents_compacted - before.extents_compacted
    );
    block_on(store.close()).expect("the store closes");
    let (engine, reference) = (median(engine) / 1e3, fio_median(reference));
    let met = reference.is_some_and(|r| engine >= 1.5 * r);
    let what = format!("durable random page overwrites, {} in flight", tasks * u64::from(shards));
    vec![Row { what, engine, reference, unit: "k/s", target: ">= 1.5 of fio's best".into(), met }]
}

fn idle(dir: &Path, sizes: &Sizes) -> Vec<Row> {
    let store = block_on(Store::open(dir.join("idle"), Options::default())).expect("the store opens");
    block_on(store.create_volume("x", 1 << 20)).expect("a volume is made");
    let wait = if sizes.rounds == 1 { Duration::from_millis(500) } else { Duration::from_secs(5) };
    std::thread::sleep(Duration::from_millis(300));
    let before = processor_ticks();
    std::thread::sleep(wait);
    let used = (processor_ticks() - before) as f64 / 100.0 / wait.as_secs_f64() * 100.0;
    block_on(store.close()).expect("the store closes");
    let what = "processor time of an idle store".into();
    vec![Row { what, engine: used, reference: None, unit: "%", target: "< 0.5 % of a core".into(), met: used < 0.5 }]
}

/// Of this process, in hundredths of a second (the kernel's USER_HZ).
fn processor_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc is there");
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    fields[11].parse::<u64>().unwrap_or(0) + fields[12].parse::<u64>().unwrap_or(0)
}
