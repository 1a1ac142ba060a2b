//! Tests that kill processes in loops, or need root: file systems on loop devices, devices that
//! fail, logged devices that are replayed, guests. Each file is a module with a promise. As another
//! user they report what they can't show.

#[path = "../common/mod.rs"]
mod common;

mod crash_replay;
mod failing_device;
mod kill_loop;
mod kill_shards;
mod leftovers;
mod nvme_guest;
mod resources;
mod surroundings;
