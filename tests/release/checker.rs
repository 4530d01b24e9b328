//! Holds answers against the tables that were in force.
//!
//! A change is in force from some moment between when it was sent and when it was answered. A
//! request obeys every table of which that can be so at some moment between its start and its end:
//! one that starts after a change was answered can only obey that one or a later one.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::time::Instant;

use crate::load::Answer;

/// What was in force, in order.
#[derive(Debug)]
pub(crate) struct History<T>(Vec<Since<T>>);

#[derive(Debug)]
struct Since<T> {
    sent: Instant,
    answered: Instant,
    table: T,
}

impl<T: Clone + Debug> History<T> {
    /// Of what is in force now.
    pub(crate) fn new(table: T) -> Self {
        let now = Instant::now();
        Self(vec![Since { sent: now, answered: now, table }])
    }

    pub(crate) fn change(&mut self, sent: Instant, answered: Instant, table: T) {
        self.0.push(Since { sent, answered, table });
    }

    pub(crate) fn now(&self) -> &T {
        &self.0.last().unwrap().table
    }

    /// By its place.
    pub(crate) fn table(&self, at: usize) -> &T {
        &self.0[at].table
    }

    pub(crate) fn changes(&self) -> usize {
        self.0.len() - 1
    }

    /// Place of the first and last table that may have decided, and all of them.
    pub(crate) fn possible(&self, answer: &Answer) -> (usize, Vec<&T>) {
        let first = self.0.partition_point(|at| at.answered <= answer.started).saturating_sub(1);
        let end = self.0.partition_point(|at| at.sent <= answer.ended);
        (first, self.0[first..end].iter().map(|at| &at.table).collect())
    }
}

/// What was seen of a stretch of load.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) requests: usize,
    pub(crate) failed: Vec<String>,
    /// Answers by a version that no possible table allowed.
    pub(crate) disallowed: Vec<String>,
    /// Answers whose header names another version than their content proves.
    pub(crate) mislabelled: Vec<String>,
    /// Of how many requests only one table could decide.
    pub(crate) sure: usize,
}

impl Verdict {
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        let wrong = [&self.failed, &self.disallowed, &self.mislabelled];
        let first: Vec<_> = wrong.iter().map(|list| list.iter().take(3).collect()).collect();
        let first: Vec<Vec<&String>> = first;
        let counts = wrong.map(Vec::len);
        assert_eq!(counts, [0, 0, 0], "failed, disallowed, mislabelled: {first:#?}");
    }
}

/// Checks answers to requests that name no version, where tables are sets of versions.
pub(crate) fn check(answers: &[Answer], history: &History<BTreeSet<u32>>) -> Verdict {
    let mut verdict = Verdict { requests: answers.len(), ..Verdict::default() };
    for answer in answers {
        let (_, tables) = history.possible(answer);
        verdict.sure += usize::from(tables.len() == 1);
        match &answer.ran {
            Err(failed) => verdict.failed.push(format!("{answer:?}: {}", failed.text)),
            Ok(ran) => {
                if ran.proven != ran.named {
                    verdict.mislabelled.push(format!("{answer:?}"));
                }
                if !tables.iter().any(|table| table.contains(&ran.proven)) {
                    verdict.disallowed.push(format!("{answer:?}: allowed were {tables:?}"));
                }
            }
        }
    }
    verdict
}
