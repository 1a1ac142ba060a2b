//! A store inside a glommio server, with zero hops: connections live on the shards.
//!
//! ```text
//! cargo run --release --example glommio_server -- DIR SOCKET
//! printf 'add 7 5\nget 7\n' | nc -U SOCKET
//!
//!   glommio executor: accept --first line: which shard--> that shard's own thread: socket, pages, commits, in one task
//! ```
//! `add KEY N` answers `ok LSN SUM` once it is durable, `get KEY` answers `is SUM`. A connection
//! goes to the shard that owns the key of its first request. There requests for keys of this shard
//! never leave the thread; those for other keys take a hop, which the code need not know of.
//!
//! Sockets are plain non-blocking ones of `async-io`, whose own thread says when one is ready: a
//! shard's thread waits in the shard's ring, not in an executor's.

use async_io::Async;
use corepage::{ErrorKind, OnShard, Options, PageId, ShardHandle, Store, Volume};
use futures_lite::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, io::BufReader};
use glommio::LocalExecutor;
use std::error::Error;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

/// The longest line that is read.
const LINE_BYTES_MAX: u64 = 256;

type Lines = BufReader<Async<UnixStream>>;

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [dir, socket] = paths.try_into().map_err(|_| "usage: glommio_server DIR SOCKET")?;
    LocalExecutor::default().run(accept(dir, socket))
}

async fn accept(dir: PathBuf, socket: PathBuf) -> Result<(), Box<dyn Error>> {
    let store = Store::open(dir, Options::default()).await?;
    let pages = match store.volume("sums").await? {
        Some(pages) => pages,
        None => store.create_volume("sums", 1 << 30).await?,
    };
    // A socket that a killed server has left; a living one has the store, and we would not be here.
    let _ = std::fs::remove_file(&socket);
    let listener = Async::<UnixListener>::bind(&socket)?;
    println!("listening on {}", socket.display());
    loop {
        let (client, _) = listener.accept().await?;
        let (store, pages) = (store.clone(), pages.clone());
        let task = glommio::spawn_local(async move {
            if let Err(error) = place(client, store, pages).await {
                eprintln!("a client went: {error}");
            }
        });
        task.detach();
    }
}

/// Reads the first line, and moves the connection to the shard that it is about.
async fn place(client: Async<UnixStream>, store: Store, pages: Volume) -> std::io::Result<()> {
    let mut lines = BufReader::new(client);
    let Some(first) = next_line(&mut lines).await? else { return Ok(()) };
    let shard = key_of(&first).map_or(0, |key| store.shard_of(&pages, key));
    let task = store.on_shard(shard, move |handle| async move {
        let pages = pages.on(&handle).map_err(std::io::Error::other)?;
        let mut line = Some(first);
        while let Some(request) = line {
            let answer = answer(&request, &handle, &pages).await;
            lines.get_mut().write_all(format!("{answer}\n").as_bytes()).await?;
            line = next_line(&mut lines).await?;
        }
        Ok::<(), std::io::Error>(())
    });
    // It may be long until it ends, and nobody waits: the task goes on by itself.
    drop(task.map_err(std::io::Error::other)?);
    Ok(())
}

async fn next_line(lines: &mut Lines) -> std::io::Result<Option<String>> {
    let mut line = String::new();
    let read = lines.take(LINE_BYTES_MAX).read_line(&mut line).await?;
    Ok((read > 0).then(|| line.trim_end().to_string()))
}

fn key_of(line: &str) -> Option<PageId> {
    line.split(' ').nth(1)?.parse().ok().map(PageId::new)
}

async fn answer(line: &str, handle: &ShardHandle, pages: &Volume<OnShard>) -> String {
    let number = line.split(' ').nth(2).map(str::parse::<i64>);
    let result = match (line.split(' ').next(), key_of(line), number) {
        (Some("add"), Some(key), Some(Ok(n))) => add(key, n, handle, pages).await,
        (Some("get"), Some(key), None) => {
            pages.read(key).await.map(|page| format!("is {}", self::number(&page)))
        }
        _ => Ok("error use: add KEY N, or get KEY".into()),
    };
    result.unwrap_or_else(|error| format!("error {error}"))
}

/// A transaction: others may add to the same sum meanwhile.
async fn add(
    key: PageId,
    n: i64,
    handle: &ShardHandle,
    pages: &Volume<OnShard>,
) -> corepage::Result<String> {
    loop {
        let mut txn = handle.begin();
        let sum = number(&txn.read(pages, key).await?).wrapping_add(n);
        txn.patch(pages, key, 0, sum.to_le_bytes().to_vec())?;
        match txn.commit().await {
            Err(error) if error.kind() == ErrorKind::Conflict => {}
            other => return other.map(|lsn| format!("ok {lsn} {sum}")),
        }
    }
}

fn number(page: &[u8]) -> i64 {
    i64::from_le_bytes(page[..8].try_into().expect("a page has 8 bytes"))
}
