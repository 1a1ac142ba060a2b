//! Records what each operation in flight is for: the shard's side of a completion.

use super::log::FlushSet;
use crate::base::{ExtentNo, NodeIdx, PageIdx, PageVersionIdx, ShardId};
use crate::format::extent::NodeKey;
use crate::format::node::{Child, Entry};

/// The purpose of an operation in flight.
pub(super) enum OpKind {
    /// The read of pages, with `None` for the blocks between them.
    PageRead(Vec<Option<PageRead>>),
    NodeRead(NodeWanted),
    /// The log write of a group.
    GroupLog(u64),
    /// The write of a group's pages straight to their places.
    GroupData(u64, Vec<PageVersionIdx>),
    /// The flush of some groups.
    GroupFlush(FlushSet),
    /// The write of dirty pages to their places.
    PageWrite(Vec<PageVersionIdx>),
    SummaryWrite(ExtentNo),
    SummaryRead(ExtentNo),
    /// A step of the checkpoint.
    Checkpoint,
    /// The growth of the data space.
    Grow(Growth),
    /// The creation of a segment, which makes the log longer.
    LogSegment,
    /// The read of some blocks of a log group for the redo, from this block on.
    RedoRead(usize),
}

/// A node to read.
pub(super) struct NodeWanted {
    pub key: NodeKey,
    pub child: Child,
    /// Pinned while it is read: a node is in memory only while its parent is.
    pub parent: Option<NodeIdx>,
}

/// One page of a read in flight.
pub(super) struct PageRead {
    pub page: PageIdx,
    pub entry: Entry,
}

/// The step of a growth in progress: first the table, then the data.
#[derive(Clone, Copy)]
pub(super) struct Growth {
    pub of: ShardId,
    pub to: u32,
    pub table_done: bool,
}
