//! What the ledger keeps of a model's predictions, and how long an answer waits for it.

use serde::{Deserialize, Serialize};

/// Where a record has to be before its answer leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// On the disk.
    Sync,
    /// With the operating system.
    #[default]
    Buffered,
    /// Nowhere: there is no record.
    Off,
}

impl Durability {
    pub const NAMES: &'static [&'static str] = &["sync", "buffered", "off"];

    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "sync" => Self::Sync,
            "buffered" => Self::Buffered,
            "off" => Self::Off,
            _ => return None,
        })
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sync => "sync",
            Self::Buffered => "buffered",
            Self::Off => "off",
        }
    }
}

/// What becomes of an answer whose record cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUnrecorded {
    /// It does not leave: 503.
    #[default]
    Refuse,
    /// It leaves, and is counted.
    Serve,
}

impl OnUnrecorded {
    pub const NAMES: &'static [&'static str] = &["refuse", "serve"];

    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "refuse" => Self::Refuse,
            "serve" => Self::Serve,
            _ => return None,
        })
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refuse => "refuse",
            Self::Serve => "serve",
        }
    }
}

/// What is kept of the tensors that no rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    #[default]
    Full,
    /// Their hashes.
    Digest,
    /// Names, datatypes and shapes only.
    None,
}

impl Capture {
    pub const NAMES: &'static [&'static str] = &["full", "digest", "none"];

    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "full" => Self::Full,
            "digest" => Self::Digest,
            "none" => Self::None,
            _ => return None,
        })
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Digest => "digest",
            Self::None => "none",
        }
    }
}

/// What becomes of the tensors that a rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Treatment {
    Keep,
    Drop,
    Digest,
    /// A keyed hash, so that nobody can try out what it may have been.
    Hash,
    /// So many of its first bytes.
    Truncate(usize),
    /// With the key of the one it is about.
    Encrypt,
}

/// Columns of a tensor of rows, the last axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Columns {
    /// The others are masked.
    Keep(Vec<usize>),
    /// These are masked.
    Mask(Vec<usize>),
}

/// A rule of `[[ledger.tensors]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorRule {
    /// A tensor's name, or a pattern of names.
    pub name: String,
    pub treatment: Treatment,
    /// Masked before anything else is done.
    pub columns: Option<Columns>,
}

/// Most rules of one model.
pub const TENSOR_RULES_MAX: usize = 256;
/// Of [`RecordSettings::sample`].
pub const SAMPLE_ALL: u64 = 1 << 32;

/// A ratio from 0 to 1, of [`SAMPLE_ALL`].
pub fn sample_of(ratio: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "between 0 and 2^32"
    )]
    let share = (ratio.clamp(0.0, 1.0) * SAMPLE_ALL as f64).round() as u64;
    share
}

/// What somebody said of it, as far as they said it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordSettings {
    pub durability: Option<Durability>,
    pub on_error: Option<OnUnrecorded>,
    pub capture: Option<Capture>,
    /// So many of [`SAMPLE_ALL`] predictions have their tensors kept.
    pub sample: Option<u64>,
    /// Larger tensors have their hash kept.
    pub tensor_bytes_max: Option<usize>,
    /// Of all that is kept of one record's tensors; what comes after has its hash kept.
    pub record_bytes_max: Option<usize>,
    /// Days that records are kept; 0: for ever.
    pub retention_days: Option<u32>,
    pub tensors: Vec<TensorRule>,
}

impl RecordSettings {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What is done for one version of a model: everything said, every rule by a tensor's own name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    pub durability: Durability,
    pub on_error: OnUnrecorded,
    pub capture: Capture,
    pub sample: u64,
    pub tensor_bytes_max: usize,
    pub record_bytes_max: usize,
    /// Days that the model's records are kept, if it says so; 0: for ever.
    pub retention_days: Option<u32>,
    pub tensors: Vec<TensorRule>,
    /// Some rule needs to know whom the data is about.
    pub needs_subject: bool,
    /// Name and hash of all this, for the records.
    pub stamp: String,
}

impl Recording {
    /// Whether a tensor of this name is kept as it is: recorded, and neither left out, hashed, cut,
    /// encrypted nor masked.
    pub fn keeps_as_is(&self, tensor: &str) -> bool {
        let kept = match self.tensors.iter().find(|rule| rule.name == tensor) {
            Some(rule) => rule.treatment == Treatment::Keep && rule.columns.is_none(),
            None => self.capture == Capture::Full,
        };
        kept && self.durability != Durability::Off && self.sample > 0
    }
}

impl Default for Recording {
    fn default() -> Self {
        Self {
            durability: Durability::Buffered,
            on_error: OnUnrecorded::Refuse,
            capture: Capture::Full,
            sample: SAMPLE_ALL,
            tensor_bytes_max: 1 << 20,
            record_bytes_max: 4 << 20,
            retention_days: None,
            tensors: Vec::new(),
            needs_subject: false,
            stamp: "full".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_recorded_whole_is_kept_as_it_is() {
        let rule = |name: &str, treatment, columns| TensorRule {
            name: name.to_owned(),
            treatment,
            columns,
        };
        let tensors = vec![
            rule("hashed", Treatment::Hash, None),
            rule("cut", Treatment::Truncate(4), None),
            rule("masked", Treatment::Keep, Some(Columns::Mask(vec![0]))),
            rule("kept", Treatment::Keep, None),
        ];
        let recording = Recording { tensors, ..Recording::default() };
        let kept = |recording: &Recording| {
            ["hashed", "cut", "masked", "kept", "other"].map(|name| recording.keeps_as_is(name))
        };
        assert_eq!(kept(&recording), [false, false, false, true, true]);
        let digests = Recording { capture: Capture::Digest, ..recording.clone() };
        assert_eq!(kept(&digests), [false, false, false, true, false]);
        let off = Recording { durability: Durability::Off, ..recording.clone() };
        let sampled_out = Recording { sample: 0, ..recording };
        assert_eq!((kept(&off), kept(&sampled_out)), ([false; 5], [false; 5]));
    }
}
