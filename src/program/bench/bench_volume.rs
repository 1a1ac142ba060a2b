//! The volume that a benchmark works on.
//!
//! 1. The benchmark has a volume of its own, in a store that may have others;
//!    [`BenchVolume::clear`] deletes it.
//! 2. A volume of that name from an earlier run is deleted only if a benchmark wrote all its pages.
//! 3. Memory holds what each page must contain: the version and the patch that were acknowledged to
//!    its writer.

use corepage::queue::{Op, Queue};
use corepage::testing::pattern::{self, Label, PAGE};
use corepage::{Error, ErrorKind, Options, PageId, Result, Store, Volume};
use futures_lite::future::block_on;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Writes in flight while the volume is prefilled.
const PREFILL_DEPTH: usize = 256;
/// The pause between two attempts while the store is busy, and between two checks for completions.
pub(super) const PAUSE: Duration = Duration::from_millis(5);
/// Attempts before a busy store is an error: about a minute.
const TRIES: usize = 12_000;
/// The volume's name.
pub const NAME: &str = "corepage-bench";

/// The label of the benchmark's pages.
const OWNER: u64 = u64::from_le_bytes(*b"bench\0\0\0");

/// Makes version `version` of page `number`, unpatched.
pub(super) fn page(number: u64, version: u64) -> Vec<u8> {
    pattern::page(Label { owner: OWNER, number, version })
}

/// Checks that these are the bytes of page `number`, in any version. Returns the version and the
/// number of the last patch.
pub(super) fn check(number: u64, bytes: &[u8]) -> Option<(u64, u64)> {
    pattern::check(OWNER, number, bytes)
}

/// Opens the store; the command that runs the benchmark uses one that can be interrupted.
pub type Opener = Box<dyn Fn(&Path, Options) -> Result<Store> + Send + Sync>;

/// A store with the volume in it.
pub struct BenchVolume {
    pub store: Store,
    pub volume: Volume,
    pub pages: u64,
    dir: PathBuf,
    options: Options,
    open: Opener,
    /// For each page its version, and how often it was patched since.
    versions: Box<[AtomicU64]>,
    patches: Box<[AtomicU64]>,
}

impl BenchVolume {
    /// Opens or creates the store, and creates a volume of `bytes` bytes in it.
    ///
    /// # Errors
    /// `Invalid`: there is a volume of that name with other data in it, which is left alone. Also
    /// the errors of the store.
    pub fn make(dir: &Path, options: Options, bytes: u64, open: Opener) -> Result<BenchVolume> {
        let pages = bytes / PAGE as u64;
        let store = open(dir, options.clone())?;
        let volume = match prepared(&store, pages * PAGE as u64) {
            Ok(volume) => volume,
            Err(error) => {
                block_on(store.close())?;
                return Err(error);
            }
        };
        let zeros = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        let (versions, patches) = (zeros(), zeros());
        Ok(BenchVolume {
            store,
            volume,
            pages,
            dir: dir.to_path_buf(),
            options,
            open,
            versions,
            patches,
        })
    }

    /// Writes every page once. `progress` gets the number of written pages, and can end the run.
    pub fn prefill(&self, mut progress: impl FnMut(u64) -> Result<()>) -> Result<()> {
        let mut queue = Queue::new(PREFILL_DEPTH)?;
        let (mut next, mut done, mut out, mut again) = (0, 0, Vec::new(), Vec::new());
        let op = |n| (n, Op::write_back(&self.volume, PageId::new(n), page(n, 0)));
        while done < self.pages {
            next += queue.submit_batch((next..self.pages).map(op)) as u64;
            queue.wait(1, None, &mut out)?;
            for completion in out.drain(..) {
                match completion.result {
                    Ok(_) => done += 1,
                    Err(error) if error.kind() == ErrorKind::Busy => again.push(completion.tag),
                    Err(error) => return Err(error),
                }
            }
            progress(done)?;
            if !again.is_empty() {
                std::thread::sleep(PAUSE);
                let refused = std::mem::take(&mut again);
                let taken = queue.submit_batch(refused.iter().copied().map(op));
                again.extend_from_slice(&refused[taken..]);
            }
        }
        block_on(self.store.checkpoint()).map(drop)
    }

    pub fn version(&self, number: u64) -> u64 {
        self.versions[number as usize].load(Ordering::Relaxed)
    }

    pub fn patch(&self, number: u64) -> u64 {
        self.patches[number as usize].load(Ordering::Relaxed)
    }

    /// Records that the store has acknowledged this version, unpatched.
    pub fn wrote(&self, number: u64, version: u64) {
        self.versions[number as usize].store(version, Ordering::Relaxed);
        self.patches[number as usize].store(0, Ordering::Relaxed);
    }

    /// Records that the store has acknowledged this patch.
    pub fn patched(&self, number: u64, count: u64) {
        self.patches[number as usize].store(count, Ordering::Relaxed);
    }

    /// Closes the store, opens it again, and reads every page. `progress` gets the number of pages
    /// read.
    ///
    /// # Errors
    /// `Corrupt`: a page does not hold what it must. Also the errors of the store.
    pub fn verify(&mut self, mut progress: impl FnMut(u64) -> Result<()>) -> Result<()> {
        block_on(self.store.close())?;
        self.store = (self.open)(&self.dir, self.options.clone())?;
        let missing = || Error::new(ErrorKind::Corrupt, "the benchmark's volume is gone");
        self.volume = block_on(self.store.volume(NAME))?.ok_or_else(missing)?;
        let bench = &*self;
        let mut scan = bench.volume.scan(PageId::new(0), PageId::new(u64::MAX));
        let mut seen = 0;
        while let Some((id, bytes)) = block_on(scan.next())? {
            let number = id.get();
            let expected =
                (number < bench.pages).then(|| (bench.version(number), bench.patch(number)));
            let found = check(number, &bytes);
            if found.is_none() || found != expected {
                let text = format!(
                    "page {number} holds {found:?} (version, patch), and must hold {expected:?}"
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
            seen += 1;
            progress(seen)?;
        }
        if seen != bench.pages {
            let text = format!("{seen} of {} pages are there", bench.pages);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(())
    }

    /// Deletes the volume, waits until its pages are freed or `stop` is set, and closes the store.
    pub fn clear(self, stop: &AtomicBool) -> Result<()> {
        let deleted = until_not_busy(|| self.store.delete_volume(NAME));
        while self.store.freeing_count() > 0 && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(PAUSE);
        }
        block_on(self.store.close()).and(deleted)
    }

    /// Closes a store that is then removed with its contents.
    pub fn close(self) -> Result<()> {
        block_on(self.store.close())
    }
}

/// Makes a fresh volume.
fn prepared(store: &Store, bytes: u64) -> Result<Volume> {
    if let Some(old) = block_on(store.volume(NAME))? {
        // Either a benchmark that was killed has left it, or it belongs to a user.
        let mut scan = old.scan(PageId::new(0), PageId::new(u64::MAX));
        while let Some((id, bytes)) = block_on(scan.next())? {
            if check(id.get(), &bytes).is_none() {
                let text = format!(
                    "the volume {NAME} has data in page {} that no benchmark wrote; it was left \
                     alone: run the benchmark without --dir or in another directory, or delete \
                     the volume with `corepage volume delete {NAME}`",
                    id.get()
                );
                return Err(Error::new(ErrorKind::Invalid, text));
            }
        }
        drop(scan);
        until_not_busy(|| store.delete_volume(NAME))?;
        block_on(store.wait_freed())?;
    }
    until_not_busy(|| store.create_volume(NAME, bytes))
}

/// Repeats a call while the store is busy, a bounded number of times.
pub(super) fn until_not_busy<T, F: Future<Output = Result<T>>>(ask: impl Fn() -> F) -> Result<T> {
    for _ in 1..TRIES {
        match block_on(ask()) {
            Err(error) if error.kind() == ErrorKind::Busy => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    block_on(ask())
}
