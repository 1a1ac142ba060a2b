//! Creates, finds, resizes and deletes volumes.
//!
//! ```text
//! none --create--> whole --shrink--> cut at the new size --pages freed--> whole
//!                    |--delete--> cut at 0, no name --pages freed--> kept --next open--> none
//!                                 ^ answered here; `freeing` does the rest in the background
//! ```
//! Invariants
//! 1. Records are pages of the catalog (volume 0), changed by ordinary transactions: each step is
//!    atomic and durable.
//! 2. A cut record says that the pages from its size on have yet to be freed. It outlives a crash,
//!    and the next open continues. Once it is durable the caller has the answer, which no error of
//!    the freeing can take back.
//! 3. Bytes that a volume gains are zeros: pages that a late write left there after the volume was
//!    shortened are freed first.
//! 4. The number of a deleted volume is reused only after the store has been opened again, since
//!    handles to the old one may still exist.

use super::freeing::{Cursor, Number, page_behind};
use super::volume::VolumeState;
use super::{Access, READ_PAGES, Store, Volume};
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::{BLOCK, Lsn, PageId, PageKey, VolumeId};
use crate::engine::{Change, Commit};
use crate::format::catalog;
use crate::format::root::VOLUMES_MAX;
use bytes::Bytes;
use std::future::Future;
use std::sync::Arc;

/// A record of a volume as it was read.
struct Record {
    key: PageKey,
    lsn: Lsn,
    /// `None`: the number is free.
    volume: Option<catalog::Volume>,
}

impl Record {
    fn id(&self) -> VolumeId {
        VolumeId::new(self.key.page.get() as u8)
    }

    /// What becomes of its number if it was found when the store was opened. A volume that is
    /// deleted later keeps its number, since handles to it may exist.
    fn number_once_freed(&self) -> Number {
        if self.is_named("") { Number::Free } else { Number::Kept }
    }

    fn is_named(&self, name: &str) -> bool {
        self.volume.as_ref().is_some_and(|volume| volume.name == name)
    }
}

/// The largest volume: clients keep sizes and offsets as signed 64-bit numbers.
const BYTES_MAX: u64 = (1 << 63) - BLOCK as u64;

/// Checks that a volume can have `bytes` bytes; the error names the nearest valid sizes.
fn check_size(bytes: u64) -> Result<()> {
    if bytes > 0 && bytes <= BYTES_MAX && bytes.is_multiple_of(BLOCK as u64) {
        return Ok(());
    }
    let below = (bytes / BLOCK as u64 * BLOCK as u64).min(BYTES_MAX);
    let above = if below < BYTES_MAX { below + BLOCK as u64 } else { below };
    let nearest = if below == 0 || below == above {
        format!("{above}")
    } else {
        format!("{below} or {above}")
    };
    Err(Error::invalid(format_args!(
        "a volume of {bytes} bytes: the size must be a multiple of {BLOCK} from {BLOCK} to \
         {BYTES_MAX} bytes; use {nearest}"
    )))
}

/// Repeats a change while it conflicts with other changes of the catalog.
macro_rules! until_no_conflict {
    ($attempt:expr) => {
        loop {
            match $attempt.await {
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                other => break other,
            }
        }
    };
}

impl<A: Access> Store<A> {
    /// Creates volume `name` of `bytes` bytes, durable on return. All its pages read as zeros.
    ///
    /// # Errors
    /// `AlreadyExists`: the name is taken. `Invalid`: it is empty, longer than 255 bytes or has
    /// control characters, the size is not a multiple of 4,096 from 4,096 to below 2^63, or there
    /// are already 247 volumes, counting those deleted since the store was opened. `Full`: no
    /// space.
    pub async fn create_volume(&self, name: &str, bytes: u64) -> Result<Volume<A>> {
        if name.is_empty()
            || name.len() > catalog::NAME_BYTES_MAX
            || name.chars().any(char::is_control)
        {
            return Err(Error::invalid(format_args!(
                "volume name {name:?}: it must have 1 to 255 bytes and no control characters"
            )));
        }
        check_size(bytes)?;
        until_no_conflict!(self.try_create(name, bytes))
    }

    async fn try_create(&self, name: &str, bytes: u64) -> Result<Volume<A>> {
        let records = self.records().await?;
        if records.iter().any(|record| record.is_named(name)) {
            let text = format_args!("a volume named {name} exists already");
            return Err(Error::new(ErrorKind::AlreadyExists, text));
        }
        let Some(free) = records.iter().position(|record| record.volume.is_none()) else {
            return Err(Error::invalid(
                "there are 247 volumes, the most that a store can have; the numbers of deleted \
                 ones become free when the store is reopened",
            ));
        };
        // Numbers are assigned in order, so two concurrent creations, of the same name or not, meet
        // at the first free page.
        let reads = records[..=free].iter().map(|record| (record.key, record.lsn)).collect();
        let volume = catalog::Volume { name: name.into(), bytes, is_cut: false };
        let lsn = self.put_record(reads, records[free].key, Some(&volume)).await?;
        Ok(self.handle(records[free].id(), lsn, &volume))
    }

    /// Finds the volume `name`; `None` if there is none.
    ///
    /// # Errors
    /// As [`Volume::read`], for the records of the volumes.
    pub async fn volume(&self, name: &str) -> Result<Option<Volume<A>>> {
        Ok(self.volumes().await?.into_iter().find(|volume| volume.name() == name))
    }

    /// Returns all volumes, in the order of their numbers.
    ///
    /// # Errors
    /// As [`volume`](Self::volume).
    pub async fn volumes(&self) -> Result<Vec<Volume<A>>> {
        let records = self.records().await?.into_iter();
        let found = records.filter_map(|record| Some((record.id(), record.lsn, record.volume?)));
        let named = found.filter(|(_, _, volume)| !volume.name.is_empty());
        Ok(named.map(|(id, lsn, volume)| self.handle(id, lsn, &volume)).collect())
    }

    /// Makes volume `name` larger or smaller, durable on return. Bytes gained are zeros. Bytes cut
    /// off are lost: their pages are freed in the background, after a crash or a close once the
    /// store is open again ([`wait_freed`](Self::wait_freed) waits for that). Concurrent writes
    /// beyond the end may be lost too. Dropping the future does not stop the change.
    ///
    /// # Errors
    /// `NotFound`: no such volume. `Invalid`: the size is not a multiple of 4,096 from 4,096 to
    /// below 2^63. `Full`, `Busy`: nothing was changed. When growing, also as
    /// [`Volume::free_range`], since pages beyond the old end that were not freed yet are freed
    /// first.
    pub async fn resize_volume(&self, name: &str, bytes: u64) -> Result<()> {
        check_size(bytes)?;
        let (store, name) = (self.any_thread(), name.to_string());
        self.detached(async move || until_no_conflict!(store.try_resize(&name, bytes))).await
    }

    async fn try_resize(&self, name: &str, bytes: u64) -> Result<()> {
        let (record, volume) = self.record(name).await?;
        let smaller = bytes < volume.bytes;
        if bytes > volume.bytes {
            self.free_between(record.id(), volume.bytes, bytes).await?;
        } else if !smaller {
            return Ok(());
        }
        let new = catalog::Volume { bytes, is_cut: smaller || volume.is_cut, ..volume };
        let lsn = self.put_record(vec![(record.key, record.lsn)], record.key, Some(&new)).await?;
        self.shared(record.id()).learn(lsn, &new);
        if smaller {
            self.free_in_background(record.key, Number::Kept);
        }
        Ok(())
    }

    /// Deletes volume `name` with all its pages, durable on return. The pages are freed in the
    /// background, after a crash or a close once the store is open again
    /// ([`wait_freed`](Self::wait_freed) waits for that). Handles to the volume get `NotFound` from
    /// then on. Dropping the future does not stop the deletion.
    ///
    /// # Errors
    /// `NotFound`: no such volume. `Full`, `Busy`: nothing was done.
    pub async fn delete_volume(&self, name: &str) -> Result<()> {
        let (store, name) = (self.any_thread(), name.to_string());
        self.detached(async move || until_no_conflict!(store.try_delete(&name))).await
    }

    async fn try_delete(&self, name: &str) -> Result<()> {
        let (record, _) = self.record(name).await?;
        let grave = catalog::Volume { name: String::new(), bytes: 0, is_cut: true };
        let lsn = self.put_record(vec![(record.key, record.lsn)], record.key, Some(&grave)).await?;
        self.shared(record.id()).learn(lsn, &grave);
        self.free_in_background(record.key, Number::Kept);
        Ok(())
    }

    /// Waits until the pages of all deleted and shortened volumes are freed. They take no space
    /// after the next checkpoint.
    ///
    /// # Errors
    /// `Corrupt`, `Io`: a part of the page map can't be read. `Closed`. In each case the next open
    /// frees the rest.
    pub async fn wait_freed(&self) -> Result<()> {
        self.inner.freeing.wait().await
    }

    /// The number of deleted and shortened volumes whose pages are still being freed in the
    /// background.
    pub fn freeing_count(&self) -> usize {
        self.inner.freeing.count()
    }

    fn free_in_background(&self, key: PageKey, number: Number) {
        self.inner.freeing.add(self.own_handle(), key, number);
    }

    /// Returns the same store, for work that outlives the call.
    fn any_thread(&self) -> Store {
        let (inner, pins) = (self.inner.clone(), self.pins.clone());
        Store { access: self.access.any_thread(), inner, pins }
    }

    /// Runs changes of volumes one after another, each to its end.
    async fn detached<F: Future<Output = Result<()>> + 'static>(
        &self,
        change: impl FnOnce() -> F + Send + 'static,
    ) -> Result<()> {
        let resizing = self.inner.resizing.clone();
        let task = self.on_shard(0, move |_| async move {
            let _alone = resizing.lock().await;
            change().await
        })?;
        task.await?
    }

    /// Resumes, in the background, what was unfinished when the store was last closed or crashed:
    /// frees pages of deleted and shortened volumes. Afterwards the numbers of the deleted ones are
    /// free, since no handle to them exists.
    pub(super) async fn begin_finishing(&self) -> Result<()> {
        for record in self.records().await? {
            if record.volume.as_ref().is_some_and(|volume| volume.is_cut) {
                self.free_in_background(record.key, record.number_once_freed());
            }
        }
        Ok(())
    }

    /// Does a bounded part of the work for a record. Returns where to continue, or `None` if that
    /// was all. No caller changes the size of a volume in the meantime: it could grow over pages
    /// that are about to be freed.
    pub(super) async fn free_step(
        &self,
        key: PageKey,
        cursor: Option<Cursor>,
        number: Number,
    ) -> Result<Option<Cursor>> {
        let _alone = self.inner.resizing.lock().await;
        self.cut_some(key, cursor, number).await
    }

    /// Frees some of the pages beyond the end of a volume, and completes its cut with the last.
    /// Returns where to continue. With [`Number::Free`], the record of a deleted
    /// volume is freed, too.
    async fn cut_some(
        &self,
        key: PageKey,
        cursor: Option<Cursor>,
        number: Number,
    ) -> Result<Option<Cursor>> {
        let Some(page) = self.read(&[key]).await?.pop().filter(|page| !page.is_absent()) else {
            return Ok(None);
        };
        let (id, volume) = (VolumeId::new(key.page.get() as u8), decode(key, &page)?);
        if !volume.is_cut {
            return Ok(None);
        }
        let first = Cursor::go_on(cursor, volume.bytes);
        if let Some(next) = self.free_some(id, first, PageId::new(u64::MAX)).await? {
            return Ok(Some(Cursor::new(volume.bytes, next)));
        }
        self.flush().await?;
        if volume.name.is_empty() && number == Number::Kept {
            return Ok(None);
        }
        let whole =
            (!volume.name.is_empty()).then_some(catalog::Volume { is_cut: false, ..volume });
        let lsn = self.put_record(vec![(key, page.lsn())], key, whole.as_ref()).await?;
        whole.into_iter().for_each(|whole| self.shared(id).learn(lsn, &whole));
        Ok(None)
    }

    /// Frees the pages of a volume from `bytes` up to `end_bytes`, durable on return.
    async fn free_between(&self, id: VolumeId, bytes: u64, end_bytes: u64) -> Result<()> {
        let Some(last) = page_behind(end_bytes).get().checked_sub(1) else { return Ok(()) };
        self.free_pages(id, page_behind(bytes), PageId::new(last)).await?;
        self.flush().await.map(drop)
    }

    async fn records(&self) -> Result<Vec<Record>> {
        let keys: Vec<PageKey> = (1..VOLUMES_MAX as u64)
            .map(|n| PageKey::new(VolumeId::CATALOG, PageId::new(n)))
            .collect();
        let mut records = Vec::with_capacity(keys.len());
        // Read in parts: with little memory a handle can't pin all at once.
        for keys in keys.chunks(READ_PAGES) {
            for (key, page) in keys.iter().zip(self.read(keys).await?) {
                let volume = if page.is_absent() { None } else { Some(decode(*key, &page)?) };
                records.push(Record { key: *key, lsn: page.lsn(), volume });
            }
        }
        Ok(records)
    }

    async fn record(&self, name: &str) -> Result<(Record, catalog::Volume)> {
        let records = self.records().await?;
        let names: Vec<&str> =
            records.iter().filter_map(|r| Some(r.volume.as_ref()?.name.as_str())).collect();
        let names =
            names.into_iter().filter(|name| !name.is_empty()).collect::<Vec<_>>().join(", ");
        let found = records.into_iter().find(|record| !name.is_empty() && record.is_named(name));
        let found = found
            .and_then(|record| Some((record.volume.clone()?, record)))
            .map(|(volume, r)| (r, volume));
        let there =
            if names.is_empty() { "there are none".into() } else { format!("there are: {names}") };
        found.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format_args!("no volume is named {name:?}; {there}"))
        })
    }

    async fn put_record(
        &self,
        reads: Vec<(PageKey, Lsn)>,
        key: PageKey,
        volume: Option<&catalog::Volume>,
    ) -> Result<Lsn> {
        let change =
            volume.map_or(Change::Free, |volume| Change::Put(Bytes::from(catalog::encode(volume))));
        self.commit(Commit { reads, changes: vec![(key, change)], durable: true }).await
    }

    fn handle(&self, id: VolumeId, lsn: Lsn, volume: &catalog::Volume) -> Volume<A> {
        let shared = self.shared(id);
        shared.learn(lsn, volume);
        Volume::new(self.same_handle(), id, &volume.name, shared)
    }

    fn shared(&self, id: VolumeId) -> Arc<VolumeState> {
        self.inner.volumes[usize::from(id.get())].clone()
    }
}

fn decode(key: PageKey, page: &[u8]) -> Result<catalog::Volume> {
    catalog::decode(page)
        .map_err(|what| Error::corrupt(format_args!("catalog page {:?} {what}", key.page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::options::Options;
    use futures_lite::future::block_on;

    /// Clients take a size of 2^63 or more for a negative number: such a volume could be created
    /// but not used.
    #[test]
    fn a_volume_has_no_more_bytes_than_clients_can_address() {
        assert!(check_size(BYTES_MAX).is_ok() && check_size(4096).is_ok());
        for (bad, says) in [
            (1 << 63, "use 9223372036854771712"),
            (u64::MAX, "use 9223372036854771712"),
            (BYTES_MAX - 1, "use 9223372036854767616 or 9223372036854771712"),
            (1_000_001, "use 999424 or 1003520"),
            (0, "use 4096"),
        ] {
            let error = check_size(bad).expect_err("no size");
            assert!(
                error.kind() == ErrorKind::Invalid && error.to_string().ends_with(says),
                "{bad}: {error}"
            );
        }
    }

    /// A crash interrupts the shortening of a volume, which is then deleted before the store has
    /// resumed that. If its number were reused, a new volume would get what old handles write.
    #[test]
    fn a_volume_deleted_while_its_cut_is_finished_keeps_its_number() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = block_on(Store::open(
            dir.path(),
            Options { memory_bytes: 16 << 20, ..Options::default() },
        ));
        let store = store.expect("it opens");
        let old = block_on(store.create_volume("v", 1 << 20)).expect("a volume");
        let key = PageKey::new(VolumeId::CATALOG, PageId::new(u64::from(old.id().get())));
        let record =
            || block_on(store.records()).expect("the catalog").remove(old.id().get() as usize - 1);
        let cut = catalog::Volume { name: "v".into(), bytes: 4096, is_cut: true };
        block_on(store.put_record(vec![(key, record().lsn)], key, Some(&cut))).expect("it is cut");
        let before = record();
        block_on(store.delete_volume("v")).expect("it goes");
        block_on(store.wait_freed()).expect("its pages go");
        // Do what the background does with the record that it found at the open.
        assert_eq!(
            block_on(store.cut_some(key, None, before.number_once_freed()))
                .expect("its pages are freed"),
            None
        );
        assert!(record().volume.is_some_and(|volume| volume.name.is_empty()), "its number is free");
        assert_ne!(block_on(store.create_volume("v", 1 << 20)).expect("a volume").id(), old.id());
        let lost = block_on(old.write(PageId::new(0), vec![1; BLOCK])).expect_err("it is deleted");
        assert_eq!(lost.kind(), ErrorKind::NotFound);
        // At the next open there are no handles.
        assert_eq!(
            block_on(store.cut_some(key, None, record().number_once_freed()))
                .expect("its pages are freed"),
            None
        );
        assert!(record().volume.is_none(), "its number is not free");
        block_on(store.close()).expect("it closes");
    }
}
