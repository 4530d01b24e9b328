//! Whether the time that it takes to refuse a token tells how near it was (dudect's way: two classes
//! in random turns, Welch's t). Ignored: it measures, which a busy machine does badly. By hand:
//!
//! ```sh
//! cargo nextest run --test token_timing --run-ignored all --no-capture
//! ```

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::hint::black_box;
use std::time::Instant;

use jiff::Timestamp;
use tidegate::admit::keys::GrantRecord;
use tidegate::admit::{Gatekeeper, KeyRecord, KeySet, Role, Token};

const EACH: usize = 50_000;
/// Beyond this a difference counts as found.
const T_MAX: f64 = 4.5;

fn record(token: &Token) -> KeyRecord {
    KeyRecord {
        id: token.id().to_owned(),
        name: "ci".to_owned(),
        grants: vec![GrantRecord { role: Role::Viewer, models: Vec::new() }],
        digest: token.digest().to_string(),
        created_at: Timestamp::UNIX_EPOCH,
        created_by: "test".to_owned(),
        expires_at: None,
        revoked_at: None,
        revoked_by: None,
    }
}

/// The fastest nine tenths: what is slower was interrupted.
fn undisturbed(mut times: Vec<f64>) -> Vec<f64> {
    times.sort_by(f64::total_cmp);
    times.truncate(times.len() / 10 * 9);
    times
}

fn mean_and_variance(times: &[f64]) -> (f64, f64) {
    let count = times.len() as f64;
    let mean = times.iter().sum::<f64>() / count;
    let variance = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, variance / count)
}

/// Welch's t of two classes of refused headers, measured in turns drawn by chance.
fn welch(keeper: &Gatekeeper, classes: [&dyn Fn(usize) -> String; 2]) -> f64 {
    let mut times = [Vec::with_capacity(EACH), Vec::with_capacity(EACH)];
    let mut chance = 7_u64;
    let mut at = 0;
    while times.iter().any(|times| times.len() < EACH) {
        chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let class = usize::from(chance >> 63 == 1);
        let header = classes[class](at);
        at += 1;
        let now = Timestamp::UNIX_EPOCH;
        let start = Instant::now();
        let refused = black_box(keeper.identify_at(black_box(Some(&header)), now));
        let took = start.elapsed();
        assert!(refused.is_err());
        times[class].push(took.as_secs_f64() * 1e9);
    }
    let [(mean_a, var_a), (mean_b, var_b)] =
        times.map(|times| mean_and_variance(&undisturbed(times)));
    let t = (mean_a - mean_b) / (var_a + var_b).sqrt();
    eprintln!("B4: {mean_a:.0} ns and {mean_b:.0} ns, t = {t:.2}");
    t
}

/// Guesses at the secret of a token's key, alike but for where their hash first differs from the
/// right one: in the first byte, or only after two that are the same.
fn guesses(token: &Token, count: usize) -> [Vec<String>; 2] {
    let right = token.digest();
    let of_id = &token.text().expose()[..20];
    let mut found = [Vec::new(), Vec::new()];
    let mut number = 0_u64;
    while found.iter().any(|found| found.len() < count) {
        number += 1;
        let text = format!("{of_id}{number:0>43}");
        let digest = Token::parse(&text).unwrap().digest();
        let same = digest.as_bytes().iter().zip(right.as_bytes()).take_while(|(a, b)| a == b);
        match same.count() {
            // The next one after a near one, and both of digits alone: reading them is the same.
            0 if found[0].len() < found[1].len() => found[0].push(format!("Bearer {text}")),
            2.. if found[1].len() < count => found[1].push(format!("Bearer {text}")),
            _ => {}
        }
    }
    found
}

#[test]
#[ignore = "measures; run by hand on a quiet machine"]
fn refusing_takes_as_long_however_near_the_guess_is() {
    const GUESSES: usize = 16;
    let token = Token::generate().unwrap();
    let kept = serde_json::to_value(record(&token)).unwrap();
    let keeper = Gatekeeper::new(KeySet::from_records([(token.id(), kept)]).0);
    let [far, near] = guesses(&token, GUESSES);
    let t = welch(&keeper, [&|at| far[at % GUESSES].clone(), &|at| near[at % GUESSES].clone()]);
    assert!(t.abs() < T_MAX, "t = {t}");
}
