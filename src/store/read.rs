//! Reads that are under way: each shard reads what is its own, all at once.
//!
//! Invariants
//! 1. Once begun, every part is under way; dropping it lets go of what comes.
//! 2. Pages count against the pins of the handle from before they are asked for until their last reference is gone.

use super::{Store, pages};
use crate::error::{Error, Result};
use crate::mesh::Reply;
use crate::shard::{PageRef, Pins, Request, Taken};
use crate::types::PageKey;
use smallvec::SmallVec;

/// A read under way.
pub(super) struct Reads {
    count: usize,
    /// Which pages each part is of; empty: all, in order.
    parts: SmallVec<[(Vec<usize>, Reply); 1]>,
    pins: Taken,
}

impl Store {
    pub(super) async fn read(&self, keys: &[PageKey]) -> Result<Vec<PageRef>> {
        self.begin_read(keys).await?.finish().await
    }

    /// Asks for pages; once this returns, all parts are on their way.
    pub(super) async fn begin_read(&self, keys: &[PageKey]) -> Result<Reads> {
        let pins = Pins::take(&self.pins, keys.len())?;
        let (most, runtime) = (self.inner.read_pages, &self.inner.runtime);
        let deal = runtime.deal();
        let mut parts = SmallVec::new();
        if keys.len() <= most && keys.iter().all(|key| deal.shard_of(*key) == deal.shard_of(keys[0])) {
            parts.push((Vec::new(), runtime.submit(Request::Read(keys.into())).await?));
            return Ok(Reads { count: keys.len(), parts, pins });
        }
        let mut by_shard: Vec<Vec<usize>> = deal.shards().map(|_| Vec::new()).collect();
        for (i, key) in keys.iter().enumerate() {
            by_shard[deal.shard_of(*key).index()].push(i);
        }
        for part in by_shard.iter().flat_map(|part| part.chunks(most)) {
            let request = Request::Read(part.iter().map(|i| keys[*i]).collect());
            parts.push((part.to_vec(), runtime.submit(request).await?));
        }
        Ok(Reads { count: keys.len(), parts, pins })
    }
}

impl Reads {
    /// The pages, in the order asked.
    pub(super) async fn finish(mut self) -> Result<Vec<PageRef>> {
        let mut found: Vec<Option<PageRef>> = (0..self.count).map(|_| None).collect();
        for (part, reply) in std::mem::take(&mut self.parts) {
            let pages = pages(reply.await?)?.into_iter().map(|page| page.counted(&mut self.pins));
            match part.is_empty() {
                true => found.iter_mut().zip(pages).for_each(|(place, page)| *place = Some(page)),
                false => part.iter().zip(pages).for_each(|(i, page)| found[*i] = Some(page)),
            }
        }
        found.into_iter().collect::<Option<_>>().ok_or_else(|| Error::corrupt("a read gave fewer pages than asked for"))
    }
}
