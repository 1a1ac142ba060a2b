//! The other end of a server's control socket.
//!
//! Does not know what is asked.

use super::Failure;
use crate::server::control::Request;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to a running server.
pub struct Connection(BufReader<UnixStream>);

impl Connection {
    /// Connects, if a server is there.
    pub fn open(socket: &Path) -> std::io::Result<Connection> {
        UnixStream::connect(socket).map(|stream| Connection(BufReader::new(stream)))
    }

    /// What the server answers.
    pub fn ask(&mut self, request: &Request) -> Result<Value, Failure> {
        let line = serde_json::to_string(request).map_err(Failure::new)? + "\n";
        let gone = |error| Failure::new(format_args!("the server is gone: {error}"));
        self.0.get_mut().write_all(line.as_bytes()).map_err(gone)?;
        let mut answer = String::new();
        self.0.read_line(&mut answer).map_err(gone)?;
        let answer: Value = serde_json::from_str(&answer)
            .map_err(|_| Failure::new("the server closed the connection; it has ended, or has too many clients"))?;
        match answer.get("error") {
            Some(error) => Err(Failure::new(error.as_str().unwrap_or("an error without a text"))),
            None => Ok(answer["ok"].clone()),
        }
    }
}
