//! Listens on `unix:PATH` or `tcp:HOST:PORT`.
//!
//! ```text
//! Address ── plan: look, don't touch ──> Plan ── bind ──> Listener
//! ```
//!
//! 1. [`Address::plan`] changes nothing in the file system, so that a start that is refused later
//!    leaves nothing behind.
//! 2. A Unix socket is bound under a temporary name, set to mode 0600, and only then renamed to its
//!    place: no other user can ever connect, and a stale socket is replaced in one step. Only a
//!    socket that refuses connections is stale.
//! 3. The socket file is removed at the end, if it is still ours.
//! 4. An address that other machines can reach is recognised ([`Address::remote`]): there is
//!    neither encryption nor a password, so it must only be used on explicit request.

use super::socket::Socket;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// When a silent TCP client is first probed, how often, and how many times before it counts as
/// gone: three minutes in all. Its kernel answers, so a paused or idle client is not cut off.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_PROBES: u32 = 6;

/// An address that the user named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket file.
    Unix(PathBuf),
    /// An address of this machine; port 0 takes a free one.
    Tcp(SocketAddr),
}

/// An address that was free when we looked.
#[derive(Debug)]
pub enum Plan {
    /// Not bound yet, since that would leave a file.
    Unix(PathBuf),
    /// Already bound, which leaves nothing behind.
    Tcp(TcpListener),
}

/// A bound address. Dropping it removes the socket file.
#[derive(Debug)]
pub enum Listener {
    /// A socket file, with its inode.
    Unix(UnixListener, PathBuf, u64),
    /// A TCP port.
    Tcp(TcpListener),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
            Some(("tcp", rest)) => parse_tcp(rest).map(Address::Tcp),
            _ => Err("use unix:PATH or tcp:HOST:PORT, for example tcp:127.0.0.1:10809".into()),
        }
    }
}

fn parse_tcp(text: &str) -> Result<SocketAddr, String> {
    let local = text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
    let local = local.map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    let what =
        "HOST must be an IP address (127.0.0.1, [::1]) or localhost, PORT a number up to 65535";
    local.map_or_else(|| text.parse().map_err(|_| what.into()), Ok)
}

/// Adds to an error what to do about it.
fn failed(context: String) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{context}: {e}"))
}

fn taken(context: String) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, context)
}

impl Address {
    /// The address, if it can be reached from other machines.
    pub fn remote(&self) -> Option<IpAddr> {
        match self {
            Address::Tcp(address) if !address.ip().to_canonical().is_loopback() => {
                Some(address.ip())
            }
            Address::Tcp(_) | Address::Unix(_) => None,
        }
    }

    /// Checks that no server uses the address, without changing anything. The directory
    /// `made_later` need not exist yet.
    pub fn plan(&self, made_later: &Path) -> io::Result<Plan> {
        match self {
            Address::Unix(path) => {
                check_parent(path, made_later)?;
                check_unix(path)?;
                Ok(Plan::Unix(path.clone()))
            }
            Address::Tcp(address) => {
                let hint = format!("can't listen on tcp:{address}; choose another port with --nbd");
                TcpListener::bind(address).map(Plan::Tcp).map_err(failed(hint))
            }
        }
    }
}

/// The name under which a socket is bound before it is renamed.
fn bind_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

fn check_parent(path: &Path, made_later: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if parent == made_later && !parent.exists() {
        return Ok(());
    }
    let hint = format!(
        "can't make the socket unix:{}; its directory must exist and be writable",
        path.display()
    );
    rustix::fs::access(parent, rustix::fs::Access::WRITE_OK)
        .map_err(io::Error::from)
        .map_err(failed(hint))
}

fn check_unix(path: &Path) -> io::Result<()> {
    let shown = path.display();
    if SocketAddrUnix::new(bind_name(path)).is_err() {
        let text = format!(
            "the path unix:{shown} is too long for a socket (about 95 bytes): use a shorter one"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(format!("can't use unix:{shown}"))(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(taken(format!(
                "{shown} exists and is not a socket: remove it, or choose another path with --nbd"
            )));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(e) => Err(failed(format!("can't tell whether a server listens on unix:{shown}"))(e)),
        Ok(_) => Err(taken(format!(
            "a server listens on unix:{shown}: stop it, or choose another path with --nbd"
        ))),
    }
}

impl Plan {
    /// Begins to take connections, which wait until they are accepted.
    pub fn bind(self) -> io::Result<Listener> {
        match self {
            Plan::Tcp(listener) => Ok(Listener::Tcp(listener)),
            Plan::Unix(path) => {
                let hint = format!("can't make the socket unix:{}", path.display());
                bind_unix(path).map_err(failed(hint))
            }
        }
    }
}

fn bind_unix(path: PathBuf) -> io::Result<Listener> {
    // Checked again: a server may have started since the plan was made.
    check_unix(&path)?;
    let name = bind_name(&path);
    // A process with our number that was killed between the steps below has left this; no living
    // one uses it.
    if fs::symlink_metadata(&name).is_ok_and(|meta| meta.file_type().is_socket()) {
        fs::remove_file(&name)?;
    }
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&name)?)?;
    let finish = || -> io::Result<u64> {
        // No client can connect before `listen`.
        fs::set_permissions(&name, fs::Permissions::from_mode(0o600))?;
        rustix::net::listen(&socket, BACKLOG)?;
        let inode = fs::symlink_metadata(&name)?.ino();
        fs::rename(&name, &path)?;
        Ok(inode)
    };
    let inode = finish().inspect_err(|_| {
        let _ = fs::remove_file(&name);
    })?;
    Ok(Listener::Unix(socket.into(), path, inode))
}

/// Sets the options of a client's connection.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Replies are sent whole: waiting for more would only cost time.
    stream.set_nodelay(true)?;
    // A client whose machine is gone must not keep its place, as it would by default for more than
    // two hours.
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}

impl Listener {
    /// Accepts the next client.
    pub fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(listener, ..) => Ok(Socket::Unix(listener.accept()?.0)),
            Listener::Tcp(listener) => {
                let stream = listener.accept()?.0;
                // If the client is already gone, reading from it will show that: it is not a
                // failure of the listener.
                let _ = prepare(&stream);
                Ok(Socket::Tcp(stream))
            }
        }
    }

    /// Makes `accept` fail, now and from now on.
    pub fn wake(&self) {
        let fd = match self {
            Listener::Unix(listener, ..) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        };
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }
}

/// Writes `path` as the value of a query parameter of a URI (RFC 3986): all but letters, digits and
/// `-._~/` percent-encoded, byte by byte. A relative path is made absolute, since clients run in
/// other directories.
fn write_path(f: &mut fmt::Formatter<'_>, path: &Path) -> fmt::Result {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                f.write_char(char::from(*byte))?
            }
            other => write!(f, "%{other:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for Listener {
    /// Writes the address as a URI that clients accept.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listener::Unix(_, path, _) => {
                f.write_str("nbd+unix:///?socket=")?;
                write_path(f, path)
            }
            Listener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "nbd://{address}"),
                Err(_) => f.write_str("nbd://(unknown)"),
            },
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listener::Unix(_, path, inode) = self
            && fs::symlink_metadata(&*path).is_ok_and(|meta| meta.ino() == *inode)
        {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, String> {
        text.parse()
    }

    /// An unprotected block device on the network belongs to anyone there.
    #[test]
    fn addresses_that_other_machines_reach_are_told_apart() {
        assert_eq!(parse("tcp:127.0.0.1:0"), Ok(Address::Tcp(([127, 0, 0, 1], 0).into())));
        assert_eq!(parse("tcp:localhost:10809"), Ok(Address::Tcp(([127, 0, 0, 1], 10809).into())));
        for here in [
            "tcp:127.0.0.1:0",
            "tcp:127.1.2.3:1",
            "tcp:[::1]:7",
            "tcp:[::ffff:127.0.0.1]:7",
            "unix:/tmp/x",
        ] {
            assert_eq!(parse(here).unwrap().remote(), None, "{here}");
        }
        for open in
            ["tcp:0.0.0.0:10809", "tcp:[::]:1", "tcp:192.168.1.1:1", "tcp:[::ffff:0.0.0.0]:7"]
        {
            assert!(parse(open).unwrap().remote().is_some(), "{open}");
        }
        for bad in [
            "",
            "unix:",
            "tcp:",
            "udp:127.0.0.1:1",
            "/tmp/x",
            "tcp:127.0.0.1:65536",
            "tcp:example.org:1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse("tcp:127.0.0.1").is_err());
    }

    /// A crashed server must not keep the next one from starting, and a running one must not lose
    /// its clients.
    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let address = Address::Unix(path.clone());
        let listener = address.plan(dir.path()).unwrap().bind().unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(address.plan(dir.path()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "files left behind");
        fs::write(&path, "mine").unwrap();
        assert_eq!(address.plan(dir.path()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    /// An unusable URI is worse than none: clients refuse raw spaces, and take `&` and `#` for the
    /// end of the path.
    #[test]
    fn a_uri_names_any_socket_path_in_a_form_that_clients_take() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a b%#&\"+?=ü'");
        let listener = Address::Unix(path.clone()).plan(dir.path()).unwrap().bind().unwrap();
        let uri = listener.to_string();
        let name = "a%20b%25%23%26%22%2B%3F%3D%C3%BC%27";
        assert_eq!(uri, format!("nbd+unix:///?socket={}/{name}", dir.path().display()));
        struct Shown;
        impl fmt::Display for Shown {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_path(f, Path::new("nbd.sock"))
            }
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            Shown.to_string(),
            format!("{}/nbd.sock", here.display()),
            "clients run in other directories"
        );
    }
}
