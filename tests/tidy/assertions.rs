//! How many assertions the code has for each function, by folder.
//!
//! What counts as one: `assert!`, `assert_eq!`, `assert_ne!`, `unreachable!` and `panic!`; and,
//! apart from those, `.expect("...")`, which says what is never missing. `debug_assert` does not
//! count, since a release has none. A function is any `fn` with a name. Tests count for neither.
//!
//! It says how many there are, not whether they are any good: that each can fail is for whoever
//! writes it to see, and of the state machines for `scripts/mutants --patches` to show.

use std::collections::BTreeMap;

/// Assertions and functions of some code.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Count {
    pub functions: u32,
    pub assertions: u32,
    pub expects: u32,
}

impl Count {
    /// Of code without comments, strings and tests.
    pub fn of(code: &str) -> Count {
        let count = |word: &str, next: &[&str]| {
            let ends = super::words(code, word).map(|at| &code[at + word.len()..]);
            ends.filter(|rest| next.iter().any(|next| rest.starts_with(next))).count() as u32
        };
        let is_named =
            |at: usize| code[at + 3..].starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        Count {
            functions: super::words(code, "fn")
                .filter(|at| code[at + 2..].starts_with(' ') && is_named(*at))
                .count() as u32,
            assertions: ["assert", "assert_eq", "assert_ne", "unreachable", "panic"]
                .into_iter()
                .map(|word| count(word, &["!"]))
                .sum(),
            expects: count("expect", &["("]),
        }
    }

    fn plus(self, other: Count) -> Count {
        Count {
            functions: self.functions + other.functions,
            assertions: self.assertions + other.assertions,
            expects: self.expects + other.expects,
        }
    }

    /// Of both kinds, for each hundred functions.
    pub fn percent(self) -> u32 {
        (self.assertions + self.expects) * 100 / self.functions.max(1)
    }
}

/// The counts of folders: those right below `src`, and those below `src/engine`.
pub fn by_folder<'a>(
    sources: impl IntoIterator<Item = (&'a str, String)>,
) -> BTreeMap<String, Count> {
    let mut counts: BTreeMap<String, Count> = BTreeMap::new();
    for (name, code) in sources {
        let parts: Vec<&str> = name.split('/').collect();
        let below = parts.len() - 1;
        let mut add = |folder: String| {
            let sum = counts.entry(folder).or_default();
            *sum = sum.plus(Count::of(&code));
        };
        add(parts[..below.min(2)].join("/"));
        if below > 2 && parts[1] == "engine" {
            add(parts[..3].join("/"));
        }
    }
    counts
}

/// The table, one folder a line.
pub fn table(counts: &BTreeMap<String, Count>) -> String {
    let mut out = format!(
        "{:24}{:>10}{:>12}{:>9}{:>14}\n",
        "", "functions", "assertions", "expects", "a function"
    );
    for (folder, count) in counts {
        let Count { functions, assertions, expects } = count;
        let per = f64::from(count.percent()) / 100.0;
        out += &format!("{folder:24}{functions:>10}{assertions:>12}{expects:>9}{per:>14.2}\n");
    }
    out
}
