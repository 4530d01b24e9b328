//! The response cache as clients see it: equal answers without the model, counted, and never one
//! of another version.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tidegate::cache;
use tidegate::domain::ModelSettings;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway;
use tidegate::proto::inference as pb;

use crate::support::{Inside, message};

fn cached() -> ModelSettings {
    ModelSettings { cached: true, ..ModelSettings::default() }
}

fn body(values: [f32; 2]) -> Value {
    json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": values}]})
}

async fn infer(inside: &Inside, model: &str, body: &Value) -> (u16, Value) {
    let path = format!("/v2/models/{model}/infer");
    let answer = inside.http("POST", &path, body.to_string()).await;
    (answer.status.as_u16(), answer.json())
}

fn value(page: &str, series: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

#[tokio::test]
async fn equal_requests_run_once_over_both_protocols_and_are_counted() {
    let inside = Inside::start(gateway::Settings::default()).await;
    let (on, off) = (FakeModel::new(2, 1.0), FakeModel::new(2, 1.0));
    inside.serve("on", &on, 1, cached());
    inside.serve("off", &off, 1, ModelSettings::default());
    let first = infer(&inside, "on", &body([1.0, 2.0])).await;
    assert_eq!(first.0, 200, "{}", first.1);
    for _ in 0..4 {
        assert_eq!(infer(&inside, "on", &body([1.0, 2.0])).await, first);
        assert_eq!(infer(&inside, "off", &body([1.0, 2.0])).await.1["outputs"], first.1["outputs"]);
    }
    // Another transport, another id and fewer outputs ask the same of the model.
    let mut asked = message("on", &[1, 2], &[1.0, 2.0]);
    asked.id = "mine".to_owned();
    let answer: pb::ModelInferResponse = inside.grpc("ModelInfer", asked).await.unwrap();
    assert_eq!(answer.id, "mine");
    assert_eq!(answer.raw_output_contents, [crate::support::floats(&[2.0, 3.0])]);
    let mut classes = body([1.0, 2.0]);
    classes["outputs"] = json!([{"name": "y", "parameters": {"classification": 1}}]);
    let classes = infer(&inside, "on", &classes).await.1;
    assert_eq!(classes["outputs"][0]["data"], json!(["3.000000:1"]));
    assert_eq!(on.runs.load(Ordering::Relaxed), 1);
    assert_eq!(off.runs.load(Ordering::Relaxed), 4);
    // Other values do not.
    infer(&inside, "on", &body([1.0, 3.0])).await;
    assert_eq!(on.runs.load(Ordering::Relaxed), 2);

    inside.api.gateway.upkeep();
    let page = inside.page();
    let of = |name: &str| value(&page, &format!("{name}{{model=\"on\",version=\"1\"}}"));
    assert_eq!(of("tidegate_cache_hits_total"), Some(6.0));
    assert_eq!(of("tidegate_cache_misses_total"), Some(2.0));
    assert_eq!(of("nv_cache_num_hits_per_model"), Some(6.0));
    assert_eq!(of("nv_cache_num_misses_per_model"), Some(2.0));
    assert_eq!(of("nv_inference_request_success"), Some(8.0));
    assert_eq!(of("nv_inference_count"), Some(2.0));
    assert!(of("nv_cache_hit_duration_per_model").is_some(), "{page}");
    assert!(!page.contains("tidegate_cache_hits_total{model=\"off\""), "{page}");
    assert_eq!(value(&page, "tidegate_cache_entries"), Some(2.0));

    let stats = inside.http("GET", "/v2/models/on/stats", "").await.json();
    let of_rest = &stats["model_stats"][0]["inference_stats"];
    assert_eq!(of_rest["cache_hit"]["count"], 6);
    assert_eq!(of_rest["cache_miss"]["count"], 2);
    let asked = pb::ModelStatisticsRequest { name: "on".to_owned(), version: String::new() };
    let stats: pb::ModelStatisticsResponse = inside.grpc("ModelStatistics", asked).await.unwrap();
    let of_grpc = stats.model_stats[0].inference_stats.as_ref().unwrap();
    let hit = of_grpc.cache_hit.unwrap();
    assert_eq!((hit.count, of_grpc.cache_miss.unwrap().count), (6, 2));
    assert!(hit.ns > 0);
    let config = inside.http("GET", "/v2/models/on/config", "").await.json();
    assert_eq!(config["response_cache"]["enable"], true);
}

#[tokio::test]
async fn a_new_artifact_never_answers_with_the_old_ones_words() {
    let inside = Inside::start(gateway::Settings::default()).await;
    for round in 0..50_u8 {
        let plus = f32::from(round);
        inside.serve("m", &FakeModel::new(2, plus), round, cached());
        for _ in 0..3 {
            let (_, answer) = infer(&inside, "m", &body([0.0, 0.0])).await;
            assert_eq!(answer["outputs"][0]["data"], json!([plus, plus]));
        }
    }
    // What the 49 before left goes with the next look.
    inside.api.gateway.upkeep();
    assert_eq!(value(&inside.page(), "tidegate_cache_entries"), Some(1.0));
}

#[tokio::test]
async fn failures_and_what_is_too_large_are_asked_again() {
    let cache = cache::Settings { entry_bytes_max: 64, ..cache::Settings::default() };
    let inside = Inside::start(gateway::Settings { cache, ..gateway::Settings::default() }).await;
    let fake = FakeModel::new(2, 1.0);
    inside.serve("m", &fake, 1, cached());
    let wrong = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3],
        "data": [1, 2, 3]}]});
    assert_eq!(infer(&inside, "m", &wrong).await.0, 400);
    assert_eq!(infer(&inside, "m", &wrong).await.0, 400);
    let rows = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [9, 2],
        "data": vec![1.0; 18]}]});
    assert_eq!(infer(&inside, "m", &rows).await.0, 200);
    assert_eq!(infer(&inside, "m", &rows).await.0, 200);
    assert_eq!(fake.runs.load(Ordering::Relaxed), 2);
    assert!(!inside.page().contains("tidegate_cache_hits_total{"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn callers_at_once_each_get_their_own_answer() {
    let inside = std::sync::Arc::new(Inside::start(gateway::Settings::default()).await);
    let fake = FakeModel::new(2, 1.0);
    inside.serve("m", &fake, 1, cached());
    let callers = (0..8_u16).map(|caller| {
        let inside = std::sync::Arc::clone(&inside);
        tokio::spawn(async move {
            for at in 0..200_u16 {
                let x = f32::from((at + caller) % 20);
                let (status, answer) = infer(&inside, "m", &body([x, -x])).await;
                assert_eq!(status, 200);
                assert_eq!(answer["outputs"][0]["data"], json!([x + 1.0, 1.0 - x]));
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    let rows = fake.rows.load(Ordering::Relaxed);
    assert!((20..=160).contains(&rows), "{rows} of 1600 requests reached the model");
}
