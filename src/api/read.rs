//! Reads in progress: all shards read their own pages at the same time.
//!
//! Invariants
//! 1. Once a read has begun, all its parts are in flight; if it is dropped, their results are
//!    discarded.
//! 2. Pages count against the pin quota of the handle from before they are requested until their
//!    last reference is dropped.

use super::access::Submit;
use super::{Access, Store, pages};
use crate::base::PageKey;
use crate::base::error::{Error, Result};
use crate::engine::{PageRef, PinQuota, PinReservation, Request};
use smallvec::SmallVec;

/// A read in progress.
pub(super) struct Reads<A: Access> {
    /// The parts whose pages have not arrived.
    parts: SmallVec<[Part<A>; 1]>,
    found: Vec<Option<PageRef>>,
    pins: PinReservation,
}

/// The positions of a part's pages in the request, and the reply that brings them.
type Part<A> = (SmallVec<[usize; 1]>, <A as Submit>::Reply);

impl<A: Access> Store<A> {
    /// Reads one page without a list and, in a task on the page's shard, without an allocation.
    pub(super) async fn read_one(&self, key: PageKey) -> Result<PageRef> {
        let pin = PinQuota::take_one(&self.pins)?;
        // This does what `ask` does, without another future around the reply.
        let (runtime, request) = (&self.inner.runtime, Request::Read(SmallVec::from_buf([key])));
        let read = match self.access.submit(runtime, None, request) {
            Ok(reply) => reply.await?,
            Err((shard, request)) => runtime.submit_to(shard, request).await?.await?,
        };
        let page = pages(read)?.pop().ok_or_else(|| Error::internal("a read returned no page"))?;
        Ok(page.pinned(pin))
    }

    pub(super) async fn read(&self, keys: &[PageKey]) -> Result<Vec<PageRef>> {
        self.begin_read(keys).await?.finish().await
    }

    /// Requests pages. Once this returns, all parts are on their way.
    pub(super) async fn begin_read(&self, keys: &[PageKey]) -> Result<Reads<A>> {
        let pins = PinQuota::take(&self.pins, keys.len())?;
        let (most, shard_map) = (self.inner.read_pages, self.inner.runtime.shard_map());
        let found = keys.iter().map(|_| None).collect();
        let mut parts = SmallVec::new();
        if keys.len() <= most
            && keys.iter().all(|key| shard_map.shard_of(*key) == shard_map.shard_of(keys[0]))
        {
            let reply = self.submit(None, Request::Read(keys.into())).await?;
            parts.push(((0..keys.len()).collect(), reply));
            return Ok(Reads { parts, found, pins });
        }
        let mut by_shard: Vec<Vec<usize>> = shard_map.shards().map(|_| Vec::new()).collect();
        for (i, key) in keys.iter().enumerate() {
            by_shard[shard_map.shard_of(*key).index()].push(i);
        }
        for part in by_shard.iter().flat_map(|part| part.chunks(most)) {
            let request = Request::Read(part.iter().map(|i| keys[*i]).collect());
            parts.push((part.into(), self.submit(None, request).await?));
        }
        Ok(Reads { parts, found, pins })
    }
}

impl<A: Access> Reads<A> {
    /// Waits for all pages. If it is dropped and called again, it continues where it was.
    ///
    /// # Errors
    /// Those of the first part that fails; the read can't be used any more.
    pub(super) async fn wait(&mut self) -> Result<()> {
        while let Some((_, reply)) = self.parts.last_mut() {
            let result = reply.await;
            let Some((part, _)) = self.parts.pop() else { break };
            for (i, page) in part.into_iter().zip(pages(result?)?) {
                self.found[i] = Some(page.counted(&mut self.pins));
            }
        }
        Ok(())
    }

    /// Waits for the pages and returns them, in the requested order.
    pub(super) async fn finish(mut self) -> Result<Vec<PageRef>> {
        self.wait().await?;
        self.into_pages()
    }

    /// Returns the pages, once all have arrived.
    pub(super) fn into_pages(self) -> Result<Vec<PageRef>> {
        let all = self.found.into_iter().collect::<Option<_>>();
        all.ok_or_else(|| Error::internal("a read returned fewer pages than requested"))
    }
}
