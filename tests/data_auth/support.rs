//! A gateway with three models, and a key for everybody.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use jiff::Timestamp;
use prost::Message;
use serde_json::{Value, json};
use tidegate::admit::keys::GrantRecord;
use tidegate::admit::{Gatekeeper, KeyRecord, KeySet, Role, Token};
use tidegate::batch::ThreadBudget;
use tidegate::domain::{
    BatchSettings, Failure, IndexEntry, ModelControl, ModelFile, ModelName, Version, VersionState,
};
use tidegate::engine::Model as _;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway::{self, Gateway};
use tidegate::observe::Observer;
use tidegate::route::Published;
use tidegate::transport::auth::Auth;
use tidegate::transport::grpc::Grpc;
use tidegate::transport::intake::Intake;
use tidegate::transport::listener::Listeners;
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings, http as rest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What is served. `other` is outside every limited key; `absent` is not there at all.
pub(crate) const MODELS: [&str; 3] = ["mine-a", "mine-b", "other"];
pub(crate) const INFER: &str =
    r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#;

/// A repository that does whatever it is told.
struct Obedient;

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

impl ModelControl for Obedient {
    fn index(&self) -> Vec<IndexEntry> {
        let entry = |name: &str| IndexEntry {
            model: name.parse().unwrap(),
            version: Version::new(1),
            state: VersionState::Ready,
            reason: String::new(),
        };
        MODELS.map(entry).to_vec()
    }

    fn load<'a>(&'a self, _: &'a ModelName, _: Option<&'a str>, _: Vec<ModelFile>) -> Done<'a> {
        Box::pin(async { Ok(()) })
    }

    fn unload<'a>(&'a self, _: &'a ModelName) -> Done<'a> {
        Box::pin(async { Ok(()) })
    }
}

/// A gateway and the tokens of its keys.
pub(crate) struct House {
    pub(crate) api: Arc<Api>,
    pub(crate) gatekeeper: Arc<Gatekeeper>,
    pub(crate) observer: Arc<Observer>,
    grpc: Grpc,
    /// `viewer`, `mine-viewer` (for `mine-*` only), …, `expired`, `revoked`.
    tokens: BTreeMap<String, Token>,
    records: Vec<KeyRecord>,
}

/// What a call gave.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Of gRPC.
    pub(crate) code: Option<tonic::Code>,
    pub(crate) message: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?}", self.body))
    }

    /// The message of a gRPC answer.
    pub(crate) fn decoded<M: Message + Default>(&self) -> M {
        assert_eq!(self.code, Some(tonic::Code::Ok), "{}", self.message);
        M::decode(&self.body[5..]).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

impl House {
    pub(crate) fn new(required: bool) -> Self {
        let mut tokens = BTreeMap::new();
        let mut records = Vec::new();
        let mut add = |name: String, role: Role, models: &[&str]| {
            let token = Token::generate().unwrap();
            let models = models.iter().map(|text| (*text).to_owned()).collect();
            records.push(KeyRecord {
                id: token.id().to_owned(),
                name: name.clone(),
                grants: vec![GrantRecord { role, models }],
                digest: token.digest().to_string(),
                created_at: Timestamp::UNIX_EPOCH,
                created_by: "test".to_owned(),
                expires_at: (name == "expired").then_some(Timestamp::UNIX_EPOCH),
                revoked_at: (name == "revoked").then_some(Timestamp::UNIX_EPOCH),
                revoked_by: None,
            });
            tokens.insert(name, token);
        };
        for role in Role::ALL {
            add(role.to_string(), role, &[]);
            add(format!("mine-{role}"), role, &["mine-*"]);
        }
        add("expired".to_owned(), Role::Admin, &[]);
        add("revoked".to_owned(), Role::Admin, &[]);

        let gatekeeper = Arc::new(Gatekeeper::default());
        let auth = Auth { required, gatekeeper: Arc::clone(&gatekeeper) };
        let settings = Settings { auth, model_control: true, ..Settings::default() };
        let access_log = tidegate::observe::AccessLog::All;
        let observer = Observer::new(tidegate::observe::Settings {
            access_log,
            ..tidegate::observe::Settings::default()
        });
        let budget = Arc::new(ThreadBudget::new(2));
        let served = MODELS.map(|name| {
            let fake = FakeModel::new(2, 1.0);
            let sessions = vec![fake.session().unwrap()];
            let batch = BatchSettings::default();
            crate::gateway::served(&observer, &budget, name, fake.signature(), sessions, batch)
        });
        let mut table = crate::gateway::table(served);
        table.default_model = Some("other".parse().unwrap());
        let gateway = Gateway::new(
            Arc::new(Published::new(table)),
            Arc::clone(&observer),
            Arc::new(Obedient),
            gateway::Settings::default(),
        );
        let api = Arc::new(Api {
            gateway: Arc::new(gateway),
            health: Arc::new(Health::default()),
            shm: SharedMemory::new(true),
            toggles: Toggles::default(),
            intake: Intake::new(&settings),
            settings,
        });
        api.health.set_ready();
        let grpc = Grpc::new(Arc::clone(&api));
        let house = Self { api, gatekeeper, observer, grpc, tokens, records };
        house.publish(|_| true);
        house
    }

    /// Puts those keys in force whose name is wanted.
    pub(crate) fn publish(&self, wanted: impl Fn(&str) -> bool) {
        let records = self.records.iter().filter(|record| wanted(&record.name));
        let records =
            records.map(|record| (record.id.as_str(), serde_json::to_value(record).unwrap()));
        let (keys, wrong) = KeySet::from_records(records);
        assert!(wrong.is_empty());
        self.gatekeeper.replace(keys);
    }

    pub(crate) fn token(&self, name: &str) -> &str {
        self.tokens[name].text().expose()
    }

    /// The value of a header with this key.
    pub(crate) fn bearer(&self, name: &str) -> String {
        format!("Bearer {}", self.token(name))
    }

    /// Asks as the key of this name, over HTTP.
    pub(crate) async fn http(
        &self,
        key: &str,
        method: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Answer {
        let bearer = self.bearer(key);
        self.http_with(&[("authorization", &bearer)], method, path, body).await
    }

    pub(crate) async fn http_with(
        &self,
        headers: &[(&str, &str)],
        method: &str,
        path: &str,
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let (head, body) = rest::handle(Arc::clone(&self.api), request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let (code, message) = (None, String::new());
        Answer { status: head.status, headers: head.headers, body, code, message }
    }

    /// Calls `path` as the key of this name, over gRPC.
    pub(crate) async fn grpc(&self, key: &str, path: &str, message: &impl Message) -> Answer {
        let bearer = self.bearer(key);
        self.grpc_with(&[("authorization", &bearer)], path, framed(message)).await
    }

    pub(crate) async fn grpc_with(
        &self,
        metadata: &[(&str, &str)],
        path: &str,
        body: Bytes,
    ) -> Answer {
        let mut request =
            Request::post(path).header("content-type", "application/grpc").header("te", "trailers");
        for (name, value) in metadata {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).unwrap();
        let (head, body) = self.grpc.call(request).await.into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned().unwrap_or_default();
        let said = |name: &str| {
            let value = head.headers.get(name).or_else(|| trailers.get(name));
            value.map(|value| value.to_str().unwrap().to_owned())
        };
        let code = said("grpc-status").map(|code| tonic::Code::from_bytes(code.as_bytes()));
        let message = said("grpc-message").unwrap_or_default();
        let mut headers = head.headers;
        headers.extend(trailers);
        Answer { status: head.status, headers, body: body.to_bytes(), code, message }
    }

    /// Serves on a socket of this machine.
    pub(crate) async fn listen(&self) -> (SocketAddr, Listeners) {
        let mut listeners = Listeners::new(Arc::clone(&self.api)).unwrap();
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        listeners.serve(socket);
        (address, listeners)
    }

    /// What nobody is let in with: names and values of headers.
    pub(crate) fn bad_credentials(&self) -> Vec<Vec<(&'static str, String)>> {
        let good = self.token("admin");
        let bearer = self.bearer("admin");
        let id = &good[..19];
        let mut bad: Vec<Vec<(&'static str, String)>> = vec![
            vec![],
            vec![("authorization", bearer.clone()), ("authorization", bearer.clone())],
            vec![("authorization", bearer.clone()), ("authorization", "Bearer x".to_owned())],
            vec![("authorization", String::new()), ("authorization", bearer.clone())],
        ];
        let values = [
            String::new(),
            "Bearer".to_owned(),
            "Bearer ".to_owned(),
            "Basic dXNlcjpwYXNz".to_owned(),
            good.to_owned(),
            format!("Token {good}"),
            format!("Basic {good}"),
            format!("Bearer{good}"),
            format!("Bearer\t{good}"),
            format!("Bearer {good},"),
            format!("{bearer}, {bearer}"),
            format!("Bearer {}", good.to_uppercase()),
            format!("Bearer {}", &good[..62]),
            format!("Bearer {good}x"),
            format!("Bearer {id}.{}", "A".repeat(43)),
            format!("Bearer {}", Token::generate().unwrap().text().expose()),
            format!("Bearer {}", self.token("expired")),
            format!("Bearer {}", self.token("revoked")),
            "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.".to_owned(),
            format!("Bearer {}", "x".repeat(9 << 10)),
        ];
        bad.extend(values.map(|value| vec![("authorization", value)]));
        for name in [
            "proxy-authorization",
            "x-authorization",
            "x-forwarded-authorization",
            "x-api-key",
            "grpc-metadata-authorization",
            "authorization-bin",
        ] {
            bad.push(vec![(name, bearer.clone())]);
        }
        bad.push(vec![("cookie", format!("authorization={bearer}; token={good}"))]);
        bad.push(vec![("x-forwarded-for", "127.0.0.1".to_owned())]);
        bad
    }
}

/// A message with gRPC's prefix.
pub(crate) fn framed(message: &impl Message) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut framed).unwrap();
    framed.freeze()
}

/// Sends bytes over a connection of their own and reads until it ends.
pub(crate) async fn raw(address: SocketAddr, request: String) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

pub(crate) fn model(name: &str) -> Value {
    json!({"name": name, "version": "1", "state": "READY"})
}
