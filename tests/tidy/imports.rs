//! Which file of the sources needs which, and where files need each other in a circle.
//!
//! A file *needs* the file that defines what it names: by `use`, or by a path in code, that begins
//! with `crate`, `super`, `self` or a module declared in the file. Names that a module only passes
//! on (`pub use`) are followed to where they are defined.
//!
//! Rules for parents and children
//! 1. `mod child;` and `pub use child::Name;` are the table of contents of a folder. They need
//!    nothing.
//! 2. A child may use what its parents define, and implement their types: it is the inside of them,
//!    as privacy in Rust has it, too. So that counts as no need. A parent that uses its child's
//!    items in code of its own needs the child.
//!
//! Tests don't count: they may look at everything.

use std::collections::{BTreeMap, BTreeSet};

/// Each file by its module's path: `io/uring/op`; the root of the crate is the empty path.
pub type Modules = BTreeMap<String, Module>;

/// A file's code, without comments, strings and tests.
pub struct Module {
    uses: Vec<Use>,
    /// The code with `use` declarations as blanks.
    rest: String,
}

impl Module {
    pub fn new(code: &str) -> Module {
        Module { uses: uses(code), rest: without_uses(code) }
    }
}

/// The module that a file of `src` holds; none for files outside of the library.
pub fn module_of(file: &str) -> Option<String> {
    let path = file.strip_prefix("src/")?.strip_suffix(".rs")?;
    match path {
        "lib" => Some(String::new()),
        "main" => None,
        path => Some(path.strip_suffix("/mod").unwrap_or(path).to_owned()),
    }
}

/// Groups of modules that need each other in a circle, each sorted.
pub fn circles(modules: &Modules) -> Vec<Vec<String>> {
    let graph: BTreeMap<&str, BTreeSet<String>> =
        modules.keys().map(|module| (module.as_str(), needs(modules, module))).collect();
    let reach = |from: &str| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from.to_owned()]);
        while let Some(module) = next.pop() {
            next.extend(
                graph[module.as_str()]
                    .iter()
                    .filter(|other| seen.insert((*other).clone()))
                    .cloned(),
            );
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<String>> =
        graph.keys().map(|module| (*module, reach(module))).collect();
    let mut circles = BTreeSet::new();
    for (module, others) in &reached {
        if others.contains(*module) {
            circles.insert(
                others
                    .iter()
                    .filter(|other| reached[other.as_str()].contains(*module))
                    .cloned()
                    .collect(),
            );
        }
    }
    circles.into_iter().collect()
}

/// The other modules that `module` needs.
pub fn needs(modules: &Modules, module: &str) -> BTreeSet<String> {
    let Module { uses, rest } = &modules[module];
    let mut needed = BTreeSet::new();
    for Use { path, passed_on } in uses {
        let Some(target) = resolve(modules, module, path) else { continue };
        let name = path.last().map_or("", String::as_str);
        let is_child = child_of(module, &target);
        // Rule 1: what is passed on is needed only if the file uses it, too.
        if !(*passed_on && is_child && !has_word(rest, name)) {
            needed.insert(target);
        }
    }
    for path in paths(rest) {
        needed.extend(resolve(modules, module, &path));
    }
    // Rule 2.
    needed.retain(|other| other != module && !child_of(other, module));
    needed
}

fn child_of(module: &str, other: &str) -> bool {
    module.is_empty() || other.strip_prefix(module).is_some_and(|rest| rest.starts_with('/'))
}

/// One name of a `use`, with the path to it.
struct Use {
    path: Vec<String>,
    /// Visible outside of its module.
    passed_on: bool,
}

/// All `use` declarations, at any depth of the file.
fn uses(code: &str) -> Vec<Use> {
    let mut found = Vec::new();
    for at in super::words(code, "use") {
        let line = code[..at].rsplit(['\n', ';', '}', '{']).next().unwrap_or("").trim();
        let end = at + code[at..].find(';').unwrap_or(code.len() - at);
        let passed_on = line.starts_with("pub");
        tree(&code[at + "use".len()..end], &mut Vec::new(), &mut |path| {
            found.push(Use { path: path.to_vec(), passed_on });
        });
    }
    found
}

/// Calls `each` with every path of a use tree. `as` names are left out, `*` and `self` end their
/// path.
fn tree(text: &str, path: &mut Vec<String>, each: &mut dyn FnMut(&[String])) {
    let text = text.trim();
    if let Some(inner) = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) {
        for part in split(inner) {
            tree(part, path, each);
        }
        return;
    }
    match text.split_once("::") {
        Some((first, rest)) if !first.contains('{') => {
            path.push(first.trim().to_owned());
            tree(rest, path, each);
            path.pop();
        }
        _ => {
            let name = text.split_whitespace().next().unwrap_or("");
            let ends = name.is_empty() || name == "self";
            if !ends {
                path.push(name.to_owned());
            }
            each(path);
            if !ends {
                path.pop();
            }
        }
    }
}

/// The parts between commas that are in no braces.
fn split(text: &str) -> Vec<&str> {
    let (mut depth, mut from, mut parts) = (0, 0, Vec::new());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b',' if depth == 0 => {
                parts.push(&text[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

/// The code with its `use` declarations as blanks.
fn without_uses(code: &str) -> String {
    let mut bytes = code.as_bytes().to_vec();
    for at in super::words(code, "use") {
        let end = at + code[at..].find(';').unwrap_or(code.len() - at);
        bytes[at..end].fill(b' ');
    }
    String::from_utf8(bytes).unwrap()
}

/// Paths such as `super::x::Y` or `child::f` in code.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = code.as_bytes();
    for (at, _) in code.match_indices("::") {
        let start = at - bytes[..at].iter().rev().take_while(|byte| is_word(**byte)).count();
        // Only from where a path begins.
        if start == at || code[..start].ends_with("::") || code[..start].ends_with("in ") {
            continue;
        }
        let length =
            bytes[start..].iter().take_while(|byte| is_word(**byte) || **byte == b':').count();
        let path = code[start..start + length].trim_end_matches(':');
        found.push(path.split("::").map(str::to_owned).collect());
    }
    found
}

/// The module that defines what `path` names in `module`; `None` if that is outside of the crate.
fn resolve(modules: &Modules, module: &str, path: &[String]) -> Option<String> {
    resolve_to(modules, module, path, 0)
        .or_else(|| imported(modules, module, path.first()?, &path[1..]))
}

/// A path that begins with a module which the file imports by name.
fn imported(modules: &Modules, module: &str, name: &str, rest: &[String]) -> Option<String> {
    let is_it =
        |found: &&Use| found.path.len() > 1 && found.path.last().is_some_and(|last| last == name);
    let path = &modules[module].uses.iter().find(is_it)?.path;
    // Not of a type, whose items are in the file that was named already.
    let target = resolve_to(modules, module, path, 0)?;
    if target.rsplit('/').next() != Some(name) {
        return None;
    }
    define(modules, target, rest, 0)
}

fn join(module: &str, child: &str) -> String {
    if module.is_empty() { child.to_owned() } else { format!("{module}/{child}") }
}

/// How often a name is passed on at most.
const DEPTH_MAX: usize = 8;

/// Follows a path from module `at` down, and what modules pass on, to the module with the
/// definition.
fn define(modules: &Modules, mut at: String, mut rest: &[String], depth: usize) -> Option<String> {
    while let Some(name) = rest.first() {
        let child = join(&at, name);
        if !modules.contains_key(&child) {
            break;
        }
        at = child;
        rest = &rest[1..];
    }
    let Some(name) = rest.first().filter(|_| depth < DEPTH_MAX) else {
        return Some(at).filter(|at| modules.contains_key(at));
    };
    let Module { uses, rest: code } = modules.get(&at)?;
    if defines(code, name) {
        return Some(at);
    }
    let passed =
        uses.iter().filter(|found| found.path.len() > 1 && found.path.last() == Some(name));
    passed
        .into_iter()
        .find_map(|found| resolve_to(modules, &at, &found.path, depth + 1))
        .or(Some(at))
}

fn resolve_to(modules: &Modules, module: &str, path: &[String], depth: usize) -> Option<String> {
    let first = path.first()?.as_str();
    match first {
        "crate" => define(modules, String::new(), &path[1..], depth),
        "self" => define(modules, module.to_owned(), &path[1..], depth),
        "super" => {
            let mut at = module.to_owned();
            let mut rest = path;
            while rest.first().is_some_and(|name| name == "super") {
                at = at.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
                rest = &rest[1..];
            }
            define(modules, at, rest, depth)
        }
        child if modules.contains_key(&join(module, child)) => {
            define(modules, module.to_owned(), path, depth)
        }
        _ => None,
    }
}

/// Whether the file itself has an item of this name.
fn defines(code: &str, name: &str) -> bool {
    const KINDS: &[&str] =
        &["struct", "enum", "trait", "fn", "const", "static", "type", "union", "mod"];
    super::words(code, name).any(|at| {
        let before = code[..at].trim_end();
        KINDS.iter().any(|kind| before.ends_with(kind))
    })
}

fn has_word(code: &str, word: &str) -> bool {
    super::words(code, word).next().is_some()
}
