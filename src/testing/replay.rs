//! Runs a fuzz target without a fuzzer: on every file of its corpus, then on mutations of them, the
//! same in every run.
//!
//! 1. An input that fails is printed in hexadecimal, to become a file of the corpus.

use super::random::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Runs the target over its corpus and over this many mutations of it, or as many as
/// COREPAGE_FUZZ_MUTATIONS says.
pub fn run(target: &str, mutations: u64, function: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> =
        entries.map(|entry| entry.expect("an entry of the corpus").path()).collect();
    paths.sort();
    let corpus: Vec<Vec<u8>> =
        paths.iter().map(|path| std::fs::read(path).expect("a file of the corpus")).collect();
    assert!(!corpus.is_empty(), "{} is empty", folder.display());
    for (path, bytes) in paths.iter().zip(&corpus) {
        one(&path.display().to_string(), bytes, &function);
    }
    let asked = std::env::var("COREPAGE_FUZZ_MUTATIONS").ok().and_then(|text| text.parse().ok());
    for seed in 0..asked.unwrap_or(mutations) {
        one(&format!("mutation {seed}"), &mutated(&corpus, seed), &function);
    }
}

fn one(what: &str, bytes: &[u8], function: impl Fn(&[u8])) {
    // The panic itself has printed what went wrong.
    if catch_unwind(AssertUnwindSafe(|| function(bytes))).is_err() {
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        panic!("the target failed on {what}: {text}");
    }
}

/// Makes an input from one, or from the front of one and the back of another, with some bytes
/// changed, removed and inserted.
fn mutated(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut draw = |bound: usize| rng.below(bound.max(1) as u64) as usize;
    let mut bytes = corpus[draw(corpus.len())].clone();
    if draw(4) == 0 {
        let other = &corpus[draw(corpus.len())];
        bytes.truncate(draw(bytes.len() + 1));
        bytes.extend_from_slice(&other[draw(other.len() + 1)..]);
    }
    for _ in 0..draw(6) {
        let at = draw(bytes.len() + 1);
        match draw(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, draw(256) as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => {
                let value = [0u64, 1, u64::MAX, 1 << 63, 4096, 255][draw(6)];
                let value = if draw(2) == 0 { value.to_be_bytes() } else { value.to_le_bytes() };
                let width = [1, 2, 4, 8][draw(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value[..width]);
            }
            4 if at < bytes.len() => bytes[at] ^= 1 << draw(8),
            _ if at < bytes.len() => bytes[at] = draw(256) as u8,
            _ => {}
        }
    }
    bytes
}
