//! `corepage::testing::fuzz::open` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| corepage::testing::fuzz::open::open(data));
