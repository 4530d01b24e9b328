//! Replays the fuzz corpus through every decoder, and each file cut short and bent a little.

#[expect(unreachable_pub, reason = "public for the fuzz package, which shares the file")]
#[path = "../fuzz/src/decoders.rs"]
mod decoders;

use std::path::Path;

use decoders::DECODERS;

/// Most places at which one file is cut and bent.
const PLACES_MAX: usize = 24;

#[test]
fn no_decoder_panics_on_its_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, decode) in DECODERS {
        let files = std::fs::read_dir(corpus.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut count = 0;
        for file in files {
            let data = std::fs::read(file.unwrap().path()).unwrap();
            decode(&data);
            bend(&data, *decode);
            count += 1;
        }
        assert!(count > 0, "target {name} has no corpus");
    }
}

fn bend(data: &[u8], decode: fn(&[u8])) {
    let step = data.len().div_ceil(PLACES_MAX).max(1);
    for at in (0..data.len()).step_by(step) {
        decode(&data[..at]);
        let mut bent = data.to_vec();
        for byte in [b'0', b'"', b'[', b']', b'{', 0xff] {
            bent[at] = byte;
            decode(&bent);
        }
    }
}

#[test]
fn every_target_is_replayed() {
    let manifest = include_str!("../fuzz/Cargo.toml");
    let targets = manifest.lines().filter(|line| line.starts_with("path = \"fuzz_targets/"));
    let mut targets: Vec<&str> = targets
        .filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""))
        .collect();
    let mut replayed: Vec<&str> = DECODERS.iter().map(|(name, _)| *name).collect();
    targets.sort_unstable();
    replayed.sort_unstable();
    assert_eq!(targets, replayed);
}

/// The corpus of the ledger's target is made here: `UPDATE_CORPUS=1` writes it.
#[test]
fn the_ledgers_corpus_is_what_makes_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/ledger");
    let made = ledger::corpus();
    for (name, bytes) in &made {
        let path = folder.join(name);
        if std::env::var_os("UPDATE_CORPUS").is_some() {
            std::fs::write(&path, bytes).unwrap();
        }
        let kept = std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(kept == *bytes, "{name} is not what is made here");
    }
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), made.len());
}

/// A few frames, what a crash leaves of them, and what is signed.
mod ledger {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use tidegate::ledger::frame::{self, Draft, Form, Parsed, SegmentHead, WriterId};

    /// A `Head` of a prediction: kind, time, id and model.
    const HEAD: &[u8] =
        b"\x08\x01\x11\x05\0\0\0\0\0\0\0\x1a\x10\0\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x22\x04iris";
    /// A `Payload`: the caller's id, and an error.
    const PAYLOAD: &[u8] = b"\x0a\x02id\x12\x02no";
    const ORIGIN: &str = "tidegate/0707070707070707/predictions";

    fn frame(seq: u64, form: Form, head: &[u8], payload: &[u8]) -> Vec<u8> {
        let (mut draft, mut bytes) = (Draft::default(), Vec::new());
        draft.start();
        draft.buffer().extend_from_slice(head);
        draft.body(form, &[u8::try_from(seq).expect("few frames") + 1; 32]);
        draft.buffer().extend_from_slice(payload);
        draft.finish();
        draft.put(seq, &mut bytes);
        bytes
    }

    fn note() -> String {
        let (root, signature) = (STANDARD.encode([0; 32]), STANDARD.encode([0; 68]));
        format!(
            "{ORIGIN}\n4\n{root}\nafter 0\ntime 2026-11-25T10:00:00Z\n\n\u{2014} {ORIGIN} {signature}\n"
        )
    }

    fn proof(first: &[u8]) -> String {
        let Parsed::Frame(frame) = frame::parse(first) else { unreachable!("just made") };
        let text = |bytes: &[u8]| STANDARD.encode(bytes);
        let proof = serde_json::json!({
            "format": "tidegate-proof/1", "origin": ORIGIN, "seq": 0, "head": text(frame.head),
            "salt": text(frame.salt), "payload": text(frame.payload),
            "commitment": text(&frame.commitment()), "path": [text(&[0; 32]), text(&[0; 32])],
            "checkpoint": note(),
        });
        proof.to_string()
    }

    pub(super) fn corpus() -> Vec<(&'static str, Vec<u8>)> {
        let first = frame(0, Form::Whole, HEAD, PAYLOAD);
        let second = frame(1, Form::Erased, HEAD, b"");
        let third = frame(2, Form::Whole, b"", b"");
        let long = frame(3, Form::Whole, HEAD, &PAYLOAD.repeat(9));
        let frames = [first.clone(), second.clone(), third, long].concat();
        let head = SegmentHead {
            log: "predictions".to_owned(),
            writer: WriterId([7; 8]),
            first_seq: 0,
            created_ns: 1,
        };
        vec![
            ("again", [first.clone(), first.clone()].concat()),
            ("damaged", {
                let mut bytes = frames.clone();
                bytes[first.len() + 20] ^= 1;
                bytes
            }),
            ("hole", [first.clone(), vec![0; 8], second].concat()),
            ("note", note().into_bytes()),
            ("notes", [note(), note(), String::new()].join("\n").into_bytes()),
            ("proof", proof(&first).into_bytes()),
            ("segment", [&head.encode()[..], &frames].concat()),
            ("torn", frames[..frames.len() - 9].to_vec()),
            ("zeros", [first, vec![0; 64]].concat()),
            ("frames", frames),
        ]
    }
}
