//! Numbers that are the same on every machine and in every version: what they make is stored in files.

/// 64 bits for the number `at` of the sequence `seed`: SplitMix64 (Steele, Lea and Flood 2014), which
/// can be entered anywhere.
pub fn mix(seed: u64, at: u64) -> u64 {
    let mut bits = seed.wrapping_add(at.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Uniform within (0, 1).
pub fn uniform(seed: u64, at: u64) -> f64 {
    ((mix(seed, at) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
}

/// Standard normal, by the method of Box and Muller.
pub fn normal(seed: u64, at: u64) -> f64 {
    let (radius, angle) =
        (uniform(seed, at.wrapping_mul(2)), uniform(seed, at.wrapping_mul(2).wrapping_add(1)));
    (-2.0 * radius.ln()).sqrt() * (2.0 * std::f64::consts::PI * angle).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_the_published_one() {
        // The first numbers of the reference implementation, seed 1234567.
        let want =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([0, 1, 2].map(|at| mix(1_234_567, at)), want);
    }
}
