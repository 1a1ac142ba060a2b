//! What operators ask: is the store whole, and what does the machine give?

pub mod probe;
pub(crate) mod verify;
