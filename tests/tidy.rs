//! The habits of this repository, as tests: what a reviewer should not have to look for.
//!
//! Every rule is a function from text to a list of complaints, and has a test in which a planted
//! text makes it complain: a check that can't fail is no check. The rules look at text, not at
//! syntax trees; where one is in your way for no good reason, mend the rule.
//!
//! If these fail, nothing breaks for users today; the next reader pays.

#[path = "tidy/calls.rs"]
mod calls;
#[path = "tidy/assertions.rs"]
mod assertions;
#[path = "tidy/habits.rs"]
mod habits;
#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/patches.rs"]
mod patches;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a source file before its tests.
const FILE_LINES_MAX: usize = 500;
/// Lines of a function, blank and comment lines not counted; at 100 columns.
const FUNCTION_LINES_MAX: usize = 80;

/// Assertions for each hundred functions of the engine, at least. It may only be raised.
const ENGINE_ASSERTIONS_MIN: u32 = 30;

/// The only files with `unsafe` code, each with the reason.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("src/memory/arena.rs", "hands out the frames of its memory as slices"),
    ("src/memory/arena/memory.rs", "maps that memory"),
    ("src/memory/word.rs", "in its model only: loom hands out bytes as pointers"),
    ("src/io/uring/ring.rs", "gives the kernel entries, with pointers in them"),
    ("src/io/uring/entries.rs", "makes those entries, and keeps what they point to"),
    ("src/io/uring/buffers.rs", "registers the arena with the kernel"),
    ("src/io/uring/probe.rs", "one polled read, to see whether the device does that"),
    ("src/io/opener.rs", "maps a page that a fork empties"),
    ("src/program/cli/allocator.rs", "sets the C library's allocator, which takes two numbers"),
    (
        "src/program/cli/system.rs",
        "asks the kernel whether a signal is ignored, and for the process behind a socket",
    ),
    ("tests/common/surroundings.rs", "limits and filters are set in a child between fork and exec"),
];

/// The only folders that may name glommio, so that the rest builds and runs without it.
const GLOMMIO_FOLDERS: &[&str] = &["src/runtime", "src/program/server"];

/// Where the process begins: it prints, reads clocks and uses what it likes.
const OUTER: &[&str] =
    &["src/main.rs", "src/program/cli", "src/program/server", "src/runtime", "src/program/bench"];

/// The layers, lowest first, down to folders; a file belongs to the row with the longest path that
/// it lies in. A module may name those in lower rows, and those in its own row that it lists.
const LAYERS: &[&[(&str, &[&str])]] = &[
    &[("base", &[]), ("base/sync", &[])],
    &[("base/error", &[])],
    &[("base/mix", &[])],
    &[("testing/pattern", &[]), ("testing/random", &[])],
    &[("testing/replay", &[])],
    &[("base/options", &[]), ("base/checksum", &[]), ("base/metrics", &[])],
    &[("memory", &[])],
    &[("io", &[])],
    &[("format", &[])],
    &[("ops/probe", &[])],
    &[
        ("engine/map", &[]),
        ("engine/codec", &[]),
        ("engine/writeback/plan", &[]),
        ("engine/order", &[]),
        ("engine/log", &["engine/order", "engine/codec"]),
    ],
    &[("engine", &[])],
    &[("engine/recovery", &[])],
    &[("mesh", &[])],
    &[("ops/verify", &[]), ("ops", &[])],
    &[("testing/local_cluster", &[]), ("runtime", &[])],
    &[("testing/sim", &[])],
    &[("api", &[])],
    &[("testing/fuzz", &[])],
    &[("testing/cost", &[]), ("testing", &[])],
    &[("program/server", &[])],
    &[("program/bench", &[])],
    &[("program/cli", &[]), ("program", &[])],
];

/// Who may name a layer above all the same: one module, the other, and why.
const EXCEPTIONS: &[(&str, &str, &str)] = &[(
    "engine",
    "testing/sim",
    "bugs planted for the simulator to find; compiled into tests and the feature `sim` only",
)];

/// Files that may need each other in a circle, each group with the reason; a row that ends in `/`
/// stands for a folder. There is none, and none may be added.
const CIRCLES: &[(&[&str], &str)] = &[];

/// What the top of the repository may hold, besides names with a leading dot and what Git ignores.
const TOP_LEVEL: &[&str] =
    &["Cargo.toml", "Cargo.lock", "src", "benches", "tests", "scripts", "README.md", "LICENSE"];
const IGNORED_BY_GIT: &[&str] = &["target", "corepage-data"];

/// Spelled in halves, so that this file does not complain about itself.
const LEFTOVERS: &[&str] = &[
    concat!("todo", "!("),
    concat!("unimpl", "emented!("),
    concat!("dbg", "!("),
    concat!("FIX", "ME"),
];

// --- the tree ---

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files under `folder` whose names end in one of `endings`: path from the root, and text.
fn files(folder: &str, endings: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(next) = folders.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if endings.iter().any(|ending| path.to_str().unwrap().ends_with(ending)) {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                // The corpus of the fuzz targets is no text.
                found.push((name, String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned()));
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let found = files("src", &[".rs"]);
    assert!(found.len() > 5, "the sources were not found");
    found
}

fn is_test_file(name: &str) -> bool {
    name.starts_with("tests/") || name.ends_with("tests.rs") || name.contains("tests/")
}

fn is_under(name: &str, folders: &[&str]) -> bool {
    folders.iter().any(|folder| {
        name.strip_prefix(folder)
            .is_some_and(|rest| rest.is_empty() || rest == ".rs" || rest.starts_with('/'))
    })
}

fn complain_about(files: Vec<(String, String)>, rule: impl Fn(&str, &str) -> Vec<String>) {
    let complaints: Vec<String> = files.iter().flat_map(|(name, text)| rule(name, text)).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// The text with comments and the insides of strings and characters as blanks; lines stay where
/// they are.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match (bytes[at], bytes.get(at + 1)) {
            (b'/', Some(b'/')) => at + text[at..].find('\n').unwrap_or(text.len() - at),
            (b'/', Some(b'*')) => at + text[at..].find("*/").map_or(text.len() - at, |n| n + 2),
            (b'r', Some(b'"' | b'#'))
                if at == 0 || !is_word(bytes[at - 1]) || bytes[at - 1] == b'b' =>
            {
                let hashes = bytes[at + 1..].iter().take_while(|&&b| b == b'#').count();
                if bytes.get(at + 1 + hashes) != Some(&b'"') {
                    at += 1;
                    continue;
                }
                let close = format!("\"{}", "#".repeat(hashes));
                let from = at + 2 + hashes;
                from + text[from..].find(&close).map_or(text.len() - from, |n| n + close.len())
            }
            (b'"', _) => quoted_end(bytes, at),
            (b'\'', Some(b'\\')) => quoted_end(bytes, at),
            (b'\'', Some(_))
                if char_len(text, at + 1)
                    .is_some_and(|n| bytes.get(at + 1 + n) == Some(&b'\'')) =>
            {
                at + 2 + char_len(text, at + 1).unwrap()
            }
            _ => {
                at += 1;
                continue;
            }
        };
        out[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        at = end;
    }
    String::from_utf8(out).unwrap()
}

fn quoted_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != bytes[start] {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

fn char_len(text: &str, at: usize) -> Option<usize> {
    text[at..].chars().next().map(char::len_utf8)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Byte offsets at which `word` stands by itself.
fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let (before, after) = (at.checked_sub(1), at + word.len());
        !before.is_some_and(|i| is_word(code.as_bytes()[i]))
            && !code.as_bytes().get(after).is_some_and(|&b| is_word(b))
    })
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The part of a file before its tests: up to a `#[cfg(test)]` at the start of a line that is not
/// merely the declaration of a module in another file.
fn before_tests(text: &str) -> &str {
    let mut from = 0;
    while let Some(at) = text[from..].find("\n#[cfg(test)]\n").map(|at| from + at) {
        let after = &text[at + "\n#[cfg(test)]\n".len()..];
        let line = after.lines().find(|line| !line.starts_with("#[")).unwrap_or("");
        if !(line.starts_with("use ") || line.contains("mod ") && line.ends_with(';')) {
            return &text[..at + 1];
        }
        from = at + 1;
    }
    text
}

// --- the rules ---

fn head_comment(name: &str, text: &str) -> Vec<String> {
    let ok = text.starts_with("//! ") && text.lines().next().is_some_and(|line| line.len() > 12);
    if ok {
        vec![]
    } else {
        vec![format!("{name}:1: a file opens with `//!` and says what it is for")]
    }
}

fn file_length(name: &str, text: &str) -> Vec<String> {
    let lines = before_tests(text).lines().count();
    if lines <= FILE_LINES_MAX || is_test_file(name) {
        return vec![];
    }
    vec![format!(
        "{name}: {lines} lines before its tests, at most {FILE_LINES_MAX}: split it where it has \
         two jobs"
    )]
}

fn function_length(name: &str, text: &str) -> Vec<String> {
    let code = code_only(before_tests(text));
    let mut complaints = Vec::new();
    for at in words(&code, "fn") {
        let rest = &code[at..];
        let Some(open) = rest.find(['{', ';']).filter(|&open| rest.as_bytes()[open] == b'{') else {
            continue;
        };
        let mut depth = 0;
        let end = rest[open..].bytes().position(|byte| {
            depth += i32::from(byte == b'{') - i32::from(byte == b'}');
            depth == 0
        });
        let body = &rest[..open + end.unwrap_or(rest.len() - open - 1) + 1];
        let lines = body.lines().filter(|line| !line.trim().is_empty()).count();
        if lines > FUNCTION_LINES_MAX {
            let head = rest.split(['(', '<']).next().unwrap();
            let line = line_of(&code, at);
            complaints.push(format!(
                "{name}:{line}: `{head}` has {lines} lines, at most {FUNCTION_LINES_MAX}"
            ));
        }
    }
    complaints
}

fn no_leftovers(name: &str, text: &str) -> Vec<String> {
    let found = LEFTOVERS.iter().filter_map(|word| text.find(word).map(|at| (word, at)));
    found
        .map(|(word, at)| {
            format!("{name}:{}: `{word}`: finish it or open an issue", line_of(text, at))
        })
        .collect()
}

/// What a test says with `eprintln` is shown only if it fails: one that skips would say `ok` and
/// nothing more.
fn skips_are_seen(name: &str, text: &str) -> Vec<String> {
    let hidden = concat!("println!(\"", "SKIPPED");
    let found = text.match_indices(hidden).map(|(at, _)| line_of(text, at));
    found
        .map(|line| format!("{name}:{line}: nobody sees that it skips: use `common::skipped`"))
        .collect()
}

fn unsafe_only_where_named(name: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    let allowed = UNSAFE_FILES.iter().any(|(file, _)| *file == name);
    if allowed {
        return unsafe_has_argument(name, text, &code);
    }
    let lines = words(&code, "unsafe").map(|at| line_of(&code, at));
    lines
        .map(|line| format!("{name}:{line}: `unsafe` outside of the files listed in tests/tidy.rs"))
        .collect()
}

/// Where `unsafe` is allowed, each block and `impl` has a `SAFETY:` comment above it, and each
/// function a section.
fn unsafe_has_argument(name: &str, text: &str, code: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let argued = |line: usize| {
        // The comment stands above the statement, which may be more than a line long.
        let continues = |line: usize| line > 1 && lines[line - 2].trim_end().ends_with('=');
        let line = (1..=line).rev().find(|&line| !continues(line)).unwrap_or(line);
        let above = lines[..line - 1].iter().rev().take_while(|l| {
            let l = l.trim_start();
            l.starts_with("//") || l.starts_with("#[") || l.starts_with("unsafe impl")
        });
        above.chain([&lines[line - 1]]).any(|l| l.contains("SAFETY:") || l.contains("# Safety"))
    };
    let missing = words(code, "unsafe").map(|at| line_of(code, at)).filter(|&line| !argued(line));
    missing
        .map(|line| format!("{name}:{line}: `unsafe` without a `SAFETY:` comment above it"))
        .collect()
}

fn glommio_only_in_the_runtime(name: &str, text: &str) -> Vec<String> {
    if is_under(name, GLOMMIO_FOLDERS) {
        return vec![];
    }
    let code = code_only(text);
    let lines = words(&code, "glommio").map(|at| line_of(&code, at));
    lines
        .map(|line| format!("{name}:{line}: glommio is named only in {GLOMMIO_FOLDERS:?}"))
        .collect()
}

/// What a simulated run must not depend on, and what a library must not do to its host.
fn no_hidden_inputs(name: &str, text: &str) -> Vec<String> {
    if is_under(name, OUTER) || is_test_file(name) {
        return vec![];
    }
    const WORDS: &[(&str, &str)] = &[
        ("collections::HashMap", "iterates in random order"),
        ("collections::HashSet", "iterates in random order"),
        ("RandomState", "is seeded at random: foldhash::fast::FixedState"),
        ("println", "prints: trace or return it"),
        ("eprintln", "prints: trace or return it"),
    ];
    let code = code_only(before_tests(text));
    let find = |(word, why)| words(&code, word).map(move |at| (word, why, at)).collect::<Vec<_>>();
    let found = WORDS.iter().copied().flat_map(find);
    found.map(|(word, why, at)| format!("{name}:{}: `{word}` {why}", line_of(&code, at))).collect()
}

/// Nothing may depend on the time of day, which jumps: all time is that of the monotonic clock.
fn no_wall_clock(name: &str, text: &str) -> Vec<String> {
    const WORDS: &[&str] = &["SystemTime", "UNIX_EPOCH", "CLOCK_REALTIME", "Realtime"];
    let code = code_only(before_tests(text));
    let found = WORDS
        .iter()
        .flat_map(|word| words(&code, word).map(move |at| (word, at)).collect::<Vec<_>>());
    found
        .map(|(word, at)| format!("{name}:{}: `{word}`: the wall clock jumps", line_of(&code, at)))
        .collect()
}

/// The row of [`LAYERS`] for a path such as `base/error`: the longest one that it lies in.
fn layer_of_path(path: &str) -> Option<&'static str> {
    let rows = LAYERS.iter().flat_map(|row| row.iter().map(|(name, _)| *name));
    let of_path = rows.filter(|row| {
        path.strip_prefix(row).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    of_path.max_by_key(|row| row.len())
}

/// The path of a file's module below `src`; none for the roots of the crates.
fn module_path(name: &str) -> Option<&str> {
    let path = name.strip_prefix("src/")?.strip_suffix(".rs")?;
    let path = path.strip_suffix("/mod").unwrap_or(path);
    (!["lib", "main"].contains(&path)).then_some(path)
}

/// The paths that a file names as `crate::a::b`, `crate::{a, b::c}` included, with the line; `/`
/// stands between names.
fn modules_named(code: &str) -> Vec<(String, usize)> {
    let mut named = Vec::new();
    for at in words(code, "crate") {
        // Not `pub(in crate::x)`.
        if code[at..].starts_with("crate::") && !code[..at].ends_with("in ") {
            use_tree(code, at + "crate::".len(), "", &mut named);
        }
    }
    named
}

/// Reads the use tree that begins at `at`, below `path`; returns where it ends.
fn use_tree(code: &str, mut at: usize, path: &str, named: &mut Vec<(String, usize)>) -> usize {
    let skip_blanks = |at: usize| at + code[at..].len() - code[at..].trim_start().len();
    at = skip_blanks(at);
    if code[at..].starts_with('{') {
        at += 1;
        loop {
            at = skip_blanks(at);
            match code[at..].chars().next() {
                Some('}') => return at + 1,
                Some(',') => at += 1,
                Some(_) => {
                    let end = use_tree(code, at, path, named);
                    at = if end > at { end } else { at + 1 };
                }
                None => return at,
            }
        }
    }
    let word: String =
        code[at..].chars().take_while(|&c| c.is_ascii() && is_word(c as u8)).collect();
    let end = at + word.len();
    let inner = match (path, word.as_str()) {
        (_, "" | "self") => path.to_owned(),
        ("", word) => word.to_owned(),
        (path, word) => format!("{path}/{word}"),
    };
    if !word.is_empty() && code[end..].starts_with("::") {
        return use_tree(code, end + 2, &inner, named);
    }
    if !inner.is_empty() {
        named.push((inner, line_of(code, at)));
    }
    end
}

/// The module behind a name that the crate's face exports.
fn home_of(path: &str) -> &str {
    match path.split('/').next().unwrap_or(path) {
        "Error" | "ErrorKind" | "Result" => "base/error",
        "Options" | "Geometry" => "base/options",
        _ => path,
    }
}

fn layers_know_what_is_below(name: &str, text: &str) -> Vec<String> {
    let Some(path) = module_path(name).filter(|_| !is_test_file(name)) else { return vec![] };
    let row =
        |layer: &str| LAYERS.iter().position(|row| row.iter().any(|(name, _)| *name == layer));
    let Some(layer) = layer_of_path(path) else {
        return vec![format!("{name}: `{path}` is in no row of the table of tests/tidy.rs")];
    };
    let own_row = row(layer).unwrap();
    let siblings = LAYERS[own_row].iter().find(|(name, _)| *name == layer).unwrap().1;
    let mut complaints = Vec::new();
    for (named, line) in modules_named(&code_only(before_tests(text))) {
        let other = layer_of_path(home_of(&named));
        let excepted =
            EXCEPTIONS.iter().any(|(from, to, _)| layer.starts_with(from) && Some(*to) == other);
        let lawful = other.is_some_and(|other| {
            other == layer
                || siblings.contains(&other)
                || row(other).is_some_and(|other| other < own_row)
        });
        if !lawful && !excepted {
            complaints
                .push(format!("{name}:{line}: `{layer}` names `{named}`, which is not below it"));
        }
    }
    complaints
}

/// Rows of the tables for which there is no file.
fn rows_without_files(exists: impl Fn(&str) -> bool) -> Vec<String> {
    let layers = LAYERS.iter().flat_map(|row| row.iter().map(|(name, _)| format!("src/{name}")));
    let others = UNSAFE_FILES
        .iter()
        .map(|(file, _)| *file)
        .chain(GLOMMIO_FOLDERS.iter().chain(OUTER).copied());
    let named = layers.chain(others.map(str::to_owned));
    let missing = named.filter(|path| !exists(path) && !exists(&format!("{path}.rs")));
    missing
        .map(|path| format!("tests/tidy.rs: {path} is in a table, and there is no such file"))
        .collect()
}

/// Links in a document that lead to files of this repository, and do not arrive.
fn links_arrive(name: &str, text: &str) -> Vec<String> {
    let folder = Path::new(name).parent().unwrap_or(Path::new(""));
    let mut complaints = Vec::new();
    for (at, _) in text.match_indices("](") {
        let target = text[at + 2..].split([')', '#', ' ']).next().unwrap();
        if target.is_empty() || target.contains("://") {
            continue;
        }
        let path: PathBuf = root().join(folder).join(target);
        if !path.exists() {
            complaints
                .push(format!("{name}:{}: the link to {target} leads nowhere", line_of(text, at)));
        }
    }
    complaints
}

/// A decision note: numbered, dated, and with its four parts.
fn decision_note(name: &str, text: &str) -> Vec<String> {
    let file = name.rsplit('/').next().unwrap();
    let mut complaints = Vec::new();
    if file.len() < 9
        || !file.as_bytes()[..4].iter().all(u8::is_ascii_digit)
        || file.as_bytes()[4] != b'-'
    {
        complaints.push(format!("{name}: is not named NNNN-subject.md"));
    }
    for part in [
        "\nDate: 2",
        "\n## Problem\n",
        "\n## Options\n",
        "\n## Decision\n",
        "\n## Figures\n",
        "\n## Price\n",
    ] {
        if !text.contains(part) {
            complaints.push(format!("{name}: has no `{}`", part.trim()));
        }
    }
    complaints
}

fn top_level(names: &[String]) -> Vec<String> {
    let unknown = names.iter().filter(|name| {
        !name.starts_with('.')
            && !TOP_LEVEL.contains(&name.as_str())
            && !IGNORED_BY_GIT.contains(&name.as_str())
    });
    unknown
        .map(|name| format!("{name}: the top of the repository holds only {TOP_LEVEL:?}"))
        .collect()
}

// --- the repository, held against the rules ---

#[test]
fn every_source_file_says_what_it_is_for() {
    complain_about(sources(), head_comment);
    complain_about(files("tests", &[".rs"]), head_comment);
    complain_about(files("benches", &[".rs"]), head_comment);
}

#[test]
fn files_are_short() {
    complain_about(sources(), file_length);
}

#[test]
fn functions_are_short() {
    complain_about(sources(), function_length);
}

#[test]
fn nothing_is_left_half_done() {
    for folder in ["src", "tests", "benches", "scripts"] {
        complain_about(files(folder, &[""]), no_leftovers);
    }
}

#[test]
fn tests_that_skip_say_so_where_it_is_seen() {
    complain_about(files("tests", &[".rs"]), skips_are_seen);
}

#[test]
fn unsafe_code_stands_only_in_the_named_files() {
    complain_about(sources(), unsafe_only_where_named);
    complain_about(files("tests", &[".rs"]), unsafe_only_where_named);
}

#[test]
fn glommio_stays_inside_the_runtime_and_the_server() {
    complain_about(sources(), glommio_only_in_the_runtime);
}

#[test]
fn the_engine_has_no_hidden_inputs_and_does_not_print() {
    complain_about(sources(), no_hidden_inputs);
}

#[test]
fn nothing_depends_on_the_wall_clock() {
    complain_about(sources(), no_wall_clock);
}

#[test]
fn layers_know_only_what_is_below_them() {
    complain_about(sources(), layers_know_what_is_below);
}

/// The modules of the library, without their tests.
fn modules(sources: &[(String, String)]) -> imports::Modules {
    let library = sources.iter().filter(|(name, _)| !is_test_file(name));
    library
        .filter_map(|(name, text)| {
            Some((imports::module_of(name)?, imports::Module::new(&code_only(before_tests(text)))))
        })
        .collect()
}

/// Circles that lie within no row of `table`, and rows that no circle lies in.
fn circles(modules: &imports::Modules, table: &[(&[&str], &str)]) -> Vec<String> {
    let found = imports::circles(modules);
    let fits = |circle: &[String], row: &[&str]| {
        let is_in = |module: &String, part: &&str| {
            module == part || (part.ends_with('/') && module.starts_with(part))
        };
        circle.iter().all(|module| row.iter().any(|part| is_in(module, part)))
    };
    let unknown = found.iter().filter(|circle| !table.iter().any(|(row, _)| fits(circle, row)));
    let complaints =
        unknown.map(|circle| format!("these files need each other: {}", circle.join(", ")));
    let gone = table.iter().filter(|(row, _)| !found.iter().any(|circle| fits(circle, row)));
    complaints
        .chain(gone.map(|(row, _)| format!("no circle any more, take the row out: {row:?}")))
        .collect()
}

#[test]
fn no_files_need_each_other_in_a_circle() {
    let complaints = circles(&modules(&sources()), CIRCLES);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// If this fails, two components of the engine call each other, and neither can be understood or
/// tested alone.
#[test]
fn components_of_the_engine_call_only_those_below_them() {
    let engine: Vec<(String, String)> = sources()
        .into_iter()
        .filter(|(name, _)| name.starts_with("src/engine/") && !is_test_file(name))
        .map(|(name, text)| (name, code_only(before_tests(&text))))
        .collect();
    let complaints = calls::upward(&engine);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    for component in calls::ORDER {
        let is_there = |(name, _): &(String, String)| {
            let path = name.trim_start_matches("src/engine/");
            path.starts_with(&format!("{component}/")) || path == format!("{component}.rs")
        };
        assert!(engine.iter().any(is_there), "{component} stands in ORDER and is gone");
    }
    let code = |file: &str| {
        engine.iter().find(|(name, _)| name == file).map(|(_, code)| code.as_str()).expect(file)
    };
    let fields = calls::fields_of_shard(code("src/engine/mod.rs"));
    assert!((1..=calls::FIELDS_MAX).contains(&fields), "Shard has {fields} fields");
    let lines = code("src/engine/shard.rs").lines().count();
    assert!(lines <= 400, "shard.rs only wires the components, and has {lines} lines");
}

#[test]
fn the_tables_name_only_what_exists() {
    let complaints = rows_without_files(|path| root().join(path).exists());
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    assert!(!rows_without_files(|path| !path.starts_with("src/base/checksum")).is_empty());
}

#[test]
fn documents_link_to_what_exists() {
    complain_about(files("src/docs", &[".md"]), links_arrive);
    complain_about(
        vec![("README.md".into(), fs::read_to_string(root().join("README.md")).unwrap())],
        links_arrive,
    );
}

#[test]
fn decisions_are_noted_with_options_figures_and_price() {
    let notes = files("src/docs/decisions", &[""]);
    assert!(!notes.is_empty());
    complain_about(notes, decision_note);
}

#[test]
fn the_top_of_the_repository_is_tidy() {
    let names = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let complaints = top_level(&names.collect::<Vec<_>>());
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// The oldest compiler is stated in two places; a reader must not find two answers.
#[test]
fn the_readme_and_the_manifest_name_the_same_oldest_compiler() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let version = manifest.split("rust-version = \"").nth(1).unwrap().split('"').next().unwrap();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    assert!(readme.contains(&format!("Rust {version}")), "README.md does not say `Rust {version}`");
}

/// Readers copy the first example that they see: it must be the one that is compiled and run.
#[test]
fn the_readme_shows_the_tested_example() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let library = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let shown =
        readme.split("```rust,ignore\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let tested = library
        .split("//! ```\n")
        .nth(1)
        .unwrap()
        .lines()
        .map(|line| line.trim_start_matches("//!"));
    let visible: Vec<&str> = tested.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
    let visible: Vec<&str> =
        visible.into_iter().filter(|line| !line.starts_with("# ") && *line != "#").collect();
    assert_eq!(shown.trim(), visible.join("\n").trim());
}

// --- each rule can fail ---

/// Asserts that the rule finds something in `bad` and nothing in `good`.
#[track_caller]
fn can_fail(rule: impl Fn(&str, &str) -> Vec<String>, name: &str, bad: &str, good: &str) {
    assert!(!rule(name, bad).is_empty(), "the rule let pass:\n{bad}");
    assert_eq!(rule(name, good), Vec::<String>::new(), "the rule complained about:\n{good}");
}

#[test]
fn planted_texts_are_found() {
    let planted = |cache: &str| {
        let shard = "\nimpl Shard {\n    fn turn(&mut self) { self.load(); }\n}\n";
        calls::upward(&[
            ("src/engine/shard.rs".to_owned(), shard.to_owned()),
            ("src/engine/cache/loading.rs".to_owned(), format!("\nimpl Shard {{\n{cache}}}\n")),
        ])
    };
    assert_eq!(planted("    fn load(&mut self) { self.ctx.now; self.load() }\n").len(), 0);
    assert_eq!(planted("    fn load(&mut self) { self.turn() }\n").len(), 1);
    assert_eq!(planted("    fn load(&mut self) { self\n.checkpoint.begin() }\n").len(), 1);
    let name = "src/engine/map/x.rs";
    can_fail(head_comment, name, "use std::fmt;\n", "//! The map of places.\n");
    let line = "let a = 1;\n";
    can_fail(
        file_length,
        name,
        &line.repeat(501),
        &format!("{}\n#[cfg(test)]\nmod tests {{\n", line.repeat(499)),
    );
    can_fail(
        file_length,
        name,
        &format!("\n#[cfg(test)]\nmod tests;\n{}", line.repeat(500)),
        &line.repeat(500),
    );
    let function = |n| format!("fn f() {{\n{}}}\n", "    g(\"}\"); // }\n".repeat(n));
    can_fail(function_length, name, &function(79), &format!("{}{}", function(78), function(78)));
    let commented = "fn f() {\n".to_owned() + &"    // why\n".repeat(90) + "}\n";
    can_fail(function_length, name, &function(90), &commented);
    for word in LEFTOVERS {
        can_fail(no_leftovers, name, &format!("a\n{word})"), "a method");
    }
    let skip = concat!("eprintln!(\"", "SKIPPED: no disk\")");
    can_fail(skips_are_seen, "tests/x.rs", skip, "common::skipped(\"no disk\")");
    can_fail(
        unsafe_only_where_named,
        name,
        "unsafe { f() }",
        "#![deny(unsafe_code)] // unsafe\n\"unsafe\"",
    );
    let arena = "src/memory/arena.rs";
    can_fail(
        unsafe_only_where_named,
        arena,
        "    unsafe { f() }",
        "// SAFETY: f has\n// no demands\nunsafe { f() }",
    );
    can_fail(glommio_only_in_the_runtime, name, "use glommio::Task;", "// not glommio\n");
    assert!(
        glommio_only_in_the_runtime("src/runtime/executor.rs", "use glommio::Task;").is_empty()
    );
    can_fail(
        no_hidden_inputs,
        name,
        "use std::collections::HashMap;",
        "use std::collections::BTreeMap;",
    );
    can_fail(no_wall_clock, name, "std::time::SystemTime::now()", "std::time::Instant::now()");
    can_fail(
        no_hidden_inputs,
        name,
        "println!(\"x\")",
        "//! println!(\"x\")\n\n#[cfg(test)]\nmod t { println!() }",
    );
    can_fail(
        links_arrive,
        "README.md",
        "[a](src/none.md)",
        "[a](src/lib.rs#x) [b](https://example.org)",
    );
    let note = "# 1\n\nDate: 2026-11-23\n\n## Problem\n\n## Options\n\n## Decision\n\n## \
                Figures\n\n## Price\n";
    can_fail(decision_note, "src/docs/decisions/0001-x.md", &note.replace("## Price\n", ""), note);
    assert!(!decision_note("src/docs/decisions/x.md", note).is_empty());
}

#[test]
fn planted_layer_breaks_are_found() {
    let rule = layers_know_what_is_below;
    let arena = "src/memory/arena.rs";
    can_fail(rule, arena, "use crate::io::Disk;", "use crate::base::Lsn;");
    can_fail(rule, arena, "fn f() { crate::engine::g() }", "fn f() { crate::base::error::g() }");
    let map = "src/engine/map/x.rs";
    can_fail(
        rule,
        map,
        "use crate::{\n    base::{Lsn, Place},\n    engine::log::Group,\n};",
        "use crate::{base::{Lsn, error::Error}, Result};",
    );
    can_fail(rule, map, "use crate::engine::{self, map::X};", "use crate::engine::map::y::Z;");
    can_fail(
        rule,
        map,
        "use crate::Store;",
        "\n#[cfg(test)]\nmod tests { use crate::testing::sim::X; }",
    );
    assert!(!rule("src/novel/x.rs", "").is_empty());
}

/// The engine's own checks are what stops a bug before it reaches the device: they don't get fewer.
#[test]
fn the_engine_asserts_what_it_takes_for_granted() {
    let sources = sources();
    let library = sources.iter().filter(|(name, _)| !is_test_file(name));
    let counts = assertions::by_folder(
        library.map(|(name, text)| (name.as_str(), code_only(before_tests(text)))),
    );
    println!("{}", assertions::table(&counts));
    let engine = counts["src/engine"];
    assert!(
        engine.percent() >= ENGINE_ASSERTIONS_MIN,
        "the engine has {} assertions for each hundred functions, fewer than \
         {ENGINE_ASSERTIONS_MIN}: {engine:?}",
        engine.percent()
    );
}

#[test]
fn planted_assertions_are_counted() {
    let code = code_only(
        "fn a() { assert!(x, \"assert!(y)\"); debug_assert!(z); } // assert!(w)\n\
         pub(crate) fn b(f: fn(u8)) { q.expect(\"it is\"); assert_eq!(1, 2); unreachable!() }",
    );
    let count = assertions::Count { functions: 2, assertions: 3, expects: 1 };
    assert_eq!(assertions::Count::of(&code), count);
    assert_eq!(count.percent(), 200);
    let sources = [("src/engine/log/a.rs", code.clone()), ("src/io/b.rs", code)];
    let counts = assertions::by_folder(sources);
    assert_eq!(counts.keys().collect::<Vec<_>>(), ["src/engine", "src/engine/log", "src/io"]);
}

/// A bug that can't be planted any more proves nothing.
#[test]
fn patches_of_bugs_still_apply() {
    let patches = files("tests/mutants", &[".patch"]);
    let text_of = |name: &str| fs::read_to_string(root().join(name)).ok();
    complain_about(patches, |name, text| patches::complaints(name, text, text_of));
}

/// Bugs that are planted, in place or as patches: the checks of the simulator are as good as these.
#[test]
fn planted_bugs_are_not_given_up() {
    let list = fs::read_to_string(root().join("src/testing/sim/canary.rs")).unwrap();
    let list = list.split("\ncanaries! {\n").nth(1).unwrap().split("\n}\n").next().unwrap();
    let in_place = list.lines().filter(|line| line.ends_with(',') && !line.contains("//")).count();
    let patches = files("tests/mutants", &[".patch"]);
    let patches = patches.iter().filter(|(_, text)| !text.contains("\nFires: ")).count();
    assert!(in_place + patches >= 39, "{in_place} in place, {patches} as patches");
}

#[test]
fn planted_faults_of_patches_are_found() {
    let source = "impl X {\n    fn assert_state(&self) {\n        \"it is so\"\n    }\n}\nfn f() {\n    a();\n}\n";
    let source = format!("use y;\n\n{source}");
    let patch = "A bug.\n\nOf: src/x.rs X\nFires: it is so\n\n--- a/src/x.rs\n+++ b/src/x.rs\n\
                 @@ -6,3 +6,3 @@\n fn f() {\n-    a();\n+    crate::patched(\"Bug\");\n }\n";
    let complaints = |patch: &str, source: &str| {
        let text_of = |name: &str| (name == "src/x.rs").then(|| source.to_owned());
        patches::complaints("tests/mutants/Bug.patch", patch, text_of).len()
    };
    assert_eq!(complaints(patch, &source), 0);
    assert_eq!(complaints(patch, &source.replace("a();", "b();")), 1, "the lines are gone");
    assert_eq!(complaints(patch, &format!("{source}{source}")), 1, "the lines stand twice");
    assert_eq!(complaints(&patch.replace("Bug", "Bag"), &source), 1, "another name");
    assert_eq!(complaints(&patch.replace("Fires: it is so\n", ""), &source), 1, "one field");
    assert_eq!(complaints(&patch.replace("it is so", "it is not"), &source), 1, "no such text");
    assert_eq!(complaints(&patch.replace("rs X", "rs Y"), &source), 1, "no such type");
    assert_eq!(complaints("A bug: crate::patched(\"Bug\")\n", &source), 1, "no change");
}

#[test]
fn planted_circles_are_found() {
    let circles = |files: &[(&str, &str)], table: &[(&[&str], &str)]| {
        let files = files
            .iter()
            .map(|(name, text)| (format!("src/{name}.rs"), (*text).to_owned()))
            .collect::<Vec<_>>();
        circles(&modules(&files), table)
    };
    let b = ("io/b", "pub struct B; pub fn f() {}");
    let two = |a, io| circles(&[("io/mod", io), ("io/a", "pub struct A;"), ("io/b", a)], &[]);
    assert_eq!(two("use super::a::A;", "mod a; mod b; pub use b::B;"), Vec::<String>::new());
    // By a path that the parent passes on, by a group, in code, around three files.
    for (a, io) in [
        ("use super::B;", "mod a; mod b; pub use b::B;"),
        ("use crate::io::{b::{B, C}, x};", "mod a; mod b;"),
        ("fn g() { super::b::f() }", "mod a; mod b;"),
        ("use super::b;\nfn g() { b::f() }", "mod a; mod b;"),
    ] {
        let own = ("io/b", "use super::a::A; pub struct B; pub fn f() {}");
        assert_eq!(
            circles(&[("io/mod", io), ("io/a", a), own], &[]),
            ["these files need each other: io/a, io/b"],
            "{a}"
        );
        let row: (&[&str], &str) = (&["io/a", "io/b"], "a reason");
        assert_eq!(circles(&[("io/mod", io), ("io/a", a), own], &[row]), Vec::<String>::new());
        assert_eq!(circles(&[("io/mod", io), ("io/a", a), b], &[]), Vec::<String>::new());
        assert_eq!(
            circles(&[("io/mod", io), ("io/a", a), b], &[row]).len(),
            1,
            "a row for nothing"
        );
    }
    let around = [
        ("a", "use crate::b::f; pub fn e() {}"),
        ("b", "use crate::c::g; pub fn f() {}"),
        ("c", "use crate::a::e; pub fn g() {}"),
        ("d", "use crate::a::e;"),
    ];
    assert_eq!(circles(&around, &[]), ["these files need each other: a, b, c"]);
    // A parent and its child.
    let child = ("x/y", "use super::X; impl X {} pub fn f() {}");
    assert_eq!(
        circles(&[("x/mod", "mod y; pub struct X; fn g() { y::f() }"), child], &[]),
        Vec::<String>::new()
    );
    let over = ("z", "use crate::x::y::f; pub struct Z;");
    let parent = ("x/mod", "mod y; use crate::z::Z; use y::f;");
    assert_eq!(circles(&[parent, ("x/y", "pub fn f() {}"), over], &[]), Vec::<String>::new());
    assert_eq!(circles(&[parent, ("x/y", "use crate::z::Z; pub fn f() {}"), over], &[]).len(), 1);
}

#[test]
fn planted_top_level_entries_are_found() {
    assert_eq!(top_level(&["src".into(), ".ci".into(), "target".into()]), Vec::<String>::new());
    assert_eq!(top_level(&["docs".into()]).len(), 1);
}

/// The rules above lean on this one: what stands in comments and strings is not code.
#[test]
fn comments_and_strings_are_not_code() {
    let cases: BTreeMap<&str, &str> = [
        ("a // b", "a     "),
        ("a /* b\n*/ c", "a     \n   c"),
        ("\"a\\\"b\" c", "       c"),
        ("r#\"a\"b\"# c", "         c"),
        ("'\\'' '{' c", "         c"),
        ("fn f<'a>(x: &'a u8)", "fn f<'a>(x: &'a u8)"),
        ("for r in b", "for r in b"),
    ]
    .into();
    for (text, code) in cases {
        assert_eq!(code_only(text), code);
    }
}
