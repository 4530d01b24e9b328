//! The SHA-256 of what can be read, a buffer at a time.

use std::io::{self, Read};

use sha2::{Digest as _, Sha256};

use crate::domain::Digest;

/// Bytes that are hashed at once.
const BUFFER: usize = 1 << 18;

/// Of all that a reader has, and how many bytes that were.
///
/// # Errors
/// When it cannot be read to its end.
pub fn sha256(mut reader: impl Read) -> io::Result<(Digest, u64)> {
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; BUFFER];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok((Digest::new(hash.finalize().into()), size)),
            Ok(read) => {
                hash.update(&buffer[..read]);
                size += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_the_digest_of_the_whole() {
        let bytes: Vec<u8> = (0..=250).cycle().take(BUFFER + 17).collect();
        let (front, back) = bytes.split_at(1000);
        let (digest, size) = sha256(front.chain(back)).unwrap();
        assert_eq!(digest, Digest::new(Sha256::digest(&bytes).into()));
        assert_eq!(size, bytes.len() as u64);
    }
}
