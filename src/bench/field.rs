//! The volume that a benchmark works on.
//!
//! 1. It is a volume of the benchmark's own, in a store that may have others; it is deleted at the end.
//! 2. What each page must hold is in memory: version and patch that its writer was told are there.

use super::page;
use corepage::queue::{Op, Queue};
use corepage::{Error, ErrorKind, Options, PageId, Result, Store, Volume};
use futures_lite::future::block_on;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes under way while it is sown.
const SOWN_AT_A_TIME: usize = 256;
/// The volume's name.
const NAME: &str = "corepage-bench";

/// A store with the volume in it.
pub struct Field {
    pub store: Store,
    pub volume: Volume,
    pub pages: u64,
    dir: PathBuf,
    options: Options,
    /// Of each page: its version, and how often it was patched since.
    versions: Box<[AtomicU64]>,
    patches: Box<[AtomicU64]>,
}

impl Field {
    /// Opens or makes the store, and a volume of `bytes` bytes in it, with every page written once. `progress` hears how
    /// many pages are, and can end it.
    pub fn sow(dir: &Path, options: Options, bytes: u64, mut progress: impl FnMut(u64) -> Result<()>) -> Result<Field> {
        let pages = bytes / page::PAGE as u64;
        let store = block_on(Store::open(dir, options.clone()))?;
        if block_on(store.volume(NAME))?.is_some() {
            // A benchmark that was killed has left it.
            block_on(store.delete_volume(NAME))?;
        }
        let volume = block_on(store.create_volume(NAME, pages * page::PAGE as u64))?;
        let mut queue = Queue::new(&store, SOWN_AT_A_TIME)?;
        let (mut next, mut done, mut out) = (0, 0, Vec::new());
        while done < pages {
            let ops = (next..pages).map(|n| (n, Op::write_back(&volume, PageId::new(n), page::whole(n, 0))));
            next += queue.submit_batch(ops) as u64;
            queue.wait(1, None, &mut out)?;
            for completion in out.drain(..) {
                completion.result?;
                done += 1;
            }
            progress(done)?;
        }
        block_on(store.checkpoint())?;
        let zeros = || (0..pages).map(|_| AtomicU64::new(0)).collect();
        let (versions, patches) = (zeros(), zeros());
        Ok(Field { store, volume, pages, dir: dir.to_path_buf(), options, versions, patches })
    }

    pub fn version(&self, number: u64) -> u64 {
        self.versions[number as usize].load(Ordering::Relaxed)
    }

    pub fn patch(&self, number: u64) -> u64 {
        self.patches[number as usize].load(Ordering::Relaxed)
    }

    /// The store has acknowledged this version; it is not patched.
    pub fn wrote(&self, number: u64, version: u64) {
        self.versions[number as usize].store(version, Ordering::Relaxed);
        self.patches[number as usize].store(0, Ordering::Relaxed);
    }

    /// The store has acknowledged this patch.
    pub fn patched(&self, number: u64, count: u64) {
        self.patches[number as usize].store(count, Ordering::Relaxed);
    }

    /// Closes the store, opens it again, and reads every page. `progress` hears how many were.
    ///
    /// # Errors
    /// `Corrupt`: a page holds something else than it must; and whatever the store says.
    pub fn verify(self, mut progress: impl FnMut(u64) -> Result<()>) -> Result<Field> {
        let Field { store, volume, pages, dir, options, versions, patches } = self;
        block_on(store.close())?;
        drop((store, volume));
        let store = block_on(Store::open(&dir, options.clone()))?;
        let missing = || Error::new(ErrorKind::Corrupt, "the benchmark's volume is not there any more");
        let volume = block_on(store.volume(NAME))?.ok_or_else(missing)?;
        let field = Field { store, volume, pages, dir, options, versions, patches };
        let mut scan = field.volume.scan(PageId::new(0), PageId::new(u64::MAX));
        let mut seen = 0;
        while let Some((id, bytes)) = block_on(scan.next())? {
            let number = id.get();
            let expected = (number < field.pages).then(|| (field.version(number), field.patch(number)));
            let found = page::check(number, &bytes);
            if found.is_none() || found != expected {
                let text = format!("page {number} holds {found:?} (version, patch), and must hold {expected:?}");
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
            seen += 1;
            progress(seen)?;
        }
        if seen != field.pages {
            let text = format!("{seen} pages are there, of {}", field.pages);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        drop(scan);
        Ok(field)
    }

    /// Deletes the volume and closes the store.
    pub fn clear(self) -> Result<()> {
        block_on(self.store.delete_volume(NAME))?;
        block_on(self.store.close())
    }
}
