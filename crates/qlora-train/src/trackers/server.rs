//! Requests to a tracker's server: JSON over HTTP.

use std::fmt;
use std::time::Duration;

use reqwest::header::CONTENT_TYPE;
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
pub(super) struct Server {
    address: String,
    asks: Asks,
    http: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

/// Who asks.
pub(super) enum Asks {
    /// Nobody in particular.
    Anyone,
    /// Who has a token.
    Bearer(String),
    /// A user, and a password.
    Basic(String, Option<String>),
    /// Who sends this header.
    Header(&'static str, String),
}

/// The value of a variable of the environment that is not empty.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The address in the value of a variable of the environment.
pub(super) fn address(variable: &str, text: &str) -> Result<Url, String> {
    let url = Url::parse(text.trim()).map_err(|error| format!("{variable}: {error}"))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        _ => Err(format!("{variable} must begin with http:// or https://")),
    }
}

impl Server {
    /// A server at an address, which may name who asks where nothing else does. What is told of the address, and kept of it, holds no password and no
    /// query.
    pub(super) fn new(mut url: Url, asks: Asks) -> Result<Self, String> {
        let asks = match asks {
            Asks::Anyone if !url.username().is_empty() => {
                Asks::Basic(url.username().into(), url.password().map(str::to_owned))
            }
            asks => asks,
        };
        // An address of HTTP can have none.
        let _ = url.set_username("").and_then(|()| url.set_password(None));
        url.set_query(None);
        url.set_fragment(None);
        let http = reqwest::Client::builder().timeout(TIMEOUT).connect_timeout(CONNECT).build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self {
            address: url.as_str().trim_end_matches('/').to_owned(),
            asks,
            http: http.map_err(|error| error.to_string())?,
            runtime: runtime.map_err(|error| error.to_string())?,
        })
    }

    /// The server's address.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Asks for something at a path below the address.
    pub(super) fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, Failure> {
        let mut url = self.url(path)?;
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.request(Method::GET, url, None)
    }

    /// Says something.
    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.request(Method::POST, self.url(path)?, Some(body))
    }

    /// Says something, several times where the server does not answer.
    pub(super) fn send(&self, path: &str, body: &Value) -> Result<(), String> {
        let mut waits = WAITS.into_iter();
        loop {
            match (self.post(path, body), waits.next()) {
                (Ok(_), _) => return Ok(()),
                (Err(Failure::Later(_)), Some(wait)) => std::thread::sleep(wait),
                (Err(failure), _) => return Err(failure.to_string()),
            }
        }
    }

    fn url(&self, path: &str) -> Result<Url, Failure> {
        let url = format!("{}/{path}", self.address);
        Url::parse(&url).map_err(|error| Failure::Refused(format!("{url}: {error}")))
    }

    fn request(&self, method: Method, url: Url, body: Option<&Value>) -> Result<Value, Failure> {
        let place = url.as_str().split('?').next().unwrap_or_default().to_owned();
        let mut request = self.http.request(method, url);
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        request = match &self.asks {
            Asks::Bearer(token) => request.bearer_auth(token),
            Asks::Basic(user, password) => request.basic_auth(user, password.as_deref()),
            Asks::Header(name, value) => request.header(*name, value),
            Asks::Anyone => request,
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
        let said = ["message", "error"].into_iter().find_map(|key| answer[key].as_str()).unwrap_or(&text);
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
