use bytes::Bytes;

use super::*;

fn spec(name: &str, datatype: DataType, shape: Vec<Dim>) -> TensorSpec {
    TensorSpec { name: name.to_owned(), datatype, shape: Some(shape) }
}

fn signature() -> Signature {
    let rows = || Dim::Dynamic(None);
    Signature {
        inputs: vec![
            spec("x", DataType::Fp32, vec![rows(), Dim::Fixed(4)]),
            spec("name", DataType::Bytes, vec![rows(), Dim::Fixed(2)]),
        ],
        outputs: vec![spec("y", DataType::Fp32, vec![rows(), Dim::Fixed(1)])],
        batched: true,
    }
}

fn rule(name: &str, treatment: Treatment) -> TensorRule {
    TensorRule { name: name.to_owned(), treatment, columns: None }
}

fn floats(numbers: &[f32]) -> Tensor {
    let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let shape = [numbers.len() / 4, 4].into_iter().collect();
    Tensor::new(DataType::Fp32, shape, Bytes::from(data)).unwrap()
}

fn resolved(tensors: Vec<TensorRule>) -> Recording {
    let asked = RecordSettings { tensors, ..RecordSettings::default() };
    resolve(&asked, &RecordSettings::default(), &signature()).unwrap()
}

/// Turns bytes around.
struct Around;

impl Subjects for Around {
    fn name(&self, subject: &str) -> Vec<u8> {
        subject.as_bytes().to_vec()
    }

    fn seal(&self, _subject: &str, data: &[u8]) -> Option<Vec<u8>> {
        Some(data.iter().rev().copied().collect())
    }
}

fn kept<'t>(recording: &Recording, name: &str, tensor: &'t Tensor) -> Kept<'t> {
    let hash_key = hmac::Key::new(hmac::HMAC_SHA256, &[1; 32]);
    let subject: Option<(&dyn Subjects, &str)> = Some((&Around, "anna"));
    let left = recording.record_bytes_max;
    let mut keeper = Keeper { recording, hash_key: &hash_key, subject, sampled: true, left };
    keeper.keep(name, tensor)
}

#[test]
fn each_treatment_leaves_what_it_says() {
    let tensor = floats(&[1.0, 2.0, 3.0, 4.0]);
    let data = &tensor.data()[..];
    let of = |treatment| kept(&resolved(vec![rule("x", treatment)]), "x", &tensor).content;
    assert_eq!(of(Treatment::Keep), Content::Data(data.into()));
    assert_eq!(of(Treatment::Drop), Content::Dropped("policy"));
    assert_eq!(of(Treatment::Digest), Content::Digest(Sha256::digest(data).into()));
    assert_eq!(of(Treatment::Truncate(5)), Content::Truncated(data[..5].into()));
    assert_eq!(of(Treatment::Truncate(16)), Content::Data(data.into()));
    assert_eq!(of(Treatment::Encrypt), Content::Sealed(data.iter().rev().copied().collect()));
    let Content::Hashed(hash) = of(Treatment::Hash) else { panic!() };
    assert_ne!(hash, <[u8; 32]>::from(Sha256::digest(data)));
}

#[test]
fn what_is_too_large_leaves_its_hash() {
    let tensor = floats(&[1.0; 8]);
    let digest = Content::Digest(Sha256::digest(tensor.data()).into());
    let mut recording = Recording { tensor_bytes_max: 31, ..Recording::default() };
    assert_eq!(kept(&recording, "x", &tensor).content, digest);
    recording.tensors.push(rule("x", Treatment::Encrypt));
    assert_eq!(kept(&recording, "x", &tensor).content, Content::Dropped("size"));
    // The record's own limit counts what was kept before.
    let recording = Recording { record_bytes_max: 40, ..Recording::default() };
    let hash_key = hmac::Key::new(hmac::HMAC_SHA256, &[1; 32]);
    let mut keeper = Keeper {
        recording: &recording,
        hash_key: &hash_key,
        subject: None,
        sampled: true,
        left: 40,
    };
    assert!(matches!(keeper.keep("a", &tensor).content, Content::Data(_)));
    assert_eq!(keeper.keep("b", &tensor).content, digest);
}

#[test]
fn columns_are_masked_before_anything_else() {
    let tensor = floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let masked = floats(&[0.0, 2.0, 3.0, 0.0, 0.0, 6.0, 7.0, 0.0]);
    let with = |columns| TensorRule { columns: Some(columns), ..rule("x", Treatment::Keep) };
    for columns in [Columns::Mask(vec![0, 3]), Columns::Keep(vec![1, 2])] {
        let recording = resolved(vec![with(columns)]);
        let kept = kept(&recording, "x", &tensor);
        assert_eq!(kept.content, Content::Data(masked.data()[..].into()));
        assert_eq!(kept.masked, [0, 3]);
    }
    let texts = Tensor::from_elements([1, 2].into_iter().collect(), &["Anna", "blue"]).unwrap();
    let gone = Tensor::from_elements([1, 2].into_iter().collect(), &["", "blue"]).unwrap();
    let columns = Some(Columns::Mask(vec![0]));
    let recording = resolved(vec![TensorRule { columns, ..rule("name", Treatment::Keep) }]);
    let kept = kept(&recording, "name", &texts);
    assert_eq!(kept.content, Content::Data(gone.data()[..].into()));
}

#[test]
fn without_a_subject_or_outside_the_sample_nothing_is_kept() {
    let recording = resolved(vec![rule("x", Treatment::Encrypt)]);
    assert!(recording.needs_subject);
    let tensor = floats(&[1.0; 4]);
    let hash_key = hmac::Key::new(hmac::HMAC_SHA256, &[1; 32]);
    let (subject, left) = (None, usize::MAX);
    let recording = &recording;
    let mut keeper = Keeper { recording, hash_key: &hash_key, subject, sampled: true, left };
    assert_eq!(keeper.keep("x", &tensor).content, Content::Dropped("subject"));
    keeper.sampled = false;
    assert_eq!(keeper.keep("y", &tensor).content, Content::Dropped("sample"));
}

#[test]
fn rules_are_held_against_the_signature() {
    let problems = |tensors: Vec<TensorRule>| {
        let asked = RecordSettings { tensors, ..RecordSettings::default() };
        resolve(&asked, &RecordSettings::default(), &signature()).unwrap_err()
    };
    let wrong = problems(vec![rule("z*", Treatment::Drop)]);
    assert_eq!(wrong, ["ledger.tensors: no input or output is called 'z*', there are x, name, y"]);
    let columns = Some(Columns::Mask(vec![1, 4]));
    let wrong = problems(vec![TensorRule { columns, ..rule("x", Treatment::Keep) }]);
    assert_eq!(wrong, ["ledger.tensors: 'x' has 4 columns, there is no column 4"]);
    // The first that fits counts.
    let found = resolved(vec![rule("name", Treatment::Drop), rule("*", Treatment::Hash)]);
    let names: Vec<_> =
        found.tensors.iter().map(|rule| (rule.name.as_str(), rule.treatment)).collect();
    let (drop, hash) = (Treatment::Drop, Treatment::Hash);
    assert_eq!(names, [("x", hash), ("name", drop), ("y", hash)]);
}

#[test]
fn what_a_model_says_wins_and_the_stamp_tells_policies_apart() {
    let all = RecordSettings {
        capture: Some(Capture::Digest),
        tensor_bytes_max: Some(7),
        ..RecordSettings::default()
    };
    let asked = RecordSettings { capture: Some(Capture::None), ..RecordSettings::default() };
    let recording = resolve(&asked, &all, &signature()).unwrap();
    assert_eq!((recording.capture, recording.tensor_bytes_max), (Capture::None, 7));
    assert!(recording.stamp.starts_with("none-") && recording.stamp.len() == 21);
    assert_ne!(recording.stamp, resolve(&all, &all, &signature()).unwrap().stamp);
}

#[test]
fn patterns_are_what_people_expect() {
    for (pattern, name, fits) in [
        ("x", "x", true),
        ("x", "xy", false),
        ("*", "", true),
        ("a*c", "abbc", true),
        ("a*c", "abcb", false),
        ("*b*", "abc", true),
        ("a?c", "abc", true),
        ("a?c", "ac", false),
        ("**a", "ba", true),
        ("ü?", "üß", true),
    ] {
        assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
    }
}

#[test]
fn the_sample_is_as_large_as_asked_and_the_same_each_time() {
    let ids: Vec<Uuid> = (0..20_000).map(|_| Uuid::now_v7()).collect();
    let share = SAMPLE_ALL / 4;
    let count = ids.iter().filter(|id| is_sampled(**id, share)).count();
    assert!((4_600..5_400).contains(&count), "{count}");
    assert!(ids.iter().all(|id| is_sampled(*id, SAMPLE_ALL) && !is_sampled(*id, 0)));
}
