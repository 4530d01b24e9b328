//! The formulas against event-by-event updates and an independent library; counting across
//! restarts.

use proptest::prelude::*;
use statrs::distribution::{ChiSquared, ContinuousCDF as _};
use statrs::function::{erf, gamma};

use super::*;

/// The formula as it stands: one event after the other, each with the weight of its moment.
fn one_by_one(events: &[(f64, bool)]) -> f64 {
    let mut e = 0.0;
    for factor in FACTORS {
        let mut log = 0.0;
        for (weight, is_candidate) in events {
            if *is_candidate {
                log += factor.ln();
            }
            log -= (weight * factor + 1.0 - weight).ln();
        }
        e += log.exp() / FACTORS.len() as f64;
    }
    e.ln()
}

proptest! {
    #[test]
    fn counts_at_a_weight_are_events_at_a_weight(
        intervals in prop::collection::vec((1_u16..10_000, 0_u64..6, 0_u64..40), 0..12),
    ) {
        let mut events = Vec::new();
        let mut mixture = Mixture::default();
        for (share, candidate, stable) in intervals {
            let weight = f64::from(share) / f64::from(SHARE_WHOLE);
            // The order within an interval does not matter: take the stable version's first.
            events.extend((0..stable).map(|_| (weight, false)));
            events.extend((0..candidate).map(|_| (weight, true)));
            mixture.add(weight, candidate, stable);
        }
        let want = one_by_one(&events);
        prop_assert!((mixture.ln() - want).abs() < 1e-9 * (1.0 + want.abs()), "{} {want}", mixture.ln());
    }

    #[test]
    fn evidence_falls_as_the_weight_rises(
        share in 1_u16..9_999, more in 1_u16..10_000, candidate in 0_u64..50, stable in 0_u64..500,
    ) {
        let weight = |share: u16| f64::from(share) / f64::from(SHARE_WHOLE);
        let ln = |share| {
            let mut mixture = Mixture::default();
            mixture.add(weight(share), candidate, stable);
            mixture.ln()
        };
        let larger = share.saturating_add(more).min(SHARE_WHOLE - 1);
        prop_assert!(ln(larger) <= ln(share) + 1e-9);
    }

    #[test]
    fn bounds_hold_the_share_that_was_seen(k in 0_u64..2_000, n in 0_u64..100_000) {
        let count = Count { events: k.min(n), of: n };
        let (low, high) = share_bounds(count, 0.05);
        prop_assert!(0.0 <= low && low <= count.share() && count.share() <= high && high <= 1.0);
    }
}

#[test]
fn the_expected_value_is_one_when_the_candidate_is_no_worse() {
    // Exactly, over all outcomes of 12 events: E = 1 at equal rates, less when it is better.
    let events = 12_u32;
    let choose = |k: u32| (0..k).fold(1.0, |c, at| c * f64::from(events - at) / f64::from(at + 1));
    for weight in [0.01, 0.05, 0.25, 0.5, 0.9] {
        for better in [1.0, 0.5, 0.0] {
            let p = weight * better / (weight * better + 1.0 - weight);
            let mut expected = 0.0;
            for k in 0..=events {
                let mut mixture = Mixture::default();
                mixture.add(weight, k.into(), (events - k).into());
                let power = |p: f64, n: u32| (0..n).fold(1.0, |all, _| all * p);
                let chance = choose(k) * power(p, k) * power(1.0 - p, events - k);
                expected += chance * mixture.ln().exp();
            }
            let exact = (expected - 1.0).abs() < 1e-9;
            assert!(
                if better < 1.0 { expected < 1.0 } else { exact },
                "{weight} {better}: {expected}"
            );
        }
    }
}

#[test]
fn extremes_stay_finite() {
    for (share, events, others) in [
        (1e-4, u64::MAX / 4, 0),
        (0.9999, 0, u64::MAX / 4),
        (0.5, u64::MAX / 4, u64::MAX / 4),
        (0.0, 9, 9),
        (1.0, 9, 9),
        (f64::NAN, 9, 9),
    ] {
        let mut mixture = Mixture::default();
        mixture.add(share, events, others);
        assert!(mixture.ln().is_finite(), "{share} {events} {others}");
    }
    assert!(Mixture::default().ln().abs() < 1e-12);
    // At one end there is nothing to compare, so nothing is said.
    let mut mixture = Mixture::default();
    mixture.add(1.0, 1_000, 0);
    assert!(mixture.ln().abs() < 1e-12);
}

#[test]
fn special_functions_agree_with_a_library() {
    for x in [0.5, 1.0, 1.5, 2.0, 3.7, 14.9, 15.0, 100.5, 12_345.5, 1e9] {
        let want = gamma::ln_gamma(x);
        assert!((ln_gamma(x) - want).abs() <= 1e-12 * (1.0 + want.abs()), "{x}: {want}");
    }
    for z in [0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0] {
        let want = erf::erfc(z);
        assert!((erfc(z) / want - 1.0).abs() < 2e-7, "{z}: {} {want}", erfc(z));
    }
    let chi = ChiSquared::new(1.0).unwrap();
    for x in [0.1, 1.0, 3.84, 10.83, 15.14, 30.0] {
        assert!((chi_square_p(x) / chi.sf(x) - 1.0).abs() < 1e-5, "{x}");
    }
}

#[test]
fn bounds_are_where_they_should_be() {
    assert_eq!(share_bounds(Count::default(), 0.05), (0.0, 1.0));
    let (low, high) = share_bounds(Count { events: 0, of: 1_000 }, 0.05);
    // (1−p)^1000 · 20 = B(½, 1000½)/B(½, ½), solved by hand: p = 0.00702.
    assert!(low.abs() < 1e-12 && (0.006_9..0.007_2).contains(&high), "{high}");
    let (low, high) = share_bounds(Count { events: 1_000, of: 1_000 }, 0.05);
    assert!((0.992_8..0.993_1).contains(&low) && (high - 1.0).abs() < 1e-12, "{low}");
    let (low, high) = share_bounds(Count { events: 50, of: 1_000 }, 0.05);
    // Wider than Wilson's 0.038..0.065 of one look.
    assert!((0.02..0.038).contains(&low) && (0.065..0.09).contains(&high), "{low} {high}");
    let wide = share_bounds(Count { events: 50, of: 1_000 }, 1e-6);
    assert!(wide.0 < low && high < wide.1);
}

#[test]
fn a_split_is_judged_by_its_distance_from_the_weight() {
    let level = |share, candidate, stable| Level {
        share,
        candidate: Tally { started: candidate, ..Tally::default() },
        stable: Tally { started: stable, ..Tally::default() },
    };
    assert!((level(500, 50, 950).split_p() - 1.0).abs() < 1e-6);
    // Two standard deviations.
    let p = level(5_000, 5_100, 4_900).split_p();
    assert!((p - 0.0455).abs() < 1e-4, "{p}");
    assert!(level(500, 0, 1_000).split_p() < 1e-4);
    assert!(level(500, 0, 90).split_p() >= 1.0, "too little to say");
    assert!(level(0, 9, 9_000).split_p() >= 1.0 && level(10_000, 9, 9_000).split_p() >= 1.0);
}

#[test]
fn quantiles_lie_in_their_buckets() {
    let mut buckets = [0; LATENCY_BUCKETS];
    assert_eq!(quantile_ns(&buckets, 0.5), None);
    buckets[0] = 50;
    buckets[7] = 50; // 5 to 10 ms
    let at = |q| quantile_ns(&buckets, q).unwrap();
    assert!((at(0.25) - 12_500.0).abs() < 1e-6);
    assert!((at(0.5) - 25_000.0).abs() < 1e-6);
    assert!((at(0.75) - 3_750_000.0).abs() < 1e-3 || (at(0.75) - 7_500_000.0).abs() < 1e-3);
    assert!((at(1.0) - LATENCY_BOUNDS_NS[7] as f64).abs() < 1e-3);
    let mut beyond = [0; LATENCY_BUCKETS];
    beyond[LATENCY_BUCKETS - 1] = 1;
    assert!((quantile_ns(&beyond, 0.5).unwrap() - 60e9).abs() < 1.0);
    assert_eq!(bound_at(25_000.0), Some(0));
    assert_eq!(bound_at(25_001.0), Some(1));
    assert_eq!(bound_at(60e9), Some(19));
    assert_eq!(bound_at(60e9 + 1.0), None);
}

fn totals(instance: u64, ok: u64, failures: u64, slow: u64) -> ArmTotals {
    let mut latency = [0; LATENCY_BUCKETS];
    (latency[3], latency[10]) = (ok + failures - slow, slow);
    ArmTotals { instance, ok, failures, latency, ..ArmTotals::default() }
}

fn seen(share: u16, stable: ArmTotals, candidate: ArmTotals) -> Observation {
    let (stable, candidate) = (Some(stable), Some(candidate));
    Observation { share, stable, candidate, ..Observation::default() }
}

#[test]
fn differences_are_counted_by_weight_and_counters_may_begin_again() {
    let thresholds = Thresholds { slow: Some(9), over: Some(10) };
    let mut evidence = Evidence::starting();
    // What was before the rollout does not count.
    evidence.add(&seen(100, totals(1, 1_000, 10, 5), totals(2, 50, 50, 9)), thresholds);
    assert_eq!(evidence.candidate(), Tally::default());
    evidence.add(&seen(100, totals(1, 1_099, 11, 7), totals(2, 51, 50, 9)), thresholds);
    evidence.add(&seen(500, totals(1, 1_199, 11, 7), totals(2, 55, 51, 10)), thresholds);
    let tally = |requests, failures, slow| Tally {
        started: requests,
        requests,
        failures,
        slow,
        ..Tally::default()
    };
    assert_eq!(evidence.at(100).stable, tally(100, 1, 2));
    assert_eq!(evidence.at(100).candidate, tally(1, 0, 0));
    assert_eq!(evidence.at(500).candidate, tally(5, 1, 1));
    // Loaded anew: these counters are another instance's, and began at 0.
    evidence.add(&seen(500, totals(1, 1_199, 11, 7), totals(3, 70, 30, 0)), thresholds);
    assert_eq!(evidence.at(500).candidate, tally(105, 31, 1));
    // Gone, and back.
    let mut gone = seen(500, totals(1, 1_199, 11, 7), totals(0, 0, 0, 0));
    gone.candidate = None;
    evidence.add(&gone, thresholds);
    evidence.add(&seen(500, totals(1, 1_199, 11, 7), totals(4, 2, 0, 0)), thresholds);
    assert_eq!(evidence.at(500).candidate, tally(107, 31, 1));
    assert_eq!(evidence.latency.candidate.requests, 108);
    // Written and read back by another process, it says the same, and counts all that is new.
    let text = serde_json::to_string(&evidence).unwrap();
    let mut read: Evidence = serde_json::from_str(&text).unwrap();
    assert_eq!(read.levels, evidence.levels);
    read.add(&seen(500, totals(9, 7, 7, 7), totals(8, 3, 0, 0)), thresholds);
    assert_eq!(read.at(500).candidate, tally(110, 31, 1));
}

#[test]
fn requests_in_progress_count_as_split_and_not_as_ended() {
    let mut evidence = Evidence::starting();
    let none = Thresholds::default();
    evidence.add(&seen(500, totals(1, 0, 0, 0), totals(2, 0, 0, 0)), none);
    let slow = ArmTotals { in_flight: 40, others: 2, ..totals(2, 8, 0, 0) };
    evidence.add(&seen(500, totals(1, 950, 0, 0), slow), none);
    let level = evidence.at(500);
    assert_eq!((level.candidate.started, level.candidate.requests), (50, 8));
    assert!(level.split_p() > 0.9);
    let ended = ArmTotals { others: 2, ..totals(2, 48, 0, 0) };
    evidence.add(&seen(500, totals(1, 950, 0, 0), ended), none);
    assert_eq!(evidence.at(500).candidate.started, 50);
}

#[test]
fn levels_are_bounded_and_what_finds_no_room_says_less() {
    let mut evidence = Evidence::starting();
    let none = Thresholds::default();
    evidence.add(&seen(0, totals(1, 0, 0, 0), totals(2, 0, 0, 0)), none);
    for at in 1..=200_u16 {
        evidence.add(&seen(at * 10, totals(1, 0, 0, 0), totals(2, u64::from(at), 0, 0)), none);
    }
    assert_eq!(evidence.levels.len(), LEVELS_MAX);
    assert!(evidence.levels.is_sorted_by_key(|level| level.share));
    let before = evidence.candidate().requests;
    // A share between two goes to the larger, one beyond all to none.
    evidence.add(&seen(15, totals(1, 0, 0, 0), totals(2, 207, 0, 0)), none);
    assert_eq!(evidence.at(20).candidate.requests, 8);
    evidence.add(&seen(9_000, totals(1, 0, 0, 0), totals(2, 300, 0, 0)), none);
    assert_eq!(evidence.candidate().requests, before + 7);
}

#[test]
fn where_requests_are_not_split_one_by_one_what_came_counts() {
    let mut evidence = Evidence::starting();
    let none = Thresholds::default();
    evidence.add(&seen(100, totals(1, 0, 0, 0), totals(2, 0, 0, 0)), none);
    // One busy key: 10 % came where 1 % was meant, and both fail alike.
    evidence.add(&seen(100, totals(1, 8_910, 90, 0), totals(2, 990, 10, 0)), none);
    let by_weight = evidence.compared(Event::Failure, |_| false).ln();
    let by_requests = evidence.compared(Event::Failure, |_| true).ln();
    assert!(by_weight > 3.0 && by_requests < 0.5, "{by_weight} {by_requests}");
}

#[test]
fn a_fixed_share_is_tested_with_the_same_mixture() {
    let mut evidence = Evidence::starting();
    let none = Thresholds::default();
    evidence.add(&seen(10_000, totals(1, 0, 0, 0), totals(2, 0, 0, 0)), none);
    evidence.add(&seen(10_000, totals(1, 0, 0, 0), totals(2, 90, 10, 0)), none);
    assert!(evidence.exceeding(Event::Failure, 0.01).ln() > 3.0);
    assert!(evidence.exceeding(Event::Failure, 0.1).ln() < 0.5);
    assert!(evidence.compared(Event::Failure, |_| false).ln().abs() < 1e-12);
}
