//! A server for tests that can do everything wrong: raw TCP, one request a connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::download::Backoff;
use super::net::Times;

/// Short enough for tests, long enough for a busy machine.
pub(super) const TIMES: Times = Times {
    connect: Duration::from_secs(2),
    silence: Duration::from_millis(400),
    answer: Duration::from_secs(2),
};
pub(super) const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(1), longest: Duration::from_millis(5) };

#[derive(Debug)]
pub(super) struct Request {
    /// Without the query, percent-decoded.
    pub(super) path: String,
    pub(super) query: HashMap<String, String>,
    pub(super) headers: HashMap<String, String>,
    /// How many came before, of this path.
    pub(super) before: usize,
}

pub(super) enum Reply {
    Whole(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Announces the whole body and sends so much of it.
    Cut(Box<Reply>, usize),
    Reset,
    /// Says nothing until the client goes.
    Hang,
    /// A body without end.
    Endless,
    Raw(Vec<u8>),
}

pub(super) fn text(status: u16, body: &str) -> Reply {
    Reply::Whole(status, Vec::new(), body.as_bytes().to_vec())
}

/// A file, or the range of it that is asked for.
pub(super) fn file(request: &Request, content: &[u8], tag: &str) -> Reply {
    let size = content.len();
    let mut headers = vec![("ETag", tag.to_owned()), ("Accept-Ranges", "bytes".to_owned())];
    headers.push(("Last-Modified", "Sat, 31 Jan 2026 09:00:00 GMT".to_owned()));
    let asked = request.headers.get("range").and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
    });
    match asked {
        None => Reply::Whole(200, headers, content.to_vec()),
        Some((first, _)) if first >= size => Reply::Whole(416, headers, Vec::new()),
        Some((first, last)) => {
            let last = last.min(size - 1);
            headers.push(("Content-Range", format!("bytes {first}-{last}/{size}")));
            Reply::Whole(206, headers, content[first..=last].to_vec())
        }
    }
}

pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) hits: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(super) async fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (handler, hits) = (Arc::new(handler), Arc::new(AtomicUsize::new(0)));
        let (counter, seen) = (Arc::clone(&hits), Arc::new(Mutex::default()));
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                counter.fetch_add(1, Ordering::SeqCst);
                let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                tokio::spawn(async move {
                    // A client that goes away early is part of many tests.
                    drop(serve(stream, &seen, &*handler).await);
                });
            }
        });
        Self { address, hits, task }
    }
}

async fn serve(
    mut stream: TcpStream,
    seen: &Mutex<HashMap<String, usize>>,
    handler: &(dyn Fn(&Request) -> Reply + Send + Sync),
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let mut byte = [0; 1024];
        match stream.read(&mut byte).await? {
            0 => return Ok(()),
            read => head.extend_from_slice(&byte[..read]),
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut lines = head.lines();
    let target = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default();
    let url = url::Url::parse(&format!("http://host{target}")).unwrap();
    let path = percent_encoding::percent_decode_str(url.path()).decode_utf8_lossy().into_owned();
    let query = url.query_pairs().map(|(key, value)| (key.into_owned(), value.into_owned()));
    let query = query.collect();
    let headers = lines.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    });
    let before = {
        let mut seen = seen.lock();
        let count = seen.entry(path.clone()).or_default();
        std::mem::replace(count, *count + 1)
    };
    let request = Request { path, query, headers: headers.collect(), before };
    let mut reply = handler(&request);
    let mut cut = usize::MAX;
    if let Reply::Cut(whole, at) = reply {
        (reply, cut) = (*whole, at);
    }
    match reply {
        Reply::Whole(status, headers, body) => {
            let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n");
            if !headers.iter().any(|(name, _)| *name == "Transfer-Encoding") {
                head.push_str(&format!("Content-Length: {}\r\n", body.len()));
            }
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(b"\r\n").await?;
            stream.write_all(&body[..body.len().min(cut)]).await?;
        }
        Reply::Raw(bytes) => stream.write_all(&bytes).await?,
        Reply::Reset => {
            let socket = socket2::SockRef::from(&stream);
            socket.set_linger(Some(Duration::ZERO))?;
            return Ok(());
        }
        Reply::Hang => {
            let mut rest = [0; 64];
            while stream.read(&mut rest).await? > 0 {}
        }
        Reply::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").await?;
            loop {
                stream.write_all(&[b' '; 65536]).await?;
            }
        }
        Reply::Cut(..) => {}
    }
    stream.shutdown().await
}
