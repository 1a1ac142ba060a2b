//! Tests with programs of other people: NBD clients, a whole disk image, executors in the examples.
//! Each file is a module with a promise; a client that is not installed is reported loudly (see
//! `common::has_tool`).

#[path = "../common/mod.rs"]
mod common;

mod examples;
mod nbd_clients;
mod real_input;
