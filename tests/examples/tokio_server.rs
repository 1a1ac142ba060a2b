//! A store inside a tokio server: a key-value service over a Unix socket, one line a request.
//!
//! ```text
//! cargo run --release --example tokio_server -- DIR SOCKET
//! printf 'set 7 hello\nget 7\n' | nc -U SOCKET
//! ```
//! `set KEY TEXT` answers `ok LSN` once it is durable, `get KEY` answers `is TEXT`. Kill it at any
//! time.

use corepage::{Options, PageId, Store, Volume};
use std::path::PathBuf;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// The longest line that is read.
const LINE_BYTES_MAX: u64 = 4096;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [dir, socket] = &paths[..] else { return Err("usage: tokio_server DIR SOCKET".into()) };
    let store = Store::open(dir, Options::default()).await?;
    let pages = match store.volume("keys").await? {
        Some(pages) => pages,
        None => store.create_volume("keys", 1 << 30).await?,
    };
    // A socket that a killed server has left; a living one has the store, and we would not be here.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    println!("listening on {}", socket.display());
    loop {
        let (client, _) = listener.accept().await?;
        // Handles are cheap to clone, and all see the same store.
        let pages = pages.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(client, &pages).await {
                eprintln!("a client went: {error}");
            }
        });
    }
}

async fn serve(client: UnixStream, pages: &Volume) -> std::io::Result<()> {
    let (read, mut write) = client.into_split();
    let mut lines = BufReader::new(read);
    let mut line = String::new();
    loop {
        line.clear();
        if (&mut lines).take(LINE_BYTES_MAX).read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let answer = answer(line.trim_end(), pages).await;
        write.write_all(format!("{answer}\n").as_bytes()).await?;
    }
}

async fn answer(line: &str, pages: &Volume) -> String {
    let mut words = line.splitn(3, ' ');
    let (what, key) =
        (words.next(), words.next().and_then(|key| key.parse().ok()).map(PageId::new));
    match (what, key, words.next()) {
        (Some("set"), Some(key), Some(text)) if text.len() < 4096 => {
            // The length, and the text: as a patch, so that only these bytes go through the log.
            let mut bytes = (text.len() as u16).to_le_bytes().to_vec();
            bytes.extend_from_slice(text.as_bytes());
            match pages.patch(key, 0, bytes).await {
                Ok(lsn) => format!("ok {lsn}"),
                Err(error) => format!("error {error}"),
            }
        }
        (Some("get"), Some(key), None) => match pages.read(key).await {
            Ok(page) => {
                let len = usize::from(u16::from_le_bytes([page[0], page[1]]));
                format!("is {}", String::from_utf8_lossy(page.get(2..2 + len).unwrap_or_default()))
            }
            Err(error) => format!("error {error}"),
        },
        _ => "error use: set KEY TEXT, or get KEY".into(),
    }
}
