//! `corepage::fuzz::log` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| corepage::fuzz::log::log(data));
