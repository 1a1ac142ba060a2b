//! Rules on what there is only one of: the random source, the pattern of pages.

use super::{can_fail, code_only, complain_about, files, line_of};

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
