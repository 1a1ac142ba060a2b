//! What the operations are for that a shard has given to the device: its side of a completion.

use super::log::FlushSet;
use crate::base::{ExtentNo, NodeIdx, PageIdx, PageVersionIdx, ShardId};
use crate::format::extent::NodeKey;
use crate::format::node::{Child, Entry};

/// What an operation under way is for.
pub(super) enum OpKind {
    /// Pages, and `None` for what lies between them.
    PageRead(Vec<Option<PageRead>>),
    NodeRead(NodeWanted),
    /// The log write of a group.
    GroupLog(u64),
    /// Pages of a group, straight to their places.
    GroupData(u64, Vec<PageVersionIdx>),
    /// The flush of some groups.
    GroupFlush(FlushSet),
    /// Dirty pages to their places.
    PageWrite(Vec<PageVersionIdx>),
    SummaryWrite(ExtentNo),
    SummaryRead(ExtentNo),
    /// A step of the checkpoint.
    Checkpoint,
    /// More data space.
    Grow(Growth),
    /// A segment by which the log gets longer.
    LogSegment,
    /// Some blocks of a log group that is redone, from this one on.
    RedoRead(usize),
}

/// A node that is to be read.
pub(super) struct NodeWanted {
    pub key: NodeKey,
    pub child: Child,
    /// Pinned while it is read: a node is in memory only while its parent is.
    pub parent: Option<NodeIdx>,
}

/// One page of a read under way.
pub(super) struct PageRead {
    pub page: PageIdx,
    pub entry: Entry,
}

/// A growth under way: first the table, then the data.
#[derive(Clone, Copy)]
pub(super) struct Growth {
    pub of: ShardId,
    pub to: u32,
    pub table_done: bool,
}
