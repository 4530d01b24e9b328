//! One Parquet file: which columns it has, and its rows.

use std::io::Write;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::arrow::arrow_writer::ArrowWriterOptions;
use ::parquet::basic::{Compression, Encoding, ZstdLevel};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties};
use ::parquet::schema::types::ColumnPath;
use arrow_array::builder::{
    ArrayBuilder, BooleanBuilder, Float32Builder, Float64Builder, Int8Builder, Int16Builder,
    Int32Builder, Int64Builder, ListBuilder, StringBuilder, TimestampNanosecondBuilder,
    UInt8Builder, UInt16Builder, UInt32Builder, UInt64Builder,
};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{ArrowError, DataType as ArrowType, Field, Schema, SchemaRef, TimeUnit};

use super::labels::LabelColumns;
use super::{ROW_GROUP_BYTES_MAX, ROW_GROUP_ROWS};
use crate::domain::{BytesElements, DataType};
use crate::ledger::export::names::{digest_text, hex_text, kind_name, protocol_name, uuid_text};
use crate::ledger::export::{Labels, TensorView, View, json_text, tensors};

/// Tensors of one file that get columns of their own; others are in `inputs` and `outputs`.
const TENSORS_MAX: usize = 512;
/// Data of a tensor that `inputs` or `outputs` holds as JSON although a column has it.
const JSON_BYTES_MAX: usize = 16 << 10;
/// Rows, and bytes of records, that are turned into arrays at a time.
const BATCH_ROWS: usize = 8 << 10;
const BATCH_BYTES: usize = 4 << 20;

/// What a file will hold.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub(super) rows: u64,
    pub(super) first_seq: u64,
    pub(super) last_seq: u64,
    pub(super) first_ns: i64,
    pub(super) last_ns: i64,
    seen: Vec<Column>,
}

/// A tensor's column.
#[derive(Clone, Debug)]
pub(super) struct Column {
    output: bool,
    tensor: String,
    datatype: DataType,
    pub(super) name: String,
}

impl Column {
    fn is(&self, output: bool, tensor: &TensorView<'_>) -> bool {
        self.output == output
            && self.tensor == tensor.name
            && self.datatype.name() == tensor.datatype
    }
}

impl Survey {
    pub(super) fn add(&mut self, view: &View<'_>) {
        if self.rows == 0 {
            (self.first_seq, self.first_ns, self.last_ns) = (view.seq, view.time_ns, view.time_ns);
        }
        self.rows += 1;
        self.last_seq = view.seq;
        self.first_ns = self.first_ns.min(view.time_ns);
        self.last_ns = self.last_ns.max(view.time_ns);
        for (output, list) in [(false, &view.inputs), (true, &view.outputs)] {
            for tensor in list.iter().filter(|tensor| tensor.data().is_some()) {
                self.see(output, tensor);
            }
        }
    }

    fn see(&mut self, output: bool, tensor: &TensorView<'_>) {
        if self.seen.iter().any(|column| column.is(output, tensor))
            || self.seen.len() == TENSORS_MAX
        {
            return;
        }
        let Ok(datatype) = tensor.datatype.parse() else { return };
        let tensor = tensor.name.to_owned();
        self.seen.push(Column { output, tensor, datatype, name: String::new() });
    }

    /// With names that differ, in whatever case. Of one tensor with several datatypes the first has
    /// the plain name.
    pub(super) fn columns(&self) -> Vec<Column> {
        let mut columns = self.seen.clone();
        let mut taken: Vec<String> = Vec::new();
        for column in &mut columns {
            let fore = if column.output { "out" } else { "in" };
            let plain = format!("{fore}_{}", column.tensor);
            let typed = format!("{plain}_{}", column.datatype.name().to_lowercase());
            let numbered = (2_usize..).map(|number| format!("{typed}_{number}"));
            let names = [plain, typed.clone()].into_iter().chain(numbered);
            let free = |name: &String| {
                let (name, shape) = (name.to_lowercase(), shape_name(name).to_lowercase());
                !taken.contains(&name) && !taken.contains(&shape)
            };
            column.name = names.into_iter().find(free).unwrap_or_default();
            taken.push(column.name.to_lowercase());
            taken.push(shape_name(&column.name).to_lowercase());
        }
        columns
    }
}

fn shape_name(column: &str) -> String {
    format!("{column}_shape")
}

/// The columns that every file has: how they are built, and their types.
macro_rules! fixed {
    ($($name:ident: $builder:ident, $type:expr;)+) => {
        struct Fixed { $($name: $builder),+ }

        impl Fixed {
            fn new() -> Self {
                Self { $($name: $builder::default().with_type(&$type)),+ }
            }

            fn fields() -> Vec<Field> {
                vec![$(Field::new(stringify!($name), $type, true)),+]
            }

            fn finish(&mut self) -> Vec<ArrayRef> {
                vec![$(ArrayBuilder::finish(&mut self.$name)),+]
            }
        }
    };
}

/// What only a builder of times needs: its zone is in its type.
trait WithType: Sized {
    fn with_type(self, _: &ArrowType) -> Self {
        self
    }
}

impl WithType for BooleanBuilder {}
impl WithType for Float64Builder {}
impl WithType for StringBuilder {}
impl WithType for UInt64Builder {}
impl WithType for TimestampNanosecondBuilder {
    fn with_type(self, data_type: &ArrowType) -> Self {
        self.with_data_type(data_type.clone())
    }
}

pub(super) fn moment() -> ArrowType {
    ArrowType::Timestamp(TimeUnit::Nanosecond, Some("UTC".into()))
}

fixed! {
    seq: UInt64Builder, ArrowType::UInt64;
    writer: StringBuilder, ArrowType::Utf8;
    prediction_id: StringBuilder, ArrowType::Utf8;
    request_id: StringBuilder, ArrowType::Utf8;
    time: TimestampNanosecondBuilder, moment();
    model: StringBuilder, ArrowType::Utf8;
    version: UInt64Builder, ArrowType::UInt64;
    model_digest: StringBuilder, ArrowType::Utf8;
    arm: StringBuilder, ArrowType::Utf8;
    route_reason: StringBuilder, ArrowType::Utf8;
    protocol: StringBuilder, ArrowType::Utf8;
    principal: StringBuilder, ArrowType::Utf8;
    trace_id: StringBuilder, ArrowType::Utf8;
    status: StringBuilder, ArrowType::Utf8;
    queue_us: Float64Builder, ArrowType::Float64;
    compute_us: Float64Builder, ArrowType::Float64;
    total_us: Float64Builder, ArrowType::Float64;
    batch_size: UInt64Builder, ArrowType::UInt64;
    cached: BooleanBuilder, ArrowType::Boolean;
    shadow_of: StringBuilder, ArrowType::Utf8;
    inputs: StringBuilder, ArrowType::Utf8;
    outputs: StringBuilder, ArrowType::Utf8;
    config_revision: UInt64Builder, ArrowType::UInt64;
    engine: StringBuilder, ArrowType::Utf8;
    kind: StringBuilder, ArrowType::Utf8;
    rows: UInt64Builder, ArrowType::UInt64;
    error: StringBuilder, ArrowType::Utf8;
    erased: BooleanBuilder, ArrowType::Boolean;
    capture: StringBuilder, ArrowType::Utf8;
    subject: StringBuilder, ArrowType::Utf8;
    count: UInt64Builder, ArrowType::UInt64;
    until: TimestampNanosecondBuilder, moment();
    action: StringBuilder, ArrowType::Utf8;
    body: StringBuilder, ArrowType::Utf8;
}

/// Columns of few values, which are kept as numbers of those.
const WORDS: &[&str] = &[
    "writer",
    "model",
    "version",
    "model_digest",
    "arm",
    "route_reason",
    "protocol",
    "principal",
    "status",
    "batch_size",
    "config_revision",
    "engine",
    "kind",
    "rows",
    "capture",
    "action",
];
/// Columns of numbers that grow, which are kept as differences.
const GROWING: &[&str] = &["seq", "time"];
/// Columns by which a reader leaves out row groups.
const SEARCHED: &[&str] = &["seq", "time", "prediction_id", "model", "version", "status", "kind"];

/// Place of `model` among the fixed columns.
const MODEL: usize = 5;

/// A file that is being written.
pub(super) struct Sheet<W: Write + Send> {
    writer: ArrowWriter<W>,
    schema: SchemaRef,
    with_model: bool,
    fixed: Fixed,
    typed: Vec<Typed>,
    /// Of an export of predictions with their labels.
    labels: Option<LabelColumns>,
    rows: usize,
    bytes: usize,
    text: Vec<u8>,
}

/// A tensor's column in the making, and its shape's.
struct Typed {
    column: Column,
    values: Values,
    shape: ListBuilder<UInt64Builder>,
    /// It has its value of this row.
    done: bool,
}

impl<W: Write + Send> Sheet<W> {
    pub(super) fn new(
        out: W,
        columns: Vec<Column>,
        about: &[(&str, String)],
        with_model: bool,
        labels: Option<Arc<Labels>>,
    ) -> Result<Self, ParquetError> {
        let labels = labels.map(LabelColumns::new);
        let mut fields = Fixed::fields();
        if !with_model {
            fields.remove(MODEL);
        }
        for column in &columns {
            fields.push(Field::new(&column.name, list_of(Values::item(column.datatype)), true));
            let shape = shape_name(&column.name);
            fields.push(Field::new(shape, list_of(ArrowType::UInt64), true));
        }
        fields.extend(labels.iter().flat_map(LabelColumns::fields));
        let schema = Arc::new(Schema::new(fields));
        let options = ArrowWriterOptions::new()
            .with_properties(properties(about))
            // Plain Parquet: the types of other programs, not Arrow's.
            .with_skip_arrow_metadata(true);
        let writer = ArrowWriter::try_new_with_options(out, Arc::clone(&schema), options)?;
        let typed = columns.into_iter().map(Typed::new).collect();
        let fixed = Fixed::new();
        let (rows, bytes, text) = (0, 0, Vec::new());
        Ok(Self { writer, schema, with_model, fixed, typed, labels, rows, bytes, text })
    }

    pub(super) fn push(&mut self, writer: &str, view: &View<'_>) -> Result<(), ParquetError> {
        self.head(writer, view);
        self.payload(view);
        for (output, list) in [(false, &view.inputs), (true, &view.outputs)] {
            for tensor in list {
                let column = self.typed.iter_mut().find(|typed| typed.column.is(output, tensor));
                if let Some(typed) = column {
                    typed.push(tensor);
                }
                self.bytes += tensor.data().map_or(0, <[u8]>::len);
            }
        }
        self.typed.iter_mut().for_each(Typed::end_row);
        if let Some(labels) = &mut self.labels {
            labels.push(view.prediction_id);
        }
        self.rows += 1;
        self.bytes += 512;
        match self.rows == BATCH_ROWS || self.bytes >= BATCH_BYTES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn head(&mut self, writer: &str, view: &View<'_>) {
        let to = &mut self.fixed;
        to.seq.append_value(view.seq);
        to.writer.append_value(writer);
        to.prediction_id.append_option(uuid_text(view.prediction_id));
        to.time.append_value(view.time_ns);
        to.model.append_option(word(view.model));
        to.version.append_option((view.version > 0).then_some(view.version));
        to.model_digest.append_option(digest_text("sha256", view.model_digest));
        to.arm.append_option(word(view.arm));
        to.route_reason.append_option(word(view.route_reason));
        to.protocol.append_option(protocol_name(view.protocol));
        to.principal.append_option(word(view.principal));
        to.trace_id.append_option(hex_text(view.trace_id));
        to.status.append_option(word(view.status));
        to.queue_us.append_value(micros(view.queue_ns));
        to.compute_us.append_value(micros(view.compute_ns));
        to.total_us.append_value(micros(view.total_ns));
        to.batch_size.append_value(view.batch_size);
        to.cached.append_value(view.cached);
        to.shadow_of.append_option(uuid_text(view.shadow_of));
        to.config_revision.append_value(view.config_revision);
        to.engine.append_option(word(view.engine));
        to.kind.append_value(kind_name(view.kind));
        to.rows.append_value(view.rows);
        to.erased.append_value(view.erased);
        to.capture.append_option(word(view.capture));
        to.subject.append_option(hex_text(view.subject));
        to.count.append_option((view.count > 0).then_some(view.count));
        to.until.append_option((view.until_ns != 0).then_some(view.until_ns));
        to.action.append_option(word(view.action));
    }

    fn payload(&mut self, view: &View<'_>) {
        let to = &mut self.fixed;
        to.request_id.append_option(word(view.request_id));
        to.error.append_option(word(view.error));
        to.body.append_option(body(view.body));
        if view.erased {
            to.inputs.append_null();
            to.outputs.append_null();
            return;
        }
        for (output, list) in [(false, &view.inputs), (true, &view.outputs)] {
            self.text.clear();
            tensors(&mut self.text, list, |tensor| {
                let large = tensor.data().is_some_and(|data| data.len() > JSON_BYTES_MAX);
                let has = |typed: &&Typed| typed.column.is(output, tensor) && typed.holds(tensor);
                let typed = large.then(|| self.typed.iter().find(has)).flatten();
                typed.map(|typed| typed.column.name.as_str())
            });
            let column = if output { &mut to.outputs } else { &mut to.inputs };
            column.append_option(std::str::from_utf8(&self.text).ok());
        }
    }

    fn flush(&mut self) -> Result<(), ParquetError> {
        let mut arrays = self.fixed.finish();
        if !self.with_model {
            arrays.remove(MODEL);
        }
        for typed in &mut self.typed {
            arrays.push(typed.values.finish());
            arrays.push(ArrayBuilder::finish(&mut typed.shape));
        }
        arrays.extend(self.labels.iter_mut().flat_map(LabelColumns::finish));
        (self.rows, self.bytes) = (0, 0);
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), arrays).map_err(arrow)?;
        self.writer.write(&batch)
    }

    pub(super) fn finish(mut self) -> Result<W, ParquetError> {
        self.flush()?;
        self.writer.into_inner()
    }
}

fn arrow(error: ArrowError) -> ParquetError {
    ParquetError::from(error)
}

fn properties(about: &[(&str, String)]) -> WriterProperties {
    let about = about.iter().map(|(key, value)| KeyValue::new((*key).to_owned(), value.clone()));
    let mut properties = WriterProperties::builder()
        .set_created_by(format!("tidegate version {}", env!("CARGO_PKG_VERSION")))
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES_MAX))
        .set_key_value_metadata(Some(about.collect()))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None);
    let path = |name: &str| ColumnPath::from(name);
    for name in WORDS {
        properties = properties.set_column_dictionary_enabled(path(name), true);
    }
    for name in GROWING {
        properties = properties.set_column_encoding(path(name), Encoding::DELTA_BINARY_PACKED);
    }
    for name in SEARCHED {
        properties = properties.set_column_statistics_enabled(path(name), EnabledStatistics::Chunk);
    }
    properties.build()
}

pub(super) fn list_of(item: ArrowType) -> ArrowType {
    ArrowType::List(Arc::new(Field::new_list_field(item, true)))
}

fn word(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// Exact up to 2⁵³ ns, a hundred days.
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}

/// JSON as it was written; what is no text, as JSON of base64.
fn body(bytes: &[u8]) -> Option<String> {
    let whole = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            use base64::Engine as _;
            let base64 = base64::engine::general_purpose::STANDARD.encode(bytes);
            let mut out = b"{\"base64\":".to_vec();
            json_text(&mut out, &base64);
            String::from_utf8_lossy(&out).into_owned() + "}"
        }
    };
    (!bytes.is_empty()).then(|| whole(bytes))
}

impl Typed {
    fn new(column: Column) -> Self {
        let values = Values::new(column.datatype);
        Self { column, values, shape: ListBuilder::new(UInt64Builder::new()), done: false }
    }

    /// Whether the column has every bit of this tensor.
    fn holds(&self, tensor: &TensorView<'_>) -> bool {
        let texts = |data| {
            BytesElements::new(data)
                .all(|element| element.is_ok_and(|bytes| std::str::from_utf8(bytes).is_ok()))
        };
        tensor.data().is_some_and(|data| match self.column.datatype.size() {
            Some(size) if self.column.datatype == DataType::Bool => {
                debug_assert_eq!(size, 1, "a byte each");
                data.iter().all(|byte| *byte <= 1)
            }
            Some(size) => data.len() % size == 0,
            None => texts(data),
        })
    }

    fn push(&mut self, tensor: &TensorView<'_>) {
        // A second one of the same name is in the JSON.
        if self.done {
            return;
        }
        let Some(data) = tensor.data() else { return };
        if self.values.push(self.column.datatype, data) {
            tensor.shape.iter().for_each(|dim| self.shape.values().append_value(*dim));
            self.shape.append(true);
            self.done = true;
        }
    }

    fn end_row(&mut self) {
        if !std::mem::take(&mut self.done) {
            self.values.null();
            self.shape.append(false);
        }
    }
}

/// Lists of a tensor's elements. Halves are singles here, which have all of theirs.
enum Values {
    Bool(ListBuilder<BooleanBuilder>),
    Uint8(ListBuilder<UInt8Builder>),
    Uint16(ListBuilder<UInt16Builder>),
    Uint32(ListBuilder<UInt32Builder>),
    Uint64(ListBuilder<UInt64Builder>),
    Int8(ListBuilder<Int8Builder>),
    Int16(ListBuilder<Int16Builder>),
    Int32(ListBuilder<Int32Builder>),
    Int64(ListBuilder<Int64Builder>),
    Fp32(ListBuilder<Float32Builder>),
    Fp64(ListBuilder<Float64Builder>),
    Text(ListBuilder<StringBuilder>),
}

/// The same expression for whatever builder it is.
macro_rules! each {
    ($values:expr, $list:ident => $do:expr) => {
        match $values {
            Self::Bool($list) => $do,
            Self::Uint8($list) => $do,
            Self::Uint16($list) => $do,
            Self::Uint32($list) => $do,
            Self::Uint64($list) => $do,
            Self::Int8($list) => $do,
            Self::Int16($list) => $do,
            Self::Int32($list) => $do,
            Self::Int64($list) => $do,
            Self::Fp32($list) => $do,
            Self::Fp64($list) => $do,
            Self::Text($list) => $do,
        }
    };
}

impl Values {
    fn new(datatype: DataType) -> Self {
        match datatype {
            DataType::Bool => Self::Bool(ListBuilder::default()),
            DataType::Uint8 => Self::Uint8(ListBuilder::default()),
            DataType::Uint16 => Self::Uint16(ListBuilder::default()),
            DataType::Uint32 => Self::Uint32(ListBuilder::default()),
            DataType::Uint64 => Self::Uint64(ListBuilder::default()),
            DataType::Int8 => Self::Int8(ListBuilder::default()),
            DataType::Int16 => Self::Int16(ListBuilder::default()),
            DataType::Int32 => Self::Int32(ListBuilder::default()),
            DataType::Int64 => Self::Int64(ListBuilder::default()),
            DataType::Fp16 | DataType::Bf16 | DataType::Fp32 => Self::Fp32(ListBuilder::default()),
            DataType::Fp64 => Self::Fp64(ListBuilder::default()),
            DataType::Bytes => Self::Text(ListBuilder::default()),
        }
    }

    fn item(datatype: DataType) -> ArrowType {
        match datatype {
            DataType::Bool => ArrowType::Boolean,
            DataType::Uint8 => ArrowType::UInt8,
            DataType::Uint16 => ArrowType::UInt16,
            DataType::Uint32 => ArrowType::UInt32,
            DataType::Uint64 => ArrowType::UInt64,
            DataType::Int8 => ArrowType::Int8,
            DataType::Int16 => ArrowType::Int16,
            DataType::Int32 => ArrowType::Int32,
            DataType::Int64 => ArrowType::Int64,
            DataType::Fp16 | DataType::Bf16 | DataType::Fp32 => ArrowType::Float32,
            DataType::Fp64 => ArrowType::Float64,
            DataType::Bytes => ArrowType::Utf8,
        }
    }

    fn null(&mut self) {
        each!(self, list => list.append(false));
    }

    fn finish(&mut self) -> ArrayRef {
        each!(self, list => ArrayBuilder::finish(list))
    }

    /// Appends the elements; not if the bytes are none of the datatype.
    fn push(&mut self, datatype: DataType, data: &[u8]) -> bool {
        macro_rules! numbers {
            ($list:expr, $type:ty, $as:expr) => {{
                let (chunks, rest) = data.as_chunks::<{ size_of::<$type>() }>();
                if !rest.is_empty() {
                    return false;
                }
                let (values, make) = ($list.values(), $as);
                for chunk in chunks {
                    values.append_value(make(<$type>::from_le_bytes(*chunk)));
                }
                $list.append(true);
            }};
        }
        match (self, datatype) {
            (Self::Bool(list), _) => {
                if data.iter().any(|byte| *byte > 1) {
                    return false;
                }
                data.iter().for_each(|byte| list.values().append_value(*byte == 1));
                list.append(true);
            }
            (Self::Uint8(list), _) => numbers!(list, u8, |value| value),
            (Self::Uint16(list), _) => numbers!(list, u16, |value| value),
            (Self::Uint32(list), _) => numbers!(list, u32, |value| value),
            (Self::Uint64(list), _) => numbers!(list, u64, |value| value),
            (Self::Int8(list), _) => numbers!(list, i8, |value| value),
            (Self::Int16(list), _) => numbers!(list, i16, |value| value),
            (Self::Int32(list), _) => numbers!(list, i32, |value| value),
            (Self::Int64(list), _) => numbers!(list, i64, |value| value),
            (Self::Fp32(list), DataType::Fp16) => numbers!(list, half::f16, half::f16::to_f32),
            (Self::Fp32(list), DataType::Bf16) => numbers!(list, half::bf16, half::bf16::to_f32),
            (Self::Fp32(list), _) => numbers!(list, f32, |value| value),
            (Self::Fp64(list), _) => numbers!(list, f64, |value| value),
            (Self::Text(list), _) => {
                let all: Result<Vec<&[u8]>, _> = BytesElements::new(data).collect();
                let Ok(all) = all else { return false };
                // One that is no text is in the JSON.
                let texts = all.into_iter().map(|bytes| std::str::from_utf8(bytes).ok());
                texts.for_each(|text| list.values().append_option(text));
                list.append(true);
            }
        }
        true
    }
}
