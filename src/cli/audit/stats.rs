//! `tidegate audit stats`: how much a ledger holds, of what, and how healthy it is.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};

use super::select::Select;
use crate::cli::admin::table::{Table, cell, plain};
use crate::cli::admin::{Client, Connection, Stop, examples, finish};
use crate::ledger::export::{ExportError, Selection, log_folder, names, scan, time};
use crate::ledger::frame::WriterId;
use crate::ledger::parquet::Manifest;
use crate::ledger::reader::{self, SegmentReader};

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit stats                                      # of a running gateway",
    "audit stats tidegate-state                       # from the files: every record is read",
    "audit stats tidegate-state --since 24h --model iris --json",
))]
pub(super) struct Args {
    /// Read this folder (of the state, the ledger or one log) instead of asking the gateway
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    select: Select,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(stats(args))
}

fn stats(args: &Args) -> Result<String, Stop> {
    let wanted = args.select.selection(None);
    let (stats, text): (Value, fn(&Value) -> String) = match &args.dir {
        Some(dir) => (of_files(dir, &wanted)?, text_of_files),
        None if wanted != Selection::default() => {
            return Err(Stop::usage("of a running gateway there are only totals: give DIR"));
        }
        None => (Client::open(&args.connection)?.get("/audit/stats")?.body, text_of_gateway),
    };
    Ok(match args.connection.json {
        true => format!("{stats:#}\n"),
        false => text(&stats),
    })
}

/// What a group of records has in common.
type Group = (&'static str, String, u64, String);

#[derive(Default)]
struct Count {
    records: u64,
    rows: u64,
    erased: u64,
    first_ns: i64,
    last_ns: i64,
}

fn of_files(dir: &Path, wanted: &Selection) -> Result<Value, Stop> {
    let log = log_folder(dir).map_err(Stop::usage)?;
    let mut groups: BTreeMap<Group, Count> = BTreeMap::new();
    let (mut first_seq, mut last_seq) = (None, None);
    scan::<ExportError>(&log, wanted, |_, view| {
        first_seq.get_or_insert(view.seq);
        last_seq = Some(view.seq);
        let kind = names::kind_name(view.kind);
        let group = (kind, view.model.to_owned(), view.version, view.status.to_owned());
        groups.entry(group).or_default().add(view.time_ns, view.rows, view.erased);
        Ok(ControlFlow::Continue(()))
    })
    .map_err(Stop::failed)?;
    let records: u64 = groups.values().map(|count| count.records).sum();
    let groups: Vec<Value> = groups.iter().map(|(group, count)| count.shown(group)).collect();
    let mut stats = json!({
        "log": log.display().to_string(), "records": records,
        "first_seq": first_seq, "last_seq": last_seq, "groups": groups,
    });
    if let (Some(all), Value::Object(segments)) = (stats.as_object_mut(), segments(&log)?) {
        all.extend(segments);
    }
    Ok(stats)
}

impl Count {
    fn add(&mut self, time_ns: i64, rows: u64, erased: bool) {
        if self.records == 0 {
            (self.first_ns, self.last_ns) = (time_ns, time_ns);
        }
        self.records += 1;
        self.rows += rows;
        self.erased += u64::from(erased);
        self.first_ns = self.first_ns.min(time_ns);
        self.last_ns = self.last_ns.max(time_ns);
    }

    fn shown(&self, (kind, model, version, status): &Group) -> Value {
        let word = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        json!({
            "kind": kind, "model": word(model), "version": (*version > 0).then_some(version),
            "status": word(status), "records": self.records, "rows": self.rows,
            "erased": self.erased, "first": time(self.first_ns), "last": time(self.last_ns),
        })
    }
}

/// The files, and how many of them are Parquet too.
fn segments(log: &Path) -> Result<Value, Stop> {
    let (mut bytes, mut sealed, mut converted) = (0, 0_u64, 0_u64);
    let mut writer: Option<WriterId> = None;
    let all = reader::segments(log).map_err(Stop::failed)?;
    let root = log.parent().map(|ledger| ledger.join(crate::ledger::parquet::FOLDER));
    for segment in &all {
        // One that is gone meanwhile has none.
        bytes += std::fs::metadata(&segment.path).map_or(0, |about| about.len());
        let reader = SegmentReader::open(segment).map_err(Stop::failed)?;
        let head = reader.head();
        writer = Some(head.writer);
        if segment.sealed {
            sealed += 1;
            let manifest = root
                .as_ref()
                .map(|root| Manifest::path(root, head.writer, head.first_seq).exists());
            converted += u64::from(manifest == Some(true));
        }
    }
    Ok(json!({
        "writer": writer.map(|writer| writer.to_string()), "segments": all.len(),
        "segments_sealed": sealed, "segments_parquet": converted, "bytes": bytes,
    }))
}

fn text_of_files(stats: &Value) -> String {
    let mut table = Table::new([
        "kind", "model", "version", "status", "records", "rows", "erased", "first", "last",
    ]);
    for group in stats["groups"].as_array().into_iter().flatten() {
        let of = |name: &str| cell(&group[name]);
        let short = |name: &str| crate::cli::admin::table::time(&group[name]);
        table.row([
            of("kind"),
            of("model"),
            of("version"),
            of("status"),
            of("records"),
            of("rows"),
            of("erased"),
            short("first"),
            short("last"),
        ]);
    }
    let mut out = String::new();
    flat(&mut out, "", stats);
    out += &table.text();
    out
}

/// Whatever it says: a line each, and a table for each list.
fn text_of_gateway(stats: &Value) -> String {
    let mut out = String::new();
    flat(&mut out, "", stats);
    for (name, list) in stats.as_object().into_iter().flatten() {
        let rows = list.as_array().into_iter().flatten().filter_map(Value::as_object);
        let rows: Vec<_> = rows.collect();
        if !rows.is_empty() {
            out += &format!("\n{}\n{}", plain(name), Table::of(&rows).text());
        }
    }
    out
}

fn flat(out: &mut String, fore: &str, value: &Value) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let name = format!("{fore}{}", plain(name));
        match value {
            Value::Object(_) => flat(out, &format!("{name}."), value),
            Value::Array(items) if items.is_empty() || items.iter().any(Value::is_object) => {}
            Value::Null => {}
            value => *out += &format!("{name}: {}\n", cell(value)),
        }
    }
}
