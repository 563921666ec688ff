//! Runs on an MLflow server, over its REST API (<https://mlflow.org/docs/latest/rest-api.html>).
//!
//! `MLFLOW_TRACKING_URI` names the server, `MLFLOW_EXPERIMENT_NAME` the experiment ("Default" without it), and
//! `MLFLOW_TRACKING_TOKEN`, or `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, who asks: the names of MLflow's own client.
//! Values are sent from a thread of their own, many at once, so that no step waits for the server.
//!
//! A resumed run goes on in the run on the server. MLflow removes no values: where a run goes back to an earlier checkpoint, the steps
//! behind that have those of both.

use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::courier::Courier;
use super::server::{Asks, Failure, Server, address, variable};
use super::{Beginning, Sink, texts};
use crate::answers::Answer;
use crate::report::Outcome;

/// Which run on which server the run in this folder is.
pub(crate) const MLFLOW_FILE: &str = "mlflow.json";
const URI: &str = "MLFLOW_TRACKING_URI";
/// What a request may hold.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Characters of a text at most.
const TEXT: usize = 4000;

/// A run on a server.
pub(super) struct MlFlow(Courier<Entry>);

/// What is to be sent.
enum Entry {
    Metrics(Vec<Value>),
    Tags(Vec<Value>),
    End(&'static str),
}

/// The content of [`MLFLOW_FILE`].
#[derive(Serialize, Deserialize)]
struct Known {
    tracking_uri: String,
    run_id: String,
}

fn millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// The server that the environment names.
fn server() -> Result<Server, String> {
    let uri = variable(URI).ok_or(format!("set {URI} to the server's address"))?;
    let asks = match (variable("MLFLOW_TRACKING_TOKEN"), variable("MLFLOW_TRACKING_USERNAME")) {
        (Some(token), _) => Asks::Bearer(token),
        (None, Some(user)) => Asks::Basic(user, variable("MLFLOW_TRACKING_PASSWORD")),
        (None, None) => Asks::Anyone,
    };
    Server::new(address(URI, &uri)?, asks)
}

/// Where a part of the interface is.
fn api(what: &str) -> String {
    format!("api/2.0/mlflow/{what}")
}

impl MlFlow {
    /// Begins a run, or goes on with the one that the folder's run has.
    pub(super) fn begin(beginning: Beginning<'_>) -> Result<Self, String> {
        Self::on(server()?, beginning)
    }

    fn on(server: Server, beginning: Beginning<'_>) -> Result<Self, String> {
        let file = beginning.folder.join(MLFLOW_FILE);
        let known = (beginning.step > 0).then(|| read(&file, server.address())).flatten();
        let run = match known {
            Some(run) if goes_on(&server, &run)? => run,
            _ => create(&server, beginning)?,
        };
        let known = Known { tracking_uri: server.address().into(), run_id: run.clone() };
        let bytes = serde_json::to_vec_pretty(&known).map_err(|error| error.to_string())?;
        adapter_io::atomic::write_bytes(&file, &bytes).map_err(|error| error.to_string())?;
        Courier::start("mlflow", move |entries| work(&server, &run, entries)).map(Self)
    }
}

impl Sink for MlFlow {
    fn scalars(&mut self, step: usize, values: &[(&'static str, f64)]) -> Result<(), String> {
        let timestamp = millis();
        // JSON has no NaN and no infinity.
        let finite = values.iter().filter(|(_, value)| value.is_finite());
        let metric =
            |(key, value): &(&str, f64)| json!({"key": key, "value": value, "timestamp": timestamp, "step": step});
        self.0.send(Entry::Metrics(finite.map(metric).collect()))
    }

    fn answers(&mut self, _: usize, answers: &[Answer]) -> Result<(), String> {
        let tag = |(key, text): (String, String)| json!({"key": key, "value": cut(&text)});
        self.0.send(Entry::Tags(texts(answers).map(tag).collect()))
    }

    fn finish(&mut self, outcome: Option<Outcome>) -> Result<(), String> {
        let status = match outcome {
            Some(Outcome::Finished | Outcome::StoppedEarly) => "FINISHED",
            Some(Outcome::Interrupted) => "KILLED",
            None => "FAILED",
        };
        self.0.finish(Entry::End(status))
    }
}

fn cut(text: &str) -> String {
    text.chars().take(TEXT).collect()
}

/// The run that the folder's file names, where it is on this server.
fn read(file: &Path, uri: &str) -> Option<String> {
    let known: Known = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    (known.tracking_uri == uri).then_some(known.run_id)
}

/// Whether the server has the run still, which goes on then.
fn goes_on(server: &Server, run: &str) -> Result<bool, String> {
    match server.post(&api("runs/update"), &json!({"run_id": run, "status": "RUNNING"})) {
        Ok(_) => Ok(true),
        Err(Failure::Missing(_)) => Ok(false),
        Err(failure) => Err(failure.to_string()),
    }
}

/// A new run with the configuration as its parameters.
fn create(server: &Server, Beginning { folder, settings, .. }: Beginning<'_>) -> Result<String, String> {
    let experiment = experiment(server).map_err(|failure| failure.to_string())?;
    let name = folder.file_name().map_or("qlora".into(), |name| name.to_string_lossy());
    let body = json!({"experiment_id": experiment, "run_name": name, "start_time": millis(),
        "tags": [{"key": "mlflow.source.name", "value": "qlora"}]});
    let created = server.post(&api("runs/create"), &body).map_err(|failure| failure.to_string())?;
    let run = created["run"]["info"]["run_id"].as_str().ok_or("runs/create: the answer names no run")?.to_owned();
    let params: Vec<Value> =
        settings.iter().map(|(key, value)| json!({"key": key, "value": cut(&value.to_string())})).collect();
    for params in params.chunks(PARAMS) {
        let body = json!({"run_id": run, "params": params});
        server.post(&api("runs/log-batch"), &body).map_err(|failure| failure.to_string())?;
    }
    Ok(run)
}

/// The experiment's id. Where nobody has it, it is made.
fn experiment(server: &Server) -> Result<Value, Failure> {
    let name = std::env::var("MLFLOW_EXPERIMENT_NAME").ok().filter(|name| !name.is_empty());
    let name = name.unwrap_or_else(|| "Default".into());
    match server.get(&api("experiments/get-by-name"), &[("experiment_name", &name)]) {
        Ok(found) => Ok(found["experiment"]["experiment_id"].clone()),
        Err(Failure::Missing(_)) => {
            Ok(server.post(&api("experiments/create"), &json!({"name": name}))?["experiment_id"].clone())
        }
        Err(failure) => Err(failure),
    }
}

/// Sends entries until the run ends.
fn work(server: &Server, run: &str, entries: &Receiver<Entry>) -> Result<(), String> {
    loop {
        let (mut metrics, mut tags, mut end) = (Vec::new(), Vec::new(), None);
        // Without an end the run was dropped: nobody is left to hear of it.
        let Ok(first) = entries.recv() else { return Ok(()) };
        for entry in std::iter::once(first).chain(entries.try_iter()) {
            match entry {
                Entry::Metrics(values) => metrics.extend(values),
                Entry::Tags(values) => tags.extend(values),
                Entry::End(status) => end = Some(status),
            }
        }
        for metrics in metrics.chunks(METRICS) {
            server.send(&api("runs/log-batch"), &json!({"run_id": run, "metrics": metrics}))?;
        }
        for tags in tags.chunks(PARAMS) {
            server.send(&api("runs/log-batch"), &json!({"run_id": run, "tags": tags}))?;
        }
        if let Some(status) = end {
            return server.send(&api("runs/update"), &json!({"run_id": run, "status": status, "end_time": millis()}));
        }
    }
}

#[cfg(test)]
mod tests;
