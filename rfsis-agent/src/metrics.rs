//! What is counted, and `/metrics`, `/live`, `/ready` over HTTP.
//!
//! A label with a fixed set of values is an enum here ([`Label`]): every series exists from the start
//! and is updated by one atomic add. A client's address is never a label.

use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};
use rfsis_common::maps::State;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::control::XdpMode;

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

/// Bounds of `rfsis_takeover_duration_seconds`, seconds.
const TAKEOVER_BUCKETS: [f64; 14] = [
    50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1.0,
];

/// Values of a label, known when the program is built.
pub trait Label: Copy + 'static {
    /// All values; the position of each is its [`Label::index`].
    const ALL: &'static [Self];
    /// Position in [`Label::ALL`].
    fn index(self) -> usize;
    /// The text of the label.
    fn as_str(self) -> &'static str;
}

/// An enum that is a [`Label`], from its variants and their texts.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl Label for $name {
            const ALL: &'static [Self] = &[$($name::$variant),+];
            fn index(self) -> usize { self as usize }
            fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }
    };
}

label! {
    /// What became of a heartbeat that was to be sent.
    HeartbeatSent {
        /// On the wire.
        Ok = "ok",
        /// The system refused.
        SendFailed = "send_failed",
    }
}

label! {
    /// What a heartbeat that came in was.
    HeartbeatReceived {
        /// Authentic and new.
        Ok = "ok",
        /// Its MAC is wrong.
        BadMac = "bad_mac",
        /// Not newer than one already seen.
        Stale = "stale",
        /// Of another cluster.
        WrongCluster = "wrong_cluster",
        /// Ends before its trailer does.
        Truncated = "truncated",
        /// Contradicts itself or the layout.
        Malformed = "malformed",
        /// Carries this node's own id.
        OwnId = "own_id",
        /// Of a node that the config does not name.
        UnknownNode = "unknown_node",
        /// Of a session that has not yet shown to be alive.
        Unproven = "unproven",
        /// Found its ring full.
        Lost = "lost",
    }
}

label! {
    /// The condition of a flow.
    FlowCondition {
        /// Not established yet.
        Handshake = "handshake",
        /// The shadow holds all that the active acknowledged.
        Lockstep = "lockstep",
        /// The shadow lacks bytes.
        Lagging = "lagging",
        /// The shadow's bytes differ from what the active sent.
        Diverged = "diverged",
        /// Without a shadow.
        Unprotected = "unprotected",
        /// Carried by the shadow since a takeover.
        Live = "live",
    }
}

label! {
    /// Why a flow was reset.
    ResetReason {
        /// The shadow lacked bytes.
        Lagging = "lagging",
        /// The shadow's bytes differed.
        Diverged = "diverged",
        /// There was no shadow.
        Unprotected = "unprotected",
        /// Its handler's output cannot be computed on two nodes.
        Unpredictable = "unpredictable",
    }
}

label! {
    /// What a mirrored frame was, to the shadows.
    FrameResult {
        /// Fed to its shadow.
        Ok = "ok",
        /// A checksum is wrong.
        BadChecksum = "bad_checksum",
        /// Contradicts itself.
        Malformed = "malformed",
        /// Not TCP.
        NotTcp = "not_tcp",
        /// From the VIP, but not from the active node.
        Foreign = "foreign",
        /// Of a flow that has no shadow.
        UnknownFlow = "unknown_flow",
        /// The active's own output.
        FromActive = "from_active",
        /// To a port that no service has.
        Outside = "outside",
    }
}

label! {
    /// A ring between kernel and agent.
    Ring {
        /// Mirrored frames.
        Frames = "frames",
        /// Heartbeats.
        Heartbeats = "heartbeats",
    }
}

label! {
    /// What became of a UDP datagram.
    DatagramResult {
        /// The handler's answer was sent.
        Answered = "answered",
        /// There was no answer, or it could not be sent.
        Ignored = "ignored",
        /// Came from where an answer would only be answered again.
        Loop = "loop",
    }
}

label! {
    /// How the XDP program is attached.
    Mode {
        /// In the driver.
        Native = "native",
        /// In the network stack.
        Generic = "generic",
    }
}

impl From<XdpMode> for Mode {
    fn from(mode: XdpMode) -> Self {
        match mode {
            XdpMode::Native => Mode::Native,
            XdpMode::Generic => Mode::Generic,
        }
    }
}

impl Label for State {
    const ALL: &'static [Self] = &State::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl Label for XdpVerdict {
    const ALL: &'static [Self] = &XdpVerdict::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl Label for GateVerdict {
    const ALL: &'static [Self] = &GateVerdict::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

/// One counter for each value of a label.
#[derive(Clone, Debug)]
pub struct Counters<L> {
    children: Vec<IntCounter>,
    label: PhantomData<fn(L)>,
}

impl<L: Label> Counters<L> {
    fn new(child: impl Fn(&str) -> IntCounter) -> Self {
        Self {
            children: L::ALL.iter().map(|value| child(value.as_str())).collect(),
            label: PhantomData,
        }
    }

    /// Counts one.
    pub fn inc(&self, value: L) {
        self.add(value, 1);
    }

    /// Counts several.
    pub fn add(&self, value: L, count: u64) {
        self.children[value.index()].inc_by(count);
    }

    /// The count so far.
    pub fn get(&self, value: L) -> u64 {
        self.children[value.index()].get()
    }

    /// Follows a counter that is kept elsewhere (in the kernel). Never goes back, so that programs
    /// loaded anew do not look like negative traffic. One caller at a time: meant for the
    /// [`ScrapeHook`].
    pub fn raise_to(&self, value: L, total: u64) {
        self.add(value, total.saturating_sub(self.get(value)));
    }
}

/// One gauge for each value of a label.
#[derive(Clone, Debug)]
pub struct Gauges<L> {
    children: Vec<Gauge>,
    label: PhantomData<fn(L)>,
}

impl<L: Label + PartialEq> Gauges<L> {
    /// Sets one.
    pub fn set(&self, value: L, number: f64) {
        self.children[value.index()].set(number);
    }

    /// The number as set last.
    pub fn get(&self, value: L) -> f64 {
        self.children[value.index()].get()
    }

    /// Sets one to 1 and the others to 0.
    pub fn choose(&self, chosen: L) {
        for value in L::ALL {
            self.set(*value, f64::from(u8::from(*value == chosen)));
        }
    }
}

/// All metrics of the agent, cheap to update from any thread.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Two scrapes at a time would both add the same kernel counts.
    scrape: Mutex<()>,
    /// `rfsis_state{state}`, 0 or 1.
    pub state: Gauges<State>,
    /// `rfsis_epoch`.
    pub epoch: IntGauge,
    /// `rfsis_failovers_total{reason}`; reasons are a fixed few words.
    pub failovers: IntCounterVec,
    /// `rfsis_takeover_duration_seconds`.
    pub takeover_duration: Histogram,
    /// `rfsis_heartbeat_age_seconds`, set by the scrape hook.
    pub heartbeat_age: Gauge,
    /// `rfsis_heartbeats_total{direction="sent"}`.
    pub heartbeats_sent: Counters<HeartbeatSent>,
    /// `rfsis_heartbeats_total{direction="received"}`.
    pub heartbeats_received: Counters<HeartbeatReceived>,
    /// `rfsis_flows{condition}`.
    pub flows: Gauges<FlowCondition>,
    /// `rfsis_flows_refused_total`.
    pub flows_refused: IntCounter,
    /// `rfsis_flow_resets_total{reason}`.
    pub flow_resets: Counters<ResetReason>,
    /// `rfsis_shadow_lag_bytes`.
    pub shadow_lag: IntGauge,
    /// `rfsis_shadow_bytes`.
    pub shadow_bytes: IntGauge,
    /// `rfsis_frames_total{result}`.
    pub frames: Counters<FrameResult>,
    /// `rfsis_xdp_packets_total{verdict}`, set by the scrape hook.
    pub xdp_packets: Counters<XdpVerdict>,
    /// `rfsis_ring_dropped_total{ring}`, set by the scrape hook.
    pub ring_dropped: Counters<Ring>,
    /// `rfsis_gate_packets_total{verdict}`, set by the scrape hook.
    pub gate_packets: Counters<GateVerdict>,
    /// `rfsis_xdp_mode{mode}`, 0 or 1.
    pub xdp_mode: Gauges<Mode>,
    /// `rfsis_held_released_total`.
    pub held_released: IntCounter,
    connections: IntCounterVec,
    datagrams: IntCounterVec,
}

impl Metrics {
    /// All metrics at zero, in a registry of their own. `version` is that of the agent.
    ///
    /// # Errors
    /// None in practice: `prometheus` refuses bad or repeated names, and these are constants.
    pub fn new(version: &str) -> prometheus::Result<Metrics> {
        let family = Families {
            registry: Registry::new(),
        };
        let build_info = family.gauges("rfsis_build_info", "Version of the agent.", "version")?;
        build_info.with_label_values(&[version]).set(1.0);
        let heartbeats = family.counters(
            "rfsis_heartbeats_total",
            "Heartbeats by direction and result.",
            &["direction", "result"],
        )?;
        Ok(Metrics {
            state: family.labelled_gauges(
                "rfsis_state",
                "1 for what the node is now, 0 for the rest.",
                "state",
            )?,
            epoch: family.integer("rfsis_epoch", "Number that grows with each takeover.")?,
            failovers: family.counters(
                "rfsis_failovers_total",
                "Takeovers by this node.",
                &["reason"],
            )?,
            takeover_duration: family.register(Histogram::with_opts(
                HistogramOpts::new(
                    "rfsis_takeover_duration_seconds",
                    "From the deadline noticed to the first frame from the VIP.",
                )
                .buckets(TAKEOVER_BUCKETS.to_vec()),
            )?)?,
            heartbeat_age: family.register(Gauge::new(
                "rfsis_heartbeat_age_seconds",
                "Since the peer's last authentic heartbeat arrived.",
            )?)?,
            heartbeats_sent: Counters::new(|result| {
                heartbeats.with_label_values(&["sent", result])
            }),
            heartbeats_received: Counters::new(|result| {
                heartbeats.with_label_values(&["received", result])
            }),
            flows: family.labelled_gauges("rfsis_flows", "Flows by condition.", "condition")?,
            flows_refused: family.counter(
                "rfsis_flows_refused_total",
                "New flows left unprotected at a bound.",
            )?,
            flow_resets: family.labelled_counters(
                "rfsis_flow_resets_total",
                "Flows reset at a takeover.",
                "reason",
            )?,
            shadow_lag: family.integer(
                "rfsis_shadow_lag_bytes",
                "Bytes that the active acknowledged and the shadows lack.",
            )?,
            shadow_bytes: family.integer(
                "rfsis_shadow_bytes",
                "Bytes queued in all shadows together.",
            )?,
            frames: family.labelled_counters(
                "rfsis_frames_total",
                "Mirrored frames by what they were to the shadows.",
                "result",
            )?,
            xdp_packets: family.labelled_counters(
                "rfsis_xdp_packets_total",
                "Frames by verdict of the XDP program.",
                "verdict",
            )?,
            ring_dropped: family.labelled_counters(
                "rfsis_ring_dropped_total",
                "Entries lost to a full ring.",
                "ring",
            )?,
            gate_packets: family.labelled_counters(
                "rfsis_gate_packets_total",
                "Packets by verdict of the gate.",
                "verdict",
            )?,
            xdp_mode: family.labelled_gauges(
                "rfsis_xdp_mode",
                "1 for how the XDP program is attached.",
                "mode",
            )?,
            held_released: family.counter(
                "rfsis_held_released_total",
                "Held FIN and RST that were approved later.",
            )?,
            connections: family.counters(
                "rfsis_connections_total",
                "TCP connections accepted by the kernel.",
                &["service"],
            )?,
            datagrams: family.counters(
                "rfsis_datagrams_total",
                "UDP datagrams by what became of them.",
                &["service", "result"],
            )?,
            registry: family.registry,
            scrape: Mutex::new(()),
        })
    }

    /// `rfsis_connections_total` of one service of the config.
    pub fn connections(&self, service: &str) -> IntCounter {
        self.connections.with_label_values(&[service])
    }

    /// `rfsis_datagrams_total` of one service of the config.
    pub fn datagrams(&self, service: &str) -> Counters<DatagramResult> {
        Counters::new(|result| self.datagrams.with_label_values(&[service, result]))
    }

    /// Calls the hook, then prints everything in the Prometheus text format.
    ///
    /// # Errors
    /// As the encoder's: none in practice.
    pub fn scrape(&self, hook: &ScrapeHook) -> prometheus::Result<Vec<u8>> {
        // The guard protects no data, so a panic of another scrape leaves nothing half-done.
        let one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        hook(self);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        drop(one_at_a_time);
        Ok(text)
    }
}

/// Makes and registers families.
struct Families {
    registry: Registry,
}

impl Families {
    fn register<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        collector: C,
    ) -> prometheus::Result<C> {
        self.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn integer(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::new(name, help)?)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::new(name, help)?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> prometheus::Result<GaugeVec> {
        self.register(GaugeVec::new(Opts::new(name, help), &[label])?)
    }

    fn labelled_counters<L: Label>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> prometheus::Result<Counters<L>> {
        let family = self.counters(name, help, &[label])?;
        Ok(Counters::new(|value| family.with_label_values(&[value])))
    }

    fn labelled_gauges<L: Label>(
        &self,
        name: &str,
        help: &str,
        label: &str,
    ) -> prometheus::Result<Gauges<L>> {
        let family = self.gauges(name, help, label)?;
        Ok(Gauges {
            children: L::ALL
                .iter()
                .map(|value| family.with_label_values(&[value.as_str()]))
                .collect(),
            label: PhantomData,
        })
    }
}

/// Reads what is kept elsewhere, such as the kernel's counters, at each scrape; never twice at a time.
pub type ScrapeHook = Arc<dyn Fn(&Metrics) + Send + Sync>;

/// Whether the node is ready: programs attached and peer heard; else the reason, for a person.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The address of `metrics.listen` cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("metrics.listen {address}: {source}; free the address or change `metrics: {{ listen }}`")]
pub struct BindError {
    /// What was asked for.
    pub address: SocketAddr,
    /// What the system said.
    pub source: std::io::Error,
}

/// Listens on the address of `metrics.listen`.
///
/// # Errors
/// [`BindError`] when the address is taken, not this host's, or not permitted.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| BindError { address, source })
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
