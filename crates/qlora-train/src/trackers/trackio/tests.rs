//! The requests that a server gets, from one that notes them.

#![allow(clippy::unwrap_used)]

use super::super::stub::{self, Requests};
use super::super::tests::{eval, step};
use super::super::{Tracker, Trackers};
use super::*;
use crate::metrics::StepMetrics;

/// A server that takes the token "secret". It has no run but those that were logged to it, and none where it is `forgetful`.
fn server(forgetful: bool) -> (String, Requests) {
    let ids = std::sync::Mutex::new(Vec::new());
    stub::server(move |request| match request.path.as_str() {
        "version" => ("200 OK", json!({"version": "0.43.0", "api_version": 1})),
        "api/get_runs_for_project" => {
            let ids: Vec<Value> = if forgetful { Vec::new() } else { ids.lock().unwrap().clone() };
            ("200 OK", json!({"data": ids.iter().map(|id| json!({"id": id, "name": "run"})).collect::<Vec<_>>()}))
        }
        "api/bulk_log" if request.asks == "secret" => {
            let logs = request.body["kwargs"]["logs"].as_array().unwrap();
            ids.lock().unwrap().extend(logs.iter().map(|log| log["run_id"].clone()));
            ("200 OK", json!({"data": null}))
        }
        "api/bulk_log" => ("400 Bad Request", json!({"error": "A write_token is required"})),
        other => panic!("{other}"),
    })
}

fn there(place: Result<Place, String>) -> Place {
    place.unwrap_or_else(|problem| panic!("{problem}"))
}

fn place(address: &str) -> Place {
    let url = format!("{address}/?write_token=secret");
    there(Place::of(|name| (name == URL).then(|| url.clone()), || None))
}

/// A run of two steps and an evaluation, told to a server.
fn tell(address: &str, folder: &Path, done: usize) {
    let settings = [("train.epochs".to_string(), 1.5.into()), ("train.schedule".to_string(), "cosine".into())];
    let beginning = Beginning { folder, settings: &settings, step: done };
    let run = Trackio::on(place(address), "mine".into(), beginning).unwrap();
    let mut trackers = Trackers { sinks: vec![(Tracker::Trackio, Box::new(run))], finished: false };
    let failed = StepMetrics { grad_norm: f64::NAN, ..step(done + 2) };
    let told = [trackers.step(&step(done + 1)), trackers.step(&failed), trackers.eval(&eval(done + 2))];
    assert!(told.concat().is_empty() && trackers.finish(Outcome::Finished).is_empty());
}

/// Every entry that was logged.
fn logged(requests: &Requests) -> Vec<Value> {
    let requests = requests.lock().unwrap();
    let logs = requests.iter().filter(|request| request.path == "api/bulk_log");
    logs.flat_map(|request| request.body["kwargs"]["logs"].as_array().cloned().unwrap()).collect()
}

#[test]
fn a_run_has_its_values_and_goes_on_in_the_same_one() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("lora");
    std::fs::create_dir(&folder).unwrap();
    let (address, requests) = server(false);
    tell(&address, &folder, 0);
    let logs = logged(&requests);
    let kinds: Vec<_> = logs.iter().map(|log| (log["step"].as_u64().unwrap(), log["metrics"].clone())).collect();
    assert_eq!((kinds[0].0, &kinds[0].1["train/loss"]), (1, &json!(1.0)));
    assert_eq!((kinds[1].0, &kinds[1].1["train/loss"]), (2, &json!(0.5)));
    assert!(kinds[0].1.get("train/grad_norm").is_some() && kinds[1].1.get("train/grad_norm").is_none());
    assert_eq!((kinds[2].0, &kinds[2].1["eval/loss"]), (2, &json!(2.0)));
    let answer = &kinds[3].1["answers"][0];
    assert_eq!(answer["_type"], "trackio.trace");
    assert_eq!(
        (&answer["messages"][0]["content"], &answer["messages"][1]["content"]),
        (&json!("1 + 1?"), &json!("two"))
    );
    // The configuration comes once, with its types.
    assert_eq!(logs[0]["config"], json!({"train.epochs": 1.5, "train.schedule": "cosine"}));
    assert!(logs[1..].iter().all(|log| log.get("config").is_none()));
    assert!(
        logs.iter().all(|log| log["project"] == "mine" && log["run"] == "lora" && log["run_id"] == logs[0]["run_id"])
    );
    let kept = std::fs::read_to_string(folder.join(TRACKIO_FILE)).unwrap();
    assert!(kept.contains(&format!("\"{address}\"")) && !kept.contains("secret"), "{kept}");
    // Step 2 once more, and two more.
    tell(&address, &folder, 1);
    tell(&address, &folder, 2);
    let logs = logged(&requests);
    assert!(logs.iter().all(|log| log["run_id"] == logs[0]["run_id"]));
    let ids = |step: u64| {
        let of_step = logs.iter().filter(|log| log["step"] == step);
        of_step.map(|log| log["log_id"].as_str().unwrap()).collect::<std::collections::BTreeSet<_>>().len()
    };
    // What is sent again has the id that it had: the server takes it once.
    assert_eq!((ids(1), ids(2), ids(3), ids(4)), (1, 3, 3, 3));
}

#[test]
fn a_run_that_the_server_has_lost_or_another_project_has_is_begun_anew() {
    for (forgetful, project) in [(true, "mine"), (false, "another")] {
        let dir = tempfile::tempdir().unwrap();
        let (address, _) = server(forgetful);
        tell(&address, dir.path(), 0);
        let before = read(&dir.path().join(TRACKIO_FILE)).unwrap();
        let beginning = Beginning { folder: dir.path(), settings: &[], step: 2 };
        drop(Trackio::on(place(&address), project.into(), beginning).unwrap());
        let now = read(&dir.path().join(TRACKIO_FILE)).unwrap();
        assert!(now.run_id != before.run_id && now.run_id.len() == 32, "{now:?}");
    }
}

#[test]
fn what_is_amiss_is_told_before_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let beginning = || Beginning { folder: dir.path(), settings: &[], step: 0 };
    let problem = |place| Trackio::on(place, "p".into(), beginning()).err().unwrap();
    let with = |url: String, token: &'static str| {
        let variable = move |name: &str| match name {
            URL => Some(url.clone()),
            TOKEN => Some(token.to_owned()),
            _ => None,
        };
        there(Place::of(variable, || None))
    };
    let (address, _) = server(false);
    let told = problem(with(address.clone(), "wrong"));
    assert_eq!(told, format!("{address}/api/bulk_log: 400 Bad Request: A write_token is required"));
    let (old, _) = stub::server(|_| ("404 Not Found", json!({"detail": "Not Found"})));
    assert_eq!(
        problem(with(old.clone(), "t")),
        format!("{old}: no HTTP interface of Trackio: it needs trackio 0.24 or newer")
    );
    let (new, _) = stub::server(|_| ("200 OK", json!({"api_version": 2})));
    assert!(problem(with(new, "t")).ends_with("its interface is of version 2, this program speaks 1"));
    assert!(!dir.path().join(TRACKIO_FILE).exists());
}

#[test]
fn variables_name_a_server_or_a_space() {
    let of = |pairs: &'static [(&str, &str)], token: Option<&str>| {
        let variable = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Place::of(variable, || token.map(str::to_owned))
    };
    let failure = |pairs, token| of(pairs, token).err().unwrap();
    assert!(failure(&[], None).starts_with("set TRACKIO_SERVER_URL to the address that `trackio show` tells"));
    assert!(failure(&[(URL, "http://127.0.0.1:7860")], None).contains("TRACKIO_WRITE_TOKEN"));
    assert_eq!(failure(&[(URL, "localhost:7860")], None), "TRACKIO_SERVER_URL must begin with http:// or https://");
    assert!(failure(&[(SPACE, "me/runs")], None).contains("HF_TOKEN"));
    assert_eq!(failure(&[(SPACE, "runs")], Some("t")), "TRACKIO_SPACE_ID = \"runs\": write OWNER/NAME");
    // A Space comes first, and has the token in each request that writes.
    let space = there(of(&[(SPACE, "Me/my_runs.1"), (URL, "http://127.0.0.1:1")], Some("hf")));
    assert_eq!(space.server.address(), "https://me-my-runs-1.hf.space");
    assert_eq!(space.logs(&[]), json!({"kwargs": {"logs": [], "hf_token": "hf"}}));
}
