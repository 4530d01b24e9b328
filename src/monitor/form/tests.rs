use std::time::Instant;

use sha2::{Digest as _, Sha256};

use super::super::Given;
use super::super::state::COUNTERS_BYTES_MAX;
use super::super::tests::colours;
use super::*;
use crate::domain::DataType;
use crate::drift::counters::Counters;
use crate::drift::feature::{Role, Value, of_rows};
use crate::drift::learn::{LearnSettings, Learner};
use crate::drift::profile::Profile;
use crate::drift::random::{mix, normal};

/// Two arms with something in all their parts: numbers, categories, new ones.
fn small() -> (Profile, BTreeMap<String, ArmState>) {
    let (_, Given::File(_, profile)) = colours() else { unreachable!() };
    let mut odd = Vec::new();
    let told = vec![true; profile.features.len()];
    let arm = |odd: &mut Vec<bool>, from: i64| {
        let mut arm = ArmState::new(&profile, from, 10);
        for slot in 0..3 {
            let mut counting = arm.counting(&profile, 40, odd, &told);
            for row in 0..40_u32 {
                let colour: &[u8] = [&b"red"[..], b"tan", b"mauve", b"pink"][row as usize % 4];
                counting.add(row as usize, 0, Value::Text(colour));
                counting.add(row as usize, 1, Value::Number(f64::from(row * 10)));
            }
            counting.end();
            arm.report("stable", &profile);
            arm.turn(&profile, from + 1800 * (slot + 1));
        }
        arm
    };
    let arms = [("stable", 0), ("canary", 7200)];
    let arms = arms.map(|(name, from)| (name.to_owned(), arm(&mut odd, from)));
    (Profile::clone(&profile), arms.into_iter().collect())
}

fn bytes_of(reference: &str, arms: &BTreeMap<String, ArmState>) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(&mut bytes, reference, arms).unwrap();
    bytes
}

/// With the checksum that fits.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.len() - CRC);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes
}

#[test]
fn what_is_written_is_read_and_nothing_else() {
    let (profile, arms) = small();
    let whole = bytes_of("sha256:07", &arms);
    let (reference, found) = read(&whole).unwrap();
    assert_eq!(reference, "sha256:07");
    assert!(found.values().all(|arm| arm.fits(&profile)));
    assert_eq!(bytes_of(&reference, &found), whole);
    for len in 0..whole.len() {
        assert!(read(&whole[..len]).is_err(), "cut to {len}");
    }
    let mut longer = whole.clone();
    longer.insert(whole.len() - CRC, 0);
    assert!(matches!(read(&sealed(longer)), Err(FormError::Rest(1))));
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&damaged).is_err(), "bit {bit}");
    }
}

#[test]
fn what_somebody_made_is_refused_or_harmless() {
    // The checksum fits: it says nothing about who wrote it.
    let (profile, arms) = small();
    let whole = bytes_of("sha256:07", &arms);
    let mut harmless = 0;
    for round in 0..4000 {
        let mut made = whole.clone();
        for change in 0..=mix(round, 0) % 3 {
            let drawn = mix(round, change + 1);
            let at = HEAD + usize::try_from(drawn >> 8).unwrap() % (whole.len() - HEAD - CRC);
            made[at] = drawn.to_le_bytes()[0];
        }
        let Ok((_, arms)) = read(&sealed(made)) else { continue };
        for (name, mut arm) in arms.into_iter().filter(|(_, arm)| arm.fits(&profile)) {
            harmless += 1;
            arm.begin_latest(&profile, 10);
            arm.turn(&profile, 100_000);
            arm.report(&name, &profile);
        }
    }
    assert!(harmless > 100, "{harmless}");
    // A length of 2^64 - 1 is believed by nobody.
    let mut huge = whole[..HEAD].to_vec();
    huge.extend([0xff; 9]);
    huge.extend([1, 0, 0, 0, 0]);
    assert!(matches!(read(&sealed(huge)), Err(FormError::Body(_))));
}

#[test]
fn what_an_arm_has_is_that_of_the_form() {
    // Something else here: raise FORM, so that what an older program wrote is not taken for it.
    let (_, arms) = small();
    let found: [u8; 32] = Sha256::digest(bytes_of("sha256:07", &arms)).into();
    assert_eq!((FORM, crate::domain::Digest::new(found).to_string()), (1, OF_FORM.to_owned()));
}

const OF_FORM: &str = "sha256:ead6b4765dfc7f174ba81d78bfaebe7b833a578dbace304a69aa8f99416ae17b";

/// So many features of numbers, each of whose cells has some hundreds of rows in each slot.
pub(in crate::monitor) fn full(features: usize) -> (Profile, ArmState) {
    let all = (0..features.div_ceil(200)).flat_map(|tensor| {
        let width = (features - tensor * 200).min(200);
        of_rows(Role::Input, &format!("x{tensor}"), DataType::Fp32, Some(&[width]))
    });
    let all: Vec<_> = all.collect();
    let mut learner = Learner::new(all, LearnSettings::default()).unwrap();
    for feature in 0..features {
        for row in 0..1000 {
            learner.add(feature, Value::Number(normal(feature as u64, row)));
        }
    }
    let of = ("m".parse().unwrap(), None);
    let profile = learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile;
    let counters: Vec<Counters> = profile
        .features
        .iter()
        .zip(0..)
        .map(|(feature, seed)| {
            let mut counters = feature.counters();
            for row in 0..500 {
                // Single floats, as most models have.
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "single floats are what models take"
                )]
                let value = f64::from((normal(!seed, row) * 1.1) as f32);
                feature.add(&mut counters, Value::Number(value));
            }
            for _ in 0..6 {
                counters.merge(&counters.clone());
            }
            counters
        })
        .collect();
    let arm = ArmState::full(&profile, &counters, 1);
    (profile, arm)
}

/// Bytes in this form and in JSON, and milliseconds: written, read, written as JSON, read as JSON.
fn measured(features: usize) -> ([usize; 2], [u128; 4]) {
    let (profile, arm) = full(features);
    let arms = BTreeMap::from([("stable".to_owned(), arm)]);
    let began = Instant::now();
    let bytes = bytes_of("sha256:07", &arms);
    let written = began.elapsed().as_millis();
    let began = Instant::now();
    let (_, found) = read(&bytes).unwrap();
    let read = began.elapsed().as_millis();
    assert!(found.values().all(|arm| arm.fits(&profile)));
    let began = Instant::now();
    let json = serde_json::to_vec(&arms).unwrap();
    let json_written = began.elapsed().as_millis();
    let began = Instant::now();
    let found: BTreeMap<String, ArmState> = serde_json::from_slice(&json).unwrap();
    assert_eq!(found.len(), 1);
    let json_read = began.elapsed().as_millis();
    ([bytes.len(), json.len()], [written, read, json_written, json_read])
}

#[test]
fn counters_are_small() {
    let ([bytes, json], _) = measured(40);
    assert!(bytes < 40 * (32 << 10) && bytes * 2 < json, "{bytes} bytes, {json} as JSON");
    // Where nobody asks anything there is hardly anything to keep.
    let (profile, _) = full(40);
    let empty: Vec<Counters> = profile.features.iter().map(|feature| feature.counters()).collect();
    let arms = BTreeMap::from([("stable".to_owned(), ArmState::full(&profile, &empty, 1))]);
    let bytes = bytes_of("sha256:07", &arms).len();
    assert!(bytes < 40 * (4 << 10), "{bytes} bytes");
}

/// The figures of docs/performance.md.
#[test]
#[ignore = "takes a minute in a debug build; its times are worth something in a release build"]
fn two_thousand_features() {
    let ([bytes, json], times) = measured(2000);
    eprintln!("{bytes} bytes, {json} as JSON; ms to write, read, and as JSON: {times:?}");
    assert!(
        bytes as u64 * 2 < COUNTERS_BYTES_MAX && bytes * 2 < json,
        "{bytes} bytes, {json} as JSON"
    );
}
