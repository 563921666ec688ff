//! Requests to a hub: who gets the token, which redirects are followed, what is tried again.
//!
//! The hub hands large files out by a redirect to another host, with a signature in the address. The token
//! goes to the hub's own origin (scheme, host and port) and nowhere else, whatever a redirect says.

use std::io::Read;
use std::time::Duration;

use ureq::http::{Request, Response, Uri, header};
use ureq::{Agent, AsSendBody, Body, SendBody};

use super::Hub;

/// How long the hub may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(30);
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// How long the hub may think before it answers: a commit of many files takes it a while.
const ANSWER: Duration = Duration::from_secs(120);
/// Redirects from one request.
const REDIRECTS: usize = 10;
/// Tries beyond the first, when the network fails or the hub is busy.
pub(super) const RETRIES: u32 = 5;
/// The longest answer that is read as text.
const LONGEST_TEXT: u64 = 64 << 20;

/// Why there is no answer to use.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer: the network, or a hub that is busy or broken.
    Unreachable(String),
    /// An answer, and it is no.
    Status {
        status: u16,
        /// The hub's `X-Error-Code`.
        code: String,
        /// What it says.
        message: String,
    },
}

/// A connection to one hub.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
}

/// The head of a request.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub method: &'a str,
    pub url: &'a str,
    pub headers: &'a [(&'a str, String)],
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(ANSWER))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            // Sizes are compared, and a resumed download counts bytes.
            .accept_encoding("identity")
            .user_agent(concat!("burn-qlora/", env!("CARGO_PKG_VERSION")));
        Self { hub, agent: config.build().new_agent() }
    }

    /// The address of something below the hub's own.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.hub.endpoint)
    }

    /// Asks once, without following redirects.
    pub(super) fn ask_once(&self, ask: Ask<'_>, body: impl AsSendBody) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(ask.method).uri(ask.url);
        for (name, value) in ask.headers {
            request = request.header(*name, value);
        }
        if let Some(token) = self.hub.token.as_ref().filter(|_| same_origin(ask.url, &self.hub.endpoint)) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let unreachable = |what: String| Failure::Unreachable(what);
        let request = request.body(body).map_err(|e| unreachable(format!("{}: {e}", ask.url)))?;
        let response = self.agent.run(request).map_err(|e| unreachable(e.to_string()))?;
        match response.status().as_u16() {
            0..400 => Ok(response),
            status => Err(self.refused(status, response)),
        }
    }

    fn refused(&self, status: u16, mut response: Response<Body>) -> Failure {
        let word = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (code, said) = (word("x-error-code").unwrap_or_default(), word("x-error-message"));
        let body = || {
            let mut text = String::new();
            response.body_mut().as_reader().take(LONGEST_TEXT).read_to_string(&mut text).ok()?;
            let json: serde_json::Value = serde_json::from_str(&text).ok()?;
            Some(json.get("error").or(json.get("message"))?.as_str()?.to_owned())
        };
        let message = said.or_else(body).unwrap_or_default();
        if status >= 500 || status == 429 || status == 408 {
            return Failure::Unreachable(format!("it answered with HTTP status {status}"));
        }
        Failure::Status { status, code, message }
    }

    /// Asks without a body, following redirects. With `stop_elsewhere` a redirect to another origin is the
    /// answer.
    pub(super) fn get(
        &self,
        method: &str,
        url: &str,
        headers: &[(&str, String)],
        stop_elsewhere: bool,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..REDIRECTS {
            let response = self.ask_once(Ask { method, url: &url, headers }, SendBody::none())?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
            let next = location
                .and_then(|location| join(&url, location))
                .ok_or_else(|| Failure::Unreachable(format!("{url} redirects to an address that can't be followed")))?;
            if stop_elsewhere && !same_origin(&next, &url) {
                return Ok(response);
            }
            url = next;
        }
        Err(Failure::Unreachable(format!("more than {REDIRECTS} redirects, the last to {url}")))
    }

    /// Sends JSON, or lines of it, and reads JSON; tried again while the hub can't be reached.
    pub(super) fn post<T: serde::de::DeserializeOwned>(
        &self,
        url: &str,
        content_type: &str,
        body: &[u8],
    ) -> Result<T, Failure> {
        let headers = [("content-type", content_type.to_owned()), ("accept", accept(content_type).to_owned())];
        let mut response = self.retry(|| self.ask_once(Ask { method: "POST", url, headers: &headers }, body))?;
        let text = read_text(&mut response)?;
        serde_json::from_str(if text.is_empty() { "null" } else { &text })
            .map_err(|e| Failure::Unreachable(format!("{url} gave an answer that can't be read: {e}")))
    }

    /// Tries until there is an answer, with longer and longer pauses.
    pub(super) fn retry<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        for tries in 0..RETRIES {
            match attempt() {
                Err(Failure::Unreachable(why)) => {
                    tracing::warn!("{}: {why}; trying again", self.hub.endpoint);
                    self.pause(tries);
                }
                done => return done,
            }
        }
        attempt()
    }

    /// Waits before the try after `tries`.
    pub(super) fn pause(&self, tries: u32) {
        std::thread::sleep(self.hub.retry_delay * 2u32.pow(tries.min(6)));
    }
}

/// What to accept for an answer to this.
fn accept(content_type: &str) -> &str {
    if content_type.contains("git-lfs") { content_type } else { "application/json" }
}

pub(super) fn read_text(response: &mut Response<Body>) -> Result<String, Failure> {
    let mut text = String::new();
    let read = response.body_mut().as_reader().take(LONGEST_TEXT).read_to_string(&mut text);
    read.map(|_| text).map_err(|e| Failure::Unreachable(e.to_string()))
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().or(match scheme.as_str() {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    })?;
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

pub(super) fn same_origin(one: &str, other: &str) -> bool {
    matches!((origin(one), origin(other)), (Some(one), Some(other)) if one == other)
}

/// The address that a `Location` at `url` means.
fn join(url: &str, location: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next()?;
    let joined = match location {
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{host}{location}"),
        _ => location.to_owned(),
    };
    origin(&joined)?;
    Some(joined)
}

/// A part of an address: everything but letters, digits and `-._~` is escaped.
pub(super) fn escaped(part: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    part.bytes().map(|b| if plain(b) { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A path of such parts.
pub(super) fn escaped_path(path: &str) -> String {
    path.split('/').map(escaped).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::{escaped, escaped_path, join, same_origin};

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert!(same_origin("https://Hub.co/a", "https://hub.co:443"));
        for other in
            ["http://hub.co", "https://hub.co:8443", "https://hub.co.evil.org", "https://cdn.hub.co", "", "hub.co"]
        {
            assert!(!same_origin(other, "https://hub.co"), "{other}");
        }
        // What stands before an @ is no host.
        assert!(!same_origin("https://hub.co@evil.org/", "https://hub.co"));
        assert!(!same_origin("https://hub.co:443@evil.org/", "https://hub.co"));
    }

    #[test]
    fn redirects_are_joined() {
        let at = |location| join("https://hub.co/a/b?c", location);
        assert_eq!(at("/x?y").as_deref(), Some("https://hub.co/x?y"));
        assert_eq!(at("//cdn.co/x").as_deref(), Some("https://cdn.co/x"));
        assert_eq!(at("http://cdn.co/x").as_deref(), Some("http://cdn.co/x"));
        for wrong in ["file:///etc/passwd", "x/y", "", "ftp://a/b"] {
            assert_eq!(at(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(escaped("v1/beta ü"), "v1%2Fbeta%20%C3%BC");
        assert_eq!(escaped_path("a b/c?d"), "a%20b/c%3Fd");
    }
}
