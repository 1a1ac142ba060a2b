//! What one handle can do, all can: every call of the library, on any thread, waited for on a plain
//! thread, through a queue, and in tasks on each shard, with the same answers and the same errors.
//!
//! If these fail, code that works on one kind of handle can't be moved to another: a call is
//! missing there, or it means something else.
//!
//! The calls are written once, as code that is generic over [`Access`]: what only one kind of
//! handle offers does not compile. A new call that is not run here is named by
//! `every_public_call_is_run_here`.

use corepage::blocking::Wait;
use corepage::queue::Queue;
use corepage::{
    Access, Change, Durability, ErrorKind, Lsn, Options, PageId, Result, Store, Volume,
};
use futures_lite::future::{block_on, poll_once};
use std::collections::BTreeSet;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

/// Calls for one kind of handle only, and why.
const NOT_FOR_ALL: &[(&str, &str)] = &[
    ("Store::open", "there is no handle yet"),
    ("Store::open_existing", "there is no handle yet"),
    ("Store::close", "a task can't wait for the end of its own thread"),
    ("Store::shard", "of the thread that a task is on"),
    ("Store::spawn", "on the thread that a task is on; `on_shard` starts tasks from anywhere"),
    ("Scan::blocking", "a thread of a shard must not block"),
];

fn id(n: u64) -> PageId {
    PageId::new(n)
}

fn page(fill: u8) -> Vec<u8> {
    vec![fill; 4096]
}

/// A page of each shard.
fn of_each<A: Access>(store: &Store<A>, disk: &Volume<A>) -> Vec<PageId> {
    let first = |shard| (0..).map(|run| id(run * 512)).find(|p| store.shard_of(disk, *p) == shard);
    (0..store.shards_count()).map(|shard| first(shard).expect("each shard has pages")).collect()
}

fn error<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => "no error".into(),
        Err(error) => format!("{:?}: {error}", error.kind()),
    }
}

type Calls = Vec<(&'static str, std::result::Result<String, String>)>;
type Call = Pin<Box<dyn Future<Output = Result<String>> + Send>>;

/// Makes of a table of calls: `in_place`, which awaits each through a handle of any kind; `given`,
/// which gives each to a function; and `CALLS`, their names and their code as text.
macro_rules! calls {
    ($store:ident, $disk:ident: $($name:literal $body:block)*) => {
        async fn in_place<A: Access>($store: Store<A>, $disk: Volume<A>) -> Calls {
            let mut calls = Calls::new();
            $({
                let outcome: Result<String> = async { $body }.await;
                calls.push(($name, outcome.map_err(|error| self::error::<()>(Err(error)))));
            })*
            calls
        }

        fn given(
            store: &Store,
            disk: &Volume,
            mut call: impl FnMut(Call) -> Result<String>,
        ) -> Calls {
            let mut calls = Calls::new();
            $({
                let ($store, $disk) = (store.clone(), disk.clone());
                let outcome = call(Box::pin(async move {
                    let _ = (&$store, &$disk);
                    $body
                }));
                calls.push(($name, outcome.map_err(|error| self::error::<()>(Err(error)))));
            })*
            calls
        }

        const CALLS: &[(&str, &str)] = &[$(($name, stringify!($body))),*];
    };
}

calls! { store, disk:
    "Store::recovery" { Ok(store.recovery().created.to_string()) }
    "Store::txn_bytes_max" { Ok(store.txn_bytes_max().to_string()) }
    "Store::disk_report" { Ok(format!("{:?}", store.disk_report().fallback)) }
    "Store::report" { Ok(store.report().driver.to_string()) }
    "Store::shards_count" { Ok(store.shards_count().to_string()) }
    "Store::shard_of" {
        let shards = of_each(&store, &disk).into_iter().map(|p| store.shard_of(&disk, p));
        Ok(format!("{:?}", shards.collect::<Vec<_>>()))
    }
    "Store::on_shard" {
        let mut seen = Vec::new();
        for shard in 0..store.shards_count() {
            let task = store.on_shard(shard, move |handle| async move { handle.shard() == shard });
            seen.push(task?.await?);
        }
        Ok(format!("{seen:?} {}", error(store.on_shard(99, |_| async {}).map(drop))))
    }
    "Store::failed" { Ok(poll_once(store.failed()).await.is_none().to_string()) }
    "Store::create_volume" {
        let made = store.create_volume("made", 1 << 20).await?;
        let again = store.create_volume("made", 1 << 20).await;
        let odd = store.create_volume("odd", 7).await;
        Ok(format!("{} {} {}", made.name(), error(again), error(odd)))
    }
    "Store::volume" {
        let (made, none) = (store.volume("made").await?, store.volume("none").await?);
        Ok(format!("{:?} {}", made.map(|volume| volume.bytes()), none.is_none()))
    }
    "Store::volumes" { Ok(format!("{:?}", store.volumes().await?)) }
    "Store::resize_volume" {
        let made = store.volume("made").await?.expect("it was made");
        store.resize_volume("made", 2 << 20).await?;
        let odd = store.resize_volume("made", 1).await;
        let none = store.resize_volume("none", 4096).await;
        Ok(format!("{} {} {}", made.bytes(), error(odd), error(none)))
    }
    "Store::delete_volume" {
        let made = store.volume("made").await?.expect("it was made");
        made.write(id(3), page(3)).await?;
        store.delete_volume("made").await?;
        let (read, write) = (made.read(id(3)).await, made.write(id(3), page(3)).await);
        Ok(format!("{} {} {}", error(store.delete_volume("made").await), error(read), error(write)))
    }
    "Store::wait_freed" { store.wait_freed().await.map(|()| "freed".into()) }
    "Store::freeing_count" { Ok(store.freeing_count().to_string()) }
    "Volume::id" { Ok(format!("{:?}", disk.id())) }
    "Volume::name" { Ok(disk.name().into()) }
    "Volume::bytes" { Ok(disk.bytes().to_string()) }
    "Volume::store" { Ok(disk.store().shards_count().to_string()) }
    "Volume::on" {
        let (own, other) = (disk.on(&store)?, store.create_volume("on", 4096).await?);
        store.delete_volume("on").await?;
        Ok(format!("{} {}", own.read(id(9)).await?.is_absent(), error(other.on(&store).map(drop))))
    }
    "Volume::write" {
        for (n, p) in (1..).zip(of_each(&store, &disk)) {
            let lsn = disk.write(p, page(n)).await?;
            assert!(lsn <= store.durable_lsn(), "it is durable on return");
        }
        Ok(error(disk.write(id(0), vec![1; 7]).await))
    }
    "Volume::read" {
        let mut bytes = Vec::new();
        for p in of_each(&store, &disk) {
            bytes.push(disk.read(p).await?[4095]);
        }
        Ok(format!("{bytes:?} {}", disk.read(id(77)).await?.is_absent()))
    }
    "Volume::read_many" {
        let mut pages = of_each(&store, &disk);
        pages.extend((0..200).map(|n| id(n * 512 + 7)));
        pages.push(pages[0]);
        let bytes: Vec<u8> = disk.read_many(&pages).await?.iter().map(|page| page[0]).collect();
        Ok(format!("{bytes:?} {}", disk.read_many(&[]).await?.len()))
    }
    "Volume::write_back" {
        for (n, p) in (11..).zip(of_each(&store, &disk)) {
            disk.write_back(p, page(n)).await?;
        }
        let pages = disk.read_many(&of_each(&store, &disk)).await?;
        let bytes: Vec<u8> = pages.iter().map(|page| page[0]).collect();
        Ok(format!("{bytes:?} {}", error(disk.write_back(id(0), vec![]).await)))
    }
    "Store::flush" {
        let lsn = disk.write_back(id(5), page(5)).await?;
        Ok((store.flush().await? >= lsn).to_string())
    }
    "Store::durable_lsn" {
        Ok((store.durable_lsn() >= disk.read(id(5)).await?.lsn()).to_string())
    }
    "Store::wait_durable" {
        let lsn = disk.write_back(id(6), page(6)).await?;
        store.wait_durable(lsn).await?;
        let kind = store.wait_durable(Lsn::new(u64::MAX >> 8)).await.map_err(|error| error.kind());
        Ok(format!("{} {kind:?}", lsn <= store.durable_lsn()))
    }
    "Store::checkpoint" { Ok((store.checkpoint().await? > Lsn::new(0)).to_string()) }
    "Volume::write_many" {
        let pages = of_each(&store, &disk);
        disk.write_many(pages.iter().map(|p| (*p, page(21).into())).collect()).await?;
        let most = store.txn_bytes_max() / 4096;
        let large = (0..=most).map(|n| (id(n), page(0).into())).collect();
        let kind = disk.write_many(large).await.map_err(|error| error.kind());
        Ok(format!("{} {kind:?}", disk.read(pages[1]).await?[0]))
    }
    "Volume::patch" {
        for p in of_each(&store, &disk) {
            disk.patch(p, 100, &b"patch"[..]).await?;
        }
        let far = of_each(&store, &disk)[1];
        let none = disk.patch(far, 0, vec![]).await;
        let beyond = disk.patch(far, 4090, vec![1; 7]).await;
        Ok(format!("{:?} {} {}", &disk.read(far).await?[99..106], error(none), error(beyond)))
    }
    "Volume::apply" {
        let pages = of_each(&store, &disk);
        let patch = || Change::Patch { offset: 0, bytes: vec![31].into() };
        let changes = pages.iter().map(|p| (*p, patch())).collect();
        let lsn = disk.apply(changes, Durability::Buffered).await?;
        store.wait_durable(lsn).await?;
        let twice = vec![(id(40), Change::Put(page(40).into())), (id(40), Change::Free)];
        disk.apply(twice, Durability::Durable).await?;
        Ok(format!("{} {}", disk.read(pages[1]).await?[0], disk.read(id(40)).await?.is_absent()))
    }
    "Volume::allocated" {
        let found = disk.allocated(id(0), id(u64::MAX), 100).await?;
        let part = disk.allocated(id(0), id(u64::MAX), 1).await?;
        Ok(format!("{:?} {:?} {}", found.ranges, found.next, part.ranges.len()))
    }
    "Volume::scan" {
        let mut scan = disk.scan(id(0), id(u64::MAX));
        let mut seen = Vec::new();
        while let Some((page, bytes)) = scan.next().await? {
            seen.push((page, bytes[0]));
        }
        Ok(format!("{seen:?}"))
    }
    "Scan::next" { Ok(format!("{:?}", disk.scan(id(1), id(0)).next().await?.is_none())) }
    "Scan::lsn" {
        let mut scan = disk.scan(id(0), id(5));
        let first = scan.next().await?.map(|(_, page)| page.lsn());
        Ok((first <= Some(scan.lsn())).to_string())
    }
    "Volume::free" {
        let far = of_each(&store, &disk)[1];
        disk.free(far).await?;
        Ok(disk.read(far).await?.is_absent().to_string())
    }
    "Volume::free_range" {
        disk.free_range(id(0), id(u64::MAX)).await?;
        Ok(format!("{:?}", disk.allocated(id(0), id(u64::MAX), 100).await?.ranges))
    }
    "Store::begin" {
        let txn = store.begin();
        Ok((txn.commit().await? <= store.durable_lsn()).to_string())
    }
    "Txn::write" {
        let mut txn = store.begin();
        for p in of_each(&store, &disk) {
            txn.write(&disk, p, page(51))?;
        }
        let short = txn.write(&disk, id(0), vec![1]);
        txn.commit().await?;
        Ok(format!("{} {}", disk.read(of_each(&store, &disk)[1]).await?[0], error(short)))
    }
    "Txn::read" {
        let mut txn = store.begin();
        let mut seen = Vec::new();
        for p in of_each(&store, &disk) {
            seen.push(txn.read(&disk, p).await?[0]);
        }
        Ok(format!("{seen:?} {}", txn.read(&disk, id(88)).await?[0]))
    }
    "Txn::read_many" {
        let mut pages = of_each(&store, &disk);
        pages.extend([id(88), pages[0], pages[1]]);
        let mut txn = store.begin();
        txn.patch(&disk, pages[0], 1, vec![52])?;
        let views = txn.read_many(&disk, &pages).await?;
        let seen: Vec<_> = views.iter().map(|view| (view[0], view[1])).collect();
        disk.write(pages[1], page(53)).await?;
        let late = txn.commit().await.map_err(|error| error.kind());
        Ok(format!("{seen:?} {:?}", late == Err(ErrorKind::Conflict)))
    }
    "Txn::patch" {
        let (far, mut txn) = (of_each(&store, &disk)[1], store.begin());
        txn.patch(&disk, far, 8, &b"txn"[..])?;
        let beyond = txn.patch(&disk, far, 4095, vec![1, 2]);
        txn.commit().await?;
        Ok(format!("{:?} {}", &disk.read(far).await?[7..12], error(beyond)))
    }
    "Txn::change" {
        let (far, mut txn) = (of_each(&store, &disk)[1], store.begin());
        txn.change(&disk, far, Change::Put(page(54).into()))?;
        let own = txn.read(&disk, far).await?[0];
        txn.commit().await?;
        Ok(format!("{own} {}", disk.read(far).await?[0]))
    }
    "Txn::free" {
        let (far, mut txn) = (of_each(&store, &disk)[1], store.begin());
        txn.free(&disk, far)?;
        txn.commit().await?;
        Ok(disk.read(far).await?.is_absent().to_string())
    }
    "Txn::commit" {
        // Reads of both shards, changes of one, and a change by somebody else meanwhile.
        let pages = of_each(&store, &disk);
        let mut outcomes = Vec::new();
        for (read, changed) in [(pages[0], pages[1]), (pages[1], pages[0])] {
            for meddles in [false, true] {
                let mut txn = store.begin();
                txn.read(&disk, read).await?;
                txn.write(&disk, changed, page(61))?;
                if meddles {
                    disk.patch(read, 0, vec![62]).await?;
                }
                outcomes.push(txn.commit().await.map(drop).map_err(|error| error.kind()));
            }
            let mut reader = store.begin();
            reader.read(&disk, read).await?;
            outcomes.push(reader.commit().await.map(drop).map_err(|error| error.kind()));
        }
        Ok(format!("{outcomes:?}"))
    }
    "Store::stats" { Ok((store.stats().await?.commits > 0).to_string()) }
    "Store::shard_stats" { Ok(store.shard_stats().await?.len().to_string()) }
    "Store::iops" { Ok((store.iops(Duration::from_secs(1)).await? >= 0.0).to_string()) }
}

/// Runs the calls in a fresh store.
fn fresh(run: impl FnOnce(&Store, &Volume) -> Calls) -> Calls {
    let dir = tempfile::tempdir().expect("a directory");
    let options = Options { shards: Some(2), memory_bytes: 32 << 20, ..Options::default() };
    let store = Store::open(dir.path(), options).wait().expect("it opens");
    let disk = store.create_volume("v", 1 << 30).wait().expect("a volume");
    let calls = run(&store, &disk);
    store.close().wait().expect("it closes");
    calls
}

#[test]
fn every_call_gives_the_same_answers_and_errors_through_every_handle() {
    let awaited = fresh(|store, disk| block_on(in_place(store.clone(), disk.clone())));
    for (name, outcome) in &awaited {
        assert!(outcome.is_ok(), "{name}: {outcome:?}");
    }
    let waited = fresh(|store, disk| given(store, disk, |call| call.wait()));
    let queued = fresh(|store, disk| {
        let mut queue = Queue::for_calls(1).expect("a queue");
        given(store, disk, |call| {
            queue.submit_call(1, call)?;
            let mut done = Vec::new();
            queue.wait(1, None, &mut done)?;
            done.remove(0).result
        })
    });
    let on_shard = |shard| {
        fresh(|store, disk| {
            let disk = disk.clone();
            let task = store.on_shard(shard, move |handle| async move {
                let disk = disk.on(&handle)?;
                Ok(in_place(handle, disk).await)
            });
            let calls: Result<Calls> =
                task.expect("there is such a shard").wait().expect("it ends");
            calls.expect("the volume is of this store")
        })
    };
    for (way, calls) in [
        ("waited for", waited),
        ("queued", queued),
        ("on shard 0", on_shard(0)),
        ("on shard 1", on_shard(1)),
    ] {
        assert_eq!(calls.len(), awaited.len());
        for (here, there) in calls.iter().zip(&awaited) {
            assert_eq!(here, there, "{way}, and awaited on any thread");
        }
    }
}

/// The public functions of the handles, by the `impl` blocks of the sources: of all handles, and of
/// one kind only.
fn public_calls() -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut of_all, mut of_one) = (BTreeSet::new(), BTreeSet::new());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api");
    for file in folder.read_dir().expect("the sources are there") {
        let text = std::fs::read_to_string(file.expect("an entry").path()).expect("a source");
        let mut block: Option<(String, bool)> = None;
        for line in text.lines() {
            if line.starts_with("impl") {
                let generic = line.starts_with("impl<A: Access> ");
                let rest = line.trim_start_matches("impl<A: Access> ").trim_start_matches("impl ");
                let of: String = rest.chars().take_while(|c| c.is_alphanumeric()).collect();
                let is_handle = ["Store", "Volume", "Txn", "Scan"].contains(&of.as_str());
                block = (is_handle && !line.contains(" for ")).then_some((of, generic));
            } else if line == "}" {
                block = None;
            }
            let code = line.strip_prefix("    pub async fn ").or(line.strip_prefix("    pub fn "));
            if let (Some((of, generic)), Some(code)) = (&block, code) {
                let name: String =
                    code.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let calls = if *generic { &mut of_all } else { &mut of_one };
                calls.insert(format!("{of}::{name}"));
            }
        }
    }
    (of_all, of_one)
}

#[test]
fn every_public_call_is_run_here() {
    let (of_all, of_one) = public_calls();
    assert!(of_all.len() > 40, "the sources were not understood: {of_all:?}");
    let run: BTreeSet<String> = CALLS.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(of_all, run, "calls of the sources (left), and those that are run here (right)");
    for (name, code) in CALLS {
        let (_, call) = name.split_once("::").expect("a type and a call");
        let code: String = code.split_whitespace().collect();
        assert!(code.contains(&format!(".{call}(")), "{name} is not called in its row: {code}");
    }
    let allowed: BTreeSet<String> = NOT_FOR_ALL.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(of_one, allowed, "calls of one kind of handle only, and those that have a reason");
}
