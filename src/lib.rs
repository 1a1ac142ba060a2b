//! # corepage: a crash-safe, transactional page store
//!
//! ```
//! use corepage::{Options, PageId, Store};
//! use futures_lite::future::block_on;
//!
//! # fn main() -> corepage::Result<()> { block_on(async {
//! # let dir = tempfile::tempdir().expect("a directory for the example");
//! let store = Store::open(dir.path(), Options::default()).await?;
//! let disk = store.create_volume("disk", 64 << 20).await?;
//!
//! let page = PageId::new(7);
//! disk.write(page, vec![1; 4096]).await?; // durable on return
//! disk.patch(page, 100, &b"hello"[..]).await?; // only these bytes go through the log
//! assert_eq!(&disk.read(page).await?[100..105], b"hello");
//!
//! let mut txn = store.begin(); // serializable, over any pages and volumes
//! let first = txn.read(&disk, page).await?[0];
//! txn.write(&disk, PageId::new(8), vec![first + 1; 4096])?;
//! txn.free(&disk, page)?;
//! let lsn = txn.commit().await?; // or `Conflict`: retry
//! println!("durable at LSN {lsn}");
//!
//! disk.write_back(page, vec![9; 4096]).await?; // ordered and visible, not durable yet
//! store.flush().await?; // now it is
//! store.close().await
//! # }) }
//! ```
//!
//! The modules, in the order in which a write travels: [`Store`] and [`Volume`] (handles) - `runtime` (a thread that
//! drives a shard) - `shard` (the state machine: pages, commits, group commit, write-back, checkpoints) - `log`,
//! `coalesce`, `map` (what it decides with) - [`mod@format`] (every byte on disk) - [`pool`] (memory) - [`disk`] (the
//! seam to the device). `recovery` opens a store; [`probe`] says what the machine
//! gives; `sim` drives the same shard by seed under a simulated disk.

/// Whether a bug is planted here, for the simulator to find (`sim::canary`); in a release of the engine the answer is a
/// constant no.
macro_rules! planted {
    ($which:ident) => {{
        #[cfg(any(test, feature = "sim"))]
        {
            crate::sim::planted(crate::sim::Canary::$which)
        }
        #[cfg(not(any(test, feature = "sim")))]
        {
            false
        }
    }};
}

pub mod checksum;
mod coalesce;
mod commit;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod cost;
pub mod disk;
mod error;
pub mod format;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod log;
mod map;
mod mesh;
pub mod metrics;
mod options;
pub mod pool;
pub mod probe;
mod recovery;
mod runtime;
pub mod shard;
#[cfg(any(test, feature = "sim"))]
#[cfg_attr(not(test), allow(dead_code, reason = "some of it serves the unit tests only"))]
pub mod sim;
mod store;
mod sync;
pub mod types;
mod verify;

pub use error::{Error, ErrorKind, Result};
pub use options::{Driver, Geometry, Options};
pub use recovery::RecoveryReport;
pub use runtime::RuntimeReport;
pub use shard::{Change, PageRef};
pub use store::{Allocated, Durability, PageView, Scan, ShardHandle, ShardTxn, Store, Txn, Volume};
pub use store::{blocking, queue};
pub use types::{Lsn, PageId};
pub use verify::{
    Damage, Mend, StoreSummary, VerifyProgress, VerifyReport, VolumeBytes, VolumeSummary, inspect, verify, verify_with,
};

/// The examples of `docs/disk_manager.md`, as tests.
#[cfg(doctest)]
#[doc = include_str!("docs/disk_manager.md")]
struct DiskManager;
