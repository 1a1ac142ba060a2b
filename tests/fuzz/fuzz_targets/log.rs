//! `corepage::testing::fuzz::log` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| corepage::testing::fuzz::log::log(data));
