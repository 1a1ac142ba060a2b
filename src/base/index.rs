//! Indices into tables: each table has an index type of its own, so that no index is taken for
//! another table's.
//!
//! Invariants
//! 1. Only `index_type!` makes an index type; it has the size of its number, and no arithmetic.
//! 2. [`IndexedSlab`] hands out its own index type and accepts no other.
//!
//! It does *not* know whether an index is still valid: a table reuses the number of a removed entry
//! for the next one.

use slab::Slab;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

/// An index type, as a table creates it and looks it up.
pub trait TableIndex: Copy {
    /// The index of the entry at this position.
    fn at(position: usize) -> Self;
    /// The position of the entry.
    fn position(self) -> usize;
}

/// Declares index types as `NAME("prefix of its Debug form")`, each with its documentation.
macro_rules! index_type {
    ($($(#[$doc:meta])* $name:ident($prefix:literal);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u32);

        impl $name {
            /// The index of the entry at this position.
            ///
            /// # Panics
            /// If `position` is 2^32 or more: no table has that many entries.
            #[inline]
            pub const fn new(position: usize) -> Self {
                assert!(position <= u32::MAX as usize, "a table has fewer than 2^32 entries");
                $name(position as u32)
            }

            /// The position of the entry in its table.
            #[inline]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl TableIndex for $name {
            #[inline]
            fn at(position: usize) -> Self {
                $name::new(position)
            }
            #[inline]
            fn position(self) -> usize {
                self.index()
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    )*};
}

index_type! {
    /// A page in a shard's page table.
    PageIdx("page ");
    /// A request in progress in a shard.
    RequestIdx("request ");
    /// A version of a page on its way into the map.
    PageVersionIdx("version ");
    /// A page image of the open group.
    ImageIdx("image ");
    /// An operation in flight at the device.
    OpIdx("op ");
    /// A map node in memory.
    NodeIdx("node ");
    /// A map node that compaction wants to move and that must be read first.
    NodeMoveIdx("node move ");
}

/// A slab whose entries are looked up by indices of one type only.
pub struct IndexedSlab<I, T> {
    entries: Slab<T>,
    index: PhantomData<fn(I) -> I>,
}

impl<I, T> Default for IndexedSlab<I, T> {
    fn default() -> Self {
        IndexedSlab { entries: Slab::new(), index: PhantomData }
    }
}

impl<I: TableIndex, T> IndexedSlab<I, T> {
    /// Makes an empty slab with room for `capacity` entries.
    pub fn with_capacity(capacity: usize) -> Self {
        IndexedSlab { entries: Slab::with_capacity(capacity), index: PhantomData }
    }

    /// Adds an entry. Its index may be that of a removed entry.
    #[inline]
    pub fn insert(&mut self, entry: T) -> I {
        I::at(self.entries.insert(entry))
    }

    /// Removes an entry.
    ///
    /// # Panics
    /// If there is no such entry.
    #[inline]
    pub fn remove(&mut self, at: I) -> T {
        self.entries.remove(at.position())
    }

    /// The entry, if there is one.
    #[inline]
    pub fn get(&self, at: I) -> Option<&T> {
        self.entries.get(at.position())
    }

    /// The entries in the order of their indices.
    pub fn iter(&self) -> impl Iterator<Item = (I, &T)> + Clone {
        self.entries.iter().map(|(at, entry)| (I::at(at), entry))
    }

    /// The number of entries.
    #[inline]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has no entries.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl<I: TableIndex, T> Index<I> for IndexedSlab<I, T> {
    type Output = T;
    #[inline]
    fn index(&self, at: I) -> &T {
        &self.entries[at.position()]
    }
}

impl<I: TableIndex, T> IndexMut<I> for IndexedSlab<I, T> {
    #[inline]
    fn index_mut(&mut self, at: I) -> &mut T {
        &mut self.entries[at.position()]
    }
}
