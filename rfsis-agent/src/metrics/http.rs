//! `/metrics`, `/live` and `/ready`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Metrics, ScrapeHook};

/// Scrapers served at a time; others wait in the backlog.
const MAX_CONNECTIONS: usize = 64;
/// A client has this long for its request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// A client has this long for request and answer together.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request that are buffered: hyper's least.
const REQUEST_BUFFER: usize = 8192;
/// Pause after an accept error that will not go away by itself, such as EMFILE.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Whether the node is ready: programs attached and peer heard; else the reason, for a person.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The address of `metrics.listen` cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("metrics.listen {address}: {error}; free the address or change `metrics: {{ listen }}`")]
pub struct BindError {
    /// What was asked for.
    pub address: SocketAddr,
    /// What the system said.
    pub error: std::io::Error,
}

/// Listens on the address of `metrics.listen`.
///
/// # Errors
/// [`BindError`] when the address is taken, not this host's, or not permitted.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| BindError { address, error })
}

/// Serves `/metrics`, `/live` and `/ready` until cancelled. One request a connection, so that no
/// client can keep its place.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    hook: ScrapeHook,
    ready: Readiness,
    cancel: CancellationToken,
) {
    let router = axum::Router::new()
        .route("/metrics", get(move || answer_metrics(metrics, hook)))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(move || answer_ready(ready)));
    cancel
        .clone()
        .run_until_cancelled(accept(&listener, router, &cancel))
        .await;
}

async fn answer_metrics(metrics: Arc<Metrics>, hook: ScrapeHook) -> impl IntoResponse {
    match metrics.scrape(&hook) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn answer_ready(ready: Readiness) -> impl IntoResponse {
    match ready() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn accept(listener: &TcpListener, router: axum::Router, cancel: &CancellationToken) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics: cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .keep_alive(false)
            .max_buf_size(REQUEST_BUFFER)
            .serve_connection(
                TokioIo::new(stream),
                TowerToHyperService::new(router.clone()),
            );
        let cancel = cancel.clone();
        tokio::spawn(async move {
            cancel
                .run_until_cancelled(tokio::time::timeout(CONNECTION_TIMEOUT, connection))
                .await;
            drop(place);
        });
    }
}
