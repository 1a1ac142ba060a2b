//! Rules on what there is only one of: the random source, the pattern of pages, the order of
//! modules.

use super::{LAYERS, can_fail, code_only, complain_about, files, line_of, root};
use std::fs;

/// The folders of `src` in the order in which a write travels, and those that stand beside its way.
const ON_THE_WAY: &[&str] = &["api", "runtime", "mesh", "engine", "format", "io", "memory", "base"];
const BESIDE: &[&str] = &["ops", "program", "testing"];

/// Multipliers of well-known generators, in lower case without `_`, and the idiom of pages that
/// repeat a word. Spelled in halves, so that this file does not complain about itself.
const GENERATORS: &[&str] = &[
    concat!("0xbf58476d", "1ce4e5b9"),
    concat!("0x94d049bb", "133111eb"),
    concat!("0xd1342543", "de82ef95"),
    concat!("636413622", "3846793005"),
    concat!("0x5851f42d", "4c957f2d"),
];
const REPEATED_WORD: &str = concat!("_bytes()", ".repeat(");

/// Where numbers are mixed for all others.
const MIX: &str = "src/base/mix.rs";
/// Examples are for users, who have only what is public.
const EXAMPLES: &str = "tests/examples/";

fn one_random_source(name: &str, text: &str) -> Vec<String> {
    if name == MIX || name.starts_with(EXAMPLES) {
        return vec![];
    }
    let of_line = |(number, line): (usize, &str)| {
        let plain = line.replace('_', "").to_lowercase();
        let is_generator = GENERATORS.iter().any(|multiplier| plain.contains(multiplier));
        is_generator.then(|| {
            format!(
                "{name}:{}: a random source of its own: use `testing::random::Rng` or \
                 `base::mix::mix`",
                number + 1
            )
        })
    };
    text.lines().enumerate().filter_map(of_line).collect()
}

fn one_pattern_of_pages(name: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    let found = code.match_indices(REPEATED_WORD).map(|(at, _)| line_of(&code, at));
    found
        .map(|line| format!("{name}:{line}: a pattern of its own: use `testing::pattern`"))
        .collect()
}

#[test]
fn random_numbers_and_patterns_of_pages_come_from_one_place() {
    for folder in ["src", "tests", "benches"] {
        complain_about(files(folder, &[".rs"]), one_random_source);
        complain_about(files(folder, &[".rs"]), one_pattern_of_pages);
    }
}

/// What stands between `start` and `end` at the beginning of lines, without repetition.
fn first_words<'a>(text: &'a str, start: &str, end: &[char]) -> Vec<&'a str> {
    let mut found: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix(start)?.split(end).next())
        .collect();
    found.dedup();
    found
}

/// The order of the folders in each place that states it.
fn orders(library: &str, architecture: &str) -> Vec<(&'static str, Vec<String>)> {
    let owned = |words: Vec<&str>| words.into_iter().map(str::to_owned).collect();
    let map = architecture.split("\n## Module map\n").nth(1).unwrap_or_default();
    let map = map.split("\n## ").next().unwrap_or_default();
    vec![
        ("the table at the top of src/lib.rs", owned(first_words(library, "//! | `", &['`']))),
        ("`mod` lines of src/lib.rs", owned(first_words(library, "mod ", &[';']))),
        ("src/docs/architecture.md", owned(first_words(map, "| `", &['`', '/']))),
    ]
}

/// Where the folders stand in another order, or are missing. The program is no module of the
/// library.
fn out_of_order(orders: &[(&str, Vec<String>)]) -> Vec<String> {
    let all = || ON_THE_WAY.iter().chain(BESIDE).copied();
    let wanted = |place: &str| -> Vec<&str> {
        all().filter(|name| *name != "program" || !place.starts_with("`mod`")).collect()
    };
    let differ = orders.iter().filter(|(place, found)| *found != wanted(place));
    differ.map(|(place, found)| format!("{place}: {found:?}, not {:?}", wanted(place))).collect()
}

/// Whoever looks for the next step of a write finds it below the one before, wherever modules are
/// listed.
#[test]
fn modules_stand_in_one_order_everywhere() {
    let text = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let mut all = orders(&text("src/lib.rs"), &text("src/docs/architecture.md"));
    let complaints = out_of_order(&all);
    assert!(complaints.is_empty(), "{complaints:#?}");
    all[2].1.swap(1, 2);
    assert_eq!(out_of_order(&all).len(), 1, "another order is not noticed");

    let entries = fs::read_dir(root().join("src")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<String> = entries
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .filter(|name| name != "docs")
        .collect();
    folders.sort();
    let mut listed: Vec<&str> = ON_THE_WAY.iter().chain(BESIDE).copied().collect();
    listed.sort();
    assert_eq!(folders, listed, "folders of src");

    let rows = LAYERS.iter().rev().flat_map(|row| row.iter().map(|(name, _)| *name));
    let layers: Vec<&str> = rows.filter(|name| ON_THE_WAY.contains(name)).collect();
    assert_eq!(layers, ON_THE_WAY, "LAYERS of tests/tidy.rs, from the top");
}

#[test]
fn planted_sources_are_found() {
    let planted = format!("let z = z.wrapping_mul({});", GENERATORS[0]);
    can_fail(one_random_source, "benches/x.rs", &planted, "let z = mix(z);");
    let lcg = format!("    state.wrapping_mul({})", GENERATORS[3].replace("3622", "3_622_"));
    can_fail(one_random_source, "tests/fast/x.rs", &lcg, "    rng.draw()");
    assert!(one_random_source(MIX, &planted).is_empty());
    let page = format!("word.to_le{REPEATED_WORD}512)");
    can_fail(one_pattern_of_pages, "src/x.rs", &page, "pattern::words(word, 4096)");
}
