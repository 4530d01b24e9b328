//! Follows the lines of HTTP/1 requests as they are read, for what hyper lets pass and does not
//! show: a line that ends with LF alone, and a length beside a transfer encoding (of which hyper
//! hides the length). Others on the way may read either differently.
//!
//! Invariants:
//! - Bodies are passed over by their length, never looked at. After a request with a transfer
//!   encoding nothing is looked at any more: the connection ends with its answer.

use memchr::memchr;

/// As much of a line that came in parts as has to be known.
const KEPT_MAX: usize = 64;

/// Where in the stream of requests we are.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// Start of a line whose end has not come.
    kept: Vec<u8>,
    /// Last byte of what has come.
    last: u8,
    in_headers: bool,
    length: Option<u64>,
    encoded: bool,
    body_left: u64,
    /// No longer following.
    done: bool,
}

/// The stream can be read in two ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TwoReadings;

impl Lines {
    pub(super) fn pass(&mut self, mut bytes: &[u8]) -> Result<(), TwoReadings> {
        while !self.done && !bytes.is_empty() {
            if self.body_left > 0 {
                let part = usize::try_from(self.body_left).unwrap_or(usize::MAX).min(bytes.len());
                self.body_left -= part as u64;
                bytes = &bytes[part..];
                continue;
            }
            let Some(end) = memchr(b'\n', bytes) else {
                self.keep(bytes);
                break;
            };
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            let ended = if line.is_empty() { self.last } else { line[end - 1] };
            if ended != b'\r' {
                self.done = true;
                return Err(TwoReadings);
            }
            if self.kept.is_empty() {
                self.line(&line[..end - 1])?;
            } else {
                self.keep(line);
                let mut kept = std::mem::take(&mut self.kept);
                if kept.last() == Some(&b'\r') {
                    kept.pop();
                }
                self.line(&kept)?;
                kept.clear();
                self.kept = kept;
            }
            self.last = b'\n';
            bytes = rest;
        }
        Ok(())
    }

    fn keep(&mut self, part: &[u8]) {
        let room = KEPT_MAX.saturating_sub(self.kept.len()).min(part.len());
        self.kept.extend_from_slice(&part[..room]);
        if let Some(last) = part.last() {
            self.last = *last;
        }
    }

    /// Takes a line without its end.
    fn line(&mut self, line: &[u8]) -> Result<(), TwoReadings> {
        if line.is_empty() {
            return self.head_ends();
        }
        if !self.in_headers {
            // The request line; nothing in it says where the body ends.
            self.in_headers = true;
            return Ok(());
        }
        match line[0] {
            b'c' | b'C' => {
                if let Some(value) = value(line, b"content-length") {
                    let text = std::str::from_utf8(value).unwrap_or_default().trim();
                    // What is no number is refused by hyper.
                    self.length = text.parse().ok().or(Some(0));
                }
            }
            b't' | b'T' => self.encoded |= value(line, b"transfer-encoding").is_some(),
            _ => {}
        }
        Ok(())
    }

    fn head_ends(&mut self) -> Result<(), TwoReadings> {
        if !self.in_headers {
            // An empty line before a request is to be passed over.
            return Ok(());
        }
        let length = self.length.take();
        self.in_headers = false;
        self.body_left = length.unwrap_or(0);
        self.done = self.encoded;
        if self.encoded && length.is_some() { Err(TwoReadings) } else { Ok(()) }
    }
}

/// The value of a header line if `name` is its name.
fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = line.split_at_checked(name.len())?;
    match rest {
        [b':', value @ ..] if start.eq_ignore_ascii_case(name) => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pass(text: &str, step: usize) -> Result<(), TwoReadings> {
        let mut lines = Lines::default();
        text.as_bytes().chunks(step).try_for_each(|part| lines.pass(part))
    }

    #[test]
    fn two_readings_are_seen_however_they_come() {
        let good = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let body = "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\na\nb\n\n";
        let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(300));
        let chunked = "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\na\n\r\n0\r\n\r\n";
        let fine = [
            good.to_owned(),
            format!("{body}{good}{body}{long}{body}"),
            format!("\r\n{good}\r\n{good}"),
            format!("{body}{chunked}"),
            "GET / HTTP/1.1\r\ncontent-lengthy: 5\r\ntransfer-encodings: x\r\n\r\n".to_owned(),
        ];
        let bad = [
            "GET / HTTP/1.1\nhost: a\r\n\r\n".to_owned(),
            "GET / HTTP/1.1\r\nhost: a\n\r\n".to_owned(),
            "GET / HTTP/1.1\r\nhost: a\r\n\n".to_owned(),
            format!("{body}{good}GET / HTTP/1.1\r\nx: {}\nhost: a\r\n\r\n", "y".repeat(300)),
            "POST / HTTP/1.1\r\nContent-length: 5\r\nTransfer-encoding: chunked\r\n\r\n".to_owned(),
            format!("{body}POST / HTTP/1.1\r\ntransfer-encoding:\tx\r\ncontent-length:5\r\n\r\n"),
        ];
        for step in 1..400 {
            for text in &fine {
                assert_eq!(pass(text, step), Ok(()), "{step}: {text}");
            }
            for text in &bad {
                assert_eq!(pass(text, step), Err(TwoReadings), "{step}: {text}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_parts_are_read_alike(
            text in "(POST / HTTP/1.1\r\n|content-length: [0-9]{1,3}\r\n|transfer-encoding: x\r\n|\r\n|\n|[a-z:\r]{0,99}){0,12}",
            step in 1_usize..80,
        ) {
            prop_assert_eq!(pass(&text, step), pass(&text, usize::MAX));
        }
    }
}
