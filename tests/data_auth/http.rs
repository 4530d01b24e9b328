//! Over HTTP: no way in without a credential that holds.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::support::{House, INFER, raw};

/// Every route there is, and some that there are not.
const PATHS: [&str; 44] = [
    "/v2",
    "/v2/models",
    "/v2/models/stats",
    "/v2/models/mine-a",
    "/v2/models/mine-a/versions/1",
    "/v2/models/mine-a/ready",
    "/v2/models/mine-a/versions/1/ready",
    "/v2/models/mine-a/config",
    "/v2/models/mine-a/stats",
    "/v2/models/mine-a/versions/1/stats",
    "/v2/models/mine-a/openapi.json",
    "/v2/models/mine-a/infer",
    "/v2/models/mine-a/versions/1/infer",
    "/v2/models/mine-a/generate",
    "/v2/models/mine-a/generate_stream",
    "/v2/models/mine-a/trace/setting",
    "/v2/models/mine-a/feedback",
    "/v2/repository/index",
    "/v2/repository/r/index",
    "/v2/repository/models/mine-a/load",
    "/v2/repository/models/mine-a/unload",
    "/v2/repository/r/models/mine-a/load",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/systemsharedmemory/status",
    "/v2/systemsharedmemory/region/r/status",
    "/v2/systemsharedmemory/region/r/register",
    "/v2/systemsharedmemory/unregister",
    "/v2/cudasharedmemory/status",
    "/v2/cudasharedmemory/unregister",
    "/v1/models",
    "/v1/models/mine-a",
    "/v1/models/mine-a:predict",
    "/invocations",
    "/metrics",
    "/",
    "/admin/v1/models",
    "/v2/health",
    "/v2/health/",
    "/v2/health/liveness",
    "/v2/health/live/extra",
    "/health",
    "/inference.GRPCInferenceService/ModelInfer",
    "/nothing/here",
];

const METHODS: [&str; 8] = ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"];

/// Other ways to write a path that a lenient reader could take for it.
fn spellings(path: &str, token: &str) -> Vec<String> {
    let encoded = path.replacen("/v", "/%76", 1);
    vec![
        path.to_owned(),
        format!("{path}/"),
        format!("/{path}"),
        format!("{path}?access_token={token}&authorization=Bearer%20{token}"),
        format!("{path}%00"),
        format!("/v2/health/live/..{path}"),
        format!("/v2/health/live%2f..{path}"),
        format!("/v2/health/live;{path}"),
        format!("/ping/..{path}"),
        format!("/%2e{path}"),
        encoded,
        path.to_uppercase(),
    ]
}

#[tokio::test]
async fn no_route_answers_without_a_credential_that_holds() {
    let house = House::new(true);
    let bad = house.bad_credentials();
    let mut probes = 0_u64;
    for path in PATHS {
        for (at, path) in spellings(path, house.token("admin")).iter().enumerate() {
            // Each method with each credential for the path as it is, in turns for the spellings.
            let methods = if at == 0 { METHODS.len() } else { 2 };
            for (turn, credential) in bad.iter().enumerate() {
                for method in METHODS.iter().cycle().skip(turn).take(methods) {
                    let headers: Vec<_> =
                        credential.iter().map(|(name, value)| (*name, value.as_str())).collect();
                    let answer = house.http_with(&headers, method, path, INFER).await;
                    let what = format!("{method} {path} {credential:?}");
                    assert_eq!(answer.status, 401, "{what}");
                    assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{what}");
                    assert_eq!(answer.json()["code"], "unauthenticated", "{what}");
                    probes += 1;
                }
            }
        }
    }
    // Nothing of it reached a model, and all of it was counted.
    let page = String::from_utf8(house.observer.page(None).1.to_vec()).unwrap();
    let counted = page.lines().find(|line| {
        line.starts_with("tidegate_requests_total{") && line.contains("unauthenticated")
    });
    let counted: u64 = counted.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert_eq!(counted, probes);
    eprintln!("HTTP: {probes} route x credential probes, 0 unauthenticated 2xx");
    for method in ["GET", "HEAD"] {
        for path in ["/v2/health/live", "/v2/health/ready", "/ping"] {
            for credential in &bad {
                let headers: Vec<_> =
                    credential.iter().map(|(name, value)| (*name, value.as_str())).collect();
                assert_eq!(house.http_with(&headers, method, path, "").await.status, 200, "{path}");
            }
        }
    }
}

#[tokio::test]
async fn a_key_that_holds_opens_every_route() {
    let house = House::new(true);
    for path in PATHS {
        for method in ["GET", "POST"] {
            let answer = house.http("admin", method, path, INFER).await;
            assert_ne!(answer.status, 401, "{method} {path}");
            assert_ne!(answer.status, 403, "{method} {path}");
        }
    }
    let answer = house.http("predictor", "POST", "/v2/models/mine-a/infer", INFER).await;
    assert_eq!(answer.status, 200);
}

fn request(method: &str, path: &str, headers: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{headers}content-length: 0\r\n\r\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_over_a_socket() {
    let house = House::new(true);
    let (address, _listeners) = house.listen().await;
    let bearer = house.bearer("admin");
    let bad = [
        String::new(),
        "authorization: Bearer x\r\n".to_owned(),
        format!("authorization: {bearer}\r\nAuthorization: {bearer}\r\n"),
        format!("authorization: {bearer}, {bearer}\r\n"),
        format!("authorization : {bearer}\r\n"),
        format!("x: y\r\n authorization: {bearer}\r\n"),
        format!("authorization: Bearer\r\n {}\r\n", house.token("admin")),
        // What is said to be gRPC is asked by the same door.
        "content-type: application/grpc\r\n".to_owned(),
    ];
    let mut probes = 0;
    for path in PATHS {
        for headers in &bad {
            for method in ["GET", "POST"] {
                let answer = raw(address, request(method, path, headers)).await;
                let head = answer.lines().next().unwrap_or_default();
                let refused = head.starts_with("HTTP/1.1 401")
                    // What hyper finds malformed, and gRPC, which has its status elsewhere.
                    || head.starts_with("HTTP/1.1 400")
                    || answer.contains("grpc-status: 16");
                assert!(refused, "{method} {path} {headers:?}: {answer}");
                probes += 1;
            }
        }
    }
    eprintln!("HTTP/1.1 over a socket: {probes} probes, 0 unauthenticated 2xx");
    let good = raw(address, request("GET", "/v2/models", &format!("AUTHORIZATION: {bearer}\r\n")));
    assert!(good.await.starts_with("HTTP/1.1 200"));
    let absolute = raw(address, request("GET", "http://a/v2/models", ""));
    assert!(absolute.await.starts_with("HTTP/1.1 401"));
    let health = raw(address, request("GET", "/v2/health/live", "authorization: Bearer x\r\n"));
    assert!(health.await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_never_authenticate() {
    let house = House::new(true);
    let (address, _listeners) = house.listen().await;
    let bearer = house.bearer("admin");
    let len = INFER.len();
    for announced in ["", "trailer: authorization\r\n"] {
        let answer = raw(
            address,
            format!(
                "POST /v2/models/mine-a/infer HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\
                 {announced}te: trailers\r\ntransfer-encoding: chunked\r\n\r\n\
                 {len:x}\r\n{INFER}\r\n0\r\nauthorization: {bearer}\r\n\r\n"
            ),
        );
        let answer = answer.await;
        assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    }
    // Over HTTP/2, with a real client.
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let mut trailers = http::HeaderMap::new();
    trailers.insert("authorization", bearer.parse().unwrap());
    for content_type in ["application/json", "application/grpc"] {
        let frames = [
            Ok::<_, std::io::Error>(Frame::data(Bytes::from(INFER))),
            Ok(Frame::trailers(trailers.clone())),
        ];
        let body = StreamBody::new(tokio_stream::iter(frames));
        let request = Request::post(format!("http://{address}/v2/models/mine-a/infer"))
            .header("content-type", content_type)
            .body(body.boxed())
            .unwrap();
        let answer = sender.send_request(request).await.unwrap();
        let grpc = answer.headers().get("grpc-status").is_some_and(|status| status == "16");
        assert!(answer.status() == 401 || grpc, "{answer:?}");
    }
}

#[tokio::test]
async fn an_open_door_lets_in_who_shows_nothing() {
    let house = House::new(false);
    let infer = "/v2/models/other/infer";
    assert_eq!(house.http_with(&[], "POST", infer, INFER).await.status, 200);
    assert_eq!(
        house.http_with(&[], "GET", "/v2/models", "").await.json()["models"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    // A credential is looked at all the same: a good one counts, a bad one does not pass for none.
    assert_eq!(house.http("predictor", "POST", infer, INFER).await.status, 200);
    assert_eq!(house.http("viewer", "POST", infer, INFER).await.status, 403);
    assert_eq!(house.http("mine-predictor", "POST", infer, INFER).await.status, 404);
    for credential in house.bad_credentials() {
        let headers: Vec<_> =
            credential.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let shown = headers.iter().any(|(name, _)| *name == "authorization");
        let answer = house.http_with(&headers, "POST", infer, INFER).await;
        assert_eq!(answer.status, if shown { 401 } else { 200 }, "{credential:?}");
    }
    assert_eq!(house.http("revoked", "GET", "/ping", "").await.status, 200, "health never looks");
}

#[tokio::test]
async fn a_key_that_is_taken_away_opens_nothing_any_more() {
    let house = House::new(true);
    let infer = "/v2/models/mine-a/infer";
    assert_eq!(house.http("predictor", "POST", infer, INFER).await.status, 200);
    house.publish(|name| name != "predictor");
    assert_eq!(house.http("predictor", "POST", infer, INFER).await.status, 401);
    house.publish(|_| true);
    assert_eq!(house.http("predictor", "POST", infer, INFER).await.status, 200);
}
