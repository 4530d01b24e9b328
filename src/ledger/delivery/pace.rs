//! How long a sink is left alone before it is tried again.

use std::time::Duration;

/// First wait; each further one is twice as long.
const FIRST: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Pace {
    next: Duration,
    longest: Duration,
}

impl Pace {
    pub(super) fn new(longest: Duration) -> Self {
        Self { next: FIRST.min(longest), longest }
    }

    pub(super) fn reset(&mut self) {
        self.next = FIRST.min(self.longest);
    }

    /// The next wait; `asked` is what the sink said, if it did.
    pub(super) fn wait(&mut self, asked: Option<Duration>) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        asked.map_or_else(|| jittered(wait), |asked| asked.min(self.longest))
    }
}

/// Between half of it and all of it, so that gateways do not come back in step.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + rand::random::<f64>() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_begin_anew() {
        let mut pace = Pace::new(Duration::from_secs(1));
        for most in [200, 400, 800, 1000, 1000] {
            let (wait, most) = (pace.wait(None), Duration::from_millis(most));
            assert!(most / 2 <= wait && wait <= most, "{wait:?} of {most:?}");
        }
        assert_eq!(pace.wait(Some(Duration::from_secs(60))), Duration::from_secs(1));
        assert_eq!(pace.wait(Some(Duration::from_millis(7))), Duration::from_millis(7));
        pace.reset();
        assert!(pace.wait(None) <= FIRST);
    }
}
