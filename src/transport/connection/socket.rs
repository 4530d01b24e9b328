//! The socket of one connection: what was read to tell the protocol is read again, and what moves
//! is noted in its [`Watch`].

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::lines::Lines;
use super::stream::Stream;
use super::watch::Watch;

/// What an HTTP/2 client says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Longest time to read what nobody wants before closing.
const LINGER_MAX: Duration = Duration::from_secs(2);

/// The first bytes of a connection.
pub(super) struct First {
    bytes: [u8; PREFACE.len()],
    len: usize,
}

impl First {
    /// Reads until it is clear which protocol the peer speaks; `None` when it closed before.
    pub(super) async fn read(stream: &mut Stream) -> io::Result<Option<Self>> {
        let mut first = Self { bytes: [0; PREFACE.len()], len: 0 };
        while first.len < PREFACE.len() {
            match stream.read(&mut first.bytes[first.len..]).await? {
                0 if first.len == 0 => return Ok(None),
                0 => break,
                read => first.len += read,
            }
            if !first.may_be_http2() {
                break;
            }
        }
        Ok(Some(first))
    }

    fn may_be_http2(&self) -> bool {
        PREFACE.starts_with(&self.bytes[..self.len])
    }

    pub(super) fn is_http2(&self) -> bool {
        self.bytes == *PREFACE
    }
}

/// A stream that notes its progress.
pub(super) struct Socket {
    stream: Stream,
    first: Option<First>,
    /// Of HTTP/1.
    lines: Option<Lines>,
    watch: Arc<Watch>,
    /// Closing, and still reading.
    linger: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    pub(super) fn new(stream: Stream, first: First, watch: Arc<Watch>) -> Self {
        let lines = (!first.is_http2()).then(Lines::default);
        let mut socket = Self { stream, first: None, lines, watch, linger: None };
        socket.came(&first.bytes[..first.len]);
        socket.first = Some(first);
        socket
    }

    fn came(&mut self, bytes: &[u8]) {
        let Some(lines) = &mut self.lines else { return };
        if lines.pass(bytes).is_err() {
            self.watch.has_two_readings();
        }
    }

    /// Reads what the client still sends of a body that nobody wants, for a while: closing with
    /// bytes unread resets the connection, and the client would lose the answer that says why.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let linger = self.linger.get_or_insert_with(|| Box::pin(sleep(LINGER_MAX)));
        let mut scratch = [0; 8 << 10];
        while linger.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {}
                _ => break,
            }
        }
        Poll::Ready(())
    }

    fn wrote<T>(&self, written: &Poll<io::Result<T>>) {
        match written {
            Poll::Ready(Ok(_)) => self.watch.wrote(),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.watch.blocked(),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        if let Some(First { bytes, len }) = me.first {
            if buf.remaining() >= len {
                buf.put_slice(&bytes[..len]);
                me.first = None;
                return Poll::Ready(Ok(()));
            }
            let part = buf.remaining();
            buf.put_slice(&bytes[..part]);
            let mut rest = First { bytes: [0; PREFACE.len()], len: len - part };
            rest.bytes[..len - part].copy_from_slice(&bytes[part..len]);
            me.first = Some(rest);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut me.stream).poll_read(cx, buf);
        if me.lines.is_some() && buf.filled().len() > before {
            me.watch.head_bytes();
            me.came(&buf.filled()[before..]);
        }
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if self.stream.holds_back() {
            self.wrote(&flushed);
        }
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        if me.lines.is_none() || !me.watch.has_unread() {
            return Pin::new(&mut me.stream).poll_shutdown(cx);
        }
        if me.linger.is_none() {
            ready!(Pin::new(&mut me.stream).poll_shutdown(cx))?;
        }
        me.poll_linger(cx).map(Ok)
    }
}
