//! The lock of one page, for commits over shards; who takes it when is `txn::page_locks`' business.

use crate::base::RequestIdx;
use smallvec::SmallVec;

/// Who holds a page: any number of commits that read it, or one that changes it.
#[derive(Default)]
pub(in crate::engine) struct PageLock {
    shared: u32,
    exclusive: bool,
    /// Commits of this shard that wait for it.
    waiters: SmallVec<[RequestIdx; 1]>,
}

impl PageLock {
    /// Whether somebody may read (`false`) or change (`true`) the page.
    pub fn allows(&self, change: bool) -> bool {
        !self.exclusive && (self.shared == 0 || !change)
    }

    /// Takes the page, to read or to change it.
    ///
    /// # Panics
    /// If that is not [allowed](Self::allows): a held page means another vote.
    pub fn take(&mut self, change: bool) {
        assert!(self.allows(change), "{} read the page, exclusive {}", self.shared, self.exclusive);
        match change {
            true => self.exclusive = true,
            false => self.shared += 1,
        }
    }

    /// Gives the page back; returns those who waited for it.
    pub fn give_back(&mut self, change: bool) -> SmallVec<[RequestIdx; 1]> {
        match change {
            true => {
                assert!(self.exclusive, "the page is given back, and nobody changes it");
                self.exclusive = false;
            }
            false => {
                assert!(self.shared > 0, "the page is given back, and nobody reads it");
                self.shared -= 1;
            }
        }
        std::mem::take(&mut self.waiters)
    }

    /// A commit of this shard waits for it.
    pub fn wait(&mut self, waiter: RequestIdx) {
        self.waiters.push(waiter);
    }
}
