//! Rules on what there is only one of: the random source, the pattern of pages, the order of
//! modules; and on parameters that say nothing where they are given.

use super::{
    LAYERS, before_tests, can_fail, code_only, complain_about, files, is_test_file, line_of, root,
    sources,
};
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

/// Functions that may take a `bool`, with the reason. A row without such a function goes.
const BOOL_PARAMETERS: &[(&str, &str, &str)] = &[
    (
        "src/engine/cache/answer.rs",
        "count_read_pages",
        "both callers have a variable of its name, on the path of every cached read",
    ),
    ("src/engine/txn/local.rs", "set_absent", "sets the field of this name"),
    ("src/ops/probe/driver.rs", "new", "sets public fields of a report"),
    ("src/ops/probe/machine.rs", "new", "sets public fields of a report"),
];

/// Folders whose files only tests and fuzz targets use.
const FOR_TESTS: &[&str] = &["src/testing/", "src/program/server/nbd/fuzz"];

/// Where the brackets end that open at `open`.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' if depth == 1 => return at,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
    }
    code.len()
}

/// Names of the functions that take a `bool`, or one that is optional or borrowed, and where they
/// stand.
fn functions_with_bool(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let rest = &code[at + "fn ".len()..];
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
        // Bounds of generics have brackets of their own: `F: Fn(bool)` is no parameter.
        let mut angles = 0;
        let open = rest.bytes().enumerate().find(|&(i, byte)| {
            match byte {
                b'<' => angles += 1,
                b'>' if !rest[..i].ends_with('-') => angles -= 1,
                _ => {}
            }
            byte == b'(' && angles == 0
        });
        let (Some((open, _)), false) = (open, name.is_empty()) else { continue };
        let parameters = &rest[open + 1..closing(rest, open)];
        let words = parameters.split_inclusive([',', ':']).map(str::trim);
        let is_bool = |word: &str| {
            let word = word.trim_end_matches(',').trim_start_matches('&');
            matches!(word.trim_start_matches("mut ").trim(), "bool" | "Option<bool>")
        };
        if words.into_iter().any(is_bool) {
            found.push((at, name));
        }
    }
    found
}

/// The rule: `true` and `false` say nothing where a function is called; an enum, or a function for
/// each case, does.
fn no_bool_parameters(name: &str, text: &str) -> Vec<String> {
    if is_test_file(name) || FOR_TESTS.iter().any(|folder| name.starts_with(folder)) {
        return vec![];
    }
    let text = text.split("\n#[cfg(all(test").next().unwrap_or_default();
    let code = code_only(before_tests(text));
    let found = functions_with_bool(&code);
    let is_allowed = |function: &str| {
        BOOL_PARAMETERS.iter().any(|(file, allowed, _)| (*file, *allowed) == (name, function))
    };
    let complaints = found.iter().filter(|(_, function)| !is_allowed(function)).map(|(at, f)| {
        format!("{name}:{}: `{f}` takes a bool: an enum says what it means", line_of(&code, *at))
    });
    let gone = BOOL_PARAMETERS
        .iter()
        .filter(|(file, function, _)| *file == name && !found.iter().any(|(_, f)| f == function))
        .map(|(_, function, _)| format!("{name}: no `{function}` takes a bool, take its row out"));
    complaints.chain(gone).collect()
}

#[test]
fn no_function_takes_a_bool() {
    complain_about(sources(), no_bool_parameters);
    for (file, ..) in BOOL_PARAMETERS {
        assert!(root().join(file).exists(), "{file} stands in BOOL_PARAMETERS and is gone");
    }
}

#[test]
fn planted_bools_are_found() {
    let rule = no_bool_parameters;
    let good = "fn zero(&self, kind: Kind) -> bool {}\nfn each<F: Fn(bool) -> bool>(f: F) {}\n\
                fn f(of: impl Fn(u8) -> bool, list: &[bool]) {}\n";
    for bad in [
        "fn zero(&self, hole: bool) {}",
        "fn zero(\n    &self,\n    hole: bool,\n    length: u64,\n) {}",
        "fn each<F: Fn(u8)>(f: F, told: &mut bool) {}",
        "fn zero(hole: Option<bool>) {}",
    ] {
        can_fail(rule, "src/x.rs", bad, good);
    }
    let tests = format!("{good}\n#[cfg(test)]\nmod tests {{\n    fn f(a: bool) {{}}\n}}\n");
    assert!(rule("src/x.rs", &tests).is_empty());
    let models = tests.replace("cfg(test)", "cfg(all(test, corepage_loom))");
    assert!(rule("src/x.rs", &models).is_empty());
    let (file, function, _) = BOOL_PARAMETERS[0];
    assert!(rule(file, &format!("fn {function}(a: bool) {{}}")).is_empty());
    assert_eq!(rule(file, good).len(), 1, "a row that is gone");
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
