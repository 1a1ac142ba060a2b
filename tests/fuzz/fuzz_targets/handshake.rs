//! `server::nbd::fuzz::handshake` under libFuzzer. The server belongs to the program, so it is
//! compiled in here.
#![no_main]
#![allow(dead_code, unused_imports, clippy::disallowed_methods)]

#[path = "../../../src/program/server/nbd/mod.rs"]
mod nbd;

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd::fuzz::handshake(data));
