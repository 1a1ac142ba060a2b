//! Shows the progress of a command: a bar on stderr, if that is a terminal.
//!
//! 1. Nothing unknown is shown: before anything is done there is no estimate of the time left.
//!
//! It does *not* know what is being done.

use indicatif::{ProgressBar, ProgressFinish, ProgressState, ProgressStyle};
use std::fmt::Write;

/// Makes a bar that counts up to `length`. Only a terminal shows it.
pub fn bar(what: &'static str, length: u64) -> ProgressBar {
    styled(what, length, "{msg} {wide_bar} {percent} %, {left} left")
}

/// Makes a bar for bytes that are read.
pub fn bytes(what: &'static str, length: u64) -> ProgressBar {
    styled(what, length, "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {left} left")
}

fn styled(what: &'static str, length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let left = |state: &ProgressState, out: &mut dyn Write| {
        let _ = match state.pos() {
            0 => write!(out, "?"),
            _ => write!(out, "{} s", state.eta().as_secs_f64().ceil()),
        };
    };
    let style = ProgressStyle::with_template(template).map(|style| style.with_key("left", left));
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    // Cleared on every exit path: a bar that is left behind would be drawn again below the final
    // message.
    bar.with_finish(ProgressFinish::AndClear)
}
