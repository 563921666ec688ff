//! Runs on a Trackio server, over the HTTP interface that its own client speaks (trackio 0.24 and newer): `POST api/<name>` with
//! `{"kwargs": {..}}`.
//!
//! `TRACKIO_SERVER_URL` names a server (`trackio show` starts one, and tells its address with the write token in it, which
//! `TRACKIO_WRITE_TOKEN` can say instead), `TRACKIO_SPACE_ID` a Space of the hub, which comes first, as for Trackio's client. A Space wants the hub's
//! token. `TRACKIO_PROJECT` is the project, "qlora" without it.
//!
//! A resumed run goes on in the run on the server. Each entry has an id made of run, step and kind, and the server takes an id once: what is
//! sent again, since an answer was lost or since a step was done again, changes nothing.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::mpsc::Receiver;

use model_hub::Hub;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::courier::Courier;
use super::server::{Asks, Failure, Server, address, variable};
use super::{Beginning, Sink};
use crate::answers::Answer;
use crate::report::Outcome;

/// Which run on which server the run in this folder is.
pub(crate) const TRACKIO_FILE: &str = "trackio.json";
const URL: &str = "TRACKIO_SERVER_URL";
const SPACE: &str = "TRACKIO_SPACE_ID";
const PROJECT: &str = "TRACKIO_PROJECT";
const TOKEN: &str = "TRACKIO_WRITE_TOKEN";
/// What `version` says of the interface that this file speaks.
const API_VERSION: u64 = 1;
/// Entries of a request.
const ENTRIES: usize = 1000;

/// A run on a server.
pub(super) struct Trackio {
    run: Run,
    courier: Courier<Option<Value>>,
    /// Goes with the first entry.
    config: Option<Value>,
}

/// The run on the server, and the content of [`TRACKIO_FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    server_url: String,
    project: String,
    run: String,
    run_id: String,
}

/// A server, and what the hub's Spaces want in each request that writes.
struct Place {
    server: Server,
    hub_token: Option<String>,
}

impl Place {
    /// The one that variables name.
    fn of(
        variable: impl Fn(&str) -> Option<String>,
        hub_token: impl FnOnce() -> Option<String>,
    ) -> Result<Self, String> {
        if let Some(space) = variable(SPACE) {
            let token =
                hub_token().ok_or(format!("{SPACE}: a Space is written to with the hub's token: set HF_TOKEN"))?;
            let server = Server::new(address(SPACE, &space_url(&space)?)?, Asks::Bearer(token.clone()))?;
            return Ok(Self { server, hub_token: Some(token) });
        }
        let text = variable(URL)
            .ok_or(format!("set {URL} to the address that `trackio show` tells, or {SPACE} to the id of a Space"))?;
        let url = address(URL, &text)?;
        let in_address = url.query_pairs().find(|(key, _)| key == "write_token").map(|(_, token)| token.into_owned());
        let token = in_address.or_else(|| variable(TOKEN)).ok_or(format!(
            "the server wants a write token: add ?write_token=.. to {URL}, as `trackio show` tells it, or set {TOKEN}"
        ))?;
        let server = Server::new(url, Asks::Header("x-trackio-write-token", token))?;
        Ok(Self { server, hub_token: None })
    }

    /// The body of a request that writes.
    fn logs(&self, logs: &[Value]) -> Value {
        json!({"kwargs": {"logs": logs, "hf_token": self.hub_token}})
    }

    /// Checks that this is a server, and that it lets us write.
    fn check(&self) -> Result<(), String> {
        let old = || format!("{}: no HTTP interface of Trackio: it needs trackio 0.24 or newer", self.server.address());
        let version = match self.server.get("version", &[]) {
            Ok(version) => version,
            Err(Failure::Missing(_)) => return Err(old()),
            Err(failure) => return Err(failure.to_string()),
        };
        match version["api_version"].as_u64() {
            Some(API_VERSION) => {}
            Some(other) => {
                let address = self.server.address();
                return Err(format!(
                    "{address}: its interface is of version {other}, this program speaks {API_VERSION}"
                ));
            }
            None => return Err(old()),
        }
        // Nothing is logged, but the server looks at the token.
        self.server.post("api/bulk_log", &self.logs(&[])).map(drop).map_err(|failure| failure.to_string())
    }

    /// Whether the server has a run still.
    fn has(&self, run: &Run) -> Result<bool, String> {
        let body = json!({"kwargs": {"project": run.project}});
        let found = self.server.post("api/get_runs_for_project", &body).map_err(|failure| failure.to_string())?;
        Ok(found["data"].as_array().is_some_and(|runs| runs.iter().any(|found| found["id"] == run.run_id.as_str())))
    }

    /// Sends entries until the run ends.
    fn work(&self, entries: &Receiver<Option<Value>>) -> Result<(), String> {
        loop {
            // Without an end the run was dropped: nobody is left to hear of it.
            let Ok(first) = entries.recv() else { return Ok(()) };
            let taken: Vec<_> = std::iter::once(first).chain(entries.try_iter()).collect();
            let ends = taken.iter().any(Option::is_none);
            let logs: Vec<Value> = taken.into_iter().flatten().collect();
            for logs in logs.chunks(ENTRIES) {
                self.server.send("api/bulk_log", &self.logs(logs))?;
            }
            if ends {
                return Ok(());
            }
        }
    }
}

/// Where a Space answers, whose id is `owner/name`.
fn space_url(space: &str) -> Result<String, String> {
    match space.split_once('/') {
        Some((owner, name)) if !owner.is_empty() && !name.is_empty() && !name.contains('/') => {
            let name = format!("{owner}-{name}").to_lowercase().replace(['_', '.'], "-");
            Ok(format!("https://{name}.hf.space"))
        }
        _ => Err(format!("{SPACE} = \"{space}\": write OWNER/NAME")),
    }
}

impl Trackio {
    /// Begins a run, or goes on with the one that the folder's run has.
    pub(super) fn begin(beginning: Beginning<'_>) -> Result<Self, String> {
        let project = variable(PROJECT).unwrap_or_else(|| "qlora".into());
        Self::on(Place::of(variable, || Hub::from_env().token)?, project, beginning)
    }

    fn on(place: Place, project: String, Beginning { folder, settings, step }: Beginning<'_>) -> Result<Self, String> {
        place.check()?;
        let file = folder.join(TRACKIO_FILE);
        let here = |run: &Run| run.server_url == place.server.address() && run.project == project;
        let known = (step > 0).then(|| read(&file)).flatten().filter(here);
        let run = match known {
            Some(run) if place.has(&run)? => run,
            _ => {
                let run = folder.file_name().map_or("qlora".into(), |name| name.to_string_lossy().into_owned());
                Run { server_url: place.server.address().into(), project, run, run_id: new_id() }
            }
        };
        let bytes = serde_json::to_vec_pretty(&run).map_err(|error| error.to_string())?;
        adapter_io::atomic::write_bytes(&file, &bytes).map_err(|error| error.to_string())?;
        let courier = Courier::start("trackio", move |entries| place.work(entries))?;
        // An infinite number, which JSON has not, becomes null.
        let config = settings.iter().map(|(key, value)| (key.clone(), serde_json::to_value(value).unwrap_or_default()));
        Ok(Self { run, courier, config: Some(config.collect::<Map<_, _>>().into()) })
    }

    fn log(&mut self, step: usize, kind: &str, metrics: Map<String, Value>) -> Result<(), String> {
        if metrics.is_empty() {
            return Ok(());
        }
        let Run { project, run, run_id, .. } = &self.run;
        let log_id = format!("{run_id}-{step}-{kind}");
        let mut entry = json!({"project": project, "run": run, "run_id": run_id, "step": step, "metrics": metrics,
            "log_id": log_id});
        if let Some(config) = self.config.take() {
            entry["config"] = config;
        }
        self.courier.send(Some(entry))
    }
}

impl Sink for Trackio {
    fn scalars(&mut self, step: usize, values: &[(&'static str, f64)]) -> Result<(), String> {
        let kind = values.first().and_then(|(name, _)| name.split('/').next()).unwrap_or_default();
        // JSON has no NaN and no infinity.
        let finite = values.iter().filter(|(_, value)| value.is_finite());
        self.log(step, kind, finite.map(|(name, value)| ((*name).to_owned(), json!(value))).collect())
    }

    fn answers(&mut self, step: usize, answers: &[Answer]) -> Result<(), String> {
        let trace = |Answer { prompt, answer, tokens, ended }: &Answer| {
            json!({"_type": "trackio.trace", "messages": [{"role": "user", "content": prompt},
                {"role": "assistant", "content": answer}], "metadata": {"tokens": tokens, "ended": ended}, "spans": []})
        };
        let traces = answers.iter().map(trace).collect();
        self.log(step, "answers", Map::from_iter([("answers".to_owned(), Value::Array(traces))]))
    }

    /// Trackio knows no state of a run.
    fn finish(&mut self, _: Option<Outcome>) -> Result<(), String> {
        self.courier.finish(None)
    }
}

fn read(file: &Path) -> Option<Run> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

/// An id that no other run has.
fn new_id() -> String {
    let number = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", number(), number())
}

#[cfg(test)]
mod tests;
