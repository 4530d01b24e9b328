//! Records into a topic of Kafka: the line of the export, with the prediction's id as its key.
//!
//! The partition is what Kafka's own clients choose for that key, so whoever looks for an id knows
//! where. Each produce waits for all replicas that are in sync.
//!
//! Invariants:
//! - The topic is not made here: how many partitions it has is its owner's decision.
//! - A record that the broker will never take, being too large, is given up alone and counted; all
//!   other failures are tried again.
//! - Without TLS a name and a password go to this machine only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{LocalBoxFuture, join_all};
use rskafka::BackoffConfig;
use rskafka::chrono::{DateTime, Utc};
use rskafka::client::error::{Error, ProtocolError};
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use rskafka::client::{Client, ClientBuilder, Credentials, SaslConfig};
use rskafka::record::Record;
use tokio::time::timeout;

use super::worker::{Again, Item, Lost, Sent, Sink};
use crate::ledger::export;
use crate::secret::SecretRef;

/// Bytes of one produce; brokers take a MiB unless they are told otherwise.
const PRODUCE_BYTES_MAX: usize = 900_000;
/// Largest answer of a broker: metadata of many topics.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// How long the library tries by itself, for a leader that moved.
const RETRIED_MAX: Duration = Duration::from_secs(1);
/// Most partitions of a topic.
const PARTITIONS_MAX: usize = 10_000;

/// Where records go, and as whom.
#[derive(Clone, Debug)]
pub struct KafkaSettings {
    /// `host:port` of some of the brokers.
    pub brokers: Vec<String>,
    pub topic: String,
    pub tls: bool,
    pub login: Option<(Mechanism, SecretRef, SecretRef)>,
    /// Longest wait for an answer.
    pub timeout: Duration,
}

/// How a name and a password are shown to a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    Plain,
    ScramSha256,
    ScramSha512,
}

pub(super) struct Kafka {
    settings: KafkaSettings,
    writer: String,
    connected: Option<Connected>,
}

struct Connected {
    client: Client,
    /// By number; made when they are first needed.
    partitions: Vec<Option<Arc<PartitionClient>>>,
}

/// What one partition gets of a batch.
type Parts = Vec<Vec<Record>>;

impl Kafka {
    pub(super) fn new(settings: KafkaSettings, writer: String) -> Self {
        Self { settings, writer, connected: None }
    }

    /// Connecting, finding leaders and producing, each of which has its own limit as well.
    fn limit(&self) -> Duration {
        self.settings.timeout * 3
    }

    async fn connect(&self) -> Result<Connected, Again> {
        let settings = &self.settings;
        let mut builder = ClientBuilder::new(settings.brokers.clone())
            .client_id("tidegate")
            .max_message_size(ANSWER_BYTES_MAX)
            // We wait between tries ourselves.
            .backoff_config(BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(1),
                base: 2.0,
                deadline: Some(RETRIED_MAX.min(settings.timeout)),
            });
        if settings.tls {
            builder = builder.tls_config(tls());
        }
        if let Some((mechanism, name, password)) = &settings.login {
            let read = |secret: &SecretRef| {
                let read = secret.read().map_err(|error| Again::new(error.to_string()))?;
                Ok::<_, Again>(read.expose().to_owned())
            };
            let login = Credentials::new(read(name)?, read(password)?);
            builder = builder.sasl_config(match mechanism {
                Mechanism::Plain => SaslConfig::Plain(login),
                Mechanism::ScramSha256 => SaslConfig::ScramSha256(login),
                Mechanism::ScramSha512 => SaslConfig::ScramSha512(login),
            });
        }
        let client = builder.build().await.map_err(|error| Again::new(error.to_string()))?;
        let topics = client.list_topics().await.map_err(|error| Again::new(error.to_string()))?;
        let topic = topics.into_iter().find(|topic| topic.name == settings.topic);
        let topic = topic.ok_or_else(|| Again::new(format!("no topic '{}'", settings.topic)))?;
        match topic.partitions.len() {
            0 => Err(Again::new("the topic has no partitions")),
            count if count > PARTITIONS_MAX => Err(Again::new("the topic has too many partitions")),
            count => Ok(Connected { client, partitions: vec![None; count] }),
        }
    }

    fn record(&self, item: &Item) -> Option<Record> {
        let view = item.view()?;
        let mut value = Vec::new();
        export::line(&mut value, &self.writer, &view);
        let key = uuid::Uuid::from_slice(view.prediction_id).ok()?.to_string();
        Some(message(key, value, view.time_ns))
    }

    /// What goes to which partition, in produces of a size that brokers take.
    fn sorted(&self, batch: &[Item], partitions: usize) -> (BTreeMap<usize, Parts>, u64) {
        let (mut sorted, mut refused) = (BTreeMap::<usize, Parts>::new(), 0);
        let mut left = BTreeMap::<usize, usize>::new();
        for item in batch {
            let Some(record) = self.record(item) else {
                refused += 1;
                continue;
            };
            let at = partition(record.key.as_deref().unwrap_or_default(), partitions);
            let (parts, left) = (sorted.entry(at).or_default(), left.entry(at).or_default());
            let size = record.approximate_size();
            match parts.last_mut().filter(|_| size <= *left) {
                Some(part) => part.push(record),
                None => {
                    parts.push(vec![record]);
                    *left = PRODUCE_BYTES_MAX;
                }
            }
            *left = left.saturating_sub(size);
        }
        (sorted, refused)
    }

    async fn connected(&mut self) -> Result<Connected, Again> {
        match self.connected.take() {
            Some(connected) => Ok(connected),
            None => self.connect().await,
        }
    }

    /// To the partition of the writer's own key.
    async fn say(&mut self, lost: &Lost) -> Result<(), Again> {
        let mut connected = self.connected().await?;
        let at = partition(self.writer.as_bytes(), connected.partitions.len());
        let to = connected.partition(at, &self.settings.topic).await?;
        let time_ns = i64::try_from(lost.at_ns).unwrap_or(i64::MAX);
        let message = message(self.writer.clone(), lost.json(&self.writer), time_ns);
        produce(to, vec![vec![message]]).await?;
        self.connected = Some(connected);
        Ok(())
    }

    async fn give(&mut self, batch: &[Item]) -> Result<Sent, Again> {
        let mut connected = self.connected().await?;
        let (sorted, refused) = self.sorted(batch, connected.partitions.len());
        let mut clients = Vec::with_capacity(sorted.len());
        for at in sorted.keys() {
            clients.push(connected.partition(*at, &self.settings.topic).await?);
        }
        let produced =
            clients.into_iter().zip(sorted.into_values()).map(|(to, parts)| produce(to, parts));
        let mut sent = Sent { refused };
        for one in join_all(produced).await {
            sent.refused += one?;
        }
        // One that failed is not kept: its password may have been replaced, its leader moved.
        self.connected = Some(connected);
        Ok(sent)
    }
}

impl Sink for Kafka {
    fn send<'a>(&'a mut self, batch: &'a [Item]) -> LocalBoxFuture<'a, Result<Sent, Again>> {
        let limit = self.limit();
        Box::pin(within(limit, self.give(batch)))
    }

    fn tell<'a>(&'a mut self, lost: &'a Lost) -> LocalBoxFuture<'a, Result<(), Again>> {
        let limit = self.limit();
        Box::pin(within(limit, self.say(lost)))
    }
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Again>>,
) -> Result<T, Again> {
    let late = |_| Err(Again::new(format!("no answer within {limit:?}")));
    timeout(limit, work).await.unwrap_or_else(late)
}

fn message(key: String, value: Vec<u8>, time_ns: i64) -> Record {
    let timestamp = DateTime::<Utc>::from_timestamp_nanos(time_ns);
    let headers = BTreeMap::from([("content-type".to_owned(), b"application/json".to_vec())]);
    Record { key: Some(key.into_bytes()), value: Some(value), headers, timestamp }
}

impl Connected {
    async fn partition(&mut self, at: usize, topic: &str) -> Result<Arc<PartitionClient>, Again> {
        let Some(known) = self.partitions.get_mut(at) else {
            return Err(Again::new(format!("no partition {at}")));
        };
        if let Some(client) = known {
            return Ok(Arc::clone(client));
        }
        let number = i32::try_from(at).unwrap_or(i32::MAX);
        let client = self.client.partition_client(topic, number, UnknownTopicHandling::Error);
        let client = Arc::new(client.await.map_err(|error| Again::new(error.to_string()))?);
        *known = Some(Arc::clone(&client));
        Ok(client)
    }
}

/// Produces one after the other; how many records were given up.
async fn produce(to: Arc<PartitionClient>, parts: Parts) -> Result<u64, Again> {
    let mut refused = 0;
    for part in parts {
        match to.produce(part.clone(), Compression::Zstd).await {
            Ok(_) => {}
            Err(error) if is_for_good(&error) => refused += produce_each(&to, part).await?,
            Err(error) => return Err(Again::new(error.to_string())),
        }
    }
    Ok(refused)
}

/// Finds which of several the broker refuses.
async fn produce_each(to: &PartitionClient, part: Vec<Record>) -> Result<u64, Again> {
    let mut refused = 0;
    for record in part {
        let key = String::from_utf8_lossy(record.key.as_deref().unwrap_or_default()).into_owned();
        let bytes = record.approximate_size();
        match to.produce(vec![record], Compression::Zstd).await {
            Ok(_) => {}
            Err(error) if is_for_good(&error) => {
                tracing::error!(sink = "kafka", prediction = key, bytes, %error, "record refused");
                refused += 1;
            }
            Err(error) => return Err(Again::new(error.to_string())),
        }
    }
    Ok(refused)
}

/// Whether the records themselves are what the broker does not take.
fn is_for_good(error: &Error) -> bool {
    let Error::ServerError { protocol_error, .. } = error else { return false };
    matches!(
        protocol_error,
        ProtocolError::MessageTooLarge
            | ProtocolError::RecordListTooLarge
            | ProtocolError::InvalidRecord
    )
}

fn tls() -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (_, unusable) = roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let errors = found.errors.len();
        tracing::warn!(errors, unusable, "no root certificates: no broker will be trusted");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has what TLS 1.2 and 1.3 need")
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

/// The partition that Kafka's own clients put a key in.
fn partition(key: &[u8], count: usize) -> usize {
    (murmur2(key) & 0x7fff_ffff) as usize % count.max(1)
}

/// Murmur2 as Kafka has it.
fn murmur2(key: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    let mix = |word: u32| {
        let word = word.wrapping_mul(M);
        (word ^ (word >> 24)).wrapping_mul(M)
    };
    let len = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let (words, rest) = key.as_chunks::<4>();
    let mut hash = SEED ^ len;
    for word in words {
        hash = hash.wrapping_mul(M) ^ mix(u32::from_le_bytes(*word));
    }
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        hash = (hash ^ u32::from_le_bytes(last)).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_fall_where_other_clients_put_them() {
        // From the tests of Kafka's own client.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
        assert_eq!(partition(b"foobar", 1), 0);
        assert!((0..100).all(|at: u32| partition(&at.to_le_bytes(), 7) < 7));
    }
}
