//! Runs on an MLflow server, over its REST API (<https://mlflow.org/docs/latest/rest-api.html>).
//!
//! `MLFLOW_TRACKING_URI` names the server, `MLFLOW_EXPERIMENT_NAME` the experiment ("Default" without it), and
//! `MLFLOW_TRACKING_TOKEN`, or `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, who asks: the names of MLflow's own client.
//! Values are sent from a thread of their own, many at once, so that no step waits for the server.
//!
//! A resumed run goes on in the run on the server. MLflow removes no values: where a run goes back to an earlier checkpoint, the steps
//! behind that have those of both.

mod client;

use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Beginning, Sink};
use crate::report::Outcome;
use client::{Client, Failure};

/// Which run on which server the run in this folder is.
pub(crate) const MLFLOW_FILE: &str = "mlflow.json";
/// What a request may hold.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
/// Characters of a text at most.
const TEXT: usize = 4000;
/// How long the end of a run waits for what is still to be sent.
const LAST_WAIT: Duration = Duration::from_secs(30);

/// A run on a server.
pub(super) struct MlFlow {
    to_worker: Sender<Entry>,
    /// How sending ended.
    from_worker: Receiver<Result<(), String>>,
}

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

impl MlFlow {
    /// Begins a run, or goes on with the one that the folder's run has.
    pub(super) fn begin(beginning: Beginning<'_>) -> Result<Self, String> {
        Self::on(Client::from_env()?, beginning)
    }

    fn on(client: Client, beginning: Beginning<'_>) -> Result<Self, String> {
        let file = beginning.folder.join(MLFLOW_FILE);
        let known = (beginning.step > 0).then(|| read(&file, client.uri())).flatten();
        let run = match known {
            Some(run) if goes_on(&client, &run)? => run,
            _ => create(&client, beginning)?,
        };
        let known = Known { tracking_uri: client.uri().into(), run_id: run.clone() };
        let bytes = serde_json::to_vec_pretty(&known).map_err(|error| error.to_string())?;
        adapter_io::atomic::write_bytes(&file, &bytes).map_err(|error| error.to_string())?;
        let ((to_worker, entries), (done, from_worker)) = (mpsc::channel(), mpsc::channel());
        let worker = move || {
            // Whoever would hear of it may be gone.
            let _ = done.send(work(&client, &run, &entries));
        };
        std::thread::Builder::new().name("mlflow".into()).spawn(worker).map_err(|error| error.to_string())?;
        Ok(Self { to_worker, from_worker })
    }

    fn send(&self, entry: Entry) -> Result<(), String> {
        // The worker has ended by an error if it takes nothing more.
        self.to_worker.send(entry).or_else(|_| self.result(LAST_WAIT))
    }

    fn result(&self, wait: Duration) -> Result<(), String> {
        match self.from_worker.recv_timeout(wait) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(format!("not all values arrived within {} s", wait.as_secs())),
            Err(RecvTimeoutError::Disconnected) => Err("its thread has ended".into()),
        }
    }
}

impl Sink for MlFlow {
    fn scalars(&mut self, step: usize, values: &[(&'static str, f64)]) -> Result<(), String> {
        let timestamp = millis();
        // JSON has no NaN and no infinity.
        let finite = values.iter().filter(|(_, value)| value.is_finite());
        let metric =
            |(key, value): &(&str, f64)| json!({"key": key, "value": value, "timestamp": timestamp, "step": step});
        self.send(Entry::Metrics(finite.map(metric).collect()))
    }

    fn texts(&mut self, _: usize, texts: &[(String, String)]) -> Result<(), String> {
        let tag = |(key, text): &(String, String)| json!({"key": key, "value": cut(text)});
        self.send(Entry::Tags(texts.iter().map(tag).collect()))
    }

    fn finish(&mut self, outcome: Option<Outcome>) -> Result<(), String> {
        let status = match outcome {
            Some(Outcome::Finished | Outcome::StoppedEarly) => "FINISHED",
            Some(Outcome::Interrupted) => "KILLED",
            None => "FAILED",
        };
        self.send(Entry::End(status))?;
        self.result(LAST_WAIT)
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
fn goes_on(client: &Client, run: &str) -> Result<bool, String> {
    match client.post("runs/update", &json!({"run_id": run, "status": "RUNNING"})) {
        Ok(_) => Ok(true),
        Err(Failure::Missing(_)) => Ok(false),
        Err(failure) => Err(failure.to_string()),
    }
}

/// A new run with the configuration as its parameters.
fn create(client: &Client, Beginning { folder, settings, .. }: Beginning<'_>) -> Result<String, String> {
    let experiment = experiment(client).map_err(|failure| failure.to_string())?;
    let name = folder.file_name().map_or("qlora".into(), |name| name.to_string_lossy());
    let body = json!({"experiment_id": experiment, "run_name": name, "start_time": millis(),
        "tags": [{"key": "mlflow.source.name", "value": "qlora"}]});
    let created = client.post("runs/create", &body).map_err(|failure| failure.to_string())?;
    let run = created["run"]["info"]["run_id"].as_str().ok_or("runs/create: the answer names no run")?.to_owned();
    let params: Vec<Value> = settings.iter().map(|(key, value)| json!({"key": key, "value": cut(value)})).collect();
    for params in params.chunks(PARAMS) {
        let body = json!({"run_id": run, "params": params});
        client.post("runs/log-batch", &body).map_err(|failure| failure.to_string())?;
    }
    Ok(run)
}

/// The experiment's id. Where nobody has it, it is made.
fn experiment(client: &Client) -> Result<Value, Failure> {
    let name = std::env::var("MLFLOW_EXPERIMENT_NAME").ok().filter(|name| !name.is_empty());
    let name = name.unwrap_or_else(|| "Default".into());
    match client.get("experiments/get-by-name", &[("experiment_name", &name)]) {
        Ok(found) => Ok(found["experiment"]["experiment_id"].clone()),
        Err(Failure::Missing(_)) => {
            Ok(client.post("experiments/create", &json!({"name": name}))?["experiment_id"].clone())
        }
        Err(failure) => Err(failure),
    }
}

/// Sends entries until the run ends.
fn work(client: &Client, run: &str, entries: &Receiver<Entry>) -> Result<(), String> {
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
            client.send("runs/log-batch", &json!({"run_id": run, "metrics": metrics}))?;
        }
        for tags in tags.chunks(PARAMS) {
            client.send("runs/log-batch", &json!({"run_id": run, "tags": tags}))?;
        }
        if let Some(status) = end {
            return client.send("runs/update", &json!({"run_id": run, "status": status, "end_time": millis()}));
        }
    }
}

#[cfg(test)]
mod tests;
