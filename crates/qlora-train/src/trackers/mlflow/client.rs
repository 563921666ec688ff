//! Requests to an MLflow server.

use std::fmt;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Method, StatusCode, Url};
use serde_json::Value;

/// How long a server may take to answer.
const TIMEOUT: Duration = Duration::from_secs(20);
const CONNECT: Duration = Duration::from_secs(5);
/// Waits between attempts of what is sent while the run goes on.
const WAITS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(4), Duration::from_secs(15)];

/// What came of a request instead of an answer.
pub(super) enum Failure {
    /// The server has no such thing.
    Missing(String),
    /// It can't be reached, or is busy: it may answer later.
    Later(String),
    /// It refuses.
    Refused(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Missing(problem) | Self::Later(problem) | Self::Refused(problem)) = self;
        f.write_str(problem)
    }
}

/// A server, and who asks it.
pub(super) struct Client {
    uri: String,
    authorization: Option<Authorization>,
    http: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

/// Who asks.
pub(super) enum Authorization {
    /// A token.
    Bearer(String),
    /// A user, and a password.
    Basic(String, Option<String>),
}

impl Client {
    /// The server that the environment names.
    pub(super) fn from_env() -> Result<Self, String> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let uri = set("MLFLOW_TRACKING_URI").ok_or("set MLFLOW_TRACKING_URI to the server's address")?;
        let authorization = match (set("MLFLOW_TRACKING_TOKEN"), set("MLFLOW_TRACKING_USERNAME")) {
            (Some(token), _) => Some(Authorization::Bearer(token)),
            (None, Some(user)) => Some(Authorization::Basic(user, set("MLFLOW_TRACKING_PASSWORD"))),
            (None, None) => None,
        };
        Self::new(&uri, authorization)
    }

    /// A server at an address, which may name who asks.
    pub(super) fn new(uri: &str, authorization: Option<Authorization>) -> Result<Self, String> {
        let mut url = Url::parse(uri).map_err(|error| format!("MLFLOW_TRACKING_URI: {error}"))?;
        if !["http", "https"].contains(&url.scheme()) {
            return Err("MLFLOW_TRACKING_URI must begin with http:// or https://".into());
        }
        let in_address = || Authorization::Basic(url.username().into(), url.password().map(str::to_owned));
        let authorization = authorization.or_else(|| (!url.username().is_empty()).then(in_address));
        // What is told of the address, and kept of it, holds no password. An address of HTTP can have none.
        let _ = url.set_username("").and_then(|()| url.set_password(None));
        let http = reqwest::Client::builder().timeout(TIMEOUT).connect_timeout(CONNECT).build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self {
            uri: url.as_str().trim_end_matches('/').to_owned(),
            authorization,
            http: http.map_err(|error| error.to_string())?,
            runtime: runtime.map_err(|error| error.to_string())?,
        })
    }

    /// The server's address.
    pub(super) fn uri(&self) -> &str {
        &self.uri
    }

    /// Asks for something.
    pub(super) fn get(&self, what: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let mut url = self.url(what)?;
        url.query_pairs_mut().extend_pairs(query);
        self.request(Method::GET, url, None)
    }

    /// Says something.
    pub(super) fn post(&self, what: &str, body: &Value) -> Result<Value, Failure> {
        self.request(Method::POST, self.url(what)?, Some(body))
    }

    /// Says something, several times where the server does not answer.
    pub(super) fn send(&self, what: &str, body: &Value) -> Result<(), String> {
        let mut waits = WAITS.into_iter();
        loop {
            match (self.post(what, body), waits.next()) {
                (Ok(_), _) => return Ok(()),
                (Err(Failure::Later(_)), Some(wait)) => std::thread::sleep(wait),
                (Err(failure), _) => return Err(failure.to_string()),
            }
        }
    }

    fn url(&self, what: &str) -> Result<Url, Failure> {
        let url = format!("{}/api/2.0/mlflow/{what}", self.uri);
        Url::parse(&url).map_err(|error| Failure::Refused(format!("{url}: {error}")))
    }

    fn request(&self, method: Method, url: Url, body: Option<&Value>) -> Result<Value, Failure> {
        let place = format!("{}{}", self.uri, url.path());
        let mut request = self.http.request(method, url);
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        request = match &self.authorization {
            Some(Authorization::Bearer(token)) => request.header(AUTHORIZATION, format!("Bearer {token}")),
            Some(Authorization::Basic(user, password)) => request.basic_auth(user, password.as_deref()),
            None => request,
        };
        let answer = self.runtime.block_on(async {
            let answer = request.send().await?;
            let status = answer.status();
            Ok::<_, reqwest::Error>((status, answer.text().await?))
        });
        let (status, text) =
            answer.map_err(|error| Failure::Later(format!("{place}: {}", chain(&error.without_url()))))?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        if status.is_success() {
            return Ok(answer);
        }
        let said = answer["message"].as_str().unwrap_or(&text);
        let said: String = said.chars().filter(|c| !c.is_control()).take(300).collect();
        let problem = format!("{place}: {status}: {said}");
        Err(match status {
            StatusCode::NOT_FOUND => Failure::Missing(problem),
            StatusCode::TOO_MANY_REQUESTS => Failure::Later(problem),
            status if status.is_server_error() => Failure::Later(problem),
            _ => Failure::Refused(problem),
        })
    }
}

/// An error and what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}
