//! What is kept of a prediction's tensors: whole, hashed, cut, masked, encrypted, or nothing.
//!
//! ```text
//! [ledger] of the configuration ◀─ [ledger] of tidegate.toml ──resolve──▶ Recording (by tensor)
//! tensor ─▶ in the sample? ─▶ columns masked ─▶ its rule, or `capture` ─▶ size ─▶ what is kept
//! ```
//!
//! Invariants:
//! - What a rule takes away never reaches the log, not even for a moment.
//! - Whether a prediction is in the sample hangs on its id alone: who has the id can tell.
//! - What is too large is not cut in silence: its hash is kept, and says what it was.

use std::borrow::Cow;

use ring::hmac;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::record::{Content, Kept};
use crate::domain::{
    Capture, Columns, DataType, Dim, RecordSettings, Recording, SAMPLE_ALL, Signature, Tensor,
    TensorRule, TensorSpec, Treatment,
};

/// Why nothing is kept, in a record.
const BY_POLICY: &str = "policy";
const BY_SAMPLE: &str = "sample";
const BY_SIZE: &str = "size";
const NO_SUBJECT: &str = "subject";

/// Keys of those that data is about.
pub trait Subjects: Send + Sync {
    /// What stands for the subject in a record's head: it does not tell who it is.
    fn name(&self, subject: &str) -> Vec<u8>;
    /// Nonce and ciphertext of `data` under the subject's key; `None` when there is no key to be had.
    fn seal(&self, subject: &str, data: &[u8]) -> Option<Vec<u8>>;
}

/// What was said for a model and for all of them, held against the model's signature.
///
/// # Errors
/// Everything that does not fit the signature.
pub fn resolve(
    asked: &RecordSettings,
    all: &RecordSettings,
    signature: &Signature,
) -> Result<Recording, Vec<String>> {
    let mut problems = Vec::new();
    let tensors = by_tensor(&asked.tensors, signature, &mut problems);
    if !problems.is_empty() {
        return Err(problems);
    }
    let usual = Recording::default();
    let mut recording = Recording {
        durability: asked.durability.or(all.durability).unwrap_or_default(),
        on_error: asked.on_error.or(all.on_error).unwrap_or_default(),
        capture: asked.capture.or(all.capture).unwrap_or_default(),
        sample: asked.sample.or(all.sample).unwrap_or(SAMPLE_ALL),
        tensor_bytes_max: asked
            .tensor_bytes_max
            .or(all.tensor_bytes_max)
            .unwrap_or(usual.tensor_bytes_max),
        record_bytes_max: asked
            .record_bytes_max
            .or(all.record_bytes_max)
            .unwrap_or(usual.record_bytes_max),
        retention_days: asked.retention_days,
        needs_subject: tensors.iter().any(|rule| rule.treatment == Treatment::Encrypt),
        tensors,
        stamp: String::new(),
    };
    recording.stamp = stamp(&recording);
    Ok(recording)
}

/// What is done for calls that never got as far as a model.
pub(super) fn unrouted(all: &RecordSettings) -> Recording {
    let nothing = Signature { inputs: Vec::new(), outputs: Vec::new(), batched: false };
    resolve(&RecordSettings::default(), all, &nothing).unwrap_or_default()
}

/// The first rule of each tensor, under the tensor's own name.
fn by_tensor(
    rules: &[TensorRule],
    signature: &Signature,
    problems: &mut Vec<String>,
) -> Vec<TensorRule> {
    let specs = || signature.inputs.iter().chain(&signature.outputs);
    for rule in rules {
        if !specs().any(|spec| matches(&rule.name, &spec.name)) {
            let names: Vec<&str> = specs().map(|spec| spec.name.as_str()).collect();
            problems.push(format!(
                "ledger.tensors: no input or output is called '{}', there are {}",
                rule.name,
                names.join(", ")
            ));
        }
    }
    let mut found: Vec<TensorRule> = Vec::new();
    for spec in specs() {
        let rule = rules.iter().find(|rule| matches(&rule.name, &spec.name));
        let Some(rule) = rule else { continue };
        if let Some(columns) = &rule.columns {
            problems.extend(check_columns(columns, spec));
        }
        if found.iter().all(|rule| rule.name != spec.name) {
            found.push(TensorRule { name: spec.name.clone(), ..rule.clone() });
        }
    }
    found
}

fn check_columns(columns: &Columns, spec: &TensorSpec) -> Option<String> {
    let (Columns::Keep(list) | Columns::Mask(list)) = columns;
    let name = &spec.name;
    let shape = spec.shape.as_ref()?;
    let Some(last) = shape.last() else {
        return Some(format!("ledger.tensors: '{name}' has no columns, it is one number"));
    };
    let Dim::Fixed(width) = last else { return None };
    let beyond = list.iter().find(|column| **column >= *width)?;
    Some(format!("ledger.tensors: '{name}' has {width} columns, there is no column {beyond}"))
}

/// `*` stands for any text, `?` for one character.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut of) = (0, 0);
    // Where the last star stands, and what it has taken so far.
    let mut star = None;
    while of < name.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, of));
                at += 1;
            }
            Some(one) if *one == '?' || *one == name[of] => {
                (at, of) = (at + 1, of + 1);
            }
            _ => {
                let Some((back, taken)) = star else { return false };
                star = Some((back, taken + 1));
                (at, of) = (back + 1, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|left| *left == '*')
}

/// The policy's name and the start of its hash.
fn stamp(recording: &Recording) -> String {
    use std::fmt::Write as _;
    let Recording { capture, sample, tensor_bytes_max, record_bytes_max, tensors, .. } = recording;
    let all = serde_json::json!([capture, sample, tensor_bytes_max, record_bytes_max, tensors]);
    let hash = Sha256::digest(all.to_string().as_bytes());
    let mut stamp = format!("{}-", capture.as_str());
    for byte in &hash[..8] {
        // Writing to a text cannot fail.
        write!(stamp, "{byte:02x}").ok();
    }
    stamp
}

/// Whether a prediction's tensors are kept, of so many of [`SAMPLE_ALL`].
pub fn is_sampled(id: Uuid, sample: u64) -> bool {
    // The last 32 bits of such an id are random, whatever its time and counter are.
    let [.., a, b, c, d] = *id.as_bytes();
    u64::from(u32::from_be_bytes([a, b, c, d])) < sample
}

/// Decides about the tensors of one record, one after the other.
pub(super) struct Keeper<'a> {
    pub(super) recording: &'a Recording,
    pub(super) hash_key: &'a hmac::Key,
    pub(super) subject: Option<(&'a dyn Subjects, &'a str)>,
    pub(super) sampled: bool,
    /// Bytes that may be kept still.
    pub(super) left: usize,
}

impl Keeper<'_> {
    pub(super) fn keep<'t>(&mut self, name: &str, tensor: &'t Tensor) -> Kept<'t> {
        if !self.sampled {
            return Content::Dropped(BY_SAMPLE).into();
        }
        let recording = self.recording;
        let rule = recording.tensors.iter().find(|rule| rule.name == name);
        let treatment = rule.map_or(usual(recording.capture), |rule| rule.treatment);
        let columns = rule.and_then(|rule| rule.columns.as_ref());
        let (data, masked) = match columns {
            None => (Cow::Borrowed(&tensor.data()[..]), Vec::new()),
            Some(columns) => mask(tensor, columns),
        };
        Kept { content: self.content(data, treatment), masked }
    }

    fn content<'t>(&mut self, data: Cow<'t, [u8]>, treatment: Treatment) -> Content<'t> {
        match treatment {
            Treatment::Keep if self.takes(data.len()) => Content::Data(data),
            Treatment::Keep | Treatment::Digest => Content::Digest(Sha256::digest(&data).into()),
            Treatment::Drop => Content::Dropped(BY_POLICY),
            Treatment::Hash => {
                let mut hash = [0; 32];
                hash.copy_from_slice(hmac::sign(self.hash_key, &data).as_ref());
                Content::Hashed(hash)
            }
            Treatment::Truncate(max) if data.len() <= max => self.content(data, Treatment::Keep),
            Treatment::Truncate(max) if self.takes(max) => Content::Truncated(match data {
                Cow::Borrowed(data) => Cow::Borrowed(&data[..max]),
                Cow::Owned(data) => Cow::Owned(data[..max].to_vec()),
            }),
            Treatment::Truncate(_) => Content::Dropped(BY_SIZE),
            Treatment::Encrypt => self.sealed(&data),
        }
    }

    fn sealed<'t>(&mut self, data: &[u8]) -> Content<'t> {
        let Some((subjects, subject)) = self.subject else { return Content::Dropped(NO_SUBJECT) };
        // A hash of what is to be forgotten would outlive it.
        if !self.takes(data.len()) {
            return Content::Dropped(BY_SIZE);
        }
        subjects.seal(subject, data).map_or(Content::Dropped(NO_SUBJECT), Content::Sealed)
    }

    fn takes(&mut self, bytes: usize) -> bool {
        let fits = bytes <= self.recording.tensor_bytes_max && bytes <= self.left;
        if fits {
            self.left -= bytes;
        }
        fits
    }
}

fn usual(capture: Capture) -> Treatment {
    match capture {
        Capture::Full => Treatment::Keep,
        Capture::Digest => Treatment::Digest,
        Capture::None => Treatment::Drop,
    }
}

/// The tensor's bytes with some columns of its last axis made zero, or empty, and which.
fn mask<'t>(tensor: &'t Tensor, columns: &Columns) -> (Cow<'t, [u8]>, Vec<u64>) {
    let width = tensor.shape().last().copied().unwrap_or(0);
    let is_masked = |column: usize| match columns {
        Columns::Keep(list) => !list.contains(&column),
        Columns::Mask(list) => list.contains(&column),
    };
    let masked: Vec<bool> = (0..width).map(is_masked).collect();
    if !masked.contains(&true) {
        return (Cow::Borrowed(tensor.data()), Vec::new());
    }
    let data = match (tensor.datatype(), tensor.datatype().size()) {
        (DataType::Bytes, _) | (_, None) => mask_texts(tensor, &masked),
        (_, Some(size)) => {
            let mut data = tensor.data().to_vec();
            for (at, element) in data.chunks_exact_mut(size).enumerate() {
                if masked[at % width] {
                    element.fill(0);
                }
            }
            data
        }
    };
    let list = (0_u64..).zip(&masked).filter_map(|(column, masked)| masked.then_some(column));
    (Cow::Owned(data), list.collect())
}

fn mask_texts(tensor: &Tensor, masked: &[bool]) -> Vec<u8> {
    let mut data = Vec::with_capacity(tensor.data().len());
    for (at, element) in tensor.bytes_elements().enumerate() {
        let element = if masked[at % masked.len()] { &[] } else { element };
        // It was read from such a length.
        data.extend_from_slice(&u32::try_from(element.len()).unwrap_or(u32::MAX).to_le_bytes());
        data.extend_from_slice(element);
    }
    data
}

#[cfg(test)]
mod tests;
