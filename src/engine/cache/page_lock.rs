//! The lock of one page, for commits over shards; `txn::page_locks` decides which commit takes it
//! when.

use crate::base::RequestIdx;
use smallvec::SmallVec;

/// What a commit does with a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(in crate::engine) enum Access {
    /// It changes the page, whether it has read it or not.
    Change,
    /// It only reads the page.
    Read,
}

impl Access {
    /// The access of a request to its page `i`, if it reads the first `reads` pages and changes the
    /// others.
    pub fn of(i: usize, reads: usize) -> Access {
        if i < reads { Access::Read } else { Access::Change }
    }
}

/// The holders of a page: any number of commits that read it, or one that changes it.
#[derive(Default)]
pub(in crate::engine) struct PageLock {
    shared: u32,
    exclusive: bool,
    /// Commits of this shard that wait for it.
    waiters: SmallVec<[RequestIdx; 1]>,
}

impl PageLock {
    /// Whether the page may be taken for this access.
    pub fn allows(&self, access: Access) -> bool {
        !self.exclusive && (self.shared == 0 || access == Access::Read)
    }

    /// Takes the page, to read or to change it.
    ///
    /// # Panics
    /// If that is not [allowed](Self::allows): a locked page leads to another vote.
    pub fn take(&mut self, access: Access) {
        assert!(self.allows(access), "{} read the page, exclusive {}", self.shared, self.exclusive);
        match access {
            Access::Change => self.exclusive = true,
            Access::Read => self.shared += 1,
        }
    }

    /// Gives the page back. Returns the commits that waited for it.
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

    /// Registers a commit of this shard that waits for the page.
    pub fn wait(&mut self, waiter: RequestIdx) {
        assert!(!self.allows(Access::Change), "{waiter:?} waits for a page that is free");
        self.waiters.push(waiter);
    }
}
