//! Connections: accepted up to a bound, each with timeouts for what the client sends and takes, and ended in order.
//!
//! `axum::serve` sets none of these bounds, so hyper's connections are driven here.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::future::{Either, select};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::error::ApiError;
use super::write_timeout::WriteTimeout;
use super::{HttpState, router};

/// Bytes of a request's header at most.
const MAX_HEADER: usize = 64 << 10;

/// How long to wait where a connection can't be accepted, for want of file descriptors say.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Serves until `shutdown` is ready; then no more connections are taken, idle ones are closed, and answers that are
/// on their way are finished, within the time that an answer may take.
///
/// The engine is left alone: [`Handle::close`](crate::Handle::close) ends it.
///
/// # Errors
/// The listener's address can't be read.
pub async fn serve(
    listener: TcpListener,
    state: HttpState,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    tracing::info!(address = %listener.local_addr()?, "serving");
    let router = router(state.clone());
    let config = state.config();
    let places = Arc::new(Semaphore::new(config.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
    let (close, closing) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accept = pin!(accept(&listener, &places));
        let (stream, place) = match select(&mut shutdown, accept).await {
            Either::Left(_) => break,
            Either::Right((accepted, _)) => accepted,
        };
        let connection = connection(stream, router.clone(), &state, closing.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    drop(close);
    let patience = config.request_timeout + config.write_timeout;
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(patience, all).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections did not end in time and are broken off");
        connections.shutdown().await;
    }
    Ok(())
}

/// Lets a request through whose header is within the bound. hyper's bound is for its buffer, which may take some more
/// before it looks.
pub(super) async fn bounded_header(request: Request, next: Next) -> Response {
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    let bytes = fields.sum::<usize>() + request.uri().path().len() + request.uri().query().map_or(0, str::len);
    if bytes <= MAX_HEADER {
        return next.run(request).await;
    }
    let message = format!("the request's header has {bytes} bytes, more than {MAX_HEADER}");
    ApiError::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "header_too_large", message).into_response()
}

/// The next connection, and its place among those that may be.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, Option<tokio::sync::OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let place = places.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(AFTER_FAILURE).await;
            }
        }
    }
}

/// Whether an error is of the connection that was to be accepted, and not of the listener.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Drives a connection to its end; when `closing` says so, to the end of the answer that is on its way.
fn connection(
    stream: TcpStream,
    router: Router,
    state: &HttpState,
    mut closing: watch::Receiver<()>,
) -> impl Future<Output = ()> + Send + 'static {
    let config = state.config();
    let mut http = http1::Builder::new();
    // The time for a header also bounds how long a connection is idle.
    http.timer(TokioTimer::new()).header_read_timeout(config.read_timeout).max_buf_size(MAX_HEADER);
    let write_timeout = config.write_timeout;
    async move {
        // Tokens are small, and each is to arrive when it is there.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection sends with delay");
        }
        let stream = TokioIo::new(WriteTimeout::new(stream, write_timeout));
        let mut connection = pin!(http.serve_connection(stream, TowerToHyperService::new(router)));
        let closed = pin!(closing.changed());
        let ended = match select(closed, connection.as_mut()).await {
            Either::Right((ended, _)) => ended,
            Either::Left(_) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended early");
        }
    }
}
