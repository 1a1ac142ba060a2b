//! A disk in memory over an image that many share, so that an execution only costs what it writes.
//!
//! Invariants
//! 1. Operations complete at once, in order; reads and writes outside a file fail as on a device.
//! 2. The image below is never changed.

use crate::base::error::{Error, Result};
use crate::base::{BLOCK, Micros};
use crate::io::{Completion, Disk, DiskOp, FileId, OpId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The files of a store.
pub(crate) type Image = BTreeMap<FileId, Vec<u8>>;

/// An image with changes.
pub(crate) struct MemoryDisk {
    image: Arc<Image>,
    lens: BTreeMap<FileId, u64>,
    changed: BTreeMap<(FileId, u64), Box<[u8; BLOCK]>>,
    done: Vec<Completion>,
}

impl MemoryDisk {
    pub fn new(image: Arc<Image>) -> Self {
        let lens = image.iter().map(|(file, bytes)| (*file, bytes.len() as u64)).collect();
        MemoryDisk { image, lens, changed: BTreeMap::new(), done: Vec::new() }
    }

    /// Copies everything into an image of its own.
    pub fn image(&self) -> Image {
        let whole = |(&file, &len): (&FileId, &u64)| {
            let blocks = (0..len / BLOCK as u64).flat_map(|number| *self.block(file, number));
            (file, blocks.collect())
        };
        self.lens.iter().map(whole).collect()
    }

    /// The contents of a block: zeros where nothing was written.
    pub fn block(&self, file: FileId, number: u64) -> &[u8; BLOCK] {
        static ZEROS: [u8; BLOCK] = [0; BLOCK];
        if let Some(bytes) = self.changed.get(&(file, number)) {
            return bytes;
        }
        let at = number as usize * BLOCK;
        let below = self.image.get(&file).and_then(|bytes| bytes.get(at..at + BLOCK));
        below.and_then(|bytes| bytes.try_into().ok()).unwrap_or(&ZEROS)
    }

    /// The contents of a block for writing; `None` outside the file.
    pub fn block_mut(&mut self, file: FileId, number: u64) -> Option<&mut [u8; BLOCK]> {
        if (number + 1) * BLOCK as u64 > *self.lens.get(&file)? {
            return None;
        }
        let now = *self.block(file, number);
        Some(self.changed.entry((file, number)).or_insert_with(|| Box::new(now)))
    }

    pub fn truncate(&mut self, file: FileId, blocks: u64) {
        if let Some(len) = self.lens.get_mut(&file) {
            *len = (*len).min(blocks * BLOCK as u64);
        }
    }

    fn perform(&mut self, op: &mut DiskOp) -> Result<()> {
        match op {
            DiskOp::Read { file, offset, into } => {
                self.within(*file, *offset, into.iter().map(|frame| frame.len() as u64).sum())?;
                let mut number = *offset / BLOCK as u64;
                for frame in into {
                    let bytes = frame.try_mut().expect("a frame that is read into has no pins");
                    for block in bytes.chunks_mut(BLOCK) {
                        block.copy_from_slice(self.block(*file, number));
                        number += 1;
                    }
                }
            }
            DiskOp::Write { file, offset, from } => {
                self.within(*file, *offset, from.iter().map(|slice| u64::from(slice.len)).sum())?;
                let blocks = from.iter().flat_map(|slice| slice.bytes().chunks(BLOCK));
                for (number, block) in (*offset / BLOCK as u64..).zip(blocks) {
                    let bytes: [u8; BLOCK] = block.try_into().expect("whole blocks are written");
                    self.changed.insert((*file, number), Box::new(bytes));
                }
            }
            DiskOp::Flush { .. } => {}
            DiskOp::Allocate { file, from, to } => {
                let (first, behind) = (*from / BLOCK as u64, *to / BLOCK as u64);
                self.changed
                    .retain(|(of, number), _| of != file || !(first..behind).contains(number));
                let below = self.image.get(file).map_or(0, |bytes| (bytes.len() / BLOCK) as u64);
                for number in first..behind.min(below) {
                    self.changed.insert((*file, number), Box::new([0; BLOCK]));
                }
                let len = self.lens.entry(*file).or_default();
                *len = (*len).max(*to);
            }
        }
        Ok(())
    }

    fn within(&self, file: FileId, offset: u64, bytes: u64) -> Result<()> {
        let len = self.lens.get(&file).copied().unwrap_or(0);
        if offset.checked_add(bytes).is_some_and(|end| end <= len) {
            return Ok(());
        }
        let end = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        Err(Error::io(
            format_args!("{bytes} bytes at byte {offset} of file {file}, which has {len}"),
            end,
        ))
    }
}

impl Disk for MemoryDisk {
    fn submit(&mut self, id: OpId, mut op: DiskOp) {
        let result = self.perform(&mut op);
        self.done.push(Completion { id, op, result });
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.done);
    }

    fn wait(&mut self, _timeout_us: Option<Micros>) {}

    fn len(&mut self, file: FileId) -> Result<Option<u64>> {
        Ok(self.lens.get(&file).copied())
    }

    fn files(&mut self) -> Result<Vec<FileId>> {
        let mut files: Vec<_> = self.lens.keys().copied().collect();
        files.sort();
        Ok(files)
    }
}
