//! The metrics page: a small model of Prometheus families, written as text or as protobuf.
//!
//! Both forms come from the same [`Family`] values, so they cannot disagree. Protobuf messages are
//! written out here because the exporter's own need `protoc` on the machine that builds.

use std::borrow::Cow;
use std::fmt::Write as _;

use bytes::Bytes;
use prost::Message as _;

/// Content type of the text form.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Content type of the protobuf form.
pub const PROTOBUF: &str =
    "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// All samples of one metric name.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    pub name: Cow<'static, str>,
    pub help: Cow<'static, str>,
    pub kind: Kind,
    pub samples: Vec<Sample>,
}

pub type Labels = Vec<(Cow<'static, str>, String)>;

#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub labels: Labels,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Number(f64),
    Histogram {
        /// Upper bound and running count; the open bucket is `count`.
        buckets: Vec<(f64, u64)>,
        sum: f64,
        count: u64,
    },
}

impl Family {
    pub fn new(name: &'static str, kind: Kind, help: &'static str) -> Self {
        Self { name: name.into(), help: help.into(), kind, samples: Vec::new() }
    }

    pub fn push(&mut self, labels: Labels, value: f64) {
        self.samples.push(Sample { labels, value: Value::Number(value) });
    }

    /// Adds a histogram from separate bucket counts, the open one last.
    pub fn push_histogram(
        &mut self,
        labels: Labels,
        bounds: impl Iterator<Item = f64>,
        counts: &[u64],
        sum: f64,
    ) {
        let mut running = 0;
        let buckets = bounds.zip(counts).map(|(bound, count)| {
            running += count;
            (bound, running)
        });
        let buckets = buckets.collect();
        let count = counts.iter().sum();
        self.samples.push(Sample { labels, value: Value::Histogram { buckets, sum, count } });
    }
}

/// The page in the form that `accept` prefers, with its content type. Families without samples
/// are left out.
pub fn render(families: &[Family], accept: Option<&str>) -> (&'static str, Bytes) {
    if accept.is_some_and(wants_protobuf) {
        (PROTOBUF, protobuf(families))
    } else {
        (TEXT, text(families).into())
    }
}

/// Whether an `Accept` header ranks delimited protobuf at least as high as anything else.
fn wants_protobuf(accept: &str) -> bool {
    let mut protobuf = 0.0;
    let mut other = 0.0;
    for range in accept.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let (mut quality, mut family, mut delimited) = (1.0, false, false);
        for part in parts {
            match part.split_once('=') {
                Some(("q", value)) => quality = value.trim().parse().unwrap_or(0.0),
                Some(("proto", value)) => family = value == "io.prometheus.client.MetricFamily",
                Some(("encoding", value)) => delimited = value == "delimited",
                _ => {}
            }
        }
        if media.eq_ignore_ascii_case("application/vnd.google.protobuf") && family && delimited {
            protobuf = f64::max(protobuf, quality);
        } else if media.starts_with("text/") || media == "*/*" {
            other = f64::max(other, quality);
        }
    }
    protobuf > 0.0 && protobuf >= other
}

/// Prometheus text format 0.0.4.
pub fn text(families: &[Family]) -> String {
    let mut out = String::with_capacity(64 * 1024);
    for family in families.iter().filter(|family| !family.samples.is_empty()) {
        let name = &*family.name;
        let help = family.help.replace('\\', r"\\").replace('\n', r"\n");
        out.extend([
            "# HELP ",
            name,
            " ",
            &help,
            "\n# TYPE ",
            name,
            " ",
            family.kind.as_str(),
            "\n",
        ]);
        for sample in &family.samples {
            write_sample(&mut out, name, sample);
        }
    }
    out
}

fn write_sample(out: &mut String, name: &str, sample: &Sample) {
    match &sample.value {
        Value::Number(value) => write_line(out, name, "", &sample.labels, None, *value),
        Value::Histogram { buckets, sum, count } => {
            let open = (f64::INFINITY, *count);
            for (bound, running) in buckets.iter().chain([&open]) {
                let running = *running as f64;
                write_line(out, name, "_bucket", &sample.labels, Some(*bound), running);
            }
            write_line(out, name, "_sum", &sample.labels, None, *sum);
            write_line(out, name, "_count", &sample.labels, None, *count as f64);
        }
    }
}

fn write_line(
    out: &mut String,
    name: &str,
    suffix: &str,
    labels: &Labels,
    le: Option<f64>,
    value: f64,
) {
    out.extend([name, suffix]);
    let mut before = '{';
    for (label, value) in labels {
        out.push(before);
        out.extend([&**label, "=\""]);
        escape_into(out, value);
        out.push('"');
        before = ',';
    }
    if let Some(bound) = le {
        out.push(before);
        out.push_str("le=\"");
        write_number(out, bound);
        out.push('"');
        before = ',';
    }
    out.push_str(if before == ',' { "} " } else { " " });
    write_number(out, value);
    out.push('\n');
}

fn escape_into(out: &mut String, value: &str) {
    for char in value.chars() {
        match char {
            '\\' => out.push_str(r"\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str(r"\n"),
            other => out.push(other),
        }
    }
}

/// Plain decimal, which every reader of the format takes, never with an exponent.
fn write_number(out: &mut String, value: f64) {
    if value.is_infinite() {
        out.push_str(if value > 0.0 { "+Inf" } else { "-Inf" });
    } else {
        write!(out, "{value}").expect("writing to a string cannot fail");
    }
}

/// Reads families back from text, as the exporter renders it: counters and gauges.
///
/// Lines it does not understand are left out.
pub fn parse(text: &str) -> Vec<Family> {
    let mut families: Vec<Family> = Vec::new();
    let mut help = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map_or("", |(_, text)| text);
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let kind = if kind == "counter" { Kind::Counter } else { Kind::Gauge };
            let (name, help) = (Cow::Owned(name.to_owned()), Cow::Owned(help.to_owned()));
            families.push(Family { name, help, kind, samples: Vec::new() });
        } else if let (Some((name, sample)), Some(family)) = (parse_line(line), families.last_mut())
            && name == family.name
        {
            family.samples.push(sample);
        }
    }
    families
}

fn parse_line(line: &str) -> Option<(&str, Sample)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, inside) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}')?),
        None => (series, ""),
    };
    let mut labels = Labels::new();
    let mut rest = inside;
    while !rest.is_empty() {
        let (label, after) = rest.split_once("=\"")?;
        let (value, after) = parse_quoted(after)?;
        labels.push((Cow::Owned(label.to_owned()), value));
        rest = after.strip_prefix(',').unwrap_or(after);
    }
    Some((name, Sample { labels, value: Value::Number(value.parse().ok()?) }))
}

/// A label value up to its closing quote, and what follows that.
fn parse_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

/// Length-delimited `io.prometheus.client.MetricFamily` messages.
fn protobuf(families: &[Family]) -> Bytes {
    let mut out = Vec::with_capacity(64 * 1024);
    for family in families.iter().filter(|family| !family.samples.is_empty()) {
        out.extend(wire::MetricFamily::from(family).encode_length_delimited_to_vec());
    }
    out.into()
}

/// The part of `io.prometheus.client` that we write, after `metrics.proto` of client_model.
pub mod wire {
    use super::{Family, Kind, Sample, Value};

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct MetricFamily {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(string, optional, tag = "2")]
        pub help: Option<String>,
        /// 0 counter, 1 gauge, 4 histogram.
        #[prost(int32, optional, tag = "3")]
        pub kind: Option<i32>,
        #[prost(message, repeated, tag = "4")]
        pub metric: Vec<Metric>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Metric {
        #[prost(message, repeated, tag = "1")]
        pub label: Vec<LabelPair>,
        #[prost(message, optional, tag = "2")]
        pub gauge: Option<Number>,
        #[prost(message, optional, tag = "3")]
        pub counter: Option<Number>,
        #[prost(message, optional, tag = "7")]
        pub histogram: Option<Histogram>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct LabelPair {
        #[prost(string, optional, tag = "1")]
        pub name: Option<String>,
        #[prost(string, optional, tag = "2")]
        pub value: Option<String>,
    }

    /// `Gauge` and `Counter` are the same on the wire.
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Number {
        #[prost(double, optional, tag = "1")]
        pub value: Option<f64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Histogram {
        #[prost(uint64, optional, tag = "1")]
        pub sample_count: Option<u64>,
        #[prost(double, optional, tag = "2")]
        pub sample_sum: Option<f64>,
        #[prost(message, repeated, tag = "3")]
        pub bucket: Vec<Bucket>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Bucket {
        #[prost(uint64, optional, tag = "1")]
        pub cumulative_count: Option<u64>,
        #[prost(double, optional, tag = "2")]
        pub upper_bound: Option<f64>,
    }

    impl From<&Family> for MetricFamily {
        fn from(family: &Family) -> Self {
            let kind = match family.kind {
                Kind::Counter => 0,
                Kind::Gauge => 1,
                Kind::Histogram => 4,
            };
            Self {
                name: Some(family.name.to_string()),
                help: Some(family.help.to_string()),
                kind: Some(kind),
                metric: family.samples.iter().map(|sample| metric(family.kind, sample)).collect(),
            }
        }
    }

    fn metric(kind: Kind, sample: &Sample) -> Metric {
        let label = |(name, value): &(std::borrow::Cow<'static, str>, String)| LabelPair {
            name: Some(name.to_string()),
            value: Some(value.clone()),
        };
        let mut metric =
            Metric { label: sample.labels.iter().map(label).collect(), ..Metric::default() };
        match &sample.value {
            Value::Number(value) => {
                let number = Some(Number { value: Some(*value) });
                match kind {
                    Kind::Counter => metric.counter = number,
                    Kind::Gauge | Kind::Histogram => metric.gauge = number,
                }
            }
            Value::Histogram { buckets, sum, count } => {
                let bucket = |(bound, running): &(f64, u64)| Bucket {
                    cumulative_count: Some(*running),
                    upper_bound: Some(*bound),
                };
                metric.histogram = Some(Histogram {
                    sample_count: Some(*count),
                    sample_sum: Some(*sum),
                    bucket: buckets.iter().map(bucket).collect(),
                });
            }
        }
        metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_help_are_escaped_and_read_back() {
        let mut family = Family::new("x_total", Kind::Counter, "a\\b\nc");
        family.push(vec![("l".into(), "q\"b\\s\nn,}".into())], 3.0);
        family.push(Labels::new(), f64::INFINITY);
        let page = text(std::slice::from_ref(&family));
        let want = "# HELP x_total a\\\\b\\nc\n# TYPE x_total counter\n\
                    x_total{l=\"q\\\"b\\\\s\\nn,}\"} 3\nx_total +Inf\n";
        assert_eq!(page, want);
        assert_eq!(parse(&page)[0].samples, family.samples);
    }

    #[test]
    fn protobuf_is_given_only_to_those_who_prefer_it() {
        let prometheus = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;\
                          encoding=delimited;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert!(wants_protobuf(prometheus));
        assert!(wants_protobuf(PROTOBUF));
        for accept in [
            "",
            "*/*",
            "text/plain",
            "application/vnd.google.protobuf",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;\
             encoding=delimited;q=0.2,text/plain;q=0.5",
        ] {
            assert!(!wants_protobuf(accept), "{accept}");
        }
    }

    #[test]
    fn small_and_large_numbers_have_no_exponent() {
        let mut out = String::new();
        for value in [0.000_025, 1e15, 0.0, -1.5] {
            write_number(&mut out, value);
            out.push(' ');
        }
        assert_eq!(out, "0.000025 1000000000000000 0 -1.5 ");
    }
}
