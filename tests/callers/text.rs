//! Text that callers bring, in the operator's log: one record each, read back as it was.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate::proto::inference as pb;
use tonic::transport::Endpoint;

use crate::onnx;
use crate::process::{Process, put};
use crate::support::{grpc, message};

const STRINGS: usize = 10_000;
const OVER_GRPC: usize = 1_000;
/// Characters of an id that the log shows.
const SHOWN_MAX: usize = 128;
const LINES_WAIT_MAX: Duration = Duration::from_secs(30);

/// What breaks lines, terminals, JSON and readers.
const PARTS: &[&str] = &[
    "\r",
    "\n",
    "\r\n",
    "\0",
    "\u{1b}[31m",
    "\u{1b}]0;t\u{7}",
    "\u{2028}",
    "\u{2029}",
    "\u{85}",
    "\u{202e}",
    "\u{2066}",
    "\u{200b}",
    "\u{feff}",
    "\u{e0041}",
    "\"",
    "\\",
    "\\u{a}",
    "\\n",
    "'",
    "\"}\n{\"target\":\"access\",\"model\":\"forged\"}",
    "… ",
    "…",
    "\t",
    "\u{7f}",
    "\u{8}",
    " ",
    "%0a",
    "%s%n",
    "${jndi:ldap://x}",
    "<script>",
    "é",
    "日本",
    "😀",
    "e\u{301}",
    "a",
    "id=1 ",
    ",",
];

fn hostile(at: usize) -> String {
    let mut state = at as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    };
    match at % 2000 {
        // As long as a body lets it be.
        0 => PARTS[next() % PARTS.len()].repeat(1 << 20).chars().take(1 << 20).collect(),
        // At the limit and beside it.
        1..=6 => "x".repeat(SHOWN_MAX - 3 + at % 2000),
        7..=9 => "\n".repeat(SHOWN_MAX - 8 + at % 2000),
        _ => (0..=next() % 12).map(|_| PARTS[next() % PARTS.len()]).collect(),
    }
}

/// Puts back what `\u{…}` stands for.
fn read_back(shown: &str) -> String {
    let mut out = String::new();
    let mut rest = shown;
    while let Some((before, after)) = rest.split_once("\\u{") {
        let (digits, after) = after.split_once('}').unwrap();
        out.push_str(before);
        out.push(char::from_u32(u32::from_str_radix(digits, 16).unwrap()).unwrap());
        rest = after;
    }
    out + rest
}

fn harmless(line: &str) -> bool {
    let bad = |char: char| {
        char.is_control()
            || matches!(char, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    !line.chars().any(bad)
}

fn body(id: &str) -> Vec<u8> {
    json!({"id": id, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2],
        "data": [1, 2]}]})
    .to_string()
    .into_bytes()
}

/// Waits for as many access lines.
fn access_lines(process: &Process, marker: &str, wanted: usize) -> Vec<String> {
    let start = Instant::now();
    loop {
        let lines: Vec<String> =
            process.lines.lock().iter().filter(|line| line.contains(marker)).cloned().collect();
        if lines.len() >= wanted || start.elapsed() > LINES_WAIT_MAX {
            return lines;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_hostile_ids_leave_as_many_records_that_read_back() {
    let root = tempfile::tempdir().unwrap();
    put(&root.path().join("models"), "m", &onnx::relu());
    let config = [("TIDEGATE_LOG_ACCESS", "all"), ("TIDEGATE_ENGINE_ENGINE", "tract")];
    let process = Process::start(root.path(), &config, "");
    let mut ids = Vec::new();
    let mut connection = process.connect();
    for at in 0..STRINGS - OVER_GRPC {
        let id = hostile(at);
        let (status, _, answer) = connection.post("/v2/models/m/infer", "", &body(&id));
        assert_eq!(status, 200, "{at}");
        if !id.is_empty() {
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            assert_eq!(answer["id"].as_str(), Some(id.as_str()), "{at}");
        }
        ids.push(id);
    }
    let channel = Endpoint::from_shared(format!("http://{}", process.http)).unwrap().connect_lazy();
    for at in STRINGS - OVER_GRPC..STRINGS {
        let mut asked = message("m", &[1, 2], &[1.0, 2.0]);
        asked.id = hostile(at);
        let answer: pb::ModelInferResponse = grpc(&channel, "ModelInfer", asked).await.unwrap();
        ids.push(answer.id);
        assert_eq!(ids[at], hostile(at));
    }
    // Names and headers of the same kind leave no record, or one without them.
    let mut unrecorded = 0;
    for at in 0..500 {
        let name: String =
            hostile(at + 20).bytes().take(200).map(|byte| format!("%{byte:02X}")).collect();
        // A name that a model may have would be on record.
        let name = name + "%0A";
        unrecorded += usize::from(connection.get(&format!("/v2/models/{name}/ready")).0 >= 400);
        let path = format!("/v2/models/{name}/infer");
        unrecorded += usize::from(connection.post(&path, "", b"{}").0 >= 400);
    }
    let raw = b"GET /v2/models/a\x1b\xff HTTP/1.1\r\nhost: x\r\nuser-agent: \xff\xfe\x80\r\n\r\n";
    let answer = process.connect().send(raw);
    assert!(answer.is_none_or(|(status, ..)| status >= 400));
    let invalid = [b"{\"id\":\"\xff\xfe", &body("")[7..]].concat();
    assert_eq!(process.connect().post("/v2/models/m/infer", "", &invalid).0, 400);

    let lines = access_lines(&process, "\"target\":\"access\"", STRINGS + 1);
    let mut records = Vec::new();
    for line in &lines {
        assert!(harmless(line), "{line:?}");
        let record: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line:?}"));
        assert_eq!(record["model"], "m", "{line}");
        records.push(record);
    }
    assert_eq!(records.pop().unwrap()["status"], "invalid_input");
    assert_eq!(records.len(), STRINGS);
    let (mut equal, mut cut) = (0, 0);
    for (id, record) in ids.iter().zip(&records) {
        let shown = record["request_id"].as_str().unwrap_or_default();
        let flagged = shown.ends_with('…');
        assert_eq!(flagged, id.chars().count() > SHOWN_MAX, "{shown:?}");
        let start: String = id.chars().take(SHOWN_MAX).collect();
        equal += usize::from(read_back(shown.trim_end_matches('…')) == start);
        cut += usize::from(flagged);
    }
    // Everything else that was written is a line of JSON too.
    for line in &*process.lines.lock() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{line:?}");
    }
    eprintln!(
        "{STRINGS} hostile ids: {} records, {equal} read back, {cut} cut and flagged; \
         {unrecorded} hostile names, 0 records",
        records.len()
    );
    assert_eq!(equal, STRINGS);
}

#[test]
fn in_the_text_format_too_a_record_is_one_line() {
    let root = tempfile::tempdir().unwrap();
    put(&root.path().join("models"), "m", &onnx::relu());
    let config = [("TIDEGATE_LOG_ACCESS", "all"), ("TIDEGATE_ENGINE_ENGINE", "tract")];
    let process = Process::start_logging(root.path(), &config, "", "text");
    let mut connection = process.connect();
    for at in 1..500 {
        assert_eq!(connection.post("/v2/models/m/infer", "", &body(&hostile(at))).0, 200);
    }
    let lines = access_lines(&process, " access: ", 499);
    assert_eq!(lines.len(), 499);
    for line in &*process.lines.lock() {
        assert!(harmless(line) && line.starts_with("20"), "{line:?}");
    }
}
