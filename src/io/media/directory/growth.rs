//! Growth of a file: the check for room, the zeros, and the undo if it fails.
//!
//! Invariants
//! 1. If growing fails or is cancelled, the file has its former length again, and the space is
//!    given back.

use super::Directory;
use crate::base::error::{ErrorKind, Result};
use crate::io::FileId;
use crate::io::media::device::free_bytes;
use crate::io::media::zeros::write_zeros;
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;

impl Directory {
    pub(super) fn grow_file(&self, id: FileId, file: &File, bytes: Range<u64>) -> Result<()> {
        let former = file.metadata().map_err(|e| self.error(id, "reading attributes of", e))?.len();
        // Checked first: an attempt would fill the disk to the last block, at the expense of
        // everything else on it.
        let needed = bytes.end.saturating_sub(former.max(bytes.start));
        let fits = free_bytes(&self.handle).is_none_or(|free| free >= needed);
        let zeroed =
            if fits { write_zeros(file, bytes.clone(), &self.cancel) } else { Err(Errno::NOSPC) };
        if let Err(e) = zeroed {
            // Gives back the space that was taken so far, or a full disk would stay full.
            let _ = rustix::fs::ftruncate(file, former);
            if e == Errno::CANCELED {
                self.cancel.check()?;
            }
            let doing =
                format_args!("allocating {} bytes at {} of", bytes.end - bytes.start, bytes.start);
            // A limit on file sizes (`ulimit -f`) counts as a full disk, too.
            let full = matches!(e, Errno::NOSPC | Errno::DQUOT | Errno::FBIG);
            let error = self.error(id, doing, e.into());
            return Err(if full { error.with_kind(ErrorKind::Full) } else { error });
        }
        self.handle.sync_all().map_err(|e| self.error(id, "syncing the directory entry of", e))
    }
}

#[cfg(test)]
mod tests {
    use crate::base::error::ErrorKind;
    use crate::base::{SegmentNo, ShardId};
    use crate::io::{Access, FileId, FileOptions, Files};

    /// A caller that gives up must not wait until gigabytes are zeroed, and the space that was
    /// taken is given back.
    #[test]
    fn a_cancelled_allocation_ends_and_leaves_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let options = FileOptions::default();
        let files = Files::open(dir.path(), Access::ReadWrite, &options).unwrap();
        let file = files.file(FileId::Log(ShardId::new(0), SegmentNo::new(0)));
        files.grow(&file, 0..8192).unwrap();
        options.cancel.cancel();
        let error = files.grow(&file, 8192..32 << 20).expect_err("it was cancelled");
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        assert_eq!(files.len(&file).unwrap(), Some(8192));
    }
}
