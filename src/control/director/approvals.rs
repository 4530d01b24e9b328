//! Who looked at a version and said yes or no.
//!
//! Invariants:
//! - An approval is of the bytes that were looked at; other bytes need another one.
//! - Nobody approves what he brought himself, and nobody counts twice: the last word counts.
//! - An approval expires. What takes traffic already keeps it: going back never needs one.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::books::{self, Doc, VersionDoc};
use super::{Books, Decided, Inner, check_match, committed, json, now};
use crate::control::call::{Call, Refusal, Versioned};
use crate::control::store::Kind;
use crate::control::view::{Approval, ApprovalRequest, ApprovalsView, Decision};
use crate::domain::{Digest, ModelName, Version};

/// Words about one version; the oldest go first, the journal has them all.
const APPROVALS_MAX: usize = 64;
/// Longest comment, in bytes.
const COMMENT_LEN_MAX: usize = 2000;

impl Inner {
    /// # Errors
    /// `NotFound`.
    pub(super) fn approvals(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<ApprovalsView>, Refusal> {
        let books = self.known(model)?;
        let record = self.registry.record(model, version);
        let digest = books.versions.get(&version).map(|doc| doc.body.what.digest);
        let digest = digest.or(record.and_then(|record| record.digest));
        let Some(digest) = digest else {
            return Err(Refusal::NotFound(format!("version {version} of '{model}' is not known")));
        };
        let doc = books.approvals.get(&version).cloned().unwrap_or_default();
        let submitter = submitter(&books, version);
        let value = ApprovalsView {
            digest: Some(digest.to_string()),
            have: count(&doc.body, digest, submitter.as_deref(), now()),
            need: self.policy.approvals_required,
            submitter,
            approvals: doc.body.clone(),
        };
        Ok(Versioned { value, etag: doc.etag() })
    }

    pub(super) fn approve(
        &self,
        model: &ModelName,
        version: Version,
        request: ApprovalRequest,
        call: &Call,
    ) -> Result<Versioned<ApprovalsView>, Refusal> {
        let name = books::version_name(model, version);
        let action = match request.decision {
            Decision::Approve => "approval.approve",
            Decision::Reject => "approval.reject",
        };
        self.alone(action, Some(model), &name, call, || {
            let books = self.known(model)?;
            let Some(known) = books.versions.get(&version) else {
                let message = format!("version {version} of '{model}' is not known");
                return Err(Refusal::NotFound(message));
            };
            let digest = known.body.what.digest;
            check_request(&request, digest)?;
            let submitter = submitter(&books, version);
            if request.decision == Decision::Approve && submitter.as_ref() == Some(&call.actor) {
                return Err(Refusal::Forbidden(format!(
                    "'{}' brought version {version} and cannot approve it: somebody else has to",
                    call.actor
                )));
            }
            let doc = books.approvals.get(&version).cloned().unwrap_or_default();
            check_match(call, &doc)?;
            let mut words = doc.body.clone();
            let age_max = jiff::SignedDuration::try_from(self.policy.approval_age_max);
            words.push(Approval {
                principal: call.actor.clone(),
                decision: request.decision,
                comment: request.comment.clone(),
                at: now(),
                expires: age_max.ok().and_then(|age| now().checked_add(age).ok()),
                digest: digest.to_string(),
            });
            if words.len() > APPROVALS_MAX {
                words.remove(0);
            }
            let enough = self.is_enough(&words, digest, submitter.as_deref());
            let mut puts = vec![books::put(Kind::Approval, name.clone(), &words, doc.expect())?];
            if enough && !known.body.cleared {
                let body = VersionDoc { cleared: true, ..known.body.clone() };
                puts.push(books::put(Kind::Version, name.clone(), &body, known.expect())?);
            }
            let decided = Decided {
                action,
                model: Some(model),
                subject: name.clone(),
                before: json(&digest),
                after: json(&words.last()),
                puts,
            };
            let documents = self.commit(decided, call)?;
            let words: Doc<Vec<Approval>> = committed(&documents, Kind::Approval)?;
            let cleared: Option<Doc<VersionDoc>> = committed(&documents, Kind::Version).ok();
            self.with_books(model, |books| {
                books.approvals.insert(version, words);
                if let Some(cleared) = cleared {
                    books.versions.insert(version, cleared);
                }
            });
            if enough && self.board.is_held(model, version) {
                self.registry.set_held(model, version, false, "approved");
                self.followed(model, call);
            }
            self.approvals(model, version)
        })
    }

    /// Whether a version's bytes may take traffic, by what was said of them or was allowed before.
    pub(super) fn is_cleared(&self, model: &ModelName, version: Version, digest: Digest) -> bool {
        if self.policy.approvals_required == 0 {
            return true;
        }
        let books = self.books(model);
        let known = books.versions.get(&version).filter(|doc| doc.body.what.digest == digest);
        if known.is_some_and(|doc| doc.body.cleared) {
            return true;
        }
        let words = books.approvals.get(&version).map(|doc| &doc.body[..]).unwrap_or_default();
        self.is_enough(words, digest, submitter(&books, version).as_deref())
    }

    fn is_enough(&self, words: &[Approval], digest: Digest, submitter: Option<&str>) -> bool {
        count(words, digest, submitter, now()) >= self.policy.approvals_required
    }

    pub(super) fn needs_approval(&self, model: &ModelName, version: Version) -> Refusal {
        let books = self.books(model);
        let digest = books.versions.get(&version).map(|doc| doc.body.what.digest);
        let words = books.approvals.get(&version).map(|doc| &doc.body[..]).unwrap_or_default();
        let submitter = submitter(&books, version);
        Refusal::NeedsApproval {
            version: version.to_string(),
            digest: digest.map(|digest| digest.to_string()).unwrap_or_default(),
            have: digest.map_or(0, |digest| count(words, digest, submitter.as_deref(), now())),
            need: self.policy.approvals_required,
        }
    }
}

fn submitter(books: &Books, version: Version) -> Option<String> {
    books.versions.get(&version)?.body.what.submitter.clone()
}

fn check_request(request: &ApprovalRequest, digest: Digest) -> Result<(), Refusal> {
    if request.comment.trim().is_empty() || request.comment.len() > COMMENT_LEN_MAX {
        let problem = format!("comment: expected 1 to {COMMENT_LEN_MAX} bytes that say why");
        return Err(Refusal::Invalid(vec![problem]));
    }
    let Some(looked_at) = &request.digest else { return Ok(()) };
    match Digest::parse(looked_at) {
        None => Err(Refusal::Invalid(vec![
            "digest: expected 'sha256:' and 64 hexadecimal digits".to_owned(),
        ])),
        Some(looked_at) if looked_at != digest => Err(Refusal::Conflict(format!(
            "the version's digest is {digest} now, not {looked_at}: look at it again"
        ))),
        Some(_) => Ok(()),
    }
}

/// Approvals that count at `at`: of these bytes, in force, the last word of each principal, not the
/// submitter's. One rejection in force outweighs them all.
fn count(words: &[Approval], digest: Digest, submitter: Option<&str>, at: Timestamp) -> usize {
    let digest = digest.to_string();
    let mut last: BTreeMap<&str, &Approval> = BTreeMap::new();
    for word in words {
        let counts = word.digest == digest && word.expires.is_none_or(|end| at < end);
        if counts && submitter != Some(word.principal.as_str()) {
            last.insert(&word.principal, word);
        }
    }
    if last.values().any(|word| word.decision == Decision::Reject) {
        return 0;
    }
    last.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn approvals_count_once_in_force_and_of_these_bytes() {
        let (ours, other) = (Digest::new([1; 32]), Digest::new([2; 32]));
        let at = Timestamp::from_second(1_000_000).unwrap();
        let end = |seconds: i64| Timestamp::from_second(1_000_000 + seconds).unwrap();
        let word = |principal: &str, decision, digest: Digest, expires: i64| Approval {
            principal: principal.to_owned(),
            decision,
            comment: "looked".to_owned(),
            at,
            expires: Some(end(expires)),
            digest: digest.to_string(),
        };
        use Decision::{Approve, Reject};
        let cases = [
            (vec![], 0),
            (vec![word("ann", Approve, ours, 10)], 1),
            (vec![word("ann", Approve, ours, 10), word("ann", Approve, ours, 10)], 1),
            (vec![word("ann", Approve, ours, 10), word("bob", Approve, ours, 10)], 2),
            (vec![word("ann", Approve, other, 10)], 0),
            (vec![word("ann", Approve, ours, -1)], 0),
            (vec![word("sub", Approve, ours, 10)], 0),
            (vec![word("ann", Approve, ours, 10), word("bob", Reject, ours, 10)], 0),
            (vec![word("bob", Reject, ours, 10), word("bob", Approve, ours, 10)], 1),
            (vec![word("ann", Approve, ours, 10), word("sub", Reject, ours, 10)], 1),
        ];
        for (words, expected) in cases {
            assert_eq!(count(&words, ours, Some("sub"), at), expected, "{words:?}");
        }
    }
}
