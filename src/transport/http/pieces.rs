//! A body in pieces, so that an output goes out from where the model left it.
//!
//! Invariant: the length is known from the start; an answer is never chunked.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use smallvec::SmallVec;

/// The bytes of one answer, in order; no piece is empty.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    pieces: SmallVec<[Bytes; 2]>,
    /// Of which so many have gone out.
    sent: usize,
    left: usize,
}

impl Pieces {
    pub(super) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.left += piece.len();
            self.pieces.push(piece);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.left
    }

    /// In one piece; copies if there is more than one.
    pub(super) fn joined(&self) -> Bytes {
        match &self.pieces[self.sent..] {
            [] => Bytes::new(),
            [one] => one.clone(),
            many => {
                let mut joined = BytesMut::with_capacity(self.left);
                many.iter().for_each(|piece| joined.extend_from_slice(piece));
                joined.freeze()
            }
        }
    }
}

impl<T: Into<Bytes>> From<T> for Pieces {
    fn from(bytes: T) -> Self {
        let mut pieces = Self::default();
        pieces.push(bytes.into());
        pieces
    }
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let at = self.sent;
        let Some(piece) = self.pieces.get_mut(at).map(std::mem::take) else {
            return Poll::Ready(None);
        };
        self.sent += 1;
        self.left -= piece.len();
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn pieces_go_out_in_order_and_uncopied() {
        let raw = Bytes::from(vec![7_u8; 1 << 20]);
        let mut pieces = Pieces::from("head");
        pieces.push(Bytes::new());
        pieces.push(raw.clone());
        assert_eq!((pieces.len(), pieces.joined().len()), (4 + raw.len(), 4 + raw.len()));
        let first = pieces.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(&first[..], b"head");
        assert_eq!(http_body::Body::size_hint(&pieces).exact(), Some(1 << 20));
        let second = pieces.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(second.as_ptr(), raw.as_ptr(), "the same memory");
        assert!(pieces.frame().await.is_none());
    }
}
