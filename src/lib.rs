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
//! The code, in the order in which a write travels:
//!
//! | Folder | Holds |
//! |---|---|
//! | `api` | [`Store`], [`Volume`], [`Txn`], [`Scan`]: what callers hold, over one [`Access`] |
//! | `runtime` | the pinned threads that drive shards |
//! | `mesh` | the channels between threads |
//! | `engine` | one shard as a state machine: `txn`, `cache`, `log`, `writeback`, `map`, `space`, `checkpoint`, `recovery` |
//! | `format` | every byte on disk |
//! | `io` | the seam to the device |
//! | `memory` | the arena of page frames, and what is evicted from it |
//! | `base` | ids, LSNs, errors, options, the checksum, counters |
//! | `ops` | `verify` reads a closed store whole, `probe` says what the machine gives |
//! | `program` | the binary: NBD server, control socket, commands |
//! | `testing` | the simulator, which drives the same shards by seed under a simulated disk; fuzzing; instruction counts |

/// Whether a bug is planted here, for the simulator to find (`sim::canary`); in a release of the
/// engine the answer is a constant no.
macro_rules! planted {
    ($which:ident) => {{
        #[cfg(any(test, feature = "sim"))]
        {
            crate::testing::sim::planted(crate::testing::sim::Canary::$which)
        }
        #[cfg(not(any(test, feature = "sim")))]
        {
            false
        }
    }};
}

mod api;
mod runtime;
mod mesh;
mod engine;
mod format;
mod io;
mod memory;
mod base;
mod ops;
#[cfg(any(test, fuzzing, feature = "sim", feature = "testing"))]
#[doc(hidden)]
pub mod testing;

pub use api::{Access, AnyThread, OnShard, ShardHandle, ShardTxn};
pub use api::{Allocated, Durability, PageView, Scan, Store, Txn, Volume};
pub use api::{blocking, queue};
pub use base::checksum::crc32c;
pub use base::error::{Error, ErrorKind, Result};
pub use base::metrics::{Latency, ShardStats};
pub use base::options::{Driver, Geometry, Options};
pub use base::{Lsn, PageId, VolumeId};
pub use engine::recovery::RecoveryReport;
pub use engine::{Change, PageRef};
pub use io::{DiskReport, FlushMethod, Polling};
pub use ops::probe;
pub use ops::verify::{
    Damage, Mend, StoreSummary, VerifyProgress, VerifyReport, VolumeBytes, VolumeSummary, inspect,
    verify, verify_with,
};
pub use runtime::RuntimeReport;

/// The examples of `docs/disk_manager.md`, as tests.
#[cfg(doctest)]
#[doc = include_str!("docs/disk_manager.md")]
struct DiskManager;
