//! Holds the tables of `docs/format.md` against the code: every structure, field, offset, size and
//! constant.
//!
//! If these fail, whoever writes a tool from the document reads wrong bytes.

use super::{catalog, extent, group, node, root, superblock};
use crate::{base, format};
use std::collections::BTreeMap;

const DOCUMENT: &str = include_str!("../docs/format.md");

/// Name, size, and (offset, bytes, field) in order.
type Layout = (String, usize, Vec<(usize, usize, String)>);

/// The layouts as compiled. Each field must be named, or the pattern does not compile.
macro_rules! layouts {
    ($($module:ident :: $name:ident { $($field:ident),* $(,)? })*) => {{
        fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
            size_of::<F>()
        }
        let mut all: Vec<Layout> = Vec::new();
        $({
            type This = $module::$name;
            let _all_named = |value: This| { let This { $($field: _),* } = value; };
            let fields = vec![$((
                std::mem::offset_of!(This, $field),
                size_of_field(|value: &This| &value.$field),
                stringify!($field).to_string(),
            )),*];
            let name = format!("{}::{}", stringify!($module), stringify!($name));
            all.push((name, size_of::<This>(), fields));
        })*
        all
    }};
}

fn compiled() -> Vec<Layout> {
    layouts! {
        superblock::Head {
            magic, version, crc, copy, shards_count, clean, flush_method, store_id, generation,
            epoch, epoch_first_lsn, salt, checkpoint, watermark, next_lsn, extent_bytes,
            segment_bytes, segments_count, vshards_count, extents_count, table_crc, reserved
        }
        superblock::LogRow { segment, block, generation, number, checksum, segments_made }
        superblock::VShardRow { generation, redo_lsn, shard, reserved, root_crc }
        root::Head {
            magic, crc, vshard, reserved, store_id, generation, redo_lsn, checkpoint, reserved2
        }
        extent::TableHead { magic, crc, index, store_id, checkpoint, reserved }
        extent::TableRow { state, class, live, summary_crc, summary_slot, reserved }
        extent::SummaryHead { magic, crc, extent, store_id, count, reserved }
        extent::SummaryItem { lsn, id, block, blocks, kind, volume, level, class, vshard, reserved }
        node::Entry { place, lsn, len, crc, class, codec, key_id, flags, nonce, tag, reserved }
        node::Child { place, crc, level, present, reserved }
        catalog::VolumeRecord { magic, crc, name_len, reserved, bytes, name }
        group::RawRun { first, count }
        group::Head {
            magic, head_crc, body_crc, epoch, generation, number, prev_crc, shard, runs_count,
            segment, block, body_blocks, blocks, records_bytes, images_count, commits_count, key_id,
            reserved, watermark, superblock_generation, runs, nonce, tag, reserved2
        }
        group::RawRecord { lsn, bytes, changes_count, kind, reserved }
        group::RawParts { shards }
        group::RawChange { kind, volume, class, reserved, len, offset, page }
        group::RawImage { page, volume, state, reserved, block, entry }
    }
}

macro_rules! constants {
    ($($module:ident :: $name:ident),* $(,)?) => {
        [$((
            concat!(stringify!($module), "::", stringify!($name)).to_string(),
            $module::$name as u64,
        )),*].into()
    };
}

fn constants() -> BTreeMap<String, u64> {
    constants![
        format::FORMAT_VERSION,
        format::LSN_END,
        base::BLOCK,
        superblock::SUPERBLOCK_BYTES,
        superblock::SUPERBLOCK_COPIES,
        superblock::SHARDS_MAX,
        superblock::SEGMENTS_MIN,
        superblock::VSHARDS_MAX,
        root::VOLUMES_MAX,
        node::LEAF_ENTRIES,
        node::NODE_CHILDREN,
        catalog::NAME_BYTES_MAX,
        extent::TABLE_ROWS,
        group::RUNS_MAX,
        group::HEAD_BYTES,
    ]
}

/// The cells of a table row; the name in backquotes without them.
fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.strip_prefix("| ")?.strip_suffix(" |")?;
    Some(inner.split(" | ").map(|cell| cell.trim_matches('`')).collect())
}

/// The layouts that a document states.
fn stated_layouts(document: &str) -> Vec<Layout> {
    let mut all: Vec<Layout> = Vec::new();
    let mut inside = false;
    for line in document.lines() {
        if let Some(heading) = line.strip_prefix("### `") {
            let (name, rest) = heading.split_once("`: ").expect("a heading states a size");
            let size = rest
                .strip_suffix(" bytes")
                .and_then(|n| n.parse().ok())
                .expect("a heading states a size");
            all.push((name.to_string(), size, Vec::new()));
            inside = true;
        } else if line.starts_with('#') {
            inside = false;
        } else if let Some(row) = cells(line).filter(|row| inside && row.len() == 4)
            && let (Ok(offset), Ok(bytes)) = (row[0].parse(), row[1].parse())
        {
            all.last_mut().expect("inside one").2.push((offset, bytes, row[2].to_string()));
        }
    }
    all
}

fn stated_constants(document: &str) -> BTreeMap<String, u64> {
    let row = |line| cells(line).filter(|row| row.len() == 3 && row[0].contains("::"));
    let value = |row: Vec<&str>| {
        (row[0].to_string(), row[1].parse().expect("a constant's value is a number"))
    };
    document.lines().filter_map(row).map(value).collect()
}

#[test]
fn the_document_states_every_field_where_it_is() {
    let (mut stated, mut compiled) = (stated_layouts(DOCUMENT), compiled());
    stated.sort();
    compiled.sort();
    for (stated, compiled) in stated.iter().zip(&compiled) {
        assert_eq!(stated, compiled, "docs/format.md (left) and the code (right) differ");
    }
    assert_eq!(stated.len(), compiled.len(), "a structure is missing on one side");
}

#[test]
fn the_document_states_every_constant() {
    assert_eq!(stated_constants(DOCUMENT), constants());
}

/// The meaning that the document gives to a field of a structure.
fn meaning<'a>(document: &'a str, structure: &str, field: &str) -> &'a str {
    let start = document.find(&format!("### `{structure}`")).expect("the structure has a heading");
    let row = document[start..].lines().find(|line| line.contains(&format!("| `{field}` |")));
    row.and_then(|row| row.strip_suffix(" |")?.rsplit(" | ").next()).expect("the field has a row")
}

/// A tool that follows the document would refuse every store, or read one of another version:
/// version and magics are what it tells structures apart by.
#[test]
fn the_document_states_version_and_magics() {
    let version = format::FORMAT_VERSION;
    assert!(DOCUMENT.starts_with(&format!("# The format on disk, version {version}\n")));
    assert_eq!(
        meaning(DOCUMENT, "superblock::Head", "version"),
        format!("`FORMAT_VERSION`: {version}.")
    );
    for (structure, magic) in [
        ("superblock::Head", superblock::MAGIC),
        ("root::Head", root::MAGIC),
        ("extent::TableHead", extent::TABLE_MAGIC),
        ("extent::SummaryHead", extent::SUMMARY_MAGIC),
        ("group::Head", group::MAGIC),
        ("catalog::VolumeRecord", catalog::MAGIC),
        ("catalog::VolumeRecord", catalog::MAGIC_CUT),
    ] {
        let text = std::str::from_utf8(&magic).expect("a magic is text").trim_end_matches('\0');
        let stated = meaning(DOCUMENT, structure, "magic");
        assert!(
            stated.contains(&format!("`{text}`")),
            "{structure}: {text} in the code, {stated} in the document"
        );
    }
}

/// Nothing lies between two fields, or it would be written to disk uninitialised.
#[test]
fn fields_touch() {
    for (name, size, fields) in compiled() {
        let mut next = 0;
        for (offset, bytes, field) in fields {
            assert_eq!(offset, next, "{name}.{field}");
            next = offset + bytes;
        }
        assert_eq!(next, size, "{name}");
    }
}

/// The check above can fail: one wrong digit in the document is found.
#[test]
fn a_wrong_digit_is_found() {
    let wrong = DOCUMENT.replacen("| 8 | 4 | `version`", "| 8 | 8 | `version`", 1);
    assert_ne!(wrong, DOCUMENT);
    assert_ne!(stated_layouts(&wrong), stated_layouts(DOCUMENT));
    let wrong = DOCUMENT.replacen("| `base::BLOCK` | 4096 |", "| `base::BLOCK` | 4095 |", 1);
    assert_ne!(stated_constants(&wrong), constants());
}
