//! The lock of one page, for commits over shards; who takes it when is `txn::page_locks`' business.

use crate::base::RequestIdx;
use smallvec::SmallVec;

/// What a commit does with a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::engine) enum Access {
    /// It changes it, whether it has read it or not.
    Change,
    /// It only reads it.
    Read,
}

impl Access {
    /// Of page `i` of a request that reads the first `reads` ones and changes the others.
    pub fn of(i: usize, reads: usize) -> Access {
        if i < reads { Access::Read } else { Access::Change }
    }
}

/// Who holds a page: any number of commits that read it, or one that changes it.
#[derive(Default)]
pub(in crate::engine) struct PageLock {
    shared: u32,
    exclusive: bool,
    /// Commits of this shard that wait for it.
    waiters: SmallVec<[RequestIdx; 1]>,
}

impl PageLock {
    /// Whether somebody may do this with the page.
    pub fn allows(&self, access: Access) -> bool {
        !self.exclusive && (self.shared == 0 || access == Access::Read)
    }

    /// Takes the page, to read or to change it.
    ///
    /// # Panics
    /// If that is not [allowed](Self::allows): a held page means another vote.
    pub fn take(&mut self, access: Access) {
        assert!(self.allows(access), "{} read the page, exclusive {}", self.shared, self.exclusive);
        match access {
            Access::Change => self.exclusive = true,
            Access::Read => self.shared += 1,
        }
    }

    /// Gives the page back; returns those who waited for it.
    pub fn give_back(&mut self, access: Access) -> SmallVec<[RequestIdx; 1]> {
        match access {
            Access::Change => {
                assert!(self.exclusive, "the page is given back, and nobody changes it");
                self.exclusive = false;
            }
            Access::Read => {
                assert!(self.shared > 0, "the page is given back, and nobody reads it");
                self.shared -= 1;
            }
        }
        std::mem::take(&mut self.waiters)
    }

    /// A commit of this shard waits for it.
    pub fn wait(&mut self, waiter: RequestIdx) {
        assert!(!self.allows(Access::Change), "{waiter:?} waits for a page that is free");
        self.waiters.push(waiter);
    }
}
