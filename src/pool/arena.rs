//! The arena: one mapping of aligned memory, cut into frames of 4 KiB << order.
//!
//! (interface to be kept; implementation to come)

/// Where the arena's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArenaKind {
    /// Explicit 2 MiB huge pages (`MAP_HUGETLB`).
    HugePages,
    /// Ordinary memory for which transparent huge pages were asked (`MADV_HUGEPAGE`).
    Transparent,
    /// Ordinary 4 KiB pages.
    Small,
}
