//! Compressed bodies, both ways.
//!
//! Invariants:
//! - A decoded body is never larger than the limit, nor out of proportion to what was sent, and
//!   decoding stops there: no more is ever held.
//! - One layer: a body is decoded once, whatever it looks like then.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::bufread::{GzDecoder, ZlibDecoder};
use flate2::write::{GzEncoder, ZlibEncoder};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, VARY};
use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;

use super::reply::Reply;
use crate::domain::{ErrorKind, Failure};
use crate::transport::Api;
use crate::transport::intake::{Grow, Held, INLINE_MAX_BYTES};

/// Decoded bytes before the ratio counts: small bodies may well compress a thousandfold.
const RATIO_FREE_BYTES: usize = 1 << 20;

/// Bodies up to this size are decoded where they arrive: the free MiB takes about a millisecond.
const INFLATED_INLINE_MAX_BYTES: usize = 1 << 10;

/// Longest wait for a thread to compress an answer on.
const COMPRESS_WAIT_MAX: Duration = Duration::from_secs(1);

/// Decoded bytes for which room is made at once: a quarter of what is there, within these.
const GROWTH_BYTES: usize = 64 << 10;
const GROWTH_MAX_BYTES: usize = 4 << 20;

/// `deflate` is zlib's form, as the HTTP specification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Gzip,
    Deflate,
}

impl Encoding {
    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }
}

/// Encoding of the request's body.
///
/// # Errors
/// `UnsupportedMedia` for an encoding that is not known, or more than one.
pub(super) fn content_encoding(headers: &HeaderMap) -> Result<Option<Encoding>, Failure> {
    let mut found = None;
    for value in headers.get_all(CONTENT_ENCODING) {
        for name in value.to_str().unwrap_or("?").split(',') {
            let encoding = match name.trim().to_ascii_lowercase().as_str() {
                "" | "identity" => continue,
                "gzip" | "x-gzip" => Encoding::Gzip,
                "deflate" => Encoding::Deflate,
                _ => return Err(unsupported("unknown content-encoding")),
            };
            if found.replace(encoding).is_some() {
                return Err(unsupported("more than one content-encoding"));
            }
        }
    }
    Ok(found)
}

fn unsupported(what: &str) -> Failure {
    let message = format!("{what}, expected one of gzip, deflate, identity");
    Failure::new(ErrorKind::UnsupportedMedia, message)
}

/// Decodes a request's body.
///
/// # Errors
/// `InvalidInput` for a broken stream, `TooLarge` over a limit.
pub async fn decode(
    encoding: Encoding,
    body: Bytes,
    api: &Api,
    size_max: usize,
    deadline: Instant,
    held: &Arc<Held>,
) -> Result<Bytes, Failure> {
    let ratio_max = api.settings.compression_ratio_max;
    let inflated = move |held: &Arc<Held>, body: &[u8]| {
        let out = inflate(encoding, body, size_max, ratio_max, &|more| held.grow(more))?;
        Ok(held.keep(out))
    };
    if body.len() <= INFLATED_INLINE_MAX_BYTES {
        return inflated(held, &body);
    }
    let held = Arc::clone(held);
    api.intake.run(deadline, move || inflated(&held, &body)).await
}

/// Decodes one whole stream of at most `size_max` bytes.
///
/// # Errors
/// As for the request's body.
pub fn inflate(
    encoding: Encoding,
    body: &[u8],
    size_max: usize,
    ratio_max: usize,
    grow: Grow<'_>,
) -> Result<Bytes, Failure> {
    let limit = size_max.min(body.len().saturating_mul(ratio_max).max(RATIO_FREE_BYTES));
    let name = encoding.name();
    let (out, left) = match encoding {
        Encoding::Gzip => read_to(GzDecoder::new(body), limit, name, grow, GzDecoder::into_inner),
        Encoding::Deflate => {
            read_to(ZlibDecoder::new(body), limit, name, grow, ZlibDecoder::into_inner)
        }
    }?;
    if out.len() > limit {
        let message = if limit < size_max {
            format!("request body decompresses to more than {ratio_max} times its size")
        } else {
            format!("request body decompresses to more than the limit of {size_max} bytes")
        };
        return Err(Failure::new(ErrorKind::TooLarge, message));
    }
    if !left.is_empty() {
        let left = left.len();
        return Err(Failure::invalid(format!("{left} bytes follow the {name} stream")));
    }
    Ok(out.into())
}

/// Reads up to one byte over `limit`; gives what of the source is left.
fn read_to<'a, R: Read>(
    mut decoder: R,
    limit: usize,
    name: &str,
    grow: Grow<'_>,
    rest: impl FnOnce(R) -> &'a [u8],
) -> Result<(Vec<u8>, &'a [u8]), Failure> {
    let mut out = Vec::new();
    loop {
        let room = (out.len() / 4).clamp(GROWTH_BYTES, GROWTH_MAX_BYTES);
        let room = room.min(limit.saturating_add(1) - out.len());
        grow(room)?;
        let (before, part) = (out.len(), u64::try_from(room).unwrap_or(u64::MAX));
        out.reserve_exact(room);
        decoder.by_ref().take(part).read_to_end(&mut out).map_err(|error| {
            Failure::invalid(format!("request body is no {name} stream: {error}"))
        })?;
        if out.len() - before < room || out.len() > limit {
            return Ok((out, rest(decoder)));
        }
    }
}

/// The encoding that the caller likes best of those we have.
pub(super) fn accepted(headers: &HeaderMap) -> Option<Encoding> {
    let mut best: Option<(u16, Encoding)> = None;
    for value in headers.get_all(ACCEPT_ENCODING) {
        for item in value.to_str().unwrap_or_default().split(',') {
            let (name, parameters) = item.split_once(';').unwrap_or((item, ""));
            let encoding = match name.trim().to_ascii_lowercase().as_str() {
                "gzip" | "x-gzip" => Encoding::Gzip,
                "deflate" => Encoding::Deflate,
                _ => continue,
            };
            let quality = quality(parameters);
            if quality > 0 && best.is_none_or(|(have, _)| quality > have) {
                best = Some((quality, encoding));
            }
        }
    }
    best.map(|(_, encoding)| encoding)
}

/// `q=0.5` in thousandths; 0 when it makes no sense.
fn quality(parameters: &str) -> u16 {
    let Some(text) = parameters.trim().strip_prefix("q=") else { return 1000 };
    let quality: f32 = text.trim().parse().unwrap_or(0.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=1000"
    )]
    let thousandths = (quality.clamp(0.0, 1.0) * 1000.0) as u16;
    thousandths
}

/// Compresses an answer if the caller takes it and it is worth it.
pub(super) async fn answer(mut reply: Reply, accepted: Option<Encoding>, api: &Api) -> Reply {
    let least = api.settings.compress_min_bytes.max(1);
    let Some(encoding) = accepted.filter(|_| reply.body.len() >= least) else {
        return reply;
    };
    let body = reply.body.joined();
    let deflated = if body.len() <= INLINE_MAX_BYTES {
        deflate(encoding, &body)
    } else {
        // When too many wait for a thread already, this one leaves as it is.
        let deadline = Instant::now() + COMPRESS_WAIT_MAX;
        let task = move || Ok(deflate(encoding, &body));
        let done = api.intake.run(deadline, task).await;
        done.unwrap_or_else(|failure| Err(std::io::Error::other(failure)))
    };
    match deflated {
        Ok(body) => {
            reply.body = body.into();
            reply.headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding.name()));
            reply.headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
        }
        Err(error) => tracing::debug!(%error, "answer goes out uncompressed"),
    }
    reply
}

fn deflate(encoding: Encoding, body: &[u8]) -> std::io::Result<Bytes> {
    // The fastest level: tensors rarely gain from a better one.
    let (out, level) = (Vec::with_capacity(body.len() / 2), Compression::fast());
    let out = match encoding {
        Encoding::Gzip => {
            let mut encoder = GzEncoder::new(out, level);
            encoder.write_all(body)?;
            encoder.finish()?
        }
        Encoding::Deflate => {
            let mut encoder = ZlibEncoder::new(out, level);
            encoder.write_all(body)?;
            encoder.finish()?
        }
    };
    Ok(out.into())
}
