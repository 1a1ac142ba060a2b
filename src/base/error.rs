//! The error type: it says what happened, to what, and what the caller can do about it.

use crate::base::{Lsn, PageKey};
use rustix::io::Errno;
use std::fmt;

/// What to do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Retry the whole transaction: a page that it read has changed since. Nothing was done.
    Conflict,
    /// Retry later: a queue is full, or the pin quota or the memory is used up for now. Nothing was
    /// done.
    Busy,
    /// Fix the call: an argument is wrong. Nothing was done.
    Invalid,
    /// Fix the call: the commit is larger than `txn_bytes_max`. Nothing was done.
    TooLarge,
    /// Make space: the file system, its quota or the limit of the data space is full. Nothing was
    /// done; reads and frees still work, and writes do again once there is space.
    Full,
    /// Fix the call or the path: there is no such volume, directory or store.
    NotFound,
    /// Fix the call: a volume of this name already exists. Nothing was done.
    AlreadyExists,
    /// Close the store elsewhere: another process, or another handle in this one, has it open.
    InUse,
    /// Use another version or machine: this version can't read the store, or this machine lacks
    /// what the options ask for.
    Unsupported,
    /// Stop: bytes on the device are not those that were written. They were not returned.
    Corrupt,
    /// Stop: the device or the file system failed. Reads may still work; to write, reopen the
    /// store.
    Io,
    /// Reopen the store and check: the commit was submitted, but it is not known whether it is
    /// durable.
    OutcomeUnknown,
    /// Reopen the store: it is closed, or has stopped after a failed log write.
    Closed,
    /// Report it and reopen the store: this is a bug of the engine. It does not mean that data is
    /// damaged.
    Internal,
}

/// An error of the engine. `Display` gives the values and what to do; code decides by
/// [`kind`](Error::kind).
#[derive(Clone, Debug)]
pub struct Error {
    kind: ErrorKind,
    context: Box<str>,
    source: Option<std::sync::Arc<std::io::Error>>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// `Result` with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about an error of the operating system, beyond what its own text says.
fn advice(source: &std::io::Error) -> &'static str {
    match Errno::from_io_error(source) {
        Some(Errno::ROFS) => {
            "; it is mounted read-only: mount it for writing (if it was, an error has changed \
             that: see the kernel's log)"
        }
        Some(Errno::IO | Errno::NXIO | Errno::NODEV | Errno::REMOTEIO | Errno::UCLEAN) => {
            "; the device or the file system failed: see the kernel's log"
        }
        Some(Errno::FBIG) => "; raise the limit on file sizes (`ulimit -f`)",
        Some(Errno::MFILE) => "; raise the limit on open files (`ulimit -n`)",
        _ => "",
    }
}

impl Error {
    /// Makes an error of `kind`; `context` says what happened, with the values, and what to do.
    pub fn new(kind: ErrorKind, context: impl fmt::Display) -> Self {
        Error { kind, context: context.to_string().into(), source: None }
    }

    /// Makes an error of kind `Io` whose source is an error of the operating system. The source's
    /// text, and what to do about common errors, are added to `context`.
    pub fn io(context: impl fmt::Display, source: std::io::Error) -> Self {
        let context = format!("{context}: {source}{}", advice(&source)).into();
        Error { kind: ErrorKind::Io, context, source: Some(std::sync::Arc::new(source)) }
    }

    /// The error for a thread that can't be started.
    pub(crate) fn no_thread(what: impl fmt::Display, source: std::io::Error) -> Self {
        let limits = "raise the limit on threads (`ulimit -u`, pids.max of a control group, \
                      TasksMax= of a systemd unit)";
        let context = format!("starting {what}: {source}; {limits}").into();
        Error { kind: ErrorKind::Io, context, source: Some(std::sync::Arc::new(source)) }
    }

    /// The kind, which says what to do about the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the same error with another kind.
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Returns the same error with the kind `Full`, if that is what the operating system meant.
    pub(crate) fn full_if_no_space(self) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match self.source.as_ref().map(|source| source.kind()) {
            Some(StorageFull | QuotaExceeded) => self.with_kind(ErrorKind::Full),
            _ => self,
        }
    }

    pub(crate) fn invalid(context: impl fmt::Display) -> Self {
        Error::new(ErrorKind::Invalid, context)
    }

    pub(crate) fn internal(context: impl fmt::Display) -> Self {
        Error::new(
            ErrorKind::Internal,
            format_args!("{context} (a bug of corepage: please report it)"),
        )
    }

    pub(crate) fn corrupt(context: impl fmt::Display) -> Self {
        Error::new(ErrorKind::Corrupt, context)
    }

    pub(crate) fn conflict(key: PageKey, read: Lsn, now: Lsn) -> Self {
        Error::new(
            ErrorKind::Conflict,
            format_args!(
                "page {key:?} was read at {read:?} and is at {now:?} now: retry the transaction"
            ),
        )
    }
}
