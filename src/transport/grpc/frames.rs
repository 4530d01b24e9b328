//! The messages of a call as they arrive: counted, limited, decompressed, before the codec has them.
//!
//! Invariants:
//! - Every byte is counted on the call's bill before anybody keeps it.
//! - A piece that is handed on never reaches into the next message, so that what is on the bill
//!   when a message is complete is that message.
//! - A compressed message is decompressed here, under the limits that HTTP bodies have, and handed
//!   on as a plain one.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::Status;

use super::encode;
use crate::domain::{ErrorKind, Failure};
use crate::transport::Api;
use crate::transport::http::compress::{self, Encoding};
use crate::transport::intake::Held;

/// Flag and length before each message.
const HEAD_LEN: usize = 5;

/// Bytes that a call holds, message by message.
pub(super) struct Bill {
    api: Arc<Api>,
    /// Guards the account of the message that is arriving; nobody waits under it.
    arriving: Mutex<Arc<Held>>,
    read: AtomicBool,
}

impl Bill {
    pub(super) fn new(api: &Arc<Api>) -> Arc<Self> {
        Arc::new(Self {
            api: Arc::clone(api),
            arriving: Mutex::new(api.intake.open()),
            read: AtomicBool::new(false),
        })
    }

    /// The account of the message that has arrived.
    pub(super) fn take(&self) -> Arc<Held> {
        self.read.store(true, Ordering::Relaxed);
        std::mem::replace(&mut *self.arriving.lock(), self.api.intake.open())
    }

    /// Whether a message has been taken.
    pub(super) fn is_read(&self) -> bool {
        self.read.load(Ordering::Relaxed)
    }

    fn current(&self) -> Arc<Held> {
        Arc::clone(&self.arriving.lock())
    }

    fn grow(&self, more: usize) -> Result<(), Failure> {
        self.arriving.lock().grow(more)
    }
}

type Inflating = Pin<Box<dyn Future<Output = Result<Bytes, Failure>> + Send>>;

enum State {
    /// Bytes of the next message's head.
    Head {
        have: [u8; HEAD_LEN],
        len: usize,
    },
    /// Bytes left of a message that is handed on.
    Plain {
        left: usize,
    },
    /// A compressed message, and what is left of it.
    Packed {
        body: BytesMut,
        left: usize,
    },
    Inflating(Inflating),
    /// Goes out next.
    Inflated(Bytes),
    /// After an error there is nothing more.
    Failed,
}

const NEXT: State = State::Head { have: [0; HEAD_LEN], len: 0 };

/// What the messages of a call may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// A unary call has one message.
    pub(super) one: bool,
    pub(super) message_bytes: usize,
}

/// A request body, cut at its messages.
pub(super) struct Frames<B> {
    inner: B,
    bill: Arc<Bill>,
    deadline: Instant,
    encoding: Option<Encoding>,
    limits: Limits,
    messages: usize,
    state: State,
    /// Arrived and not yet looked at.
    chunk: Bytes,
}

/// What the messages of a call are compressed with, if we know it.
pub(super) fn encoding(headers: &HeaderMap) -> Option<Encoding> {
    match headers.get(super::ENCODING).map(HeaderValue::as_bytes) {
        Some(b"gzip") => Some(Encoding::Gzip),
        Some(b"deflate") => Some(Encoding::Deflate),
        _ => None,
    }
}

impl<B> Frames<B> {
    pub(super) fn new(
        inner: B,
        bill: Arc<Bill>,
        encoding: Option<Encoding>,
        limits: Limits,
        deadline: Instant,
    ) -> Self {
        let chunk = Bytes::new();
        Self { inner, bill, deadline, encoding, limits, messages: 0, state: NEXT, chunk }
    }

    /// Takes the chunk one step on; gives what is to be handed on, if anything.
    fn step(&mut self) -> Result<Option<Bytes>, Failure> {
        let cut = match &mut self.state {
            State::Head { len: 0, .. } if self.chunk.len() >= HEAD_LEN => {
                let (packed, size) =
                    self.head(*self.chunk.first_chunk().unwrap_or(&[0; HEAD_LEN]))?;
                if packed {
                    self.chunk.advance(HEAD_LEN);
                    return Ok(None);
                }
                // The head and what is there of the message, as one piece.
                let cut = (HEAD_LEN + size).min(self.chunk.len());
                self.state = plain(HEAD_LEN + size - cut);
                cut
            }
            State::Head { have, len } => {
                let part = (HEAD_LEN - *len).min(self.chunk.len());
                have[*len..*len + part].copy_from_slice(&self.chunk[..part]);
                self.chunk.advance(part);
                *len += part;
                if *len < HEAD_LEN {
                    return Ok(None);
                }
                let have = *have;
                let (packed, size) = self.head(have)?;
                if packed {
                    return Ok(None);
                }
                self.state = plain(size);
                return Ok(Some(Bytes::copy_from_slice(&have)));
            }
            State::Plain { left } => {
                let cut = (*left).min(self.chunk.len());
                self.state = plain(*left - cut);
                cut
            }
            State::Packed { body, left } => {
                let part = (*left).min(self.chunk.len());
                self.bill.grow(part)?;
                body.extend_from_slice(&self.chunk.split_to(part));
                *left -= part;
                if *left == 0 {
                    let body = std::mem::take(body).freeze();
                    self.inflate(body);
                }
                return Ok(None);
            }
            State::Inflating(_) | State::Inflated(_) | State::Failed => return Ok(None),
        };
        self.bill.grow(cut)?;
        Ok(Some(self.chunk.split_to(cut)))
    }

    /// Looks at a message's head; gives whether the message is ours to decompress, and its length.
    fn head(&mut self, head: [u8; HEAD_LEN]) -> Result<(bool, usize), Failure> {
        let [flag, len @ ..] = head;
        let size = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        let limit = self.limits.message_bytes;
        if size > limit {
            let message = format!("message has {size} bytes, the limit is {limit}");
            return Err(Failure::new(ErrorKind::TooLarge, message));
        }
        if self.limits.one && self.messages > 0 {
            return Err(Failure::invalid("a unary call has one message, got another"));
        }
        self.messages += 1;
        let packed = flag == 1 && self.encoding.is_some();
        if packed {
            self.state = State::Packed { body: BytesMut::new(), left: size };
            if size == 0 {
                self.inflate(Bytes::new());
            }
        }
        Ok((packed, size))
    }

    fn inflate(&mut self, body: Bytes) {
        let Some(encoding) = self.encoding else { return };
        let (api, held) = (Arc::clone(&self.bill.api), self.bill.current());
        let (deadline, size_max) = (self.deadline, self.limits.message_bytes);
        self.state = State::Inflating(Box::pin(async move {
            compress::decode(encoding, body, &api, size_max, deadline, &held).await
        }));
    }
}

fn plain(left: usize) -> State {
    if left == 0 { NEXT } else { State::Plain { left } }
}

/// Head of a message that is not compressed.
fn plain_head(len: usize) -> Result<Bytes, Failure> {
    let len = u32::try_from(len)
        .map_err(|_| Failure::new(ErrorKind::TooLarge, "message has 4 GiB or more"))?;
    let mut head = [0; HEAD_LEN];
    head[1..].copy_from_slice(&len.to_be_bytes());
    Ok(Bytes::copy_from_slice(&head))
}

impl<B> http_body::Body for Frames<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            let step = match &mut this.state {
                State::Failed => return Poll::Ready(None),
                State::Inflating(inflating) => {
                    let inflated = ready!(inflating.as_mut().poll(context));
                    inflated.and_then(|body| {
                        let head = plain_head(body.len())?;
                        this.state = if body.is_empty() { NEXT } else { State::Inflated(body) };
                        Ok(Some(head))
                    })
                }
                State::Inflated(body) => {
                    let body = std::mem::take(body);
                    this.state = NEXT;
                    Ok(Some(body))
                }
                _ if this.chunk.is_empty() => {
                    match ready!(Pin::new(&mut this.inner).poll_frame(context)) {
                        None => return Poll::Ready(None),
                        Some(Err(error)) => {
                            this.state = State::Failed;
                            return Poll::Ready(Some(Err(Status::from_error(error.into()))));
                        }
                        Some(Ok(frame)) => match frame.into_data() {
                            Ok(data) => {
                                this.chunk = data;
                                Ok(None)
                            }
                            Err(frame) => {
                                return Poll::Ready(Some(Ok(
                                    frame.map_data(|_: Bytes| Bytes::new())
                                )));
                            }
                        },
                    }
                }
                _ => this.step(),
            };
            match step {
                Ok(None) => {}
                Ok(Some(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Err(failure) => {
                    this.state = State::Failed;
                    return Poll::Ready(Some(Err(encode::status(&failure, None))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
