//! The file of a version's counters.
//!
//! ```text
//! "tidegate counters\n" | form: u32 | reference and arms, in postcard | CRC-32C of all before: u32
//! ```
//!
//! Numbers are little-endian. [Postcard](https://postcard.jamesmunns.com) writes fields one after the
//! other, without their names; cells without rows take hardly anything, those with some 10
//! bytes.
//!
//! Invariants:
//! - Nothing is believed before the checksum fits; after that no length is, beyond what is there.
//! - What is written in another form, or has anything left over, is refused.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, IntoInnerError, Write};

use super::arm::ArmState;

const MAGIC: &[u8] = b"tidegate counters\n";
/// Goes up with every change of what [`ArmState`] has, however deep: fields have no names here.
const FORM: u32 = 1;
/// Bytes before and after the body.
const HEAD: usize = MAGIC.len() + 4;
const CRC: usize = 4;

#[derive(Debug, thiserror::Error)]
pub(super) enum FormError {
    #[error("it is no file of counters, or of another form than {FORM}")]
    Head,
    #[error("it is damaged: its checksum is another")]
    Checksum,
    #[error("it cannot be read: {0}")]
    Body(#[from] postcard::Error),
    #[error("it has {0} bytes more than it should")]
    Rest(usize),
}

/// The digest of the reference, and the arms by name.
pub(super) type Content = (String, BTreeMap<String, ArmState>);

/// # Errors
/// When the file cannot be written.
pub(super) fn write(
    file: impl Write,
    reference: &str,
    arms: &BTreeMap<String, ArmState>,
) -> io::Result<()> {
    // Postcard writes byte by byte.
    let mut file = BufWriter::new(Checked { file, crc: 0 });
    file.write_all(MAGIC)?;
    file.write_all(&FORM.to_le_bytes())?;
    let written = postcard::to_io(&(reference, arms), file).map_err(io::Error::other)?;
    let Checked { mut file, crc } = written.into_inner().map_err(IntoInnerError::into_error)?;
    file.write_all(&crc.to_le_bytes())
}

/// # Errors
/// When that is not what [`write`] wrote.
pub(super) fn read(bytes: &[u8]) -> Result<Content, FormError> {
    let (rest, crc) = bytes.split_last_chunk::<CRC>().ok_or(FormError::Head)?;
    let (head, body) = rest.split_at_checked(HEAD).ok_or(FormError::Head)?;
    if head.strip_prefix(MAGIC) != Some(&FORM.to_le_bytes()) {
        return Err(FormError::Head);
    }
    if crc32c::crc32c(rest) != u32::from_le_bytes(*crc) {
        return Err(FormError::Checksum);
    }
    match postcard::take_from_bytes(body)? {
        (content, []) => Ok(content),
        (_, rest) => Err(FormError::Rest(rest.len())),
    }
}

/// Sums up what goes through.
struct Checked<W> {
    file: W,
    crc: u32,
}

impl<W: Write> Write for Checked<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.crc = crc32c::crc32c_append(self.crc, &bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
pub(super) mod tests;
