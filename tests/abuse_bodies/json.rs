//! JSON: how much memory a body may cost, and what is refused.

use super::gateway::Gateway;
use super::{ALONE, MIB, mib};

const INT64: &str = "/v2/models/identity_int64/infer";

fn input(datatype: &str, shape: &str, data: &str) -> String {
    format!(
        r#"{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}"#
    )
}

fn list(element: &str, count: usize) -> String {
    let mut text = String::with_capacity(count * (element.len() + 1) + 2);
    text.push('[');
    for at in 0..count {
        if at > 0 {
            text.push(',');
        }
        text.push_str(element);
    }
    text.push(']');
    text
}

#[test]
fn a_body_costs_at_most_twenty_times_itself() {
    let _alone = ALONE.lock();
    let columns = |count: usize| {
        let names: Vec<String> = (0..count).map(|at| format!("\"{at}\"")).collect();
        format!("[{}]", names.join(","))
    };
    let record = |count: usize| {
        let members: Vec<String> = (0..count).map(|at| format!("\"{at}\":0")).collect();
        format!("{{{}}}", members.join(","))
    };
    let key = "k".repeat(60 << 20);
    let cases: Vec<(&str, &str, String)> = vec![
        ("ten million numbers", INT64, input("INT64", "[5000000,2]", &list("0", 10_000_000))),
        (
            "empty strings",
            "/v2/models/identity_bytes/infer",
            input("BYTES", "[1000000,2]", &list("\"\"", 2_000_000)),
        ),
        (
            "instances",
            "/v1/models/identity_int64:predict",
            format!("{{\"instances\":{}}}", list("[0,0]", 1_000_000)),
        ),
        (
            "table by rows",
            "/invocations",
            format!(
                "{{\"dataframe_split\":{{\"columns\":{},\"data\":{}}}}}",
                columns(2),
                list("[0,0]", 100_000)
            ),
        ),
        (
            "wide table",
            "/invocations",
            format!(
                "{{\"dataframe_split\":{{\"columns\":{},\"data\":{}}}}}",
                columns(1000),
                list(&list("0", 1000), 2000)
            ),
        ),
        (
            "table by records",
            "/invocations",
            format!("{{\"dataframe_records\":{}}}", list(&record(20), 20_000)),
        ),
        ("one key of 60 MiB", INT64, format!("{{\"{key}\":1}}")),
        ("250,000 levels", INT64, format!("{{\"a\":{}", "[".repeat(250_000))),
    ];
    let mut worst = 0.0_f64;
    for (name, path, body) in cases {
        // A new one each: what an earlier body left free would hide what this one takes.
        let mut gateway = Gateway::start("");
        assert!(gateway.is_well());
        gateway.forget_peak();
        let (before, _) = gateway.memory();
        let (status, _) = gateway.post(path, "", body.as_bytes());
        let (_, peak) = gateway.memory();
        let growth = peak.saturating_sub(before);
        let factor = growth as f64 / body.len() as f64;
        eprintln!(
            "{name}: {:.1} MiB of JSON, memory +{:.1} MiB, {factor:.1} times, answer {status}",
            mib(body.len() as u64),
            mib(growth)
        );
        assert!(status < 500 || status == 503, "{name}: {status}");
        // Of a small body most is the program's own first use of its buffers.
        if body.len() as u64 > MIB {
            worst = worst.max(factor);
        }
        assert!(gateway.is_alive() && gateway.settles(), "{name}");
    }
    eprintln!("worst amplification: {worst:.1}");
    assert!(worst <= 20.0, "{worst}");
}

#[test]
fn hostile_json_is_refused_with_what_was_expected() {
    let _alone = ALONE.lock();
    let mut gateway = Gateway::start("");
    let int64 = |data: &str| input("INT64", "[1,2]", data);
    let fp32 = |data: &str| input("FP32", "[1,2]", data);
    let utf16: Vec<u8> = int64("[1,2]").encode_utf16().flat_map(u16::to_le_bytes).collect();
    let cases: Vec<(&str, &str, Vec<u8>, &str)> = vec![
        (
            "1e400",
            "fp32",
            fp32("[1e400,0]").into(),
            "input 'x': element 0 is 1e400, expected a finite",
        ),
        (
            "beyond FP32",
            "fp32",
            fp32("[0,1e39]").into(),
            "input 'x': element 1 is 1e39, expected a finite",
        ),
        ("NaN", "fp32", fp32("[NaN,0]").into(), "request body: expected value"),
        ("Infinity", "fp32", fp32("[-Infinity,0]").into(), "request body: "),
        ("leading zero", "fp32", fp32("[01,0]").into(), "request body: "),
        ("hexadecimal", "int64", int64("[0x1,0]").into(), "request body: "),
        ("plus", "int64", int64("[+1,0]").into(), "request body: "),
        (
            "fraction",
            "int64",
            int64("[1.5,0]").into(),
            "input 'x': element 0 is 1.5, expected an integer from",
        ),
        (
            "too large",
            "int64",
            int64("[9223372036854775808,0]").into(),
            "element 0 is 9223372036854775808",
        ),
        ("string", "int64", int64("[\"1\",0]").into(), "element 0 is \"1\", expected an integer"),
        ("null", "int64", int64("[null,0]").into(), "element 0 is null, expected an integer"),
        ("bool for a number", "int64", int64("[true,0]").into(), "element 0 is true"),
        (
            "number for a bool",
            "bool",
            input("BOOL", "[1,2]", "[1,0]").into(),
            "element 0 is 1, expected true or false",
        ),
        (
            "number for a string",
            "bytes",
            input("BYTES", "[1,2]", "[1,\"\"]").into(),
            "element 0 is 1, expected a string",
        ),
        (
            "lone surrogate",
            "bytes",
            input("BYTES", "[1,2]", r#"["\ud800",""]"#).into(),
            "whole Unicode characters",
        ),
        ("lone surrogate in a key", "int64", br#"{"\udfff":1}"#.to_vec(), "request body: "),
        (
            "byte order mark",
            "int64",
            [b"\xef\xbb\xbf", int64("[1,2]").as_bytes()].concat(),
            "request body: ",
        ),
        ("UTF-16", "int64", utf16, "request body: "),
        (
            "invalid UTF-8",
            "bytes",
            input("BYTES", "[1,2]", "[\"a\",\"b\"]").replace('a', "\u{1}").into(),
            "request body: ",
        ),
        (
            "duplicate key",
            "int64",
            br#"{"inputs":[],"inputs":[]}"#.to_vec(),
            "duplicate field `inputs`",
        ),
        (
            "duplicate key of an input",
            "int64",
            br#"{"inputs":[{"name":"x","name":"x"}]}"#.to_vec(),
            "duplicate field `name`",
        ),
        (
            "duplicate parameter",
            "int64",
            br#"{"parameters":{"a":1,"a":2},"inputs":[]}"#.to_vec(),
            "duplicate parameter `a`",
        ),
        ("duplicate unknown key", "int64", br#"{"q":1,"q":2,"inputs":[]}"#.to_vec(), "duplicate"),
        (
            "two values",
            "int64",
            [int64("[1,2]"), int64("[1,2]")].concat().into(),
            "trailing characters",
        ),
        (
            "too few",
            "int64",
            int64("[1]").into(),
            "input 'x': INT64 tensor of shape [1, 2] takes 16 bytes, got 8",
        ),
        (
            "too many",
            "int64",
            int64("[1,2,3]").into(),
            "more than the 2 elements that the shape says",
        ),
        ("ragged", "int64", int64("[[1,2],[]]").into(), "ragged"),
        (
            "101 levels",
            "int64",
            format!("{{\"a\":{}", "[".repeat(101)).into(),
            "nested deeper than 100",
        ),
        ("unknown datatype", "int64", input("INT65", "[1,2]", "[1,2]").into(), "input 'x': "),
        (
            "other datatype",
            "int64",
            input("INT32", "[1,2]", "[1,2]").into(),
            "input 'x' has datatype INT32, expected INT64",
        ),
        (
            "other shape",
            "int64",
            input("INT64", "[1,3]", "[1,2,3]").into(),
            "input 'x' has shape [1, 3], expected [-1, 2]",
        ),
        ("empty", "int64", Vec::new(), "request body: "),
    ];
    let count = cases.len();
    for (name, model, body, error) in cases {
        let (status, text) = gateway.post(&format!("/v2/models/identity_{model}/infer"), "", &body);
        assert_eq!(status, 400, "{name}: {text}");
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let message = json["error"].as_str().unwrap();
        assert!(message.contains(error), "{name}: {message}");
    }
    // Routes that are no predictions obey the same rules.
    for path in ["/v2/logging", "/v2/trace/setting", "/v2/repository/index"] {
        for body in [
            format!("{{\"a\":{}", "[".repeat(250_000)),
            r#"{"ready":true,"ready":true}"#.to_owned(),
        ] {
            let (status, text) = gateway.post(path, "", body.as_bytes());
            assert_eq!(status, 400, "{path}: {text}");
        }
    }
    // What is unusual and right stays right.
    let (status, text) =
        gateway.post("/v2/models/identity_fp32/infer", "", fp32("[-0,-0.0]").as_bytes());
    assert_eq!(status, 200);
    assert!(text.contains("\"data\":[-0.0,-0.0]"), "{text}");
    assert!(gateway.is_well() && gateway.is_alive());
    eprintln!("{count} hostile bodies, {count} answers of 400 that say what was expected");
}
