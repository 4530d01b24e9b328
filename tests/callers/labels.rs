//! Names that strangers make up must not become series.

use tidegate::domain::ModelSettings;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway;
use tidegate::proto::inference as pb;

use crate::support::{Inside, message};

const NAMES: u64 = 100_000;
const OVER_GRPC: u64 = 5_000;
const SERIES_MORE_MAX: usize = 20;
const PAGE_MORE_MAX_BYTES: usize = 4096;

/// A long period and no dependency.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 20
    }
}

fn series(page: &str) -> usize {
    page.lines().filter(|line| !line.starts_with('#')).count()
}

#[tokio::test]
async fn random_names_add_next_to_nothing_to_the_page() {
    let inside = Inside::start(gateway::Settings::default()).await;
    inside.serve("m", &FakeModel::new(2, 1.0), 1, ModelSettings::default());
    // What the operator's own traffic makes is there before.
    let body = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#;
    assert_eq!(inside.http("POST", "/v2/models/m/infer", body).await.status, 200);
    let asked = message("m", &[1, 2], &[1.0, 2.0]);
    let _answer: pb::ModelInferResponse = inside.grpc("ModelInfer", asked).await.unwrap();
    let before = inside.page();

    let mut random = Random(7);
    let methods =
        ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "M-SEARCH"];
    for at in 0..NAMES - OVER_GRPC {
        let (a, b) = (random.next(), random.next());
        let path = match at % 8 {
            0 => format!("/v2/models/{a:x}/infer"),
            1 => format!("/v2/models/{a:x}/versions/{b}/infer"),
            2 => format!("/v2/models/m/versions/{b}/infer"),
            3 => format!("/v2/models/m/versions/{b:x}/infer"),
            4 => format!("/{a:x}/{b:x}"),
            5 => format!("/v1/models/{a:x}:predict"),
            6 => format!("/v2/models/{a:x}/{b:x}"),
            _ => format!("/v2/repository/models/{a:x}/load"),
        };
        let method = match at % 3 {
            0 => methods[usize::try_from(a % 10).unwrap()].to_owned(),
            _ => "POST".to_owned(),
        };
        let agent = format!("agent-{b}");
        let headers = [("user-agent", agent.as_str()), ("tidegate-sticky-key", agent.as_str())];
        let answer = inside.http_with(&method, &path, &headers, body).await;
        assert!(answer.status.is_client_error() || answer.status == 501, "{method} {path}");
    }
    for at in 0..OVER_GRPC {
        let name = format!("{:x}", random.next());
        let mut asked = message(if at % 2 == 0 { &name } else { "m" }, &[1, 2], &[1.0, 2.0]);
        asked.model_version = random.next().to_string();
        let answer: Result<pb::ModelInferResponse, _> = inside.grpc("ModelInfer", asked).await;
        assert_eq!(answer.unwrap_err().code(), tonic::Code::NotFound);
    }

    let after = inside.page();
    let more = series(&after).saturating_sub(series(&before));
    let bytes = after.len().saturating_sub(before.len());
    eprintln!("{NAMES} random names: {more} series and {bytes} bytes more than before");
    assert!(more <= SERIES_MORE_MAX, "{more} series more");
    assert!(bytes <= PAGE_MORE_MAX_BYTES, "{bytes} bytes more");
}
