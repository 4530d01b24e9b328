//! Files for a bucket in memory, which may be away.

use std::sync::atomic::{AtomicBool, AtomicU64};

use futures_util::TryStreamExt as _;
use object_store::memory::InMemory;

use super::super::tests::{Ledger, settings};
use super::*;

#[derive(Default)]
struct Bucket {
    objects: Arc<InMemory>,
    away: AtomicBool,
    /// Puts that were asked for; they are numbered.
    seen: AtomicU64,
}

struct Case {
    ledger: Ledger,
    bucket: Arc<Bucket>,
}

const DAY: &str = "model=iris/date=2026-11-25";

impl Case {
    fn new() -> Self {
        Self { ledger: Ledger::new(), bucket: Arc::default() }
    }

    fn file(&self, name: &str, content: &[u8]) {
        let path = self.ledger.dir.path().join(PARQUET).join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn objects(&self, settings: &Settings) -> Objects {
        let bucket = Arc::clone(&self.bucket);
        let open = move || match bucket.away.load(Ordering::Relaxed) {
            true => Err("away".to_owned()),
            false => Ok(Arc::clone(&bucket.objects) as Arc<dyn ObjectStore>),
        };
        let (source, stop) = (self.ledger.source(), CancellationToken::new());
        let shared = Shared::new("objects", true);
        Objects::with(Box::new(open), "led/ger".to_owned(), settings, &source, shared, stop)
    }

    async fn content(&self, name: &str) -> Vec<u8> {
        let key = Key::from(format!("led/ger/{name}"));
        self.bucket.objects.get(&key).await.unwrap().bytes().await.unwrap().to_vec()
    }

    /// What was put since this was asked last, in order.
    async fn puts(&self) -> Vec<String> {
        let all: Vec<_> = self.bucket.objects.list(None).try_collect().await.unwrap();
        let number = |tag: Option<String>| tag.unwrap().trim_matches('"').parse::<u64>().unwrap();
        let named = all.into_iter().map(|meta| (number(meta.e_tag), meta.location.to_string()));
        let seen = self.bucket.seen.load(Ordering::Relaxed);
        let mut new: Vec<_> = named.filter(|(number, _)| *number >= seen).collect();
        new.sort();
        if let Some((last, _)) = new.last() {
            self.bucket.seen.store(last + 1, Ordering::Relaxed);
        }
        new.into_iter().map(|(_, name)| name).collect()
    }
}

#[tokio::test]
async fn files_come_once_under_their_names_and_manifests_last() {
    let case = Case::new();
    let mut objects = case.objects(&settings());
    objects.round().await.unwrap();
    case.file(&format!("{DAY}/0102-00000000000000000200.parquet"), b"later");
    case.file("_segments/0102-00000000000000000100.json", b"{\"files\":[]}");
    case.file(&format!("{DAY}/0102-00000000000000000100.parquet"), b"data");
    case.file(&format!("{DAY}/.0102-00000000000000000300.parquet"), b"half");
    case.file(&format!("{DAY}/0102-00000000000000000300.parquet.part"), b"half");
    objects.round().await.unwrap();
    let name = |rest: &str| format!("led/ger/{DAY}/0102-00000000000000000{rest}");
    let manifest = "led/ger/_segments/0102-00000000000000000100.json".to_owned();
    assert_eq!(case.puts().await, [name("100.parquet"), manifest, name("200.parquet")]);
    assert_eq!(case.content(&format!("{DAY}/0102-00000000000000000100.parquet")).await, b"data");
    objects.round().await.unwrap();
    objects.save(Duration::ZERO);
    // Nor does another start send it again.
    case.objects(&settings()).round().await.unwrap();
    assert!(case.puts().await.is_empty());
    let stats = objects.shared.stats(0, now_ns());
    assert_eq!((stats.delivered, stats.lag_files, stats.lag_bytes), (3, 0, 0));
    assert_eq!(objects.shared.saved_seq.load(Ordering::Relaxed), u64::MAX);
}

#[tokio::test]
async fn a_bucket_that_was_away_gets_all_of_it() {
    let case = Case::new();
    case.bucket.away.store(true, Ordering::Relaxed);
    case.file(&format!("{DAY}/0102-7.parquet"), b"seven");
    case.file(&format!("{DAY}/0102-9.parquet"), b"nine!");
    let mut objects = case.objects(&settings());
    assert!(objects.round().await.unwrap_err().contains("away"));
    let stats = objects.shared.stats(0, now_ns());
    assert_eq!((stats.lag_files, stats.lag_bytes), (2, 10));
    assert!(stats.lag_seconds > 0.0);
    // What waits is not to be removed.
    assert_eq!(objects.shared.saved_seq.load(Ordering::Relaxed), 7);
    case.bucket.away.store(false, Ordering::Relaxed);
    objects.round().await.unwrap();
    assert_eq!(case.puts().await.len(), 2);
}

#[tokio::test]
async fn what_was_put_before_a_crash_is_found_there() {
    let case = Case::new();
    let name = format!("{DAY}/0102-7.parquet");
    case.file(&name, b"seven");
    case.objects(&settings()).round().await.unwrap();
    assert_eq!(case.puts().await.len(), 1);
    // The list of what is there was never kept.
    let mut objects = case.objects(&settings());
    objects.round().await.unwrap();
    assert!(case.puts().await.is_empty());
    assert_eq!(objects.shared.stats(0, now_ns()).lag_files, 0);
}

#[tokio::test]
async fn what_others_put_there_is_not_touched_and_holds_up_no_other() {
    let case = Case::new();
    let name = format!("{DAY}/0102-7.parquet");
    case.file(&name, b"seven");
    case.file(&format!("{DAY}/0102-8.parquet"), b"eight");
    let key = Key::from(format!("led/ger/{name}"));
    case.bucket.objects.put(&key, PutPayload::from_static(b"another's")).await.unwrap();
    let mut objects = case.objects(&settings());
    let why = objects.round().await.unwrap_err();
    assert!(why.contains("is there with other content"), "{why}");
    assert_eq!(case.content(&name).await, b"another's");
    assert_eq!(case.content(&format!("{DAY}/0102-8.parquet")).await, b"eight");
    assert_eq!(objects.shared.stats(0, now_ns()).lag_files, 1);
    // The same content without a digest beside it is the same.
    case.bucket.objects.put(&key, PutPayload::from_static(b"seven")).await.unwrap();
    objects.round().await.unwrap();
}

#[tokio::test]
async fn a_file_that_changed_here_replaces_the_one_there() {
    let case = Case::new();
    let name = format!("{DAY}/0102-7.parquet");
    case.file(&name, b"with a secret");
    let mut objects = case.objects(&settings());
    objects.round().await.unwrap();
    case.file(&name, b"erased");
    objects.round().await.unwrap();
    assert_eq!(case.content(&name).await, b"erased");
    // Gone here: it stays there, and is forgotten.
    fs::remove_file(case.ledger.dir.path().join(PARQUET).join(&name)).unwrap();
    objects.round().await.unwrap();
    assert!(objects.taken.files.is_empty());
    assert_eq!(case.content(&name).await, b"erased");
}

#[tokio::test]
async fn a_large_file_goes_in_parts_and_once() {
    let case = Case::new();
    let name = format!("{DAY}/0102-7.parquet");
    let content: Vec<u8> = (0..WHOLE_BYTES_MAX + 5).map(|at| (at % 251) as u8).collect();
    case.file(&name, &content);
    case.objects(&settings()).round().await.unwrap();
    assert!(case.content(&name).await == content);
    assert_eq!(case.puts().await.len(), 1);
    case.objects(&settings()).round().await.unwrap();
    assert!(case.puts().await.is_empty());
}

#[tokio::test]
async fn files_beyond_the_cap_are_kept_or_passed_over() {
    for on_cap in [OnCap::Keep, OnCap::Skip] {
        let case = Case::new();
        for seq in 1..=3 {
            case.file(&format!("{DAY}/0102-{seq}.parquet"), &[0; 10]);
        }
        let cap = Cap { bytes_max: 20, age_max: None, on_cap };
        let mut objects = case.objects(&Settings { cap, ..settings() });
        case.bucket.away.store(true, Ordering::Relaxed);
        objects.round().await.unwrap_err();
        let keep = on_cap == OnCap::Keep;
        let stats = objects.shared.stats(0, now_ns());
        assert_eq!((stats.over_cap, stats.skipped), (keep, u64::from(!keep)));
        case.bucket.away.store(false, Ordering::Relaxed);
        objects.round().await.unwrap();
        assert_eq!(case.puts().await.len(), if keep { 3 } else { 2 });
    }
}

#[tokio::test]
async fn only_models_that_are_wanted_are_sent() {
    let case = Case::new();
    case.file("model=iris/date=2026-11-25/0102-1.parquet", b"1");
    case.file("model=fraud/date=2026-11-25/0102-2.parquet", b"2");
    let models = Models::parse("fr*").unwrap();
    case.objects(&Settings { models, ..settings() }).round().await.unwrap();
    assert_eq!(case.puts().await, ["led/ger/model=fraud/date=2026-11-25/0102-2.parquet"]);
}

#[tokio::test]
async fn a_file_waits_for_a_manifest_that_knows_it() {
    let case = Case::new();
    let name = format!("{DAY}/0102-7.parquet");
    let manifest = |digest: &str| {
        format!("{{\"files\":[{{\"file\":\"{name}\",\"sha256\":\"{digest}\"}}]}}").into_bytes()
    };
    case.file("_segments/0102-7.json", &manifest("of the file before"));
    case.file(&name, b"seven");
    let mut objects = case.objects(&settings());
    objects.round().await.unwrap();
    assert_eq!(case.puts().await, ["led/ger/_segments/0102-7.json"]);
    assert_eq!(objects.shared.stats(0, now_ns()).lag_files, 1);
    case.file("_segments/0102-7.json", &manifest(&hex(&Sha256::digest(b"seven"))));
    objects.round().await.unwrap();
    assert_eq!(case.puts().await.len(), 2);
    assert_eq!(objects.shared.stats(0, now_ns()).lag_files, 0);
}
