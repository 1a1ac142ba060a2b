//! Knows where everything is: the page map (a radix tree for each virtual shard and volume) and the
//! extents.

mod extents;
#[cfg(test)]
mod extents_tests;
mod remote_refs;
mod tree;
#[cfg(test)]
mod tree_tests;

pub(crate) use extents::{Extents, Stream};
#[cfg(test)]
pub(crate) use tree::NODE_BYTES;
pub(crate) use tree::{LEAF_PAGES, Lookup, Map, NextLeaf};
