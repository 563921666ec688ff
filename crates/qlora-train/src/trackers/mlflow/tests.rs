//! The requests that a server gets, from one that notes them.

#![allow(clippy::unwrap_used)]

use super::super::stub::{self, Requests};
use super::super::tests::{eval, step};
use super::super::{Tracker, Trackers};
use super::*;
use crate::metrics::StepMetrics;

/// A server that answers every request: with 404 where the path or the body holds `missing`.
fn server(missing: &'static str) -> (String, Requests) {
    stub::server(move |request| {
        let what = request.path.trim_start_matches("api/2.0/mlflow/").split('?').next().unwrap();
        if !missing.is_empty() && format!("{} {}", request.path, request.body).contains(missing) {
            return ("404 Not Found", json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}));
        }
        let answer = match what {
            "runs/create" => json!({"run": {"info": {"run_id": "r1"}}}),
            "experiments/create" => json!({"experiment_id": "e1"}),
            "experiments/get-by-name" => json!({"experiment": {"experiment_id": "e0"}}),
            _ => json!({}),
        };
        ("200 OK", answer)
    })
}

/// A run of two steps and an evaluation, told to a server.
fn tell(uri: &str, folder: &Path, done: usize) {
    let settings = [("train.epochs".to_string(), 1.0.into())];
    let beginning = Beginning { folder, settings: &settings, step: done };
    let server = Server::new(address(URI, uri).unwrap(), Asks::Bearer("secret".into())).unwrap();
    let run = MlFlow::on(server, beginning).unwrap();
    let mut trackers = Trackers { sinks: vec![(Tracker::MlFlow, Box::new(run))], finished: false };
    let failed = StepMetrics { grad_norm: f64::NAN, ..step(done + 2) };
    let told = [trackers.step(&step(done + 1)), trackers.step(&failed), trackers.eval(&eval(done + 2))];
    assert!(told.concat().is_empty() && trackers.finish(Outcome::Finished).is_empty());
}

/// Every entry of a list in bodies of log-batch.
fn logged(requests: &Requests, what: &str) -> Vec<Value> {
    let requests = requests.lock().unwrap();
    let batches = requests.iter().filter(|request| request.path == api("runs/log-batch"));
    batches.flat_map(|request| request.body[what].as_array().cloned().unwrap_or_default()).collect()
}

#[test]
fn a_run_has_its_values_and_goes_on_in_the_same_one() {
    let dir = tempfile::tempdir().unwrap();
    let (uri, requests) = server("experiments/get-by-name");
    tell(&uri, dir.path(), 0);
    assert_eq!(logged(&requests, "params"), [json!({"key": "train.epochs", "value": "1.0"})]);
    let metrics = logged(&requests, "metrics");
    let of = |key: &str, step: usize| {
        metrics
            .iter()
            .find(|metric| metric["key"] == key && metric["step"] == step)
            .map(|metric| metric["value"].clone())
    };
    assert_eq!(
        (of("train/loss", 1), of("train/loss", 2), of("eval/loss", 2)),
        (Some(json!(1.0)), Some(json!(0.5)), Some(json!(2.0)))
    );
    assert_eq!((of("train/grad_norm", 1), of("train/grad_norm", 2)), (Some(json!(0.5)), None));
    assert!(logged(&requests, "tags")[0]["value"].as_str().unwrap().contains("two"));
    let all = std::mem::take(&mut *requests.lock().unwrap());
    assert!(all.iter().all(|request| request.asks == "Bearer secret"));
    let created = all.iter().find(|request| request.path == api("runs/create")).unwrap();
    assert_eq!(created.body["experiment_id"], "e1");
    let last = all.last().unwrap();
    assert_eq!((&last.path, &last.body["status"]), (&api("runs/update"), &json!("FINISHED")));
    assert_eq!(last.body["run_id"], "r1");
    tell(&uri, dir.path(), 2);
    let all = requests.lock().unwrap();
    assert!(!all.iter().any(|request| request.path == api("runs/create")));
    assert_eq!((&all[0].path, &all[0].body["status"]), (&api("runs/update"), &json!("RUNNING")));
}

#[test]
fn a_run_that_the_server_has_lost_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MLFLOW_FILE), "{}").unwrap();
    let (uri, requests) = server("RUNNING");
    tell(&uri, dir.path(), 0);
    tell(&uri, dir.path(), 2);
    let all = requests.lock().unwrap();
    assert_eq!(all.iter().filter(|request| request.path == api("runs/create")).count(), 2);
}

#[test]
fn addresses_show_no_password() {
    let server =
        Server::new(address(URI, "http://me:hidden@127.0.0.1:9/?token=hidden").unwrap(), Asks::Anyone).unwrap();
    assert_eq!(server.address(), "http://127.0.0.1:9");
    let problem = server.post(&api("runs/create"), &json!({})).err().unwrap().to_string();
    assert!(
        problem.starts_with("http://127.0.0.1:9/api/2.0/mlflow/runs/create: ") && !problem.contains("hidden"),
        "{problem}"
    );
    let refused = address(URI, "sqlite:///mlflow.db").err().unwrap();
    assert_eq!(refused, "MLFLOW_TRACKING_URI must begin with http:// or https://");
}
