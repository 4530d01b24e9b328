//! Bodies on their way: a request's body is held to a pace, an answer's pieces are watched until
//! the client has taken them.
//!
//! Invariants:
//! - Only time spent waiting for the client counts against it.
//! - A stream of messages may be quiet between two messages, but not within one.

use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::watch::{Open, Piece, Watch};
use super::{Body, Front, Settings};
use crate::observe::CloseReason;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// How fast a body has to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    grace: Duration,
    /// Bytes per second; zero: any.
    rate_min: u32,
    time_max: Duration,
}

impl Pace {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            grace: settings.body_grace,
            rate_min: settings.body_rate_min,
            time_max: settings.body_timeout,
        }
    }

    /// The longest time to have waited for `received` bytes and the next.
    fn patience(self, received: u64) -> Duration {
        if self.rate_min == 0 {
            return self.time_max;
        }
        let earned =
            Duration::from_millis(received.saturating_mul(1000) / u64::from(self.rate_min));
        self.grace.saturating_add(earned).min(self.time_max)
    }
}

/// The body came too slowly.
#[derive(Debug, thiserror::Error)]
#[error("{}", .status.message())]
pub(in crate::transport) struct TooSlow {
    /// Found there by the gRPC codec.
    #[source]
    status: tonic::Status,
}

impl TooSlow {
    fn new(received: u64, waited: Duration) -> Self {
        let seconds = waited.as_secs_f64();
        let message = format!(
            "request body came too slowly: {received} bytes in the {seconds:.1} s that were waited for it"
        );
        Self { status: tonic::Status::deadline_exceeded(message) }
    }
}

/// A request's body, which has to come at a pace.
pub(super) struct Paced {
    body: Incoming,
    front: Arc<Front>,
    watch: Arc<Watch>,
    /// Where the wait is noted, and since when.
    waiting: Option<(usize, Instant)>,
    received: u64,
    waited: Duration,
    ended: bool,
    /// Of a stream of messages.
    framing: Option<Framing>,
}

impl Paced {
    pub(super) fn new(body: Incoming, front: &Arc<Front>, open: &Open, stream: bool) -> Self {
        Self {
            body,
            front: Arc::clone(front),
            watch: Arc::clone(open.watch()),
            waiting: None,
            received: 0,
            waited: Duration::ZERO,
            ended: false,
            framing: stream.then(Framing::default),
        }
    }

    fn came(&mut self, data: Option<&Bytes>) {
        if let Some((slot, since)) = self.waiting.take() {
            self.watch.body_came(slot);
            self.waited += since.elapsed();
        }
        let Some(data) = data else { return };
        self.received = self.received.saturating_add(data.len() as u64);
        if let Some(framing) = &mut self.framing {
            framing.pass(data);
            if framing.is_between() {
                (self.received, self.waited) = (0, Duration::ZERO);
            }
        }
    }

    /// Notes the wait; gives the failure when it has been too long.
    fn wait(&mut self, cx: &Context<'_>) -> Option<TooSlow> {
        if self.framing.as_ref().is_some_and(Framing::is_between) {
            return None;
        }
        let Some((slot, since)) = self.waiting else {
            let now = Instant::now();
            let patience = self.front.pace.patience(self.received).saturating_sub(self.waited);
            self.waiting = Some((self.watch.await_body(now + patience, cx.waker()), now));
            return None;
        };
        if !self.watch.body_expired(slot, cx.waker()) {
            return None;
        }
        self.front.closed(CloseReason::SlowBody);
        Some(TooSlow::new(self.received, self.waited + since.elapsed()))
    }
}

impl Drop for Paced {
    fn drop(&mut self) {
        self.came(None);
        if !self.ended && !self.body.is_end_stream() {
            self.watch.leaves_unread();
        }
    }
}

impl HttpBody for Paced {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let me = self.get_mut();
        match Pin::new(&mut me.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                let data = match &frame {
                    Some(Ok(frame)) => frame.data_ref(),
                    _ => None,
                };
                me.came(data);
                me.ended = frame.is_none();
                Poll::Ready(frame.map(|frame| frame.map_err(Error::from)))
            }
            Poll::Pending => match me.wait(cx) {
                Some(slow) => Poll::Ready(Some(Err(Box::new(slow)))),
                None => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Follows gRPC's messages: a byte of flags, four of length, then the message.
#[derive(Debug, Default)]
struct Framing {
    prefix: [u8; 5],
    prefix_len: usize,
    message_left: usize,
}

impl Framing {
    fn is_between(&self) -> bool {
        self.prefix_len == 0 && self.message_left == 0
    }

    fn pass(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.message_left > 0 {
                let part = self.message_left.min(data.len());
                self.message_left -= part;
                data = &data[part..];
                continue;
            }
            self.prefix[self.prefix_len] = data[0];
            self.prefix_len += 1;
            data = &data[1..];
            if self.prefix_len == self.prefix.len() {
                let [_, length @ ..] = self.prefix;
                self.message_left =
                    usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                self.prefix_len = 0;
            }
        }
    }
}

/// An answer's body; its request is open until the last of it is gone.
pub(super) struct AnswerBody {
    body: Body,
    open: Open,
    /// HTTP/2 keeps what the client has no window for; HTTP/1 writes it to the socket.
    pieces: bool,
}

impl AnswerBody {
    pub(super) fn new(body: Body, open: Open, pieces: bool) -> Self {
        Self { body, open, pieces }
    }
}

impl HttpBody for AnswerBody {
    type Data = PieceData;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<PieceData>, tonic::Status>>> {
        let me = self.get_mut();
        let frame = ready!(Pin::new(&mut me.body).poll_frame(cx));
        let piece = |bytes| {
            let piece = me.pieces.then(|| Piece::new(me.open.watch()));
            PieceData { bytes, piece }
        };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes of an answer; gone when the client has taken them, or never will.
pub(super) struct PieceData {
    bytes: Bytes,
    piece: Option<Piece>,
}

impl PieceData {
    fn progressed(&self) {
        if let Some(piece) = &self.piece {
            piece.progressed();
        }
    }
}

impl Buf for PieceData {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn chunks_vectored<'a>(&'a self, dst: &mut [IoSlice<'a>]) -> usize {
        self.bytes.chunks_vectored(dst)
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.progressed();
    }

    fn copy_to_bytes(&mut self, len: usize) -> Bytes {
        self.progressed();
        self.bytes.copy_to_bytes(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_what_came_and_ends() {
        let pace = Pace {
            grace: Duration::from_secs(10),
            rate_min: 1024,
            time_max: Duration::from_secs(60),
        };
        assert_eq!(pace.patience(0), Duration::from_secs(10));
        assert_eq!(pace.patience(20 * 1024), Duration::from_secs(30));
        assert_eq!(pace.patience(u64::MAX), Duration::from_secs(60));
        assert_eq!(Pace { rate_min: 0, ..pace }.patience(0), Duration::from_secs(60));
    }

    #[test]
    fn messages_are_followed_however_they_are_cut() {
        let mut stream = Vec::new();
        for length in [0_u32, 1, 7, 300] {
            stream.push(0);
            stream.extend_from_slice(&length.to_be_bytes());
            stream.extend(std::iter::repeat_n(9, length as usize));
        }
        for step in 1..=stream.len() {
            let mut framing = Framing::default();
            let mut at = 0;
            let mut ends = vec![0];
            ends.extend([0_usize, 1, 7, 300].iter().scan(0, |end, length| {
                *end += 5 + length;
                Some(*end)
            }));
            for part in stream.chunks(step) {
                framing.pass(part);
                at += part.len();
                assert_eq!(framing.is_between(), ends.contains(&at), "step {step} at {at}");
            }
        }
    }
}
