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
