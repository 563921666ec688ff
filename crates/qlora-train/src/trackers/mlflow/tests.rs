//! The requests that a server gets, from one that notes them.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use super::super::tests::{eval, step};
use super::super::{Tracker, Trackers};
use super::client::Authorization;
use super::*;
use crate::metrics::StepMetrics;

/// Path, `authorization` and body of each request.
type Requests = Arc<Mutex<Vec<(String, String, Value)>>>;

/// A server that answers every request: with 404 where the path or the body holds `missing`.
fn server(missing: &'static str) -> (String, Requests) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    let requests = Requests::default();
    let noted = Arc::clone(&requests);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let path = line.split(' ').nth(1).unwrap_or_default().trim_start_matches("/api/2.0/mlflow/").to_string();
            let (mut length, mut authorization) = (0, String::new());
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).unwrap();
                let Some((name, value)) = header.split_once(": ") else { break };
                match name.to_lowercase().as_str() {
                    "content-length" => length = value.trim().parse().unwrap(),
                    "authorization" => authorization = value.trim().to_string(),
                    _ => {}
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            let is_missing = !missing.is_empty() && format!("{path} {body}").contains(missing);
            noted.lock().unwrap().push((path.clone(), authorization, body));
            let (status, answer) = match path.split('?').next().unwrap() {
                _ if is_missing => {
                    ("404 Not Found", json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}))
                }
                "runs/create" => ("200 OK", json!({"run": {"info": {"run_id": "r1"}}})),
                "experiments/create" => ("200 OK", json!({"experiment_id": "e1"})),
                "experiments/get-by-name" => ("200 OK", json!({"experiment": {"experiment_id": "e0"}})),
                _ => ("200 OK", json!({})),
            };
            let answer = answer.to_string();
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(answer.as_bytes()));
        }
    });
    (uri, requests)
}

/// A run of two steps and an evaluation, told to a server.
fn tell(uri: &str, folder: &Path, done: usize) {
    let settings = [("train.epochs".to_string(), "1.0".to_string())];
    let beginning = Beginning { folder, settings: &settings, step: done };
    let client = Client::new(uri, Some(Authorization::Bearer("secret".into()))).unwrap();
    let run = MlFlow::on(client, beginning).unwrap();
    let mut trackers = Trackers { sinks: vec![(Tracker::MlFlow, Box::new(run))], finished: false };
    let failed = StepMetrics { grad_norm: f64::NAN, ..step(done + 2) };
    let told = [trackers.step(&step(done + 1)), trackers.step(&failed), trackers.eval(&eval(done + 2))];
    assert!(told.concat().is_empty() && trackers.finish(Outcome::Finished).is_empty());
}

/// Every entry of a list in bodies of log-batch.
fn logged(requests: &Requests, what: &str) -> Vec<Value> {
    let requests = requests.lock().unwrap();
    let batches = requests.iter().filter(|(path, ..)| path == "runs/log-batch");
    batches.flat_map(|(.., body)| body[what].as_array().cloned().unwrap_or_default()).collect()
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
    assert!(all.iter().all(|(_, authorization, _)| authorization == "Bearer secret"));
    let created = all.iter().find(|(path, ..)| path == "runs/create").unwrap();
    assert_eq!(created.2["experiment_id"], "e1");
    let (path, _, last) = all.last().unwrap();
    assert_eq!((path.as_str(), &last["status"], &last["run_id"]), ("runs/update", &json!("FINISHED"), &json!("r1")));
    tell(&uri, dir.path(), 2);
    let all = requests.lock().unwrap();
    assert!(!all.iter().any(|(path, ..)| path == "runs/create"));
    assert_eq!((all[0].0.as_str(), &all[0].2["status"]), ("runs/update", &json!("RUNNING")));
}

#[test]
fn a_run_that_the_server_has_lost_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(MLFLOW_FILE), "{}").unwrap();
    let (uri, requests) = server("RUNNING");
    tell(&uri, dir.path(), 0);
    tell(&uri, dir.path(), 2);
    let all = requests.lock().unwrap();
    assert_eq!(all.iter().filter(|(path, ..)| path == "runs/create").count(), 2);
}

#[test]
fn addresses_show_no_password() {
    let client = Client::new("http://me:hidden@127.0.0.1:9/", None).unwrap();
    assert_eq!(client.uri(), "http://127.0.0.1:9");
    let problem = client.post("runs/create", &json!({})).err().unwrap().to_string();
    assert!(
        problem.starts_with("http://127.0.0.1:9/api/2.0/mlflow/runs/create: ") && !problem.contains("hidden"),
        "{problem}"
    );
    let refused = Client::new("sqlite:///mlflow.db", None).err().unwrap();
    assert_eq!(refused, "MLFLOW_TRACKING_URI must begin with http:// or https://");
}
