//! Tests exports over a real store: what clients are told about a volume is true, even while its
//! size changes.
//!
//! If these fail, clients lose data that they were told is a hole, copy holes as data, or bring
//! back what was cut off. `tests.rs` tests the protocol without a store.

use super::holes::Holes;
use super::memory::{Division, Memory};
use super::proto::{Errno, ExtentKind, Fault};
use super::{Export, Exports, StoreExports};
use bytes::Bytes;
use corepage::{Durability, Options, Store};
use futures_lite::future::block_on;
use tempfile::TempDir;

const PAGE: usize = 4096;
const GIB: u64 = 1 << 30;

/// Opens a store with a volume `disk` of 1 TiB on two shards.
fn opened() -> (TempDir, Store, StoreExports) {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { memory_bytes: 32 << 20, shards: Some(2), ..Options::default() };
    let store = block_on(Store::open(dir.path(), options)).unwrap();
    block_on(store.create_volume("disk", 1024 * GIB)).unwrap();
    let exports = StoreExports::new(store.clone(), &Memory::new(Division::of(64 << 20)));
    (dir, store, exports)
}

fn export(exports: &StoreExports) -> <StoreExports as Exports>::Export {
    exports.find("").unwrap().expect("the only volume").1
}

/// Returns length and kind of all extents of a range, requested as a client does.
fn extents<E: Export>(
    export: &E,
    offset: u64,
    length: u64,
    extents_max: usize,
) -> Vec<(u64, bool)> {
    let mut all: Vec<(u64, bool)> = Vec::new();
    let mut at = offset;
    while at < offset + length {
        let asked = (offset + length - at).min(u64::from(u32::MAX)) as u32;
        let some = block_on(export.allocation(at, asked, extents_max)).unwrap();
        assert!((1..=extents_max).contains(&some.len()), "{} extents at {at}", some.len());
        for extent in some {
            let is_hole = extent.kind == ExtentKind::Hole;
            at += u64::from(extent.bytes);
            match all.last_mut() {
                Some((bytes, known)) if *known == is_hole => *bytes += u64::from(extent.bytes),
                _ => all.push((u64::from(extent.bytes), is_hole)),
            }
        }
    }
    assert_eq!(at, offset + length, "an extent went beyond its range");
    all
}

/// A hole that is reported as data costs time; data that is reported as a hole is lost by every
/// copy.
#[test]
fn extents_tell_what_is_stored_to_the_page() {
    let (_dir, store, exports) = opened();
    let disk = export(&exports);
    let page = |n: u64| n * PAGE as u64;
    // Parts of two pages at both ends; a long stretch over many runs; one page far away.
    block_on(disk.write(page(3) + 100, Bytes::from(vec![1; 2 * PAGE]), Durability::Buffered))
        .unwrap();
    block_on(disk.write(page(1000), Bytes::from(vec![2; 5000 * PAGE]), Durability::Buffered))
        .unwrap();
    block_on(disk.write(700 * GIB, Bytes::from_static(b"x"), Durability::Buffered)).unwrap();
    let stored = [
        (page(3), true),
        (page(3), false),
        (page(994), true),
        (page(5000), false),
        (700 * GIB - page(6000), true),
        (page(1), false),
        (324 * GIB - page(1), true),
    ];
    for extents_max in [1, 2, 8192] {
        assert_eq!(extents(&disk, 0, 1024 * GIB, extents_max), stored, "{extents_max} at a time");
    }
    assert_eq!(extents(&disk, page(5) + 7, page(1), 9), [(page(1) - 7, false), (7, true)]);
    block_on(disk.zero(page(1), page(4), ExtentKind::Hole, Durability::Buffered)).unwrap();
    block_on(disk.zero(page(2), page(1), ExtentKind::Stored, Durability::Buffered)).unwrap();
    assert_eq!(
        extents(&disk, 0, page(6), 9),
        [(page(2), true), (page(1), false), (page(2), true), (page(1), false)]
    );
    block_on(store.close()).unwrap();
}

/// The client takes holes in a reply for zeros without seeing them.
#[test]
fn holes_of_a_read_are_the_pages_that_are_not_stored() {
    let (_dir, store, exports) = opened();
    let disk = export(&exports);
    block_on(disk.write(2 * PAGE as u64, Bytes::from(vec![7; PAGE]), Durability::Buffered))
        .unwrap();
    block_on(disk.zero(4 * PAGE as u64, PAGE as u64, ExtentKind::Stored, Durability::Buffered))
        .unwrap();
    let (mut bytes, mut holes) = (vec![0; 6 * PAGE + 10], Holes::default());
    block_on(disk.read(10, &mut bytes, &mut holes)).unwrap();
    let end = bytes.len();
    let told = holes.pieces(end, 1);
    let at = |page: usize| page * PAGE - 10;
    // Page 4 is stored and full of zeros.
    let pieces =
        [(0..at(2), true), (at(2)..at(3), false), (at(3)..at(4), true), (at(4)..at(5), false)];
    assert_eq!(told, [&pieces[..], &[(at(5)..end, true)]].concat());
    assert!(
        bytes
            .iter()
            .enumerate()
            .all(|(n, byte)| *byte == 7 * u8::from((at(2)..at(3)).contains(&n)))
    );
    block_on(store.close()).unwrap();
}

/// A trim of a terabyte must only take the time for what is stored in it, and must not free a byte
/// too many.
#[test]
fn huge_holes_are_made_to_the_byte() {
    let (_dir, store, exports) = opened();
    let disk = export(&exports);
    let end = 1024 * GIB;
    let (first, last) = (5_000, end - 3_000);
    for at in [0, 4096, 8192, 300 * GIB + 1, end - 12_288, end - 8192] {
        block_on(disk.write(
            at,
            Bytes::from(vec![9; 8192.min((end - at) as usize)]),
            Durability::Buffered,
        ))
        .unwrap();
    }
    block_on(disk.zero(first, last - first, ExtentKind::Hole, Durability::Durable)).unwrap();
    let read = |at: u64, length: usize| {
        let mut bytes = vec![0; length];
        block_on(disk.read(at, &mut bytes, &mut Holes::default())).unwrap();
        bytes
    };
    assert_eq!(read(0, 16_384), [&[9; 5_000][..], &[0; 11_384]].concat());
    assert_eq!(read(end - 12_288, 12_288), [&[0; 9_288][..], &[9; 3_000]].concat());
    assert_eq!(extents(&disk, 0, end, 9), [(8192, false), (end - 12_288, true), (4096, false)]);
    block_on(store.close()).unwrap();
}

/// A volume changes its size under its clients: old ones must not write beyond its end, new ones
/// must see all of it.
#[test]
fn new_connections_see_the_new_size_and_old_ones_stay_inside_both() {
    let (_dir, store, exports) = opened();
    block_on(store.resize_volume("disk", GIB)).unwrap();
    let old = export(&exports);
    assert_eq!((old.bytes(), old.bytes_now()), (GIB, GIB));
    block_on(store.resize_volume("disk", 2 * GIB)).unwrap();
    let grown = export(&exports);
    assert_eq!((old.bytes(), old.bytes_now(), grown.bytes()), (GIB, 2 * GIB, 2 * GIB));
    block_on(grown.write(2 * GIB - 1, Bytes::from_static(b"x"), Durability::Buffered)).unwrap();
    block_on(store.resize_volume("disk", 4096)).unwrap();
    assert_eq!((old.bytes(), old.bytes_now(), export(&exports).bytes()), (GIB, 4096, 4096));
    block_on(store.resize_volume("disk", 2 * GIB)).unwrap();
    assert_eq!(extents(&grown, 0, 2 * GIB, 9), [(2 * GIB, true)], "what was cut off came back");
    block_on(store.delete_volume("disk")).unwrap();
    assert_eq!(old.bytes_now(), 0);
    assert!(exports.find("").unwrap().is_none());
    let refused = block_on(old.write(0, Bytes::from_static(b"x"), Durability::Buffered));
    assert!(
        old.is_deleted() && matches!(refused, Err(Fault { errno: Errno::Shutdown, .. })),
        "{refused:?}"
    );
    block_on(store.close()).unwrap();
}

/// A range of any length, stored or not, must be served as announced.
#[test]
fn caching_takes_any_range() {
    let (_dir, store, exports) = opened();
    let disk = export(&exports);
    block_on(disk.write(5, Bytes::from(vec![7; 1 << 20]), Durability::Durable)).unwrap();
    for (offset, length) in [(0, 1), (4095, 2), (77, 64 << 20), (GIB, u64::from(u32::MAX))] {
        block_on(disk.cache(offset, length)).unwrap();
    }
    block_on(store.close()).unwrap();
}
