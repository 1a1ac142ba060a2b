//! Prints results to stdout, and errors and log lines to stderr.
//!
//! 1. If a result can't be written, the command fails: `> /dev/full` must not look like success. A
//!    reader that has gone away (a closed pipe, as with `| head`) is not a failure: it has what it
//!    wanted.
//! 2. Writing to stderr never fails, panics or delays its caller for longer than [`PATIENCE`]: a
//!    line that stderr does not accept is dropped and counted, and the next line that gets through
//!    says how many were dropped.
//!
//! It does *not* know what is printed, nor which lines are too many (see `logging`).

use super::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long a line waits for a full pipe or terminal. Once a line was dropped, the following ones
/// don't wait.
const PATIENCE: Duration = Duration::from_millis(100);
/// What a pipe accepts without blocking once `poll` says that it is writable (`PIPE_BUF`, pipe(7)).
const PIECE_BYTES: usize = 4096;

/// The only way to stderr.
pub static STDERR: Lines = Lines { lost: Mutex::new(0) };

/// Lines on their way to stderr.
pub struct Lines {
    /// Lines dropped since the last one that got through. Locked while a line is written, so that
    /// no line interrupts another.
    lost: Mutex<u64>,
}

impl Lines {
    /// Writes a line, or drops it.
    pub fn say(&self, line: &str) {
        self.put(io::stderr(), line.as_bytes());
    }

    fn put(&self, to: impl rustix::fd::AsFd, line: &[u8]) {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        let mut patience = PATIENCE;
        if *lost > 0 {
            patience = Duration::ZERO;
            let note = format!(
                "({lost} lines before this one were lost: nothing could be written to stderr)\n"
            );
            if write_whole(&to, note.as_bytes(), patience) {
                *lost = 0;
            }
        }
        if *lost > 0 || !write_whole(&to, line, patience) {
            *lost = lost.saturating_add(1);
        }
    }
}

/// Used by the log, which writes each line in one call.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(io::stderr(), line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether all of `bytes` was written, with no wait longer than `patience`.
fn write_whole(to: impl rustix::fd::AsFd, bytes: &[u8], patience: Duration) -> bool {
    let limit = Timespec { tv_sec: 0, tv_nsec: patience.as_nanos() as _ };
    let mut left = bytes;
    while !left.is_empty() {
        let mut event = [PollFd::new(&to, PollFlags::OUT)];
        match poll(&mut event, Some(&limit)) {
            Ok(0) => return false,
            Err(Errno::INTR) => continue,
            // If `poll` can't tell, the write will.
            Ok(_) | Err(_) => {}
        }
        match rustix::io::write(&to, &left[..left.len().min(PIECE_BYTES)]) {
            Ok(0) => return false,
            Ok(count) => left = &left[count..],
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Prints a warning whatever the log level is.
pub fn warn(text: impl std::fmt::Display) {
    STDERR.say(&format!("warning: {text}\n"));
}

/// Writes a result to stdout.
///
/// # Errors
/// It could not be written, so no reader can have it.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush())).map(drop)
}

/// Whether the reader is still there, after a write to stdout.
///
/// # Errors
/// As [`print`].
pub fn written(result: io::Result<()>) -> Result<bool, Failure> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure::new(format_args!("the output could not be written to stdout: {error}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn lines() -> Lines {
        Lines { lost: Mutex::new(0) }
    }

    /// A server would stall with its log reader, in whichever thread logs a line; and whoever reads
    /// the log later must see that lines are missing.
    #[test]
    fn a_full_pipe_drops_lines_and_the_next_one_says_how_many() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lines = lines();
        let line = [b'x'; PIECE_BYTES];
        // Write far more than a pipe holds.
        for _ in 0..100 {
            lines.put(&writer, &line);
        }
        let lost = *lines.lost.lock().unwrap();
        assert!(lost > 0 && lost < 100, "{lost} of 100 lines lost");
        let mut taken = vec![0; (100 - lost as usize) * PIECE_BYTES];
        reader.read_exact(&mut taken).unwrap();
        lines.put(&writer, b"here\n");
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            format!(
                "({lost} lines before this one were lost: nothing could be written to \
                 stderr)\nhere\n"
            )
        );
    }

    /// A log line must not end a server, as it once did: the log library panics when stderr is
    /// gone.
    #[test]
    fn a_line_that_nobody_takes_is_dropped() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let full = File::options().write(true).open("/dev/full").unwrap();
        for to in [OwnedFd::from(writer), OwnedFd::from(full)] {
            let lines = lines();
            lines.put(&to, b"one\n");
            lines.put(&to, b"two\n");
            assert_eq!(*lines.lost.lock().unwrap(), 2);
        }
    }

    /// A script that checks the exit code must learn that its output is missing.
    #[test]
    fn lost_output_is_a_failure_and_a_reader_that_left_is_none() {
        assert!(written(Ok(())).is_ok_and(|there| there));
        assert!(written(Err(io::ErrorKind::BrokenPipe.into())).is_ok_and(|there| !there));
        assert!(written(Err(io::ErrorKind::StorageFull.into())).is_err());
    }
}
