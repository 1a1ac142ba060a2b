//! Commits: of one shard, and over several by two-phase commit. Everything that a commit needs is
//! reserved before its LSN is allocated.

pub(in crate::engine) mod admission;
pub(in crate::engine) mod coordinator;
pub(in crate::engine) mod local;
pub(in crate::engine) mod page_locks;
pub(in crate::engine) mod participant;
pub(in crate::engine) mod precedence;
