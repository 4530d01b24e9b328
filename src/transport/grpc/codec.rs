//! A codec that hands over request messages as they are: bytes, unread.
//!
//! What a message says is read later, by [`super::wire`], where a failure belongs to a prediction.

use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use tonic::Status;
use tonic::codec::{BufferSettings, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

/// What a call's buffers hold before they grow: the usual small prediction. The default of 8 KiB is
/// taken and cleared away for every call, and a request's tensors would keep it for as long as they live.
const BUFFER_BYTES: usize = 512;
/// As the library's default; only streams of answers look at it.
const YIELD_BYTES: usize = 32 << 10;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}

/// Takes bytes, answers with messages of type `T`.
pub(super) struct Unread<T>(PhantomData<T>);

impl<T> Default for Unread<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: prost::Message + Send + 'static> tonic::codec::Codec for Unread<T> {
    type Encode = T;
    type Decode = Bytes;
    type Encoder = ProstEncoder<T>;
    type Decoder = Whole;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, ()>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        Whole
    }
}

/// Takes a message out of the receive buffer without a copy.
pub(super) struct Whole;

impl Decoder for Whole {
    type Item = Bytes;
    type Error = Status;

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}
