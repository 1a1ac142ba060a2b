//! Where everything is: the page map (a radix tree for each virtual shard and volume) and the extents.

mod extents;
mod foreign;
mod tree;

pub(crate) use extents::{Extents, Stream};
pub(crate) use tree::{LEAF_PAGES, Lookup, Map, NextLeaf, NodeIdx};
