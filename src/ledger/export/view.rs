//! A record read where it lies: every text and tensor is a part of the frame.
//!
//! [`Record`](crate::ledger::record::Record) reads the same and owns it. This one is for whoever
//! goes through millions of records; a test holds the two against each other.

use smallvec::SmallVec;

use crate::ledger::frame::{Form, Frame};

/// What a record says. A field that it does not have is empty or 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View<'a> {
    pub seq: u64,
    /// Number of its [`Kind`](crate::ledger::record::Kind).
    pub kind: u64,
    pub time_ns: i64,
    pub prediction_id: &'a [u8],
    pub model: &'a str,
    pub version: u64,
    pub model_digest: &'a [u8],
    pub arm: &'a str,
    pub route_reason: &'a str,
    pub protocol: u64,
    pub principal: &'a str,
    pub trace_id: &'a [u8],
    pub status: &'a str,
    pub queue_ns: u64,
    pub compute_ns: u64,
    pub total_ns: u64,
    pub batch_size: u64,
    pub cached: bool,
    pub shadow_of: &'a [u8],
    pub config_revision: u64,
    pub engine: &'a str,
    pub rows: u64,
    pub capture: &'a str,
    pub subject: &'a [u8],
    pub count: u64,
    pub until_ns: i64,
    pub action: &'a str,
    /// The payload is gone; what follows is empty.
    pub erased: bool,
    pub request_id: &'a str,
    pub error: &'a str,
    pub inputs: SmallVec<[TensorView<'a>; 4]>,
    pub outputs: SmallVec<[TensorView<'a>; 4]>,
    pub body: &'a [u8],
}

/// One tensor of a record.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorView<'a> {
    pub name: &'a str,
    pub datatype: &'a str,
    pub shape: SmallVec<[u64; 4]>,
    pub content: Content<'a>,
    /// Columns that were made zero or empty before.
    pub masked: SmallVec<[u64; 4]>,
}

/// What was kept of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Content<'a> {
    Data(&'a [u8]),
    Digest(&'a [u8]),
    Hashed(&'a [u8]),
    Sealed(&'a [u8]),
    Truncated(&'a [u8]),
    Dropped(&'a str),
    #[default]
    None,
}

impl<'a> View<'a> {
    /// # Errors
    /// When its bytes are no messages of `proto/ledger.proto`.
    pub fn read(frame: &Frame<'a>) -> Result<Self, &'static str> {
        let mut view = Self::read_head(frame)?;
        for field in Fields(frame.payload) {
            view.payload_field(field?)?;
        }
        Ok(view)
    }

    /// Only what is in the head; the rest is as if it had been erased, but for `erased`.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn read_head(frame: &Frame<'a>) -> Result<Self, &'static str> {
        let mut view =
            Self { seq: frame.seq, erased: frame.form == Form::Erased, ..Self::default() };
        for field in Fields(frame.head) {
            view.head_field(field?)?;
        }
        Ok(view)
    }

    fn head_field(&mut self, (field, value): (u64, Value<'a>)) -> Result<(), &'static str> {
        match field {
            1 => self.kind = value.uint()?,
            2 => self.time_ns = value.fixed()?,
            3 => self.prediction_id = value.bytes()?,
            4 => self.model = value.text()?,
            5 => self.version = value.uint()?,
            6 => self.model_digest = value.bytes()?,
            7 => self.arm = value.text()?,
            8 => self.route_reason = value.text()?,
            9 => self.protocol = value.uint()?,
            10 => self.principal = value.text()?,
            11 => self.trace_id = value.bytes()?,
            12 => self.status = value.text()?,
            13 => self.queue_ns = value.uint()?,
            14 => self.compute_ns = value.uint()?,
            15 => self.total_ns = value.uint()?,
            16 => self.batch_size = value.uint()?,
            17 => self.cached = value.uint()? != 0,
            18 => self.shadow_of = value.bytes()?,
            19 => self.config_revision = value.uint()?,
            20 => self.engine = value.text()?,
            21 => self.rows = value.uint()?,
            22 => self.capture = value.text()?,
            23 => self.subject = value.bytes()?,
            24 => self.count = value.uint()?,
            25 => self.until_ns = value.fixed()?,
            26 => self.action = value.text()?,
            // Of a later gateway.
            _ => {}
        }
        Ok(())
    }

    fn payload_field(&mut self, (field, value): (u64, Value<'a>)) -> Result<(), &'static str> {
        match field {
            1 => self.request_id = value.text()?,
            2 => self.error = value.text()?,
            3 => self.inputs.push(TensorView::read(value.bytes()?)?),
            4 => self.outputs.push(TensorView::read(value.bytes()?)?),
            5 => self.body = value.bytes()?,
            _ => {}
        }
        Ok(())
    }
}

impl<'a> TensorView<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, &'static str> {
        let mut tensor = Self::default();
        for field in Fields(bytes) {
            let (field, value) = field?;
            match field {
                1 => tensor.name = value.text()?,
                2 => tensor.datatype = value.text()?,
                3 => value.uints(&mut tensor.shape)?,
                4 => tensor.content = Content::Data(value.bytes()?),
                5 => tensor.content = Content::Digest(value.bytes()?),
                6 => tensor.content = Content::Hashed(value.bytes()?),
                7 => tensor.content = Content::Sealed(value.bytes()?),
                8 => tensor.content = Content::Truncated(value.bytes()?),
                9 => tensor.content = Content::Dropped(value.text()?),
                10 => value.uints(&mut tensor.masked)?,
                _ => {}
            }
        }
        Ok(tensor)
    }

    /// Its bytes, if they were kept whole.
    pub fn data(&self) -> Option<&'a [u8]> {
        match self.content {
            Content::Data(data) => Some(data),
            _ => None,
        }
    }
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    Fixed(u64),
    Bytes(&'a [u8]),
    Other,
}

const OTHER_TYPE: &str = "a field of another type than is written";

impl<'a> Value<'a> {
    fn uint(self) -> Result<u64, &'static str> {
        if let Self::Varint(value) = self { Ok(value) } else { Err(OTHER_TYPE) }
    }

    fn fixed(self) -> Result<i64, &'static str> {
        if let Self::Fixed(value) = self { Ok(value.cast_signed()) } else { Err(OTHER_TYPE) }
    }

    fn bytes(self) -> Result<&'a [u8], &'static str> {
        if let Self::Bytes(value) = self { Ok(value) } else { Err(OTHER_TYPE) }
    }

    fn text(self) -> Result<&'a str, &'static str> {
        std::str::from_utf8(self.bytes()?).map_err(|_| "a text that is no UTF-8")
    }

    /// Of a repeated field, packed or not.
    fn uints(self, out: &mut SmallVec<[u64; 4]>) -> Result<(), &'static str> {
        match self {
            Self::Varint(value) => out.push(value),
            _ => {
                let mut packed = self.bytes()?;
                while !packed.is_empty() {
                    out.push(varint(&mut packed)?);
                }
            }
        }
        Ok(())
    }
}

/// The fields of a message, in order.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Value<'a>), &'static str> {
        let tag = varint(&mut self.0)?;
        let value = match tag & 7 {
            0 => Value::Varint(varint(&mut self.0)?),
            1 => {
                let bytes = self.take(8)?;
                Value::Fixed(bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)))
            }
            2 => {
                let len = varint(&mut self.0)?;
                Value::Bytes(self.take(usize::try_from(len).unwrap_or(usize::MAX))?)
            }
            5 => {
                self.take(4)?;
                Value::Other
            }
            _ => return Err("a field of a type that is not known"),
        };
        Ok((tag >> 3, value))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) =
            self.0.split_at_checked(len).ok_or("a field longer than its message")?;
        self.0 = rest;
        Ok(taken)
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64, &'static str> {
    let mut value = 0;
    for at in 0..10 {
        let Some((byte, rest)) = bytes.split_first() else { return Err("half a number") };
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number of more than 64 bits")
}
