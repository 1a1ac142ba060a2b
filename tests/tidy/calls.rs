//! Which component of the engine calls or touches which: a component knows those below it, and none
//! above.
//!
//! `Shard` owns the components and is passed to the steps of a turn, so the compiler lets each step
//! reach everything. This rule takes that freedom away: in a method of `Shard` that stands in a
//! component's folder, `self.method(…)` and `self.field` may only lead to the same component or to
//! one that stands before it in [`ORDER`]. So no two components call each other, not even around
//! corners.
//!
//! It does not see calls through arguments of other types; those follow `use`, which the rule on
//! circles of files looks after.

use std::collections::{BTreeMap, BTreeSet};

/// The components of the engine, each a file or folder of `src/engine`, the lowest first: each may
/// call those before it.
pub const ORDER: [&str; 15] = [
    "life",
    "context",
    "map",
    "log",
    "reservations",
    "requests",
    "watermark",
    "cache",
    "space",
    "writeback",
    "txn",
    "group_commit",
    "redo",
    "checkpoint",
    "shard",
];

/// Files of `src/engine` that are `Shard`'s own: they are called from outside, and call all others.
const TOP: [&str; 8] =
    ["shard", "dispatch", "shortage", "state_machine", "build", "audit", "observe", "debug"];

/// Fields of `Shard` that are not called as their component.
const FIELDS: [(&str, &str); 3] =
    [("ctx", "context"), ("coordinator", "txn"), ("participant", "txn")];

/// Fields that `Shard` may have.
pub const FIELDS_MAX: usize = 15;

/// A method of `Shard`.
struct Method<'a> {
    file: &'a str,
    name: &'a str,
    body: &'a str,
}

/// The component that a file of the engine belongs to.
fn component(file: &str) -> Option<&'static str> {
    let path = file.strip_prefix("src/engine/")?;
    let name = path.split('/').next()?.trim_end_matches(".rs");
    let name = if TOP.contains(&name) { "shard" } else { name };
    ORDER.into_iter().find(|component| *component == name)
}

/// What is between the brace at `open` and its partner.
fn braced(code: &str, open: usize) -> &str {
    let mut depth = 0;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &code[open + 1..at];
        }
    }
    &code[open + 1..]
}

/// The methods in all `impl Shard` and `impl Trait for Shard` of a file without comments, strings
/// and tests.
fn methods<'a>(file: &'a str, code: &'a str) -> Vec<Method<'a>> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("\nimpl") {
        let Some(brace) = code[at..].find('{').map(|brace| at + brace) else { continue };
        let head = code[at..brace].trim();
        if head != "impl Shard" && !head.ends_with(" for Shard") {
            continue;
        }
        let body = braced(code, brace);
        let starts: Vec<usize> = body.match_indices("fn ").map(|(at, _)| at + 3).collect();
        for (i, start) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(body.len());
            let name = &body[*start..];
            let len = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(0);
            found.push(Method { file, name: &name[..len], body: &body[*start..end] });
        }
    }
    found
}

/// The names behind `self.` in a method.
fn named(body: &str) -> impl Iterator<Item = &str> {
    body.match_indices("self").filter_map(|(at, _)| {
        let rest = body[at + 4..].trim_start().strip_prefix('.')?.trim_start();
        let len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        (len > 0).then_some(&rest[..len])
    })
}

/// Calls and accesses that lead upwards; `files` are names and code without comments and strings.
pub fn upward(files: &[(String, String)]) -> Vec<String> {
    let all: Vec<Method> = files.iter().flat_map(|(file, code)| methods(file, code)).collect();
    let defined: BTreeMap<&str, &str> = all.iter().map(|m| (m.name, m.file)).collect();
    let place = |component: &str| ORDER.iter().position(|name| *name == component);
    let mut complaints = BTreeSet::new();
    for method in &all {
        let Some(from) = component(method.file) else {
            complaints.insert(format!(
                "{}: {} is a method of Shard outside of the components in ORDER",
                method.file, method.name
            ));
            continue;
        };
        for name in named(method.body) {
            let field = FIELDS.iter().find(|(field, _)| *field == name).map(|(_, of)| *of);
            let of_file = defined.get(name).copied().and_then(component);
            let Some(to) = field.or(of_file).or_else(|| ORDER.into_iter().find(|c| *c == name))
            else {
                continue;
            };
            if place(to) > place(from) {
                complaints.insert(format!(
                    "{}: {} reaches up from {from} to {to} by self.{name}",
                    method.file, method.name
                ));
            }
        }
    }
    complaints.into_iter().collect()
}

/// The fields of `Shard`.
pub fn fields_of_shard(code: &str) -> usize {
    let Some(at) = code.find("pub struct Shard {") else { return 0 };
    let body = braced(code, at + "pub struct Shard ".len());
    body.lines().filter(|line| line.trim_end().ends_with(',')).count()
}
