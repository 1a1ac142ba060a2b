//! `corepage::fuzz::open` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| corepage::fuzz::open::open(data));
